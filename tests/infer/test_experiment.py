"""Rules by experiment: what is found is true, what must not be tried is not, and nothing is used unverified."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx
from ecospa_fx.errors import NoCouplingError
from ecospa_fx.passes.capture.capture import capture
from ecospa_fx.passes.infer.infer import infer_axes
from ecospa_fx.passes.infer.probe import probe
from ecospa_fx.passes.rules import OPS
from ecospa_fx.testing import assert_exact
from ecospa_fx.testing.check import Tally
from ecospa_fx.testing.fuzz import fuzz, smallest

aten = torch.ops.aten


@pytest.fixture(scope="module", autouse=True)
def ops() -> Iterator[None]:
    """Ops that nobody wrote a rule for."""
    library = torch.library.Library("strange", "DEF")

    def define(schema: str, run: Any) -> None:
        library.define(schema)
        name = schema.split("(")[0]
        library.impl(name, run, "CompositeExplicitAutograd")

    define("swirl(Tensor x) -> Tensor", lambda x: torch.sin(x) * x.abs().sqrt())
    define("rows(Tensor x, Tensor y) -> Tensor", lambda x, y: x * y.softmax(-1)[..., None])
    define("centred(Tensor x) -> Tensor", lambda x: x - x.mean(-1, keepdim=True))
    define("reversed(Tensor x) -> Tensor", lambda x: x.flip(-1).clone())
    define("swapped(Tensor x) -> Tensor", lambda x: x.transpose(-1, -2).contiguous())
    define("wide(Tensor x) -> Tensor", lambda x: x - x.mean() if x.shape[-1] >= 40 else x * 1)
    library.define("loud(Tensor x) -> Tensor")
    library.impl("loud", lambda x: x * 1 if x.abs().max() < 1e4 else x / x.norm(), "CPU")
    torch.library.register_fake("strange::loud", torch.empty_like, lib=library)
    torch.library.register_autograd("strange::loud", lambda ctx, gradient: gradient * 1, lib=library)
    counter = iter(range(10**9))
    define("counted(Tensor x) -> Tensor", lambda x: x * next(counter))
    yield
    library._destroy()


class Between(nn.Module):
    """An op between two weights."""

    def __init__(self, op: Any, width: int = 8) -> None:
        super().__init__()
        self.op, self.up, self.down = op, nn.Linear(6, width), nn.Linear(width, 4)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.op(self.up(x)))


def outcome(op: Any, *shapes: tuple[int, ...]) -> Any:
    """What experiments say about an op on parameters of these shapes: (axes, outputs), or None."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

        def forward(self, x: Tensor) -> Any:
            return op(*self.held), x

    captured = capture(Module(), (torch.zeros(2),), {}, check=False)
    axis_facts = infer_axes(captured)
    (node,) = (node for nodes in axis_facts.missing.values() for node in nodes)
    found = probe(node, axis_facts.operands[node])
    return found and (found.axes, found.outputs)


def strange(name: str) -> Any:
    return getattr(torch.ops.strange, name).default


def test_entry_by_entry_is_found() -> None:
    axes, outputs = outcome(strange("swirl"), (4, 4))
    assert len(set(axes[0])) == 2 and outputs == axes


def test_axes_are_told_apart_by_what_they_do_and_not_by_size() -> None:
    axes, outputs = outcome(strange("swapped"), (3, 4, 4))
    assert outputs == ((axes[0][0], axes[0][2], axes[0][1]),) and len(set(axes[0])) == 3


def test_operands_share_axes_and_an_axis_that_mixes_stays_whole() -> None:
    axes, outputs = outcome(strange("rows"), (3, 4, 4), (3, 4))
    assert axes[0][:2] == axes[1]
    # Dim 1 goes through a softmax; dims 0 and 2 pass.
    assert outputs == ((axes[0][0], None, axes[0][2]),)


@pytest.mark.parametrize("name", ["centred", "reversed"])
def test_what_mixes_or_moves_entries_is_seen(name: str) -> None:
    axes, outputs = outcome(strange(name), (4, 4))
    assert outputs == ((axes[0][0], None),)


def test_the_sizes_of_the_model_are_tried_too() -> None:
    """At small sizes `wide` is pointwise."""
    assert outcome(strange("wide"), (3, 12)) is not None
    assert outcome(strange("wide"), (3, 48)) is None


def test_state_is_seen() -> None:
    assert outcome(strange("counted"), (3, 4)) is None


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (lambda x: torch.ops.aten.rrelu_with_noise_functional(x, x, training=True)[0], ((3, 4),)),  # random
        (lambda x: torch.ops.aten._reshape_alias(x, (3, 4), (4, 1)), ((3, 4),)),  # shares memory
        (lambda x: torch.ops.aten.bucketize(x, torch.arange(3.0)), ((3, 4),)),  # makes whole numbers
    ],
)
def test_what_must_not_be_tried_is_not(op: Any, shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OPS, aten.bucketize.Tensor)
    assert outcome(op, *shapes) is None


# What moves entries, or multiplies and sums them, keeps its rule: experiments leave such axes whole.
STRUCTURE = {
    "addmm", "bmm", "cat", "chunk", "conv1d", "conv2d", "einsum", "embedding", "expand", "flatten", "linear", "matmul",
    "mm", "numpy_T", "permute", "reshape", "scaled_dot_product_attention", "select", "slice", "split", "sum", "t",
    "split_with_sizes", "stack", "transpose", "unbind", "unflatten", "unsqueeze", "squeeze", "view",
}  # fmt: skip


def test_with_the_rules_taken_away_random_programs_stay_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations, norms, sums and products of values, and what else can be, get their rules by experiment."""
    for op in list(OPS):
        if getattr(op, "_opname", "view") not in STRUCTURE:
            monkeypatch.delitem(OPS, op)
    used: set[str] = set()

    def by_experiment(captured: Any) -> Any:
        axis_facts = infer_axes(captured, experiments=True)
        used.update(axis_facts.experiments)
        return axis_facts

    monkeypatch.setattr("ecospa_fx.testing.check.infer_axes", by_experiment)
    tally = Tally()
    assert not [str(smallest(found)) for found in fuzz(range(25), seed=7, tally=tally)]
    assert tally.shrinkable > 15 and {"aten.add", "aten.mul", "aten.softmax", "aten.relu", "aten.layer_norm"} <= used


def test_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OPS, aten.mish.default)
    model, x = Between(nn.functional.mish), torch.randn(2, 3, 6)
    assert list(ecospa_fx.explain(model, example_inputs=(x,)).missing_rules) == ["aten.mish"]
    with pytest.raises(NoCouplingError):
        ecospa_fx.compile(model, example_inputs=(x,))


def test_asked_for_it_is_used_exact_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OPS, aten.mish.default)
    plain, x = Between(nn.functional.mish), torch.randn(2, 3, 6)
    explanation = ecospa_fx.explain(plain, example_inputs=(x,), experiments=True)
    assert explanation.missing_rules == {}
    assert [(c.kind, c.size, c.linear) for c in explanation.couplings] == [("ffn", 8, False)]
    (where,) = explanation.experiments.values()
    assert where.startswith("1 use, first in test_experiment.py:")
    assert str(explanation).endswith(
        f"Ops whose axis rule comes from an experiment (verified, not proved):\n  aten.mish: {where}"
    )
    model = ecospa_fx.compile(copy.deepcopy(plain).double(), example_inputs=(x.double(),), experiments=True)
    assert assert_exact(model, (x.double(),)).worst.tolerance == 1e-10
    ecospa_fx.shrink(model, {"ffn": torch.tensor([0, 2, 5])})
    hidden = nn.functional.mish(plain.double().up(x.double()))[..., [0, 2, 5]]
    expected = hidden @ plain.down.weight[:, [0, 2, 5]].T + plain.down.bias
    torch.testing.assert_close(model(x.double()), expected)
    # Another way to call it is captured by itself, and replays the plan through the same experiment.
    assert model.train()(x.double()[:1]).shape == (1, 3, 4)


def test_a_saved_model_tries_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.delitem(OPS, aten.mish.default)
    x = torch.randn(2, 3, 6)
    model = ecospa_fx.compile(Between(nn.functional.mish), example_inputs=(x,), experiments=True)
    ecospa_fx.shrink(model, {"ffn": torch.tensor([1, 3])})
    ecospa_fx.save(model, tmp_path / "saved")
    loaded = ecospa_fx.load(tmp_path / "saved", lambda: Between(nn.functional.mish))
    assert torch.equal(loaded(x), model(x))


def test_what_experiments_missed_verify_sees() -> None:
    """`loud` is the identity on all that trials come up with, and a norm over everything on large entries."""
    assert outcome(strange("loud"), (3, 4)) is not None
    model, x = Between(strange("loud")), torch.randn(2, 3, 6)
    assert list(ecospa_fx.explain(model, example_inputs=(x,), experiments=True).experiments) == ["strange.loud"]
    with torch.no_grad():
        model.up.weight.mul_(1e6)
    explanation = ecospa_fx.explain(model, example_inputs=(x,), experiments=True)
    assert not explanation.couplings and not explanation.experiments
    assert list(explanation.missing_rules) == ["strange.loud"]


def test_weights_tied_after_a_compile_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OPS, aten.mish.default)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Between(nn.functional.mish), Between(nn.functional.mish)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x)

    model, x = Two(), torch.randn(2, 3, 6)
    ecospa_fx.compile(model, example_inputs=(x,), experiments=True, regions="root")
    assert [c.size for c in ecospa_fx.couplings(model)] == [8, 8]
    model.second.up.weight = model.first.up.weight
    (coupling,) = ecospa_fx.couplings(model)
    assert coupling.size == 8 and len({str(m).partition("[")[0] for m in coupling.members}) == 5
    ecospa_fx.shrink(model, {coupling: torch.arange(3)})
    ecospa_fx.verify(model, example_inputs=(x,)).raise_if_failed()


def test_nothing_is_tried_on_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OPS, aten.mish.default)
    model = Between(nn.functional.mish).to("meta")
    explanation = ecospa_fx.explain(model, example_inputs=(torch.empty(2, 3, 6, device="meta"),), experiments=True)
    assert list(explanation.missing_rules) == ["aten.mish"] and not explanation.experiments
