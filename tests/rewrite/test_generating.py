"""`generate` in graph execution: with a cache as without, and as the original with zeros where it has shrunk."""

import copy

import pytest
import torch

import ecospa_fx
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.full_size import unshrunk
from ecospa_fx.passes.graph.tensors import named_tensors

transformers = pytest.importorskip("transformers")

ENDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 61, **ENDS}
HEADED = {**SMALL, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
PLAIN = {"vocab_size": 61, "d_model": 24, "dropout": 0.0, **ENDS}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**HEADED),
    "mistral": lambda: transformers.MistralConfig(**HEADED, sliding_window=10),
    "qwen2": lambda: transformers.Qwen2Config(**{**HEADED, "head_dim": 4}),
    "phi": lambda: transformers.PhiConfig(**SMALL, num_attention_heads=3, resid_pdrop=0.0),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL, num_attention_heads=3),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=3, vocab_size=61, n_positions=40, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0,
        **ENDS,
    ),
    "bloom": lambda: transformers.BloomConfig(hidden_size=24, n_layer=2, n_head=3, vocab_size=61, **ENDS),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=3, vocab_size=61, word_embed_proj_dim=24,
        max_position_embeddings=40, dropout=0.0, **ENDS,
    ),
    "t5": lambda: transformers.T5Config(
        d_model=24, d_ff=40, d_kv=8, num_layers=2, num_heads=3, vocab_size=61, dropout_rate=0.0, pad_token_id=0,
        eos_token_id=None, decoder_start_token_id=0,
    ),
    "bart": lambda: transformers.BartConfig(
        **PLAIN, encoder_layers=2, decoder_layers=2, encoder_attention_heads=3, decoder_attention_heads=3,
        encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=40, attention_dropout=0.0,
        decoder_start_token_id=2, forced_eos_token_id=None,
    ),
}  # fmt: skip
PAIRS = ("t5", "bart")
IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def made(name):
    torch.manual_seed(0)
    auto = transformers.AutoModelForSeq2SeqLM if name in PAIRS else transformers.AutoModelForCausalLM
    model = auto.from_config(CONFIGS[name]()).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn_like(parameter) * 0.5
    kwargs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False}
    return model, kwargs | ({"decoder_input_ids": IDS[:, :5]} if name in PAIRS else {})


def halved(model):
    ecospa_fx.shrink(model, {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model) if c.size > 1})
    return model


def masked(plain, model):
    """Write the model's weights into the original, with zeros where the model has shrunk."""
    plan, held = ecospa_fx.plan(model), named_tensors(model)
    with torch.no_grad():
        for name, tensor in named_tensors(plain).items():
            value = held[name].detach()
            tensor.copy_(unshrunk(value, plan, name) if name in plan.original_shapes else value)
    return plain


def tokens(model, number=12, **options):
    torch.manual_seed(0)
    more = {"attention_mask": torch.ones_like(IDS), "do_sample": False, "use_cache": True, **options}
    return model.generate(IDS, max_new_tokens=number, min_new_tokens=number, **more)


def graphs(model):
    return sum(len(region.specializations) for region in model.__dict__[MODEL].regions.values())


@pytest.mark.parametrize(
    "name", [name if name == "llama" else pytest.param(name, marks=pytest.mark.sweep) for name in CONFIGS]
)
def test_with_every_cache(name):
    plain, kwargs = made(name)
    model = ecospa_fx.compile(copy.deepcopy(plain), example_kwargs=kwargs)
    assert torch.equal(tokens(model, 3), tokens(plain, 3))  # graphs from before the shrink follow it
    kinds = {coupling.kind for coupling in ecospa_fx.couplings(model)}
    assert {"qk", "vo"} <= kinds
    halved(model)
    masked(plain, model)
    expected = tokens(plain)
    assert torch.equal(tokens(model, 4), expected[:, : expected.shape[1] - 8])
    before = graphs(model)
    assert torch.equal(tokens(model), expected)
    assert graphs(model) <= before + (2 if name == "mistral" else 0)  # its window is full then
    assert torch.equal(tokens(model, use_cache=False), expected)
    for way in ({"num_beams": 3}, {"do_sample": True}, {"cache_implementation": "static"}):
        assert torch.equal(tokens(model, **way), tokens(plain, **way)), way


def test_a_model_that_was_saved(tmp_path):
    plain, kwargs = made("llama")
    model = halved(ecospa_fx.compile(plain, example_kwargs=kwargs))
    ecospa_fx.save(model, tmp_path / "saved")
    loaded = ecospa_fx.load(tmp_path / "saved")
    assert torch.equal(tokens(loaded), tokens(model))


def test_training_with_the_cache_that_a_model_makes_for_itself():
    """Blocks are regions although they are given a cache, and all of their couplings are found."""
    plain, kwargs = made("llama")
    del kwargs["use_cache"]
    model = ecospa_fx.compile(copy.deepcopy(plain), example_kwargs=kwargs)
    assert set(model.__dict__[MODEL].regions) == {"model.layers.0", "model.layers.1"}
    assert {c.kind for c in ecospa_fx.couplings(model)} == {"qk", "vo", "heads", "groups", "glu"}
    for each in (model, plain):
        each(**kwargs, labels=IDS).loss.backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    halved(model)
    result = model(**kwargs)
    assert result.past_key_values.layers[1].keys.shape == (2, 2, 7, 4)
    assert torch.equal(tokens(model), tokens(masked(plain, model)))
