"""Removed means absent: a shrunk model is the same class, built at the sizes that are left.

The judge knows no graph and no masks: a second model from a smaller config takes over the weights. What the class takes
from its sizes and a shrink leaves as it was (the scale of an embedding) is written into the second model by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import ecospa_fx

WORDS = {"input_ids": torch.tensor([[3, 8, 5, 1, 9, 2], [7, 4, 4, 6, 3, 8]])}
GENERATING = {**WORDS, "use_cache": False}
IMAGES = {"pixel_values": torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
DECODER = {"vocab_size": 24, "num_hidden_layers": 1, "max_position_embeddings": 16, "head_dim": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Case:
    """A class, how it is built at `1 / share` of its sizes and `1 / fewer` of its heads, and what is halved."""

    make: Callable[[int, int], nn.Module]
    call: dict[str, Tensor | bool]
    kinds: tuple[str, ...] = ("residual", "ffn", "glu", "heads")
    dtype: torch.dtype = torch.float64


def decoder(config: type, model: type, **more: Any) -> Callable[[int, int], nn.Module]:
    def make(share: int, fewer: int) -> nn.Module:
        heads = {"num_attention_heads": 4 // fewer, "num_key_value_heads": 2 // fewer}
        sizes = {"hidden_size": 16 // share, "intermediate_size": 24 // share}
        return model(config(**DECODER, **SPECIAL, **sizes, **heads, **more))

    return make


def gemma3(share: int, fewer: int) -> nn.Module:
    model = decoder(hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, query_pre_attn_scalar=4)(share, fewer)
    model.model.embed_tokens.embed_scale.fill_(4.0)  # the root of the width
    model.model.embed_tokens.scalar_embed_scale = 4.0
    return model


def gpt2(share: int, fewer: int) -> nn.Module:
    config = hf.GPT2Config(
        n_embd=16 // share, n_head=4 // fewer, n_inner=24 // share, n_layer=2, vocab_size=24, n_positions=16,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


class T5(nn.Module):
    """T5 with all that it returns beside the logits left out: an output keeps its width."""

    def __init__(self, share: int, fewer: int) -> None:
        super().__init__()
        config = hf.T5Config(
            d_model=16 // share, d_ff=24 // share, num_heads=4 // fewer, d_kv=4, num_layers=1, vocab_size=24,
            decoder_start_token_id=0,
        )  # fmt: skip
        self.model = hf.T5ForConditionalGeneration(config)
        self.model.model_dim = 16  # by which logits are scaled

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        return self.model(input_ids=input_ids, decoder_input_ids=input_ids, use_cache=use_cache).logits


def bert(share: int, fewer: int) -> nn.Module:
    config = hf.BertConfig(
        hidden_size=16 // share, intermediate_size=24 // share, num_attention_heads=4 // fewer, num_hidden_layers=1,
        vocab_size=24, max_position_embeddings=16,
    )  # fmt: skip
    return hf.BertForSequenceClassification(config)


def vit(share: int, fewer: int) -> nn.Module:
    config = hf.ViTConfig(
        hidden_size=16 // share, intermediate_size=24 // share, num_attention_heads=4 // fewer, num_hidden_layers=1,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip
    return hf.ViTForImageClassification(config)


def convnext(share: int, _: int) -> nn.Module:
    config = hf.ConvNextConfig(
        hidden_sizes=[16 // share, 20 // share], depths=[1, 1], num_stages=2, image_size=8, patch_size=2, num_labels=3,
        layer_scale_init_value=1.0,
    )  # fmt: skip
    return hf.ConvNextForImageClassification(config)


CASES = {
    "llama": Case(decoder(hf.LlamaConfig, hf.LlamaForCausalLM), GENERATING),
    "qwen3": Case(decoder(hf.Qwen3Config, hf.Qwen3ForCausalLM), GENERATING),
    "olmo2": Case(decoder(hf.Olmo2Config, hf.Olmo2ForCausalLM), GENERATING),
    "gemma3": Case(gemma3, GENERATING),
    # Its experts are multiplied in single precision only.
    "mixtral": Case(
        decoder(hf.MixtralConfig, hf.MixtralForCausalLM, num_local_experts=4), GENERATING, dtype=torch.float32
    ),
    "gpt2": Case(gpt2, GENERATING),
    "t5": Case(T5, GENERATING),
    "bert": Case(bert, WORDS),
    "vit": Case(vit, IMAGES),
    "convnext": Case(convnext, IMAGES),
}


def logits_and_gradients(model: nn.Module, call: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**call)
    out = out if isinstance(out, Tensor) else out.logits
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().view(out.shape)
    (out * weights).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def stirred(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In eval mode, with no weight of a norm at one and no bias at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def halves(model: nn.Module, kinds: tuple[str, ...]) -> dict[Any, Tensor]:
    generator = torch.Generator().manual_seed(2)
    chosen = [c for c in ecospa_fx.couplings(model) if c.kind in kinds]
    return {c: torch.randperm(c.size, generator=generator)[: c.size // 2].sort().values for c in chosen}


QUICK = [("llama", "graph"), ("gemma3", "graph"), ("gpt2", "module"), ("t5", "graph"), ("convnext", "graph")]
OTHERS = [(name, execution) for name in CASES for execution in ("graph", "module") if (name, execution) not in QUICK]


@pytest.mark.parametrize(
    ("name", "execution"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.sweep) for case in OTHERS)]
)
def test_a_shrunk_model_is_the_same_class_built_smaller(name: str, execution: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = stirred(case.make(1, 1), case.dtype)
    ecospa_fx.compile(model, example_inputs=(), example_kwargs=case.call, regions="root", execution=execution)
    keeps = halves(model, case.kinds)
    assert "residual" in {coupling.kind for coupling in keeps}
    before = sum(p.numel() for p in model.parameters())
    ecospa_fx.shrink(model, keeps)
    fewer = 2 if "heads" in {coupling.kind for coupling in keeps} else 1  # two heads may be followed or two groups
    smaller = case.make(2, fewer).to(case.dtype).eval()
    smaller.load_state_dict(model.state_dict())
    assert sum(p.numel() for p in smaller.parameters()) < 0.7 * before
    (a, gradients), (b, expected) = (logits_and_gradients(each, case.call) for each in (model, smaller))
    close = {"rtol": 1e-9, "atol": 1e-10} if case.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(a, b, **close)
    assert gradients.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(
            gradients[parameter], gradient, msg=lambda text, p=parameter: f"{p}: {text}", **close
        )


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind: str, inputs: int, hidden: int, **how: Any) -> None:
        super().__init__()
        self.before = nn.Linear(3, inputs)
        self.layer = getattr(nn, kind)(inputs, hidden, **how)
        values = how.get("proj_size") or hidden
        self.head = nn.Linear(values * (2 if how.get("bidirectional") else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.layer(torch.relu(self.before(x)))
        return self.head(found)


class Stepping(nn.Module):
    """A cell that a Python loop steps."""

    def __init__(self, kind: str, inputs: int, hidden: int) -> None:
        super().__init__()
        self.before, self.cell, self.head = (
            nn.Linear(3, inputs),
            getattr(nn, kind)(inputs, hidden),
            nn.Linear(hidden, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in torch.relu(self.before(x)):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
    ("RNN", {"nonlinearity": "relu", "bias": False}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 4}),
]


def assert_smaller(model: nn.Module, smaller: Callable[[], nn.Module], args: tuple[Any, ...], execution: str) -> None:
    """Halve every coupling of a model, and compare with a module that was built so."""
    model = stirred(model, torch.float64).train()
    ecospa_fx.compile(model, example_inputs=args, regions="root", execution=execution)
    couplings = ecospa_fx.couplings(model)
    assert sorted({c.kind for c in couplings}) == ["ffn", "recurrent"]
    assert ecospa_fx.verify(model, example_inputs=args).ok
    ecospa_fx.shrink(model, halves(model, ("ffn", "recurrent")))
    twin = smaller().double()
    twin.load_state_dict(model.state_dict())
    for each in (model, twin):
        each(*args).square().sum().backward()
    torch.testing.assert_close(model(*args), twin(*args), rtol=1e-10, atol=1e-12)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("execution", ["graph", "module"])
@pytest.mark.parametrize(("kind", "how"), LAYERS)
def test_a_recurrent_layer_is_one_of_fewer_hidden_units(kind: str, how: dict[str, Any], execution: str) -> None:
    fewer = how | ({"proj_size": 2} if "proj_size" in how else {})
    hidden = 6 if "proj_size" in how else 3  # torch tells by the sizes that values handed on are fewer
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    assert_smaller(Recurrent(kind, 4, 6, **how), lambda: Recurrent(kind, 2, hidden, **fewer), (x,), execution)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_cell_is_one_of_fewer_hidden_units(kind: str) -> None:
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    assert_smaller(Stepping(kind, 4, 6), lambda: Stepping(kind, 2, 3), (x,), "graph")
