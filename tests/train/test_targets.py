"""Targets by kind and by name: what they mean in every rule, and what is wrong with others."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import ecospa_fx
from ecospa_fx import errors
from ecospa_fx.cli.app import main

CALL = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(0))


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=40, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@cache
def compiled():
    """A model for tests that change nothing."""
    return ecospa_fx.compile(llama(), example_kwargs={"input_ids": CALL})


def entries(model):
    """Entries now, by layer, of each kind."""
    found = {}
    for coupling in ecospa_fx.couplings(model):
        found.setdefault(coupling.kind, []).append(coupling.size)
    return found


def trained(model, steps=9, **settings):
    ecospa_fx.compile(model, example_kwargs={"input_ids": CALL})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, **settings)
    for _ in range(steps):
        loss = model(input_ids=CALL, labels=CALL).loss
        loss.backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    return trainer


@pytest.mark.parametrize(
    "settings", [{}, {"policy": "adaptive"}, pytest.param({"interval": 1}, marks=pytest.mark.sweep)]
)
def test_each_kind_comes_to_its_share(settings):
    model = llama()
    schedule = {"interval": 2, "end": 8} if "interval" not in settings else {}
    trainer = trained(model, steps=9 if schedule else 30, target={"glu": 0.5, "vo": 0.75}, **schedule, **settings)
    before, after = entries(compiled()), entries(model)
    assert trainer.done
    assert sum(after["glu"]) == 0.5 * sum(before["glu"]) and sum(after["vo"]) == 0.75 * sum(before["vo"])
    assert {kind: sizes for kind, sizes in after.items() if kind not in ("glu", "vo")} == {
        kind: sizes for kind, sizes in before.items() if kind not in ("glu", "vo")
    }
    if schedule:  # half of the way there, half has gone
        sizes = [entry["removed"] for entry in trainer.history]
        of_glu = [sum(n for name, n in each.items() if "mlp" in name) for each in sizes]
        assert sum(of_glu) == 72 and max(of_glu) < 72
    assert trainer.state_dict()["settings"]["target"] == {"glu": 0.5, "vo": 0.75}


def test_names_come_before_kinds():
    model = llama()
    report = ecospa_fx.compress(model, [{"input_ids": CALL}] * 2, {"model.layers.0.*": 1.0, "glu": 0.5})
    after = entries(model)
    assert after["glu"][0] == 48 and sum(after["glu"][1:]) == 48 and after["heads"] == [4, 4, 4]
    assert set(report.removed) == {f"model.layers.{i}.mlp.glu" for i in (1, 2)}


def test_in_two_strokes():
    model = llama()
    ecospa_fx.compress(model, [{"input_ids": CALL}] * 2, {"glu": 0.25}, steps=2)
    assert sum(entries(model)["glu"]) == 36


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({}, "names nothing"),
        ({"glu": 0}, r"target\['glu'\]=0 is out of range"),
        ({"glu": "half"}, "'half' is out of range"),
        ({3: 0.5}, "has the key 3"),
        ({"conv": 0.5}, "'conv', which is a kind of coupling that it does not have: .* are glu, heads, qk"),
        ({"attention": 0.5}, "'attention', which is no kind, and fits no name"),
        ({"glu": 0.001}, "entries of 'glu' is 1, but .* down to 3 only"),
    ],
)
def test_what_is_wrong_is_said(target, words):
    with pytest.raises(errors.TargetError, match=words):
        ecospa_fx.CoupledSparsifier(compiled(), target=target)
    with pytest.raises(errors.TargetError, match=words):
        ecospa_fx.EcoSpaTrainer(compiled(), torch.optim.SGD(compiled().parameters()), target=target)


def test_two_costs_are_one_too_many():
    for more in ({"cost": "flops"}, {"among": "prunable"}):
        with pytest.raises(errors.TargetError, match="share of their entries"):
            ecospa_fx.CoupledSparsifier(compiled(), target={"glu": 0.5}, **more)


def test_couplings_that_shrink_together_have_one_target():
    constraints = ecospa_fx.Constraints(uniform="layers")
    with pytest.raises(errors.TargetError, match="shrink together"):
        ecospa_fx.CoupledSparsifier(compiled(), target={"model.layers.0.mlp.glu": 0.5}, constraints=constraints)
    sparsifier = ecospa_fx.CoupledSparsifier(compiled(), target={"glu": 0.5}, constraints=constraints)
    importance = dict.fromkeys(ecospa_fx.couplings(compiled()), 1.0)
    keeps = sparsifier.decide(importance, at_most=sparsifier.target_size(sparsifier.sizes()))
    assert {c.kind for c in keeps} == {"glu"} and {len(keep) for keep in keeps.values()} == {24}


def test_the_commands_take_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["shrink", "hf/llama", "--target", "glu=0.5", "--out", "small"]) == 0
    small = {c.kind: c.size / c.original_size for c in ecospa_fx.couplings(called(ecospa_fx.load("small")))}
    assert small["glu"] == 0.5 and small["heads"] == 1
    assert main(["shrink", "hf/llama", "--target", "glu:0.5", "--out", "other"]) == 2
    assert "neither a share nor kinds" in capsys.readouterr().err


def called(model: nn.Module) -> nn.Module:
    model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    return model
