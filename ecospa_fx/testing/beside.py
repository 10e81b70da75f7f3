"""Beside: a compiled model and the plain one through the same loop, compared after every step.

    both = Beside(source, execution="graph", regions="root")
    both.compile()
    both.train(3)
    both.change("block.tau = 0.5")
    both.shrink(0)
    both.train(3)

Each step leaves both equal in outputs, gradients, all state and all generators, or is refused by an error of this
library, which leaves everything as it was.
"""

from __future__ import annotations

import copy
import pickle
import random
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.api import compile
from ecospa_fx.checkpoint.save_load import load, resume, save
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import EcoSpaError, NoInputsError
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.execution import Execution
from ecospa_fx.model.lookup import couplings, plan
from ecospa_fx.model.restore import restore
from ecospa_fx.model.shrinking import shrink
from ecospa_fx.passes.axes.algebra import atoms_of
from ecospa_fx.passes.graph.tensors import join
from ecospa_fx.see.explanation import explain
from ecospa_fx.see.verification import verify

from .interrupting import Interrupting
from .sandbox import WORLDS, Differs, Generators, Sandbox, check_same, check_value, everything, frozen, optimizer_of
from .twins import Axis, Remains, fitted


class Ended(Exception):
    """The end of a program: a shrunk model cannot run a call, and says why."""


class Beside:
    """Two worlds of one file: the plain model, and one compiled by this library.

    Args:
        source: code of the file, which has a class `Model`.
        execution: as for `compile`.
        regions: as for `compile`.
        sized: whether it draws random tensors whose sizes shrink.
        tokens: whether its arguments are `[batch, token, entry]`, else `[batch, entry]`.

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
        self.plain, self.ours = (Sandbox(source, name) for name in WORLDS)
        self.refusals: list[str] = []
        self.shrinks = 0
        self._remains = Remains()
        self._inputs = 0  # drawn so far
        self._called: set[bool] = set()  # modes, train or eval, in which a call of the compiled model is captured
        self._ran: set[bool] = set()  # those of calls that have been made, with what a first call does
        self._changed: list[str] = []  # statements of the loop since the last shrink
        self._compare("before compile")

    goes_on_after_errors = True

    @property
    def compiled(self) -> bool:
        """True while the model is compiled."""
        return MODEL in self.ours.model.__dict__

    def called(self, world: Sandbox) -> nn.Module:
        """Return what the loop calls to train: the model itself."""
        return world.model

    # Steps of both: each is one line of a program

    def call(self, batch: int) -> None:
        """Run the model without gradients."""
        x = self._input(batch)

        def run(world: Sandbox) -> Any:
            with torch.no_grad():
                return world.model(x)

        self._both(f"call({batch})", run)

    def train(self, batch: int) -> None:
        """Run the model, its backward, and a step of the optimizer."""
        x = self._input(batch)
        for world in (self.plain, self.ours):
            world.model.zero_grad()

        def run(world: Sandbox) -> Any:
            y = self.called(world)(x)
            loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
            for module in world.model.modules():
                loss = loss + sum(v for k, v in vars(module).items() if k.startswith("aux") and isinstance(v, Tensor))
            loss.backward()
            return y, loss

        self._both(f"train({batch})", run)
        if not self.sized:
            self._remains.zero(self.plain.model, self.plain.optimizer)
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
            exec(statement, dict(vars(world.module)), _scope(world, block))

    def keep(self, code: str, block: int = 0) -> None:
        """Let the loop keep an object of the model, which is compared from then on."""
        for world in (self.plain, self.ours):
            place = code.replace("block.", f"blocks.{block}.")
            world.memory[place] = eval(code, dict(vars(world.module)), _scope(world, block))

    def state_dict(self) -> None:
        """Change all weights, and load those from before."""
        expected, found = (world.model.state_dict() for world in (self.plain, self.ours))
        check_same(expected, found, "state_dict", self._remains)
        errors = []
        for world, state in ((self.plain, copy.deepcopy(expected)), (self.ours, copy.deepcopy(found))):
            with torch.no_grad():
                for tensor in world.model.parameters():
                    tensor.mul_(2)
            errors.append(_tried(partial(world.model.load_state_dict, state))[1])
        _check_error("state_dict", *errors)
        self._compare("state_dict")

    def deepcopy(self) -> None:
        """Go on with a copy of the model and its optimizer."""
        self._copied("deepcopy", copy.deepcopy)

    def pickle(self) -> None:
        """Go on with the model and its optimizer, pickled and read again."""
        self._copied("pickle", lambda each: pickle.loads(pickle.dumps(each)))

    # Steps of this library

    def compile(self, batch: int = 0) -> None:
        """Compile the model; with a batch size, capture a call now."""
        options: dict[str, Any] = {"regions": self.regions, "execution": self.execution}
        if batch:
            options["example_inputs"] = (self._input(batch),)
        if self._library("compile", lambda: compile(self.ours.model, **options)) and batch:
            self._called.add(self.ours.model.training)

    def explain(self, batch: int = 2) -> None:
        """Explain the model, which leaves it as it is."""
        x = self._input(batch)
        self._library("explain", lambda: str(explain(self.ours.model, example_inputs=(x,))))

    def verify(self, batch: int = 2) -> None:
        """Verify the model, which leaves it as it is."""
        if not self.compiled:
            return
        x = self._input(batch)
        for result in self._library("verify", lambda: verify(self.ours.model, example_inputs=(x,))):
            if not result.ok:
                raise Differs(f"verify: {result}")

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
            found = [c for c in couplings(model) if c.size > 1 and not _reduced(model, c)]
        except NoInputsError:  # nothing has been called so far
            return
        if not found:
            return
        chosen = found if dice.random() < 0.3 else [dice.choice(found)]
        keeps = {c: torch.tensor(sorted(dice.sample(range(c.size), dice.randint(1, c.size - 1)))) for c in chosen}
        shapes = {name: p.shape for name, p in model.named_parameters()}

        def shrink_or_not() -> bool:
            try:
                with Interrupting(line):
                    shrink(model, keeps, optimizer=self.ours.optimizer)
            except KeyboardInterrupt:
                return {name: p.shape for name, p in model.named_parameters()} != shapes
            return True

        if any(self._library(f"shrink({seed})", shrink_or_not, changes=True)):
            self.shrinks += 1
            self._changed.clear()
            self._follow(keeps)
        self._compare(f"shrink({seed}{f', line={line}' if line else ''})")

    def save_and_load(self) -> None:
        """Save the model, make a new one and load it."""

        def reload() -> tuple[nn.Module, Any]:
            with tempfile.TemporaryDirectory() as folder:
                where = Path(folder) / "saved"
                save(self.ours.model, where, optimizer=self.ours.optimizer)
                loaded = load(where, self.ours.made)
                optimizer = optimizer_of(loaded)
                resume(where, loaded, optimizer=optimizer)
            return loaded, optimizer

        for loaded, optimizer in self._library("save_and_load", reload) if self.compiled else ():
            loaded.train(self.ours.model.training)
            self.ours.model, self.ours.optimizer = loaded, optimizer
            fresh = fitted(self.plain.made(), self.plain.model)
            fresh.load_state_dict(self.plain.model.state_dict())
            for path, module in self.plain.model.named_modules():
                buffers = fresh.get_submodule(path)._buffers
                for name, buffer in module._buffers.items():  # `save` keeps dtypes, and what a state_dict leaves out
                    if name in module._non_persistent_buffers_set:
                        buffers[name] = buffer
                    elif buffer is not None and (loaded_one := buffers[name]) is not None:
                        buffers[name] = loaded_one.to(buffer.dtype)
            fresh.train(self.plain.model.training)
            plain_optimizer = optimizer_of(fresh)
            plain_optimizer.load_state_dict(self.plain.optimizer.state_dict())
            self.plain.model, self.plain.optimizer = fresh, plain_optimizer
            self._forget()
            self._compare("save_and_load")

    # Comparison

    def _input(self, batch: int) -> Tensor:
        self._inputs += 1
        generator = torch.Generator().manual_seed(self._inputs)
        shape = (batch, 3, 3) if self.tokens else (batch, 3)
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    def _both(self, what: str, run: Callable[[Sandbox], Any]) -> None:
        """Run something in both worlds, and compare all that there is."""
        before = Generators.now()
        expected, error = _tried(lambda: run(self.plain))
        if error is not None and not self.goes_on_after_errors:
            raise Ended
        after = Generators.now()
        before.put_back()
        state = frozen(self.ours)
        found, ours_error = _tried(lambda: run(self.ours))
        if isinstance(ours_error, EcoSpaError):
            self._check_refused(what, ours_error, state, before)
            before.put_back()
            found, ours_error = _tried(lambda: run(self.ours))
        _check_error(what, error, ours_error)
        after.check(what)
        if error is not None:  # how far a backward comes that fails depends on the order in which its ops ran
            for world in (self.plain, self.ours):
                world.model.zero_grad()
        if self.compiled and ours_error is None:
            self._called.add(self.ours.model.training)
            self._ran.add(self.ours.model.training)
        known = self.compiled and self.ours.model.__dict__[MODEL].captured
        if self.shrinks and not self.sized and known:  # a graph of a new mode may reduce over what has shrunk
            shrunk = (each for each in couplings(self.ours.model) if each.size < each.original_size)
            if any(_reduced(self.ours.model, each) for each in shrunk) or self._own_python_alone():
                raise Ended
        for name, a, b in zip(("output", "loss"), _listed(expected), _listed(found), strict=False):
            check_value(a, b, f"{what}: {name}")
        self._compare(what)

    def _check_refused(self, what: str, error: EcoSpaError, state: dict[str, Any], generators: Generators) -> None:
        """Check that a call may be refused, and has left the model as it was.

        Only the first call may be, after which the model is made plain, and one of a shrunk model, in a mode that it
        has not been called in so far, or whose cause is named; and a first call that does what others would not.
        """
        self.refusals.append(f"{type(error).__name__}: {error}")
        if not self._ran_partly():
            generators.check(f"refused {what} ({error})")
            check_same(state, frozen(self.ours), f"refused {what} ({error})")
        if self.compiled and not self.ours.model.__dict__[MODEL].captured:
            restore(self.ours.model)  # it would wait for a call that it can capture
        if not self.compiled:
            return
        if self.shrinks and self.ours.model.training not in self._called:
            raise Ended
        if self.shrinks and "in its first call" in str(error) and self.ours.model.training not in self._ran:
            raise Ended
        if self.shrinks and any(name in str(error) for each in self._changed for name in _names(each)):
            raise Ended
        raise Differs(f"{what}: a {'shrunk' if self.shrinks else 'compiled'} model refuses a call: {error}")

    def _own_python_alone(self) -> bool:
        """Return whether the model's Python runs in a mode of which no graph says what it reduces over."""
        if self.execution != "module":
            return False
        regions = self.ours.model.__dict__[MODEL].regions.values()
        modes = {each.captured.signature.training[0] for region in regions for each in region.specializations}
        return self.ours.model.training not in modes

    def _ran_partly(self) -> bool:
        """Return whether a call that one region refuses may have run the Python of others before it came there."""
        if not self.shrinks:
            return False
        return any(region.uncaptured is not None for region in self.ours.model.__dict__[MODEL].regions.values())

    def _library(self, what: str, run: Callable[[], Any], changes: bool = False) -> list[Any]:
        """Run something that belongs to this library alone, and, unless it is to change the model, leaves it as it is.

        Returns:
            Its result in a list; an empty one if it was refused.
        """
        generators, state = Generators.now(), frozen(self.ours)
        try:
            result = [run()]
        except EcoSpaError as error:
            self.refusals.append(f"{what.split('(')[0]}: {type(error).__name__}: {error}")
            result, changes, what = [], False, f"refused {what} ({error})"
        generators.check(what)
        if not changes:
            check_same(state, frozen(self.ours), what)
        return result

    def _copied(self, what: str, copied: Callable[[Any], Any]) -> None:
        plain, error = _tried(lambda: copied((self.plain.model, self.plain.optimizer)))
        ours, ours_error = _tried(lambda: copied((self.ours.model, self.ours.optimizer)))
        _check_error(what, error, ours_error)
        if error is not None:
            return
        originals = [*self.plain.model.parameters(), *self.ours.model.parameters()]
        self.plain.model, self.plain.optimizer = plain
        self.ours.model, self.ours.optimizer = ours
        self._forget()
        with torch.no_grad():  # whatever happens to the originals is of no concern to the copies
            for parameter in originals:
                parameter.fill_(7.0)
        self._compare(what)

    def _forget(self) -> None:
        """Drop the parts of a model that the loop has kept, once another one trains."""
        for world in (self.plain, self.ours):
            world.memory.clear()

    def _compare(self, what: str) -> None:
        check_same(dict(everything(self.plain)), dict(everything(self.ours)), what, self._remains)

    def _follow(self, keeps: Mapping[Coupling, Tensor]) -> None:
        """Note which entries are left, and remove the others from the plain model."""
        gone: dict[Axis, Tensor] = {}
        for coupling, keep in keeps.items():
            for member in coupling.members:
                goes = (member.index >= 0) & ~torch.isin(member.index, keep)
                axis = member.parameter, member.dim
                gone[axis] = gone[axis] | goes if axis in gone else goes
        before, sizes = dict(self._remains.left), dict(self.plain.made().named_parameters())
        left_by_plan = plan(self.ours.model).kept
        self._remains.take(gone, {axis: kept for axis, kept in left_by_plan.items() if axis[0] not in sizes}, sizes)
        for axis, left in self._remains.left.items():
            if axis not in left_by_plan or not torch.equal(left_by_plan[axis], left):
                raise Differs(f"shrink: the plan keeps {left_by_plan.get(axis)} of {axis}, expected {left}")
        if self.sized:
            self._remains.slice(self.plain.model, self.plain.optimizer, before)
        else:
            self._remains.zero(self.plain.model, self.plain.optimizer, buffers=True)


def _reduced(model: nn.Module, coupling: Coupling) -> bool:
    """Return whether a reduction runs over what is left of a coupling, which no zeros in a plain model stand for."""
    members = [(member.parameter, member.dim) for member in coupling.members]
    for name, region in model.__dict__[MODEL].regions.items():
        for each in region.specializations:
            facts = each.program.axis_facts
            reduced = {atom for fact in facts.facts if fact.role == "reduced" for atom in atoms_of(fact.expr)}
            along = ((join(name, inside), dim, expr) for inside, exprs in facts.parameters.items()
                     for dim, expr in enumerate(exprs))  # fmt: skip
            if any((full, dim) in members and reduced & set(atoms_of(expr)) for full, dim, expr in along):
                return True
    return False


def _scope(world: Sandbox, block: int) -> dict[str, Any]:
    """Return the names that statements of a loop know."""
    model: Any = world.model
    return {"model": model, "block": model.blocks[block], "world": world.module}


def _tried(run: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return run(), None
    except Exception as error:
        return None, error


def _check_error(what: str, expected: Exception | None, found: Exception | None) -> None:
    if expected is None and found is not None:
        raise found
    if type(expected) is not type(found):
        raise Differs(f"{what}: {type(found).__name__}, expected {type(expected).__name__}: {expected}")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [] if value is None else [value]


def _names(statement: str) -> list[str]:
    """Return the names of what a statement of the loop changes, such as `tau` of `block.tau = 0.5`."""
    target = re.split(r" = |\.fill_|\.mul_", statement)[0]
    return [name for name in re.findall(r"[A-Za-z]\w*", target) if name not in ("block", "world", "model", "Block")]
