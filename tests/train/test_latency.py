"""Latency: forecasts beside what a made-up machine takes, by a table of seconds per op. No clock runs."""

from __future__ import annotations

import copy
import time
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ecospa_fx
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops
from ecospa_fx.model.cost import CostModel
from ecospa_fx.model.lookup import state_of
from ecospa_fx.train.latency import LatencyModel
from ecospa_fx.train.sparsifier import CoupledSparsifier
from ecospa_fx.train.timing import FIRST_CALLS, in_turn

CALL, NUMBER, PRODUCT, ATTENTION = 1e-5, 4e-9, 1e-10, 5e-11
"""Seconds of any op, of a number that one makes, of a FLOP of a product of matrices, of one inside of attention."""

NONE_MUST_STAY = ecospa_fx.Constraints(min_keep=0)


class Machine(TorchDispatchMode):
    """A machine that takes as many seconds for an op as the table says."""

    seconds = 0.0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple | list) else result
        if not isinstance(first, Tensor):
            return result
        self.seconds += CALL
        name = str(op.overloadpacket)
        if "attention" in name:
            q, k, v = (each.shape for each in args[:3])
            self.seconds += ATTENTION * 2 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
        elif name in ("aten.mm", "aten.bmm", "aten.addmm"):
            left = args[-2].shape
            self.seconds += PRODUCT * 2 * first.numel() * left[-1] + NUMBER * first.numel()
        elif first.numel() and first.data_ptr() not in {a.data_ptr() for a in args if isinstance(a, Tensor)}:
            self.seconds += NUMBER * first.numel()
        return result


def llama(layers: int = 6) -> tuple[nn.Module, dict[str, Any]]:
    tolerate_missing_torchvision_ops()
    import transformers as hf

    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=512,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=64,
        )
    ).eval()
    call = {"input_ids": torch.randint(0, 512, (1, 64)), "use_cache": False}
    return ecospa_fx.compile(model, example_kwargs=call), call


def seconds_of(call: dict[str, Any]) -> Any:
    def measure(model: nn.Module) -> float:
        with torch.no_grad(), Machine() as machine:
            model(**call)
        return machine.seconds

    return measure


CASES = {
    "an attention": {"heads": (1, 0.0)},
    "attentions": {"heads": (4, 0.0)},
    "an FFN": {"glu": (1, 0.0)},
    "FFNs": {"glu": (5, 0.0)},
    "blocks": {"heads": (2, 0.0), "glu": (2, 0.0)},
    "all blocks but one": {"heads": (5, 0.0), "glu": (5, 0.0)},
    "an attention by all its couplings": {"heads": (2, 0.0), "vo": (2, 0.0), "groups": (2, 0.0)},
    "an attention by its values": {"vo": (3, 0.0)},
    "units": {"glu": (6, 0.7)},
    "heads": {"heads": (6, 0.5)},
    "groups": {"groups": (6, 0.5)},
    "widths": {"glu": (6, 0.4), "heads": (6, 0.75), "groups": (3, 0.5)},
    "both": {"heads": (3, 0.0), "glu": (6, 0.6), "groups": (6, 0.5)},
}


def test_forecasts_agree_with_what_smaller_models_take():
    model, call = llama()
    latency = ecospa_fx.Latency(measure=seconds_of(call))
    sizes = CoupledSparsifier(model, target=0.9, cost=latency, constraints=NONE_MUST_STAY).sizes()
    whole = seconds_of(call)(model)
    assert sizes.total({}) == sizes.original == round(1e9 * whole)
    errors = {}
    for name, case in CASES.items():
        keeps = {}
        for kind, (count, share) in case.items():
            same = [c for c in ecospa_fx.couplings(model) if c.kind == kind]
            keeps |= {c.name: round(share * c.size) for c in same[:count]}
        smaller = copy.deepcopy(model)
        ecospa_fx.shrink(smaller, {n: torch.arange(keep) for n, keep in keeps.items()}, constraints=NONE_MUST_STAY)
        errors[name] = (1e-9 * sizes.total(keeps) - seconds_of(call)(smaller)) / whole
        assert seconds_of(call)(smaller) < 0.97 * whole
    assert max(map(abs, errors.values())) < 0.02, errors


def test_what_is_slower_when_narrower_stays_whole():
    """Attention with values of one width and queries of another falls back to products of matrices and a softmax."""
    model, call = llama(2)
    latency = ecospa_fx.Latency(measure=seconds_of(call))
    sparsifier = CoupledSparsifier(model, target=0.9, cost=latency)
    assert latency.slower == ["qk", "vo"] and latency.rates["qk"] == 0
    assert {unit.couplings[0].kind for unit in sparsifier.shrinkable()} == {"heads", "groups", "glu"}
    assert (
        sparsifier.whole["model.layers.0.self_attn.qk"] == "with fewer entries of each qk a forward took no less time"
    )
    tied = ecospa_fx.Constraints(equal_head_dims=True)
    both = ecospa_fx.Latency(measure=seconds_of(call))
    assert "model.layers.0.self_attn.qk" not in CoupledSparsifier(model, target=0.9, cost=both, constraints=tied).whole
    assert both.slower == [] and both.rates["qk"] == both.rates["vo"] > 0
    # All of them may still go where that is allowed.
    depth = CoupledSparsifier(model, target=0.9, cost=latency, constraints=NONE_MUST_STAY)
    assert {unit.sizes for unit in depth.shrinkable() if unit.couplings[0].kind == "vo"} == {(0, 12)}


def test_a_target_of_sublayers_is_met():
    """Five of 12 sublayers, each as dear as its weights and a millisecond."""
    model, call = llama()
    seconds = seconds_of(call)
    cost = ecospa_fx.Latency(measure=seconds)
    batches = [{**call, "labels": call["input_ids"]}] * 2
    whole = seconds(model)
    ecospa_fx.compress(model, batches, target=0.7, cost=cost, min_keep=0)
    assert 0.67 < seconds(model) / whole <= 0.705


def test_readings_go_on_elsewhere():
    model, call = llama(2)
    latency = ecospa_fx.Latency(measure=seconds_of(call))
    latency.observe(model, CostModel(model, state_of(model), "flops"), NONE_MUST_STAY)
    other = ecospa_fx.Latency(measure=lambda model: pytest.fail("all of it is known"))
    other.take(latency.readings())
    other.observe(model, CostModel(model, state_of(model), "flops"), NONE_MUST_STAY)
    keeps = {c.name: 0 for c in ecospa_fx.couplings(model) if c.last_stays is None}
    here, there = (
        LatencyModel(CostModel(model, state_of(model), "flops"), each, ecospa_fx.couplings(model)).total(keeps)
        for each in (latency, other)
    )
    assert here == there < 0.7 * 1e9 * seconds_of(call)(model)


class Clock:
    """Seconds that pass only while a layer runs, as many as it has outputs; other load makes them longer and longer."""

    def __init__(self) -> None:
        self.now, self.load = 0.0, 1.0

    def __call__(self) -> float:
        return self.now

    def watch(self, module: nn.Module) -> None:
        module.register_forward_hook(self._spend)

    def _spend(self, module: nn.Module, args: Any, result: Tensor) -> None:
        self.now += self.load * result.shape[-1]
        self.load *= 1.05


def test_models_in_turn_meet_the_same_load():
    clock = Clock()
    models = [nn.Linear(4, 8), nn.Linear(4, 2).eval()]
    for model in models:
        clock.watch(model)
    x = torch.randn(3, 4)
    rounds = in_turn(models, lambda model: model(x), 6, clock)
    assert len(rounds) == 6 and clock.load == pytest.approx(1.05 ** (2 * (6 + FIRST_CALLS)))
    assert all(b / a == pytest.approx(0.25, rel=0.06) for a, b in rounds)
    assert rounds[-1][0] > 1.5 * rounds[0][0]  # one after the other would say anything
    assert [model.training for model in models] == [True, False]


def test_modules_that_evaluate_while_the_model_trains_still_do_so_after_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    model[1].eval()
    in_turn((model,), lambda each: each(torch.randn(3, 4)), 1, time.perf_counter)
    assert model.training and model[0].training and not model[1].training
