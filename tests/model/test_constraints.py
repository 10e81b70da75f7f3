"""Constraints: the widths a trainer may choose, what it must leave whole, and that it still reaches its target."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.optim import SGD
from transformers import LlamaConfig, LlamaForCausalLM

import ecospa_fx
from ecospa_fx.errors import TargetError

TOKENS = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))


@functools.cache
def compiled() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=40, use_cache=False,
    )  # fmt: skip
    return ecospa_fx.compile(LlamaForCausalLM(config), example_kwargs={"input_ids": TOKENS, "labels": TOKENS})


def shrunk(target: float, **constraints) -> tuple[nn.Module, ecospa_fx.EcoSpaTrainer]:
    model = copy.deepcopy(compiled())
    optimizer = SGD(model.parameters(), lr=0.01)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=target, interval=1, end=4, **constraints)
    trainer.fit([{"input_ids": TOKENS, "labels": TOKENS}] * 6)
    assert trainer.done
    assert ecospa_fx.verify(model, example_kwargs={"input_ids": TOKENS, "labels": TOKENS}).ok
    return model, trainer


def widths(model: nn.Module) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for c in ecospa_fx.couplings(model):
        found.setdefault(c.kind, []).append(c.size * (1 if c.kind in ("heads", "groups") else c.width))
    return found


def original() -> int:
    return sum(p.numel() for p in compiled().parameters())


def test_without_constraints_the_target_is_met_to_the_entry():
    model, trainer = shrunk(0.5)
    largest = max(p.shape[1] * 3 for name, p in model.named_parameters() if "mlp" in name and p.ndim > 1)
    assert 0 <= trainer.size - 0.5 * original() < largest


def test_round_to_gives_multiples_also_of_rotary_pairs():
    model, trainer = shrunk(0.5, round_to=8)
    found = widths(model)
    assert all(width % 8 == 0 for kind in ("glu", "qk", "vo") for width in found[kind]), found
    assert trainer.size >= 0.5 * original()
    assert any(c.size < c.original_size for c in ecospa_fx.couplings(model))


def test_a_coupling_narrower_than_round_to_stays_whole():
    model, _ = shrunk(0.7, round_to=32)
    found = widths(model)
    assert found["qk"] == found["vo"] == [16, 16] and all(width % 32 == 0 for width in found["glu"])


def test_min_keep_holds():
    model, _ = shrunk(0.45, min_keep=5)
    assert all(c.size >= min(5, c.original_size) for c in ecospa_fx.couplings(model))


def test_equal_head_dims_stay_equal_and_shrink():
    model, _ = shrunk(0.4, equal_head_dims=True)
    found = widths(model)
    assert found["qk"] == found["vo"]
    assert max(found["vo"]) < 16


def test_equal_head_dims_leave_both_whole_where_one_is_frozen():
    model, _ = shrunk(0.6, equal_head_dims=True, frozen=["*.layers.0.self_attn.qk"])
    assert widths(model)["vo"][0] == widths(model)["qk"][0] == 16
    sparsifier = ecospa_fx.CoupledSparsifier(
        copy.deepcopy(compiled()),
        constraints=ecospa_fx.Constraints(equal_head_dims=True, frozen=["*.layers.0.self_attn.qk"]),
    )
    assert sparsifier.whole == {
        "model.layers.0.self_attn.qk": "frozen by `*.layers.0.self_attn.qk`",
        "model.layers.0.self_attn.vo": "equal_head_dims: its queries and keys cannot shrink in step with its values",
    }


def sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {c.name: (c.size, c.original_size) for c in ecospa_fx.couplings(model)}


@pytest.mark.parametrize("by", ["pattern", "parameter", "prefix", "module", "coupling"])
def test_frozen(by: str):
    glu = "model.layers.1.mlp.glu"
    frozen = {
        "pattern": "*.1.mlp.*",
        "parameter": "*.layers.1.mlp.up_proj.weight",
        "prefix": "model.layers.1.mlp",
        "coupling": next(c for c in ecospa_fx.couplings(compiled()) if c.name == glu),
    }
    model = copy.deepcopy(compiled())
    entry = model.model.layers[1].mlp if by == "module" else frozen[by]
    trainer = ecospa_fx.EcoSpaTrainer(
        model, SGD(model.parameters(), lr=0.01), target=0.6, interval=1, end=3, frozen=[entry]
    )
    trainer.fit([{"input_ids": TOKENS, "labels": TOKENS}] * 4)
    whole = {name for name, (size, before) in sizes(model).items() if size == before}
    assert glu in whole and "model.layers.0.mlp.glu" not in whole
    assert trainer.state_dict()["settings"]["frozen"] == [
        "LlamaMLP" if by == "module" else glu if by == "coupling" else frozen[by]
    ]


def test_what_has_no_coupling_is_whole_already_and_may_be_frozen():
    model = copy.deepcopy(compiled())
    constraints = ecospa_fx.Constraints(frozen=[model.lm_head, "model.embed_tokens"])
    assert ecospa_fx.CoupledSparsifier(model, constraints=constraints).whole == {}


def test_head_dims_off_keeps_all_of_every_head():
    model, _ = shrunk(0.6, head_dims="off")
    assert widths(model)["qk"] == widths(model)["vo"] == [16, 16]


@pytest.mark.parametrize("head_dims", ["per_head", "per_layer"])
def test_heads_keep_their_own_dims_or_the_same(head_dims: str):
    model, _ = shrunk(0.4, head_dims=head_dims)
    differ = set()
    for (name, dim), kept in ecospa_fx.plan(model).kept.items():
        if name.endswith("v_proj.weight") and dim == 0:
            rows = (kept % 16).view(-1, ecospa_fx.plan(model).shape(name)[0] // len(set((kept // 16).tolist())))
            differ.add(any(not torch.equal(rows[0], row) for row in rows))
    assert differ == {True} if head_dims == "per_head" else differ == {False}


def test_each_head_keeps_its_strongest_dims():
    """By hand: value rows and output columns of head `h` grow with the distance from dim `3 + h`."""
    model = copy.deepcopy(compiled())
    with torch.no_grad():
        for layer in model.model.layers:
            for h in range(2):
                strength = (torch.arange(16) - (3 + h)).abs().add(1).double()
                layer.self_attn.v_proj.weight.view(2, 16, -1)[h] = strength[:, None].float()
            layer.self_attn.o_proj.weight.fill_(1.0)
    vo = next(c for c in ecospa_fx.couplings(model) if c.kind == "vo")
    sparsifier = ecospa_fx.CoupledSparsifier(model, target=0.9, theta=0.8)
    importance = {c: float(c != vo) for c in ecospa_fx.couplings(model)}
    keep = sparsifier.decide(importance, None)[vo]
    for h in range(2):
        gone = sorted(set(range(16)) - set(keep[h].tolist()), key=lambda d: abs(d - 3 - h))
        assert gone and max(abs(d - 3 - h) for d in gone) <= min(abs(d - 3 - h) for d in keep[h].tolist())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"round_to": 0}, "round_to=0 is out of range; it is a whole number, at least 1"),
        ({"min_keep": 1.5}, "min_keep=1.5 is out of range; it is a whole number, at least 0"),
        ({"head_dims": "each"}, "head_dims='each' is none of 'per_head', 'per_layer', 'off'"),
        (
            {"frozen": ["nothing.*"]},
            "frozen: nothing in this LlamaForCausalLM matches `nothing.*`; ecospa_fx.couplings(model) and "
            "model.named_parameters() list the names",
        ),
        (
            {"frozen": [nn.Linear(2, 2)]},
            "frozen: nothing in this LlamaForCausalLM matches this Linear; ecospa_fx.couplings(model) and "
            "model.named_parameters() list the names",
        ),
        ({"frozen": [3]}, "frozen holds 3; it takes name patterns, modules and couplings"),
        ({"frozen": "mlp"}, "frozen='mlp' is one string; pass a list of them"),
        (
            {"target": 0.2, "round_to": 32, "frozen": ["*.layers.0.*"]},
            "target=0.2 of 33,440 parameters is 6,688, but the couplings reach down to 23,200 only; the smallest "
            "reachable target is 0.694 with min_keep=1, round_to=32, 5 couplings that stay whole. 7.75% of the "
            "parameters lie outside of the 2 regions: model.embed_tokens, lm_head, model.norm; compiled with "
            'regions="root" the whole model is analysed',
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_settings_that_cannot_be(settings, words):
    model = copy.deepcopy(compiled())
    with pytest.raises(TargetError) as caught:
        ecospa_fx.EcoSpaTrainer(model, SGD(model.parameters(), lr=0.1), **settings)
    assert str(caught.value) == words
