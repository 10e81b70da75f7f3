"""Blocks whose sublayers are all gone are not in what plain transformers loads: fewer layers, and equal results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import deployed
import pytest
import torch
import transformers as hf
from torch import nn
from without_us import WITHOUT_US

import ecospa_fx
from ecospa_fx.model.fewer_blocks import renamed

NONE = torch.empty(0, dtype=torch.long)
MAY_GO = ecospa_fx.Constraints(min_keep=0)
LAYERS = 4
SIZES = {**deployed.GROUPED, "num_hidden_layers": LAYERS}
TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
WORDS = {"input_ids": deployed.IDS, "attention_mask": torch.ones_like(deployed.IDS), "use_cache": False}
IMAGES = {"pixel_values": deployed.PIXELS}
GPT2 = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": 61, "n_positions": 32, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip
SINGLE = {**deployed.SIZES, "num_hidden_layers": LAYERS}
IMAGE_SIZES = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 48,
               "num_hidden_layers": LAYERS, "num_attention_heads": 4}  # fmt: skip

MODELS: dict[str, Any] = {
    "llama": lambda: (hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, head_dim=6, tie_word_embeddings=True)), WORDS),
    "qwen3": lambda: (hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=6)), WORDS),
    "gemma3": lambda: (
        hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SIZES, head_dim=6, layer_types=TYPES, sliding_window=3)),
        WORDS,
    ),
    "mixtral": lambda: (hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=4)), WORDS),
    "qwen2_moe": lambda: (
        hf.Qwen2MoeForCausalLM(
            hf.Qwen2MoeConfig(
                **SIZES,
                num_experts=4,
                moe_intermediate_size=16,
                shared_expert_intermediate_size=16,
                mlp_only_layers=[0, 3],
            )
        ),
        WORDS,
    ),
    "gpt2": lambda: (hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, n_inner=48)), WORDS),
    "opt": lambda: (
        hf.OPTForCausalLM(
            hf.OPTConfig(
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                vocab_size=61,
                max_position_embeddings=32,
                word_embed_proj_dim=32,
            )
        ),
        WORDS,
    ),
    "vit": lambda: (hf.ViTForImageClassification(hf.ViTConfig(**IMAGE_SIZES)), IMAGES),
    "bert": lambda: (
        hf.BertForSequenceClassification(hf.BertConfig(**SINGLE)),
        {name: value for name, value in WORDS.items() if name != "use_cache"},
    ),
}
QUICK = ("llama", "gpt2", "gemma3")


def drawn(model: nn.Module) -> nn.Module:
    """Weights large enough for scores to differ, and biases that are not zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            width = max(1, parameter.numel() // max(parameter.shape))
            parameter.copy_(noise / width**0.5) if parameter.ndim > 1 else parameter.add_(noise / 5)
    return model.eval()


def built(kind: str, **how: Any) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, call = MODELS[kind]()
    return ecospa_fx.compile(drawn(model), example_kwargs=call, **how), call


def empty(model: nn.Module, *numbers: int) -> None:
    """Remove all sublayers of some blocks."""
    gone = {
        c.name: NONE
        for c in ecospa_fx.couplings(model)
        for number in numbers
        if f".{number}." in c.name and c.last_stays is None and c.kind in ("heads", "ffn", "glu")
    }
    ecospa_fx.shrink(model, gone, constraints=MAY_GO)


def logits(model: nn.Module, call: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**call).logits


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.sweep) for kind in MODELS if kind != "bert"]
)
def test_plain_transformers_loads_fewer_layers(kind, tmp_path):
    model, call = built(kind)
    count = len(dict(model.named_parameters()))
    empty(model, 1, 2)
    wanted = logits(model, call)
    assert ecospa_fx.save_pretrained(model, tmp_path) is None
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.get("num_hidden_layers", config.get("n_layer")) == LAYERS - 2
    if kind == "gemma3":
        assert config["layer_types"] == [TYPES[0], TYPES[3]]
    if kind == "qwen2_moe":
        assert config["mlp_only_layers"] == [0, 1]
    plain = getattr(hf, config["architectures"][0]).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(plain, call), wanted)
    # The model itself is as it was, and goes on.
    assert len(dict(model.named_parameters())) == count
    torch.testing.assert_close(logits(model, call), wanted)
    loaded = ecospa_fx.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, call), wanted)
    assert all(c.size and not re.search(r"\.[23]\.", c.name) for c in ecospa_fx.couplings(loaded))


def test_a_process_without_this_library_generates_with_fewer_layers(tmp_path):
    """Also narrower ones: the configuration has both numbers. The first block goes too, so that caches count anew."""
    model, call = built("llama")
    empty(model, 0, 2)
    glus = [c for c in ecospa_fx.couplings(model) if c.kind == "glu" and c.size]
    ecospa_fx.shrink(model, {c: torch.arange(1, c.size, 2) for c in glus})
    assert ecospa_fx.save_pretrained(model, tmp_path) is None
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 24)
    words = {"attention_mask": call["attention_mask"], "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(call["input_ids"], **words)
    torch.save((call["input_ids"], words, expected), tmp_path / "expected.pt")
    program = f"""{WITHOUT_US}
ids, words, expected = torch.load(sys.argv[1] + "/expected.pt")
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
print(torch.equal(model.generate(ids, **words), expected), "ecospa_fx" in sys.modules)
"""
    output = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False)
    assert output.stdout.split() == ["True", "False"], output.stderr


def test_a_trainer_brings_what_is_left_to_sizes_of_a_configuration(tmp_path):
    model, call = built("llama")
    empty(model, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    trainer = ecospa_fx.EcoSpaTrainer(
        model, optimizer, target=0.6, among="prunable", interval=1, end=3, deployable="transformers", min_keep=0
    )
    for _ in range(4):
        model(**call).logits.pow(2).mean().backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    sizes = {c.size for c in ecospa_fx.couplings(model) if c.kind == "glu"}
    assert trainer.done and len(sizes) == 2 and 0 in sizes and max(sizes) < 48
    assert ecospa_fx.save_pretrained(model, tmp_path) is None
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (LAYERS - 1, max(sizes))
    torch.testing.assert_close(logits(hf.LlamaForCausalLM.from_pretrained(tmp_path).eval(), call), logits(model, call))


def why_not(model: nn.Module, directory: Any) -> str:
    why = ecospa_fx.save_pretrained(model, directory)
    assert why is not None
    return why


def test_what_is_no_shorter_list_is_refused(tmp_path):
    bert, call = built("bert")
    empty(bert, 1)
    assert (
        "`bert.encoder.layer.1` stays in its list: without its sublayers it still does more than to add a constant"
        in (why_not(bert, tmp_path))
    )
    torch.testing.assert_close(logits(ecospa_fx.from_pretrained(tmp_path).eval(), call), logits(bert, call))
    gpt2, _ = built("gpt2")
    empty(gpt2, 0)
    assert "adds a constant, its biases, and no block comes before it that could" in why_not(gpt2, tmp_path)
    llama, _ = built("llama")
    empty(llama, 0, 1, 2, 3)
    assert "all blocks of `model.layers` are empty, and no configuration has none" in why_not(llama, tmp_path)
    llama, _ = built("llama", regions="root")
    empty(llama, 1)
    assert "it is not captured as a region of its own" in why_not(llama, tmp_path)


class Counting(hf.LlamaForCausalLM):
    """A class that counts its blocks in its own Python."""

    def forward(self, **kwargs: Any) -> Any:
        result = super().forward(**kwargs)
        result.logits = result.logits / len(self.model.layers)
        return result


def test_python_between_blocks_is_compared(tmp_path):
    torch.manual_seed(0)
    model = drawn(Counting(hf.LlamaConfig(**SIZES, head_dim=6)))
    ecospa_fx.compile(model, example_kwargs=WORDS)
    empty(model, 1)
    assert "with fewer blocks it returns results that differ by" in why_not(model, tmp_path)


def test_a_scale_that_follows_the_place_of_a_block(tmp_path):
    model = drawn(hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, n_inner=48, scale_attn_by_inverse_layer_idx=True)))
    ecospa_fx.compile(model, example_kwargs=WORDS)
    empty(model, 1)
    why = why_not(model, tmp_path)
    assert "no number of this GPT2Config makes `transformer.h` 3 blocks long, which are as those that are left" in why


def test_names_without_blocks():
    lists = {"a.layers": (0, 2), "b": (1,)}
    assert renamed("a.layers.0.w", lists) is None and renamed("a.layers.3.b.1.w", lists) == "a.layers.1.b.1.w"
    assert (
        renamed("a.layers", lists) == "a.layers" and renamed("b.2", lists) == "b.1" and renamed("c.0", lists) == "c.0"
    )
