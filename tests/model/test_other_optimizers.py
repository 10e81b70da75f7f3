"""Optimizers that are not torch's: what follows a shrink, what is refused, and in which words."""

import pytest
import torch
from test_optimizers import Weights, cut, shrink, step
from torch import Tensor, nn, optim

import ecospa_fx
from ecospa_fx.errors import OptimizerError
from ecospa_fx.model.optimizer_table import take


def refusal(model: nn.Module, optimizer: optim.Optimizer, dim: int = 0) -> str:
    """The words a shrink is refused with; nothing has changed."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    held = {p: dict(state) for p, state in optimizer.state.items()}
    with pytest.raises(OptimizerError) as caught:
        shrink(model, {("matrix", dim): torch.tensor([0, 2])}, optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {p: {e: id(v) for e, v in s.items()} for p, s in optimizer.state.items()} == {
        p: {e: id(v) for e, v in s.items()} for p, s in held.items()
    }
    return str(caught.value)


class Plain(optim.Optimizer):
    """What somebody writes: gradient descent that keeps whatever `make` makes of each parameter."""

    def __init__(self, parameters, make) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.make = make

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for p in [p for group in self.param_groups for p in group["params"]]:
            self.state[p].setdefault("kept", self.make(p))
            p.sub_(p, alpha=0.1)


def stepped(make, rows: int = 4, columns: int = 3, cls=Plain):
    model = Weights(rows, columns, 0)
    optimizer = cls(model.parameters(), make)
    optimizer.step()
    return model, optimizer


WAY_OUT = (
    "which of it belongs to which row or column is not known, so it cannot shrink along. Say it with "
    "@ecospa_fx.state_rule(Plain), or use an optimizer with elementwise state (AdamW, SGD with momentum)"
)


class Packed(Tensor):
    """Looks like a tensor of a shape, and holds something else."""


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.zeros(len(p), len(p)), "Plain holds `kept` of shape (4, 4) for `matrix` of shape (4, 3): "),
        (
            lambda p: [torch.zeros(()), torch.zeros(len(p))],
            "Plain holds `kept` in a list of shape (4,) for `matrix` of shape (4, 3): ",
        ),
        (
            lambda p: {"left": torch.zeros(2, 2)},
            "Plain holds `kept` in a dict of shape (2, 2) for `matrix` of shape (4, 3): ",
        ),
        (lambda p: object(), "Plain holds `kept`, a object, for `matrix` of shape (4, 3): "),
        (
            lambda p: torch.zeros_like(p).as_subclass(Packed),
            "Plain holds `kept`, a Packed of shape (4, 3), for `matrix` of shape (4, 3): ",
        ),
    ],
    ids=["matrix", "list", "dict", "object", "subclass"],
)
def test_state_of_unknown_layout_is_refused(make, words):
    assert refusal(*stepped(make)) == words + WAY_OUT


def test_state_of_the_parameters_shape_and_numbers_of_an_unknown_optimizer_follow():
    model, optimizer = stepped(lambda p: p.detach().clone())
    for state in optimizer.state.values():
        state |= {"count": 3, "norm": torch.tensor(2.0), "one": torch.ones(1), "name": "x", "betas": (0.9, None)}
    state = dict(optimizer.state[model.matrix])
    shrink(model, {("matrix", 0): torch.tensor([0, 2])}, optimizer)
    after = optimizer.state[model.matrix]
    assert torch.equal(after.pop("kept"), state.pop("kept")[[0, 2]])
    assert all(after[entry] is value for entry, value in state.items())


def test_a_square_shape_alone_proves_nothing():
    """Row-by-row preconditioners of square matrices have their shape too, and would be cut along both dims."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.ones(4, 4))

    model = Square()
    optimizer = Plain(model.parameters(), lambda p: torch.eye(len(p)))
    optimizer.step()
    assert refusal(model, optimizer) == "Plain holds `kept` of shape (4, 4) for `matrix` of shape (4, 4): " + WAY_OUT


def test_tensors_beside_the_states_are_refused_until_a_rule_says_otherwise():
    class Averaging(Plain):
        pass

    model, optimizer = stepped(lambda p: 0, cls=Averaging)
    optimizer.slow = {"first": torch.zeros(4, 3)}
    way = (
        "outside of its parameters' states: whether it follows the parameters is not known, so nothing can shrink. If "
        "it does not, register a rule for the rest of it, @ecospa_fx.state_rule(Averaging); else use another optimizer "
        "(AdamW, SGD with momentum)"
    )
    assert refusal(model, optimizer) == f"Averaging holds a tensor of shape (4, 3) in `slow`, {way}"
    del optimizer.slow
    optimizer.param_groups[0]["table"] = torch.zeros(5)
    words = f"Averaging holds a tensor of shape (5,) in `param_groups[0]['table']`, {way}"
    assert refusal(model, optimizer) == words
    ecospa_fx.state_rule(Averaging)(lambda state, parameter, keep: {})
    shrink(model, {("matrix", 0): torch.tensor([0, 2])}, optimizer)
    assert model.matrix.shape == (2, 3)


def test_a_registered_rule_is_used_for_subclasses_too_and_its_failure_is_named():
    class Rows(Plain):
        pass

    class Derived(Rows):
        pass

    @ecospa_fx.state_rule(Rows)
    def rows(state, parameter, keep):
        return {"kept": take(state["kept"], keep, dims=(0,))}

    model, optimizer = stepped(lambda p: torch.arange(len(p)), cls=Derived)
    kept = optimizer.state[model.matrix]["kept"]
    shrink(model, {("matrix", 1): torch.tensor([0, 2])}, optimizer)  # along the other dim: as it was, in a copy
    assert torch.equal(optimizer.state[model.matrix]["kept"], kept)
    model, optimizer = stepped(lambda p: torch.arange(len(p)), cls=Derived)
    shrink(model, {("matrix", 0): torch.tensor([0, 2])}, optimizer)
    assert torch.equal(optimizer.state[model.matrix]["kept"], torch.tensor([0, 2]))

    model, optimizer = stepped(lambda p: torch.arange(2), cls=Derived)
    assert refusal(model, optimizer) == (
        "the state rule of Derived failed on `matrix` of shape (4, 3) with IndexError: index out of range in self; "
        "nothing was changed"
    )


LBFGS = (
    "LBFGS keeps steps and gradient differences of all parameters as one flat vector each; their inner products "
    "estimate the curvature of the whole model, and slicing them would make that estimate wrong. Shrink without "
    "passing it and make a new LBFGS afterwards, or train with AdamW or SGD while shrinking"
)


def test_lbfgs_is_refused_with_a_reason():
    model = Weights(4, 3, 0)
    optimizer = optim.LBFGS(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    assert refusal(model, optimizer) == LBFGS


# Optimizers in optimizers


class Wrapper(optim.Optimizer):
    """Steps another, shows its states as its own, and keeps slow weights there, as averaging wrappers do."""

    def __init__(self, inner: optim.Optimizer) -> None:
        self.inner, self.param_groups, self.defaults, self.state = inner, inner.param_groups, {}, inner.state

    def step(self, closure=None) -> None:
        self.inner.step(closure)
        for p in [p for group in self.param_groups for p in group["params"]]:
            slow = self.state[p].setdefault("slow", p.detach().clone())
            slow.lerp_(p.detach(), 0.5)


def test_what_an_optimizer_wraps_follows():
    model, whole = Weights(4, 3, 0), Weights(4, 3, 0)
    inner = optim.AdamW(model.parameters())
    optimizer = Wrapper(inner)
    step(model, optimizer, 0, whole, {})
    before, keep = {entry: value.clone() for entry, value in inner.state[model.matrix].items()}, torch.tensor([0, 2])
    shrink(model, {("matrix", 0): keep}, optimizer)
    for entry in ("exp_avg", "exp_avg_sq", "slow"):
        assert torch.equal(inner.state[model.matrix][entry], before[entry][keep])
    step(model, optimizer, 1, whole, {("matrix", 0): keep})
    refused = Weights(4, 3, 0)
    assert refusal(refused, Wrapper(optim.LBFGS(refused.parameters()))) == LBFGS


def test_what_is_wrapped_follows_by_its_own_rule():
    """A wrapper that shows the state of Adafactor as its own does not hide what it is."""
    model, whole, keep = Weights(4, 3, 0), Weights(4, 3, 0), torch.tensor([0, 2])
    inner = optim.Adafactor(model.parameters())
    inner.param_groups[0]["table"] = torch.zeros(5)  # and so with what lies in its groups
    optimizer = Wrapper(inner)
    step(model, optimizer, 0, whole, {})
    shrink(model, {("matrix", 0): keep}, optimizer)
    assert inner.state[model.matrix]["row_var"].shape == (2, 1)
    assert inner.state[model.matrix]["slow"].shape == (2, 3)
    step(model, optimizer, 1, whole, {("matrix", 0): keep})


TIMM = [
    "adabelief", "adam", "adamp", "adan", "adopt", "lamb", "laprop", "lars", "lion", "madgrad", "mars", "muon",
    "nadamw", "novograd", "radam", "rmsproptf", "sgdp", "sgdw",
]  # fmt: skip


@pytest.mark.parametrize("name", [*TIMM, "lookahead_adamw"])
def test_optimizers_of_timm_take_steps_after_a_shrink(name):
    from timm.optim import create_optimizer_v2

    model, whole, keep = Weights(5, 4, 0).float(), Weights(5, 4, 0), torch.tensor([0, 2, 3])
    optimizer = create_optimizer_v2(model, name, lr=1e-3)
    keeps = {("matrix", 0): keep, ("bias", 0): keep, ("kernel", 1): keep}

    def one(number, keeps):
        for p in model.parameters():
            p.grad = None
        draw = torch.Generator().manual_seed(number)
        for n, p in whole.named_parameters():
            model.get_parameter(n).grad = cut(torch.randn(p.shape, generator=draw), n, keeps)
        optimizer.step()

    for number in range(7):
        one(number, {})
    shrink(model, keeps, optimizer)
    for number in range(7, 10):
        one(number, keeps)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["adafactor", "adafactorbv"])
def test_factors_along_dims_of_the_optimizers_choice_are_refused(name):
    """Those of timm factor a tensor along its two largest dims, which a shrink may change."""
    from timm.optim import create_optimizer_v2

    model = Weights(40, 36, 0).float()
    optimizer = create_optimizer_v2(model, name, lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert refusal(model, optimizer).endswith(WAY_OUT.replace("(Plain)", f"({type(optimizer).__name__})"))
