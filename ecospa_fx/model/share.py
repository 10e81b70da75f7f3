"""Share: the part of a region that this rank computes, where tensor parallelism spreads its weights.

A rank computes what the model computes with its part of the entries alone, but for the sums over ranks, which the
modules with sharded weights see to themselves. So its program is that of a shrink to these entries.

    plan, shards -> the plan of this rank -> rewrite -> a program that calls those modules
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ecospa_fx.collectives import is_distributed
from ecospa_fx.errors import PinnedAxisError, WrapperError
from ecospa_fx.passes.axes.algebra import Atom
from ecospa_fx.passes.axes.selection import Selected
from ecospa_fx.passes.capture.hooks import calls_itself, other_hooks
from ecospa_fx.passes.graph.tensors import join
from ecospa_fx.passes.rewrite.program import Program
from ecospa_fx.passes.rewrite.replay import replay
from ecospa_fx.passes.rewrite.rewrite import rewrite
from ecospa_fx.plan import Plan
from ecospa_fx.ranks.shards import is_sharded
from ecospa_fx.ranks.tensor_parallel import parallel_modules, sends, shardings


@dataclass(frozen=True)
class _Layout:
    """The entries that an nn.Linear with sharded weights takes and returns.

    Attributes:
        takes_share: those of this rank, and not all.
        returns_share: those of this rank, and not all.
    """

    takes_share: bool
    returns_share: bool


class Share:
    """The part of a region that this rank computes.

    Args:
        name: of the region.
        module: the region, whose weights are sharded now. Every rank must be here.

    Raises:
        WrapperError: a graph cannot be run so.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        check_served(name, module)
        linears = parallel_modules(module)
        self._layouts = {path: _layout(join(name, path), each) for path, each in linears.items() if _weight(each)}
        self._first = next(linears[path] for path in self._layouts)
        self._programs: list[tuple[Program, Program]] = []  # those of all ranks together, and of this one

    @property
    def ranks(self) -> int:
        """The number of ranks that compute the region together."""
        return max((each.ranks for each in shardings(self._first._parameters["weight"]).values()), default=1)

    def holds(self) -> bool:
        """Return whether the weights are sharded now: for a while all ranks may hold all of them."""
        return is_sharded(self._first._parameters["weight"])

    def program(self, whole: Program, plan: Plan, module: nn.Module, alive: Iterable[Program]) -> Program:
        """Return the program of this rank for one of the whole region.

        Args:
            whole: the program of all ranks together.
            plan: the plan that it is of.
            module: the region.
            alive: all programs that the region has now.
        """
        for held, mine in self._programs:
            if held is whole:
                return mine
        made: Program = self._add(whole, plan, module, alive)
        return made

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _add(self, whole: Program, plan: Plan, module: nn.Module, alive: Iterable[Program]) -> Program:
        now = [*alive]
        self._programs = [pair for pair in self._programs if any(pair[0] is each for each in now)]
        mine: Program = rewrite(whole.axis_facts, self.kept(whole, plan, module), module)
        self._programs.append((whole, mine))
        return mine

    def kept(self, whole: Program, plan: Plan, module: nn.Module) -> dict[Atom, Selected]:
        """Return the entries that this rank computes, in atoms of one program's graph."""
        try:
            return replay(whole.axis_facts, self.plan(plan, module))
        except PinnedAxisError as error:
            raise WrapperError(
                f"region `{self.name}` cannot run with its weights sharded as they are: {error}. Shard a weight by "
                "columns and the one that takes what it returns by rows, whole heads on each rank; or use "
                "execution='module'"
            ) from error

    def plan(self, plan: Plan, module: nn.Module) -> Plan:
        """Return the plan of this rank: of what a plan keeps, the entries that it computes."""
        mine = plan.copy()
        for path, layout in self._layouts.items():
            for name, parameter in module.get_submodule(path)._parameters.items():
                for dim, sharding in shardings(parameter).items():
                    if not (layout.takes_share if dim == 1 else layout.returns_share):
                        continue
                    full = join(self.name, f"{path}.{name}")
                    mine.original_shapes.setdefault(full, tuple(parameter.shape))  # type: ignore[union-attr]
                    size = parameter.shape[dim]  # type: ignore[union-attr]
                    mine.kept[full, dim] = plan.kept.get((full, dim), torch.arange(size))[sharding.here(size)]
        return mine


def share_of(name: str, module: nn.Module) -> Share | None:
    """Return the part of a region that this rank computes; None where each rank computes all of it."""
    if not is_distributed() or not any(is_sharded(parameter) for parameter in module.parameters()):
        return None
    share: Share = _made(name, module)
    return share


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _made(name: str, module: nn.Module) -> Share:
    return Share(name, module)


def check_served(name: str, module: nn.Module, model: nn.Module | None = None) -> None:
    """Refuse a region that runs as one graph, with modules in it that tensor parallelism has changed otherwise.

    Args:
        name: of the region.
        module: the region, in a forward; or
        model: the model that it is a part of, outside of one.

    Raises:
        WrapperError: it has such modules.
    """
    for path, child in parallel_modules(module, model).items():
        if not (calls_itself(child) and _weight(child)):
            raise WrapperError(
                f"`{join(name, path)}` ({type(child).__name__}) is parallel over ranks, and "
                f"{f'region `{name}`' if name else 'the model'} runs as one graph, which calls nn.Linear alone as a "
                "module: compile with execution='module', or leave it out of the plan of parallelize_module"
            )


def _weight(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and is_sharded(module._parameters.get("weight"))


@torch.no_grad()
def _layout(name: str, linear: nn.Module) -> _Layout:
    """Find by a small call how many entries an nn.Linear takes and returns."""
    weight: Any = linear._parameters["weight"]
    by_dim = shardings(weight)
    (given,) = {len(each.here(weight.shape[1])) for dim, each in by_dim.items() if dim == 1} or {weight.shape[1]}
    ranks = weight.device_mesh.size()
    with _without_others(linear), _quiet():
        for width in dict.fromkeys((given, weight.shape[1])):
            taken = torch.zeros(ranks, ranks, width, dtype=weight.dtype, device=weight.device)
            try:
                result = linear(taken)
            except RuntimeError:
                continue
            if is_sharded(result) or result.shape[:-1] != taken.shape[:-1]:
                break
            return _Layout(width != weight.shape[1], result.shape[-1] != weight.shape[0])
    raise WrapperError(
        f"`{name}` takes or returns DTensors, or shards of a sequence, and the region around it runs as one graph of "
        "plain tensors: compile with execution='module', or use layouts in which tensors are local and whole, or "
        "shared out along the last dim"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Let torch say nothing of sizes that do not fit."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def _without_others(linear: nn.Module) -> Any:
    """Silence the hooks of a module that do not speak for a device mesh."""

    def other(path: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        return hook if sends(hook) else lambda *_, **__: None

    return other_hooks(linear, [""], other)
