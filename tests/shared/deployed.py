"""Small models of transformers, trained to a smaller size that plain transformers must load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as t
from torch import nn

import ecospa_fx

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 61,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 4}


def _words(**more: Any) -> dict[str, Any]:
    """A call with padding: without any, some code takes a path on which a number of heads is of no account."""
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    return {"input_ids": IDS, "attention_mask": mask, **more}


def _causal(config: Any) -> tuple[nn.Module, dict[str, Any]]:
    return t.AutoModelForCausalLM.from_config(config), _words(use_cache=False)


def _image(config: Any) -> tuple[nn.Module, dict[str, Any]]:
    return t.ViTForImageClassification(config), {"pixel_values": PIXELS}


def _pair(cls: Any, config: Any) -> tuple[nn.Module, dict[str, Any]]:
    return cls(config), _words(decoder_input_ids=IDS[:, :5], use_cache=False)


MODELS: Mapping[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "llama": lambda: _causal(t.LlamaConfig(**GROUPED, head_dim=6)),
    "mistral": lambda: _causal(t.MistralConfig(**GROUPED, head_dim=6)),
    "qwen2": lambda: _causal(t.Qwen2Config(**GROUPED)),
    "qwen3": lambda: _causal(t.Qwen3Config(**GROUPED, head_dim=6)),
    "gemma2": lambda: _causal(t.Gemma2Config(**GROUPED, head_dim=6)),
    "gemma3": lambda: _causal(t.Gemma3TextConfig(**GROUPED, head_dim=6)),
    "phi3": lambda: _causal(t.Phi3Config(**GROUPED)),
    "olmo2": lambda: _causal(t.Olmo2Config(**GROUPED)),
    "gpt2": lambda: _causal(t.GPT2Config(n_embd=32, n_inner=48, n_layer=2, n_head=8, vocab_size=61, n_positions=32)),
    "opt": lambda: _causal(
        t.OPTConfig(
            hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=8, vocab_size=61,
            max_position_embeddings=32, word_embed_proj_dim=32,
        )
    ),
    "gpt_neox": lambda: _causal(t.GPTNeoXConfig(**SIZES)),
    "bert": lambda: (t.BertForSequenceClassification(t.BertConfig(**SIZES)), _words()),
    "distilbert": lambda: (
        t.DistilBertForSequenceClassification(
            t.DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=8, vocab_size=61)
        ),
        _words(),
    ),
    "vit": lambda: _image(
        t.ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8, image_size=16,
            patch_size=4,
        )
    ),
    "t5": lambda: _pair(
        t.T5ForConditionalGeneration, t.T5Config(d_model=32, d_kv=6, d_ff=48, num_layers=2, num_heads=8, vocab_size=61)
    ),
    "bart": lambda: _pair(
        t.BartForConditionalGeneration,
        t.BartConfig(
            d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=40, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=8, decoder_attention_heads=8, vocab_size=61, max_position_embeddings=32,
        ),
    ),
}  # fmt: skip


def built(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model, compiled to run its own Python, and a call of it."""
    model, call = plain(kind)
    return ecospa_fx.compile(model, example_kwargs=call, execution="module"), call


def plain(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model whose weights are large enough for scores to differ, and a call of it."""
    torch.manual_seed(0)
    model, call = MODELS[kind]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            width = max(1, parameter.numel() // max(parameter.shape))
            parameter.copy_(noise / width**0.5) if parameter.ndim > 1 else parameter.add_(noise / 5)
    return model.eval(), call


def trained(model: nn.Module, call: Mapping[str, Any], target: float | None = None, **settings: Any) -> Any:
    """The trainer of a model that it has brought to a target; by default near the smallest that can be reached."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    make = lambda share: ecospa_fx.EcoSpaTrainer(  # noqa: E731
        model, optimizer, target=share, among="prunable", interval=1, end=3, deployable="transformers", **settings
    )
    if target is None:
        target = max(0.5, make(1.0).deployment.reachable[0] + 0.03)
    trainer = make(target)
    for _ in range(4):
        model(**call).logits.pow(2).mean().backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    return trainer
