"""A machine that does to random small models what people do, in any order, beside a dense twin that never shrinks.

The twin is the plain model with zeros in place of what has been removed; its gradients and optimizer state are zero
there too, so it trains as the small one does. It knows no graph and no plan, only which entries each shrink took.
"""

from __future__ import annotations

import copy
import itertools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

import ecospa_fx
from ecospa_fx.testing.check import zeroing_is_removing
from ecospa_fx.testing.programs import RandomProgram
from ecospa_fx.testing.random_program import free_program

SHAPES = ((2, 5), (3, 7), (1, 4))
KINDS = ("attention", "glu", "mlp", "residual", "linear", "norm", "pointwise", "experts", "tied")
TOLERANCE = 1e-8
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
    # A large eps, so that gradients that are zero up to rounding do not become steps.
    "AdamW": lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.1, eps=1e-3),
}


def call(program: RandomProgram, shape: tuple[int, int], seed: int) -> Tensor:
    _, (example,) = program.build()
    return torch.randn(*shape, example.shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def usable(program: RandomProgram) -> bool:
    """It takes any number of tokens, something can shrink in it, and zero weights are removed weights."""
    try:
        model, _ = program.build()
        outputs = [model(call(program, shape, 0)) for shape in SHAPES]
        return len(outputs) == len(SHAPES) and zeroing_is_removing(model, (call(program, (2, 5), 0),))
    except (RuntimeError, ValueError, IndexError):
        return False


def loss_of(outputs: Any) -> Tensor:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    terms = [(out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).mean() for out in outputs]
    return torch.stack(terms).sum()


def stays_in(member: ecospa_fx.Member, keep: Tensor) -> Tensor:
    """Which rows or columns of a member a selection keeps, in each context its own where it differs."""
    if keep.ndim == 1:
        return torch.isin(member.index, keep)
    assert member.context is not None
    return torch.stack([torch.isin(entry, keep[at]) for entry, at in zip(member.index, member.context, strict=True)])


class Shrinking(RuleBasedStateMachine):
    """One model through a sequence of everything."""

    @initialize(number=st.integers(0, 10**6), optimizer=st.sampled_from(sorted(OPTIMIZERS)))
    def start(self, number: int, optimizer: str) -> None:
        programs = (free_program(random.Random(number + i), KINDS, most=3) for i in itertools.count())
        program = next(program for program in programs if usable(program))
        note(str(program))
        self.program, self.make = program, OPTIMIZERS[optimizer]
        self.shape, self.seed, self.losses = SHAPES[0], 0, 0
        self.model = program.build()[0]
        self.twin = copy.deepcopy(self.model)
        ecospa_fx.compile(self.model, example_inputs=(self.input(),), regions="root")
        self.optimizer, self.twin_optimizer = self.make(self.model.parameters()), self.make(self.twin.parameters())
        self.left: dict[tuple[str, int], Tensor] = {}

    def input(self) -> Tensor:
        return call(self.program, self.shape, self.seed)

    def sliced(self, tensor: Tensor, name: str) -> Tensor:
        for dim in range(tensor.ndim):
            if (name, dim) in self.left:
                tensor = tensor.index_select(dim, self.left[name, dim])
        return tensor

    def zeroed(self) -> None:
        """Zeros in the twin, its gradients and its optimizer, wherever an entry has been removed."""
        for name, parameter in self.twin.named_parameters():
            tensors = [parameter.data, parameter.grad, *self.twin_optimizer.state.get(parameter, {}).values()]
            for dim in range(parameter.ndim):
                if (name, dim) in self.left:
                    gone = torch.ones(parameter.shape[dim], dtype=torch.bool)
                    gone[self.left[name, dim]] = False
                    for tensor in tensors:
                        if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                            tensor.index_fill_(dim, gone.nonzero().flatten(), 0.0)

    def same(self, expected: Tensor, found: Tensor, what: str, scale: float = 0.0) -> None:
        assert expected.shape == found.shape, f"{what} is {tuple(found.shape)}, not {tuple(expected.shape)}"
        error = float((expected - found).abs().max())
        assert error <= TOLERANCE * max(float(expected.abs().max()), 1e-3 * scale, 1e-6), (
            f"{what} is off by {error:.1e}"
        )

    @rule(seed=st.integers(0, 3))
    def forward(self, seed: int) -> None:
        self.seed = seed
        outputs, expected = self.model(self.input()), self.twin(self.input())
        pairs = zip(outputs, expected, strict=True) if isinstance(expected, tuple) else [(outputs, expected)]
        for i, (out, want) in enumerate(pairs):
            self.same(want.detach(), out.detach(), f"output {i}")

    @rule(steps=st.integers(1, 2))
    def train(self, steps: int) -> None:
        for _ in range(steps):
            for model, optimizer in ((self.model, self.optimizer), (self.twin, self.twin_optimizer)):
                optimizer.zero_grad()
                loss_of(model(self.input())).backward()
            self.zeroed()
            mine, twins = dict(self.model.named_parameters()), dict(self.twin.named_parameters())
            assert mine.keys() == twins.keys()
            scale = max(float(p.grad.abs().max()) for p in twins.values() if p.grad is not None)
            for name, parameter in twins.items():
                assert (parameter.grad is None) == (mine[name].grad is None), name
                if parameter.grad is not None:
                    self.same(self.sliced(parameter.grad, name), mine[name].grad, f"gradient of {name}", scale)
            self.optimizer.step()
            self.twin_optimizer.step()
            for name, parameter in twins.items():
                self.same(self.sliced(parameter.data, name), mine[name].data, f"{name} after a step", 1.0)

    @rule(number=st.integers(0, 10**6))
    def shrink(self, number: int) -> None:
        dice = random.Random(number)
        shrinkable = [c for c in ecospa_fx.couplings(self.model) if c.size > 1]
        if not shrinkable:
            return
        coupling = dice.choice(shrinkable)
        amount = dice.randint(1, coupling.size - 1)
        each = coupling.contexts if coupling.context is not None and dice.random() < 0.7 else 1
        rows = torch.tensor([sorted(dice.sample(range(coupling.size), amount)) for _ in range(each)])
        keep = rows if each > 1 else rows[0]
        gone: dict[tuple[str, int], Tensor] = {}
        for member in coupling.members:
            axis = member.parameter, member.dim
            before = gone.get(axis, torch.zeros(len(member.index), dtype=torch.bool))
            stays = stays_in(member, keep)
            gone[axis] = before | ((member.index >= 0) & ~stays)
        ecospa_fx.shrink(self.model, {coupling: keep}, optimizer=self.optimizer)
        sizes = {name: p.shape for name, p in self.twin.named_parameters()}
        for axis, mask in gone.items():
            left = self.left.get(axis, torch.arange(sizes[axis[0]][axis[1]]))
            self.left[axis] = left[~mask]
        self.left = {axis: left for axis, left in self.left.items() if len(left) < sizes[axis[0]][axis[1]]}
        self.zeroed()
        plan = ecospa_fx.plan(self.model)
        assert plan.kept.keys() >= self.left.keys()
        assert all(torch.equal(plan.kept[axis], left) for axis, left in self.left.items())
        self.forward(self.seed)

    @rule(number=st.integers(0, 10**6))
    def shrink_and_train(self, number: int) -> None:
        self.shrink(number)
        self.train(1)

    @rule(training=st.booleans())
    def mode(self, training: bool) -> None:
        self.model.train(training)
        self.twin.train(training)

    @rule(shape=st.sampled_from(SHAPES))
    def batch(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            where = Path(directory) / "saved"
            ecospa_fx.save(self.model, where, optimizer=self.optimizer)
            loaded = ecospa_fx.load(where, lambda: self.program.build()[0])
            optimizer = self.make(loaded.parameters())
            ecospa_fx.resume(where, loaded, optimizer=optimizer)
        loaded.train(self.model.training)
        self.model, self.optimizer = loaded, optimizer
        self.forward(self.seed)

    @rule()
    def deepcopy(self) -> None:
        original = self.model, self.optimizer
        self.model, self.optimizer = copy.deepcopy(original)
        # What happens to the original from here on is of no concern to the copy.
        with torch.no_grad():
            for parameter in original[0].parameters():
                parameter.fill_(7.0)
        self.forward(self.seed)

    @precondition(lambda self: self.left)
    @rule()
    def verify(self) -> None:
        assert ecospa_fx.verify(self.model, example_inputs=(self.input(),)).ok


def run(examples: int, steps: int, **more: Any) -> None:
    run_state_machine_as_test(
        Shrinking,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, database=None, print_blob=False,
            phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck), **more,
        ),
    )  # fmt: skip


def test_a_shrinking_model_always_agrees_with_its_masked_twin() -> None:
    run(12, 12, derandomize=True)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
def test_many_shrinking_models_always_agree_with_their_masked_twins() -> None:
    run(300, 30)
