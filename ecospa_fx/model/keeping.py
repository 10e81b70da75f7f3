"""Keeping: only the entries that are selected stay, in weights, programs, integers of modules and copies of the model.

keep_only(compiled, model, selection, journal)
  -> planned           the plan afterwards
  -> rewrite           a program under it for each call, which copies share
  -> prepare_tensors   smaller tensors beside the old ones
  -> commit            assignments only, once every rank has come so far
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.couple.coupling import CouplingSelection
from ecospa_fx.errors import ShrinkError
from ecospa_fx.logs import logger
from ecospa_fx.passes.follow.attributes import Attribute, Changes, Value, Values, sync_layer_sizes
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.passes.rewrite.program import Program
from ecospa_fx.passes.rewrite.replay import replay
from ecospa_fx.passes.rewrite.rewrite import rewrite
from ecospa_fx.passes.rewrite.stored import check_state_layouts
from ecospa_fx.plan import Plan
from ecospa_fx.ranks.fsdp2 import check_gathered_at_once, check_reduced, owners, reshard
from ecospa_fx.ranks.members import ranks_of
from ecospa_fx.ranks.tensor_parallel import parallel_count

from .class_swap import unswap_forward
from .compiled import MODEL, CompiledModel
from .copies import Copy, check_plan
from .joint_offers import joint_offers
from .journal import Journal
from .memory import in_shared_memory
from .optimizer_state import averages_of
from .planning import planned
from .slicing import Absorber, prepare_tensors
from .specialization import Specialization
from .whole import shared_numbers


@torch.inference_mode(False)
def keep_only(
    compiled: CompiledModel,
    model: nn.Module,
    selection: CouplingSelection,
    journal: Journal,
    optimizers: Iterable[Optimizer] = (),
    copies: Sequence[Copy] = (),
    absorb: Absorber | None = None,
) -> None:
    """Keep only the selected entries of each coupling, everywhere; see `ecospa_fx.shrink`.

    Args:
        compiled: the state of the model.
        model: the compiled model.
        selection: coupling (or its name) -> entries to keep.
        journal: that of the change, of which this is a part.
        optimizers: the optimizers that hold the parameters.
        copies: copies of the model that shrink with it.
        absorb: statistics by which entries that stay take over.
    """
    # Everything new is made beside the old, on every rank; then come assignments only.
    prepared = ranks_of(model).together(
        "shrink",
        lambda: _prepared(compiled, model, selection, tuple(optimizers), copies, absorb),
        lambda prepared: prepared.facts(compiled.plan),
        hint=_ALIKE,
    )
    prepared.commit(journal)


_ALIKE = (
    "They decide by weights and gradients, which all must have alike: where each steps by its own for a while (local "
    "SGD, no_sync, a communication hook that does not reduce over all of them), average both before a shrink"
)


def _in_shared_memory(model: nn.Module, after: Plan) -> list[str]:
    """Return the names of tensors that lose entries and lie in memory that other processes may hold, too."""
    named = {name: t for name, t in named_tensors(model).items() if name in after.original_shapes}
    return [name for name, t in named.items() if in_shared_memory(t) and tuple(t.shape) != after.shape(name)]


def _warn_of_shared(names: Sequence[str]) -> None:
    logger("shrink").warning(
        "%d weights, the first is `%s`, lie in memory that other processes may hold too (share_memory, or a model that "
        "was sent to this one); here they get memory of their own, and others keep the sizes of before",
        len(names), names[0],
    )  # fmt: skip


def _prepared(
    compiled: CompiledModel,
    model: nn.Module,
    selection: CouplingSelection,
    optimizers: Sequence[Optimizer],
    copies: Sequence[Copy],
    absorb: Absorber | None,
) -> _Prepared:
    reshard(model)
    check_reduced(model)
    for name in compiled.regions:
        check_gathered_at_once(name, model.get_submodule(name), compiled.execution)
    compiled.follow(model)
    if compiled.execution == "graph" and compiled.state.shared_out:
        ranks_of(model).meet("look at how weights are sharded")  # which takes calls of layers
    if compiled.execution == "graph":
        for name in compiled.regions:
            compiled.regions[name].check_shared(model.get_submodule(name), model)
    joints = joint_offers(compiled.state, compiled.regions)
    after = planned(compiled.plan, compiled.regions, compiled.couplings(), selection, joints)
    shared = _in_shared_memory(model, after)
    rewritten: dict[Program, Program] = {}
    specializations = _rewritten(compiled, model, after, rewritten)
    twins = [(copy.module, _of_copy(compiled, copy)) for copy in copies if copy.module is not None]
    of_twins = [_rewritten(twin, module, after, rewritten) for module, twin in twins]
    mine = named_tensors(model)
    names = {id(tensor): name for name, tensor in mine.items() if name in after.original_shapes}
    tensors = [(name, t) for each in (mine, *(copy.tensors for copy in copies)) for name, t in each.items()]
    named = [(names.get(id(mine[name]), name), tensor) for name, tensor in tensors]
    replaced: dict[int, Tensor] = {}
    if absorb is not None:
        weights = [mine, *(copy.tensors for copy in copies), *averages_of(mine, optimizers)]
        replaced = absorb.absorbed(compiled.plan, after, weights)
    change = prepare_tensors(named, compiled.plan, after, optimizers, replaced, owners(model))
    attributes = _attributes_under(compiled, after)
    numbers = _numbers_here(compiled, model, attributes)

    def commit(journal: Journal) -> None:
        for module in (model, *(module for module, _ in twins)):
            journal.note_modules(module)
            _hold(module, numbers)
        change.commit(journal)
        if shared:
            journal.note_later(partial(_warn_of_shared, shared))
        if compiled.execution == "module":
            for module in (model, *(module for module, _ in twins)):
                sync_layer_sizes(module)
        _adopt(compiled, after, specializations, attributes, journal)
        compiled.guard_inner(model)
        for (module, twin), theirs in zip(twins, of_twins, strict=True):
            _adopt(twin, after.copy(), theirs, dict(attributes), journal)
            if module.__dict__.get(MODEL) is not twin:
                unswap_forward(module)  # it may have been waiting for its first call
                module.__dict__[MODEL] = twin
                twin.route(module)
            twin.guard_inner(module)

    return _Prepared(after, commit)


def _numbers_here(compiled: CompiledModel, model: nn.Module, attributes: Changes) -> Values:
    """Return the integers that modules are to hold; where they hold the part of this rank, that part."""
    shared, ranks = shared_numbers(model, compiled.regions), parallel_count(model)
    numbers: dict[Attribute, Value] = {attribute: now for attribute, (_, now) in attributes.items()}
    for attribute, now in numbers.items():
        if attribute not in shared or not isinstance(now, int):
            continue
        if now % ranks:
            raise ShrinkError(
                f"`{attribute}` is of the part of one of {ranks} ranks, and would be {now} for all of them; keep a "
                f"multiple of {ranks}"
            )
        numbers[attribute] = now // ranks
    return numbers


def _hold(module: nn.Module, numbers: Values) -> None:
    """Let the integers of modules, and what they take of their arguments, follow."""
    for attribute, now in numbers.items():
        if attribute.read(module) != now:
            attribute.write(module, now)


def _rewritten(
    compiled: CompiledModel, model: nn.Module, plan: Plan, rewritten: dict[Program, Program]
) -> dict[str, list[Specialization]]:
    """Return the specializations of each region under a plan.

    Args:
        compiled: the state of the model, or of a copy of it.
        model: that model.
        plan: the plan.
        rewritten: programs before -> programs under the plan, which copies of the model share; filled here.
    """
    for name, region in compiled.regions.items():
        for each in region.specializations:
            if each.program not in rewritten:
                kept = replay(each.axis_facts, plan)
                rewritten[each.program] = rewrite(each.axis_facts, kept, model.get_submodule(name))
        check_state_layouts(
            (each.axis_facts, replay(each.axis_facts, plan))
            for each in region.specializations
            if each.captured.carried.types
        )
    return {
        name: [replace(each, program=rewritten[each.program]) for each in region.specializations]
        for name, region in compiled.regions.items()
    }


def _attributes_under(compiled: CompiledModel, plan: Plan) -> Changes:
    """Return the integers of modules that follow under a plan: the value before any shrink, and then."""
    attributes = dict(compiled.attributes)
    for region in compiled.regions.values():
        support = region.python_support
        if support is not None:
            before, now = support.values({}), support.values(replay(region.naming_graph.axis_facts, plan))
            attributes |= {a.within(region.name): (before[a], now[a]) for a in before if before[a] != now[a]}
    return attributes


def _adopt(
    compiled: CompiledModel,
    plan: Plan,
    specializations: Mapping[str, list[Specialization]],
    attributes: Changes,
    journal: Journal,
) -> None:
    for name, region in compiled.regions.items():
        journal.note_attribute(region, "specializations")
        region.specializations = specializations[name]
        if region.border:
            journal.note_attribute(region, "routing")
            region.routing = region.routing.without_routes()
    journal.note_object(compiled.state)
    compiled.state.adopt(plan, attributes)


def _of_copy(compiled: CompiledModel, copied: Copy) -> CompiledModel:
    """Return the state of a copy of the model, a new one if it was copied before this model was captured."""
    theirs: CompiledModel | None = None if copied.module is None else copied.module.__dict__.get(MODEL)
    if theirs is not None:
        check_plan(copied, theirs.plan, compiled.plan)
        if theirs.regions:
            return theirs
    return copy.deepcopy(compiled)


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A shrink that is ready: the plan after it, and a function that puts everything in place."""

    after: Plan
    commit: Callable[[Journal], None]

    def facts(self, before: Plan) -> dict[str, object]:
        """Describe by (parameter, dim) what stays, to compare it between ranks: how much, and a code of the rest."""
        return {
            f"the entries kept of `{name}` along dim {dim}": [len(kept), crc32(kept.numpy().tobytes())]
            for (name, dim), kept in self.after.kept.items()
            if (name, dim) not in before.kept or not torch.equal(kept, before.kept[name, dim])
        }
