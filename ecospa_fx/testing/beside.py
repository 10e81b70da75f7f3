"""Beside: a compiled model and the plain one through the same loop, compared after every step.

    both = Beside(source, execution="graph", regions="root")
    both.compile()
    both.train(3)
    both.change("block.tau = 0.5")
    both.shrink(0)
    both.train(3)

The plain model runs its own Python. After a shrink it is a dense twin, with zeros in place of what has been removed; if
it draws random tensors of sizes that shrink, it is made as small as the other instead, so that it draws the same.
"""

from __future__ import annotations

import copy
import pickle
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import ecospa_fx
from ecospa_fx.errors import EcoSpaError, NoInputsError
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.state import Execution

from .worlds import Cut, Differs, Generators, World, check_same, check_value, everything, frozen, optimizer_of

_PACKAGE = str(Path(ecospa_fx.__file__).parent)


class Ended(Exception):
    """The end of a program: a shrunk model cannot run a call, and says why."""


class Beside:
    """Two worlds of one file: the plain model, and one compiled by this library.

    Attributes:
        plain: the world of the plain model.
        ours: the world of the other.
        refusals: the errors of this library so far.
        shrinks: how many shrinks there were.
    """

    def __init__(
        self,
        source: str,
        execution: Execution = "graph",
        regions: str = "auto",
        sized: bool = False,
        tokens: bool = False,
    ) -> None:
        self.execution, self.regions, self.sized, self.tokens = execution, regions, sized, tokens
        Generators.seeded(1)
        self.plain, self.ours = World(source, "plain_program"), World(source, "compiled_program")
        self.refusals: list[str] = []
        self.shrinks = 0
        self._cut = Cut()
        self._calls = 0
        self._changed: list[str] = []  # statements of the loop since the last shrink
        self._compare("before compile")

    @property
    def compiled(self) -> bool:
        """True while the model is compiled."""
        return MODEL in self.ours.model.__dict__

    # Steps: each is one line of a program

    def compile(self, batch: int = 0) -> None:
        """Compile the model; with a batch size, capture a call now."""
        given: dict[str, Any] = {"example_inputs": (self._input(batch),)} if batch else {}
        self._library("compile", lambda: ecospa_fx.compile(
            self.ours.model, regions=self.regions, execution=self.execution, **given
        ))  # fmt: skip

    def call(self, batch: int) -> None:
        """Run the model without gradients."""
        x = self._input(batch)

        def run(world: World) -> Any:
            with torch.no_grad():
                return world.model(x)

        self._both(f"call({batch})", run)

    def train(self, batch: int) -> None:
        """Run the model, its backward, and a step of the optimizer."""
        x = self._input(batch)
        for world in (self.plain, self.ours):
            world.model.zero_grad()

        def run(world: World) -> Any:
            y = world.model(x)
            weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
            loss = (y * weights).sum()
            for module in world.model.modules():
                loss = loss + sum(v for k, v in vars(module).items() if k.startswith("aux") and isinstance(v, Tensor))
            loss.backward()
            return y, loss

        self._both(f"train({batch})", run)
        self._zero()
        for world in (self.plain, self.ours):
            for parameter in world.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.clamp_(-1, 1)
            world.optimizer.step()
        self._compare(f"train({batch}), step of the optimizer")

    def mode(self, training: bool) -> None:
        """Go to train or eval mode."""
        for world in (self.plain, self.ours):
            world.model.train(training)

    def change(self, statement: str, block: int = 0) -> None:
        """Run a statement of the loop, on `block`, `model` and `world`."""
        self._changed.append(statement)
        for world in (self.plain, self.ours):
            model: Any = world.model
            exec(
                statement,
                dict(vars(world.module)),
                {"model": model, "block": model.blocks[block], "world": world.module},
            )

    def keep(self, code: str, block: int = 0) -> None:
        """Let the loop keep an object of the model, which is compared from then on."""
        for world in (self.plain, self.ours):
            model: Any = world.model
            scope = {"model": model, "block": model.blocks[block], "world": world.module}
            world.memory[code] = eval(code, dict(vars(world.module)), scope)

    def shrink(self, seed: int, line: int = 0) -> None:
        """Remove some entries of one coupling, or of all.

        Args:
            seed: seed of the choice.
            line: the line of this library at which Ctrl-C is pressed; 0: at none.
        """
        if not self.compiled:
            return
        dice, model = random.Random(seed), self.ours.model
        try:
            found = [c for c in ecospa_fx.couplings(model) if c.size > 1]
        except NoInputsError:  # nothing has been called so far
            return
        if not found:
            return
        chosen = found if dice.random() < 0.3 else [dice.choice(found)]
        keeps = {c: torch.tensor(sorted(dice.sample(range(c.size), dice.randint(1, c.size - 1)))) for c in chosen}
        shapes = {name: p.shape for name, p in model.named_parameters()}

        def shrink() -> None:
            with Interrupting(line):
                ecospa_fx.shrink(model, keeps, optimizer=self.ours.optimizer)

        try:
            if not self._library(f"shrink({seed})", shrink):
                return
        except KeyboardInterrupt:
            if {name: p.shape for name, p in model.named_parameters()} == shapes:
                self._compare(f"interrupted shrink({seed}, {line})")
                return
        self.shrinks += 1
        self._changed.clear()
        self._follow(keeps)
        self._compare(f"shrink({seed})")

    def save_and_load(self) -> None:
        """Save the model, make a new one and load it."""

        def reload() -> tuple[nn.Module, Any]:
            with tempfile.TemporaryDirectory() as folder:
                where = Path(folder) / "saved"
                ecospa_fx.save(self.ours.model, where, optimizer=self.ours.optimizer)
                loaded = ecospa_fx.load(where, self.ours.made)
                optimizer = optimizer_of(loaded)
                ecospa_fx.resume(where, loaded, optimizer=optimizer)
            return loaded, optimizer

        if not self.compiled:
            return
        done = self._library("save_and_load", reload)
        if not done:
            return
        loaded, optimizer = done[0]
        loaded.train(self.ours.model.training)
        self.ours.model, self.ours.optimizer = loaded, optimizer
        fresh = self.plain.made()
        _fit(fresh, self.plain.model)
        fresh.load_state_dict(self.plain.model.state_dict())
        fresh.train(self.plain.model.training)
        optimizer = optimizer_of(fresh)
        optimizer.load_state_dict(self.plain.optimizer.state_dict())
        self.plain.model, self.plain.optimizer = fresh, optimizer
        self._compare("save_and_load")

    def state_dict(self) -> None:
        """Copy the state into a model made anew, and go on with that; a compiled one stays and loads its own."""
        a, b = self.plain.model.state_dict(), self.ours.model.state_dict()
        check_same(a, b, "state_dict", self._cut)
        for world, state in ((self.plain, copy.deepcopy(a)), (self.ours, copy.deepcopy(b))):
            with torch.no_grad():
                for tensor in world.model.parameters():
                    tensor.mul_(2)
            world.model.load_state_dict(state)
        self._compare("state_dict")

    def deepcopy(self) -> None:
        """Go on with a copy of the model and its optimizer."""
        self._copied("deepcopy", copy.deepcopy)

    def pickle(self) -> None:
        """Go on with the model and its optimizer, pickled and read again."""
        self._copied("pickle", lambda each: pickle.loads(pickle.dumps(each)))

    def explain(self, batch: int = 2) -> None:
        """Explain the model, which leaves it as it is."""
        self._library("explain", lambda: str(ecospa_fx.explain(self.ours.model, example_inputs=(self._input(batch),))))

    def verify(self, batch: int = 2) -> None:
        """Verify the model, which leaves it as it is."""
        if self.compiled:
            done = self._library(
                "verify", lambda: ecospa_fx.verify(self.ours.model, example_inputs=(self._input(batch),))
            )
            if done and not done[0].ok:
                raise Differs(f"verify: {done[0]}")

    def interrupted_call(self, batch: int, line: int) -> None:
        """Press Ctrl-C at a line of this library during a call that captures; nothing has been called then."""
        before, generators = frozen(self.ours), Generators.now()
        x = self._input(batch)
        try:
            with Interrupting(line, only="capture"), torch.no_grad():
                self.ours.model(x)
        except KeyboardInterrupt:
            generators.check("interrupted capture")
            check_same(before, frozen(self.ours), "interrupted capture")
            return
        except EcoSpaError:
            return
        generators.put_back()
        with torch.no_grad():
            self.plain.model(x)
        self._compare("call")

    # Comparison

    def _input(self, batch: int) -> Tensor:
        self._calls += 1
        generator = torch.Generator().manual_seed(self._calls)
        return torch.randn(batch, *((3, 3) if self.tokens else (3,)), dtype=torch.float64, generator=generator)

    def _both(self, what: str, run: Callable[[World], Any]) -> None:
        """Run something in both worlds, and compare all that there is."""
        before = Generators.now()
        expected, error = _tried(lambda: run(self.plain))
        after = Generators.now()
        before.put_back()
        state = frozen(self.ours)
        try:
            found, ours_error = _tried(lambda: run(self.ours))
            if isinstance(ours_error, EcoSpaError):
                raise ours_error
        except EcoSpaError as refusal:
            self._refused(what, refusal, state, before)
            before.put_back()
            found, ours_error = _tried(lambda: run(self.ours))
        if error is None and ours_error is not None:
            raise ours_error
        if error is not None and type(error) is not type(ours_error):
            raise Differs(f"{what}: {type(ours_error).__name__}, expected {type(error).__name__}: {error}")
        after.check(what)
        for i, (a, b) in enumerate(zip(_listed(expected), _listed(found), strict=True)):
            check_value(a, b, f"{what}: {('output', 'loss')[i]}")
        self._compare(what)

    def _refused(self, what: str, error: EcoSpaError, state: dict[str, Any], generators: Generators) -> None:
        """Check that a refused call has left the model as it was."""
        self.refusals.append(f"{type(error).__name__}: {error}")
        generators.check(f"refused {what} ({error})")
        check_same(state, frozen(self.ours), f"refused {what} ({error})")
        if not self.compiled:
            return
        names = [word for each in self._changed for word in _words(each)]
        if self.shrinks and any(name in str(error) for name in names):
            raise Ended
        raise Differs(f"{what}: a {'shrunk' if self.shrinks else 'compiled'} model refuses a call: {error}")

    def _library(self, what: str, run: Callable[[], Any]) -> list[Any]:
        """Run something that belongs to this library alone, and leaves all as it is; return its result in a list."""
        before, state = Generators.now(), frozen(self.ours)
        changes = what.startswith("shrink")
        try:
            result = [run()]
        except EcoSpaError as error:
            self.refusals.append(f"{what.split('(')[0]}: {type(error).__name__}: {error}")
            result, changes = [], False
            what = f"refused {what} ({error})"
        before.check(what)
        if not changes:
            check_same(state, frozen(self.ours), what)
        return result

    def _copied(self, what: str, copied: Callable[[Any], Any]) -> None:
        plain, error = _tried(lambda: copied((self.plain.model, self.plain.optimizer)))
        ours, ours_error = _tried(lambda: copied((self.ours.model, self.ours.optimizer)))
        if error is not None:
            if ours_error is None:
                raise Differs(f"{what}: works, expected {type(error).__name__}: {error}")
            return
        if ours_error is not None:
            raise ours_error
        originals = [*self.plain.model.parameters(), *self.ours.model.parameters()]
        self.plain.model, self.plain.optimizer = plain
        self.ours.model, self.ours.optimizer = ours
        with torch.no_grad():  # what happens to the original is of no concern to the copy
            for parameter in originals:
                parameter.fill_(7.0)
        self._compare(what)

    def _compare(self, what: str) -> None:
        check_same(dict(everything(self.plain)), dict(everything(self.ours)), what, self._cut)

    # The plain model after a shrink

    def _follow(self, keeps: dict[Any, Tensor]) -> None:
        """Note which entries are left, and remove the others from the plain model."""
        gone: dict[tuple[str, int], Tensor] = {}
        for coupling, keep in keeps.items():
            for member in coupling.members:
                stays = torch.isin(member.index, keep)
                axis = member.parameter, member.dim
                before = gone.get(axis, torch.zeros(len(member.index), dtype=torch.bool))
                gone[axis] = before | ((member.index >= 0) & ~stays)
        before = dict(self._cut.left)
        sizes = dict(self.plain.made().named_parameters())
        for axis, mask in gone.items():
            left = before.get(axis, torch.arange(sizes[axis[0]].shape[axis[1]]))
            if mask.any():
                self._cut.left[axis] = left[~mask]
        plan = ecospa_fx.plan(self.ours.model).kept
        for axis, left in self._cut.left.items():
            if axis[0] in sizes and (axis not in plan or not torch.equal(plan[axis], left)):
                raise Differs(f"shrink: the plan keeps {plan.get(axis)} of {axis}, expected {left}")
        buffers = {axis: kept for axis, kept in plan.items() if axis[0] not in sizes}
        self._cut.left |= buffers
        if self.sized:
            self._slice(before)
        else:
            self._zero(buffers=True)

    def _zero(self, buffers: bool = False) -> None:
        """Put zeros in the dense twin wherever an entry has been removed."""
        if self.sized:
            return
        model, states = self.plain.model, self.plain.optimizer.state
        named = dict(model.named_parameters()) | (dict(model.named_buffers()) if buffers else {})
        for (name, dim), left in self._cut.left.items():
            if name in named:
                tensor = named[name]
                gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
                gone[left] = False
                for each in (tensor.data, tensor.grad, *states.get(tensor, {}).values()):
                    if isinstance(each, Tensor) and each.shape == tensor.shape:
                        each.index_fill_(dim, gone.nonzero().flatten(), 0.0)

    def _slice(self, before: dict[tuple[str, int], Tensor]) -> None:
        """Make the plain model as small as the other."""
        model, states = self.plain.model, self.plain.optimizer.state
        named = dict(model.named_parameters()) | dict(model.named_buffers())
        for (name, dim), left in self._cut.left.items():
            tensor = named[name]
            was = before.get((name, dim), torch.arange(tensor.shape[dim]))
            stays = torch.isin(was, left).nonzero().flatten()
            state, grad = states.get(tensor, {}), tensor.grad
            tensor.grad = None
            shape, tensor.data = tensor.shape, tensor.data.index_select(dim, stays)
            tensor.grad = None if grad is None else grad.index_select(dim, stays)
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == shape:
                    state[key] = value.index_select(dim, stays)


class Interrupting:
    """A context in which a KeyboardInterrupt is raised at one line of this library."""

    def __init__(self, line: int, only: str = "") -> None:
        self.left, self.only = line, only

    def __enter__(self) -> None:
        """Begin to count lines."""
        if self.left:
            sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        """Count no more."""
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        path = frame.f_code.co_filename
        if not path.startswith(_PACKAGE) or "/testing/" in path:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace


def _tried(run: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return run(), None
    except Exception as error:
        return None, error


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [] if value is None else [value]


def _words(statement: str) -> list[str]:
    """Return the names of what a statement changes."""
    target = statement.split(" = ")[0].split(".fill_")[0].split(".mul_")[0]
    return [
        word
        for word in target.replace("[", ".").replace("]", "").split(".")
        if word[:1].isalpha() and word not in ("block", "world", "model", "Block", "a", "s")
    ]


def _fit(fresh: nn.Module, model: nn.Module) -> None:
    """Give a new plain model the sizes of another."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        named = dict(fresh.named_parameters()) | dict(fresh.named_buffers())
        if name in named and named[name].shape != tensor.shape:
            named[name].data = torch.zeros_like(tensor.data)
