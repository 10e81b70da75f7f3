"""Types of transformers models in widest use, 60 of them in a list made by hand: the ones tried first."""

USED = (
    "bert", "roberta", "distilbert", "xlm-roberta", "albert", "electra", "deberta-v2", "mpnet", "modernbert",
    "nomic_bert", "t5", "mt5", "bart", "mbart", "pegasus", "marian", "m2m_100", "gpt2", "gpt_neo", "gpt_neox", "gptj",
    "opt", "bloom", "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2",
    "gemma3_text", "phi", "phi3", "falcon", "stablelm", "starcoder2", "cohere", "olmo2", "gpt_oss", "deepseek_v3",
    "glm4", "smollm3", "granite", "mamba", "vit", "deit", "dinov2", "swin", "beit", "convnext", "segformer", "clip",
    "siglip", "detr", "whisper", "wav2vec2", "hubert", "layoutlmv3",
)  # fmt: skip
