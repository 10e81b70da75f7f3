"""Across regions: blocks and what lies between them, with the couplings that cross their edges.

choose_regions(model, args, kwargs, how)
  -> choose           regions, each on its own
  -> joined           couplings across them: where that was asked for, or the root covers more and cannot be captured

joined(model, args, kwargs, analyses)
  -> _more            modules that hold weights outside of the blocks (an embedding, a head) are regions too
  -> follow_between   what the model runs between its regions
  -> find_joints      the couplings across
  -> not_followed     the model's own Python between the regions, tried at the sizes that a shrink leaves
  -> on_other_paths   what it runs there in the other mode, or if the tensors that it asks say otherwise
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ecospa_fx.errors import CaptureError
from ecospa_fx.logs import logger
from ecospa_fx.passes.capture.between import Between, ForwardPath, follow_between
from ecospa_fx.passes.capture.options import DEFAULTS, CaptureOptions
from ecospa_fx.passes.capture.outside_numbers import OutsideNumbers, Place
from ecospa_fx.passes.capture.record import ATTEMPTS
from ecospa_fx.passes.graph.shared_memory import SharedMemory
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.passes.graph.uncompiled import uncompiled
from ecospa_fx.passes.ir.border import WeightDim

from .analyse import Analysis, Captures
from .analyse_calls import analyse_calls
from .coverage import Coverage
from .flow import RegionFlow, flow_of
from .joint import Joint
from .joints import find_joints
from .joints_tried import not_followed
from .left_whole import Refusal
from .other_paths import on_other_paths
from .regions import choose


@dataclass(frozen=True, eq=False)
class Chosen:
    """The regions of a model.

    Attributes:
        analyses: the regions by name.
        failed: submodules that were not captured, with the reasons.
        joints: the couplings that cross their edges.
        refusals: axes that cross them and cannot shrink, with the reasons.
        flow: the calls of regions, where couplings cross their edges.
        numbers: places of the numbers that the model's own Python reads outside of the regions.
    """

    analyses: dict[str, Analysis]
    failed: dict[str, str]
    joints: tuple[Joint, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    flow: RegionFlow | None = None
    numbers: frozenset[Place] = frozenset()


@uncompiled()
def choose_regions(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    how: str | Sequence[str] = "auto",
    captures: Captures | None = None,
    options: CaptureOptions = DEFAULTS,
    across: bool = True,
) -> Chosen:
    """Choose the regions of a model, and analyse them.

    With `"auto"`, regions are joined where the root would cover more than they do and cannot be captured.

    Args:
        model: the model; left as it is.
        args: positional arguments of a call.
        kwargs: keyword arguments of a call.
        how: as `choose` takes it, or `"joined"`: blocks, and what lies between them.
        captures: gets the captured blocks, for equal ones to share.
        options: of the model's captures.
        across: whether `"auto"` may take couplings that cross the edges of regions.

    Raises:
        CaptureError: nothing can be captured.
    """
    captures, numbers = [] if captures is None else captures, OutsideNumbers()
    apart = "blocks" if how == "joined" else how
    try:
        chosen = Chosen(*choose(model, args, kwargs, apart, captures, options, numbers))
    except CaptureError as error:
        if not across or how not in ("auto", "joined"):
            raise
        chosen = _joined_alone(model, args, kwargs, captures, options, error)
        return replace(chosen, numbers=numbers.places(chosen.analyses))
    if how == "joined" and "" not in chosen.analyses:
        found = joined(model, args, kwargs, chosen.analyses, captures, options)
        chosen = replace(found, failed=chosen.failed | found.failed)
    elif how == "auto" and across and "" in chosen.failed:
        chosen = _joined_if_it_covers_more(model, args, kwargs, chosen, captures, options)
    return replace(chosen, numbers=numbers.places(chosen.analyses))


def _joined_alone(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    captures: Captures,
    options: CaptureOptions,
    why: CaptureError,
) -> Chosen:
    """Join submodules that have no coupling of their own: single layers in a forward that cannot be captured.

    Raises:
        CaptureError: `why`, where they have not a coupling between them either.
    """
    try:
        found = joined(model, args, kwargs, {}, captures, options)
    except Exception as error:  # the call itself may be at fault
        logger("discover").info("regions cannot be joined: %s", error)
        raise why from None
    if not found.joints:
        raise CaptureError(f"{why}{_no_joint(found.refusals)}") from why
    return replace(found, failed={"": str(why)} | found.failed)


def _no_joint(refusals: Sequence[Refusal]) -> str:
    if not refusals:
        return ""
    first = refusals[0]
    return f". Nor can what runs through its submodules shrink: {', '.join(first.members[:3])}: {first.reasons[0]}"


def _joined_if_it_covers_more(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    apart: Chosen,
    captures: Captures,
    options: CaptureOptions,
) -> Chosen:
    """Join regions if that brings more matrices onto couplings than they do alone; else leave them as they are."""
    try:
        found = joined(model, args, kwargs, apart.analyses, captures, options)
    except CaptureError as error:
        logger("discover").info("regions cannot be joined: %s", error)
        return apart
    coverage = Coverage(model)
    alone = coverage.on_couplings(apart.analyses)
    together = coverage.on_couplings(found.analyses) | coverage.counted(m for j in found.joints for m in j.matrices)
    if coverage.share(together) <= coverage.share(alone):
        return apart
    return replace(found, failed=apart.failed | found.failed)


def joined(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    blocks: Mapping[str, Analysis],
    captures: Captures,
    options: CaptureOptions,
) -> Chosen:
    """Add regions to those of a model, and find the couplings that cross their edges."""
    analyses, failed = dict(blocks), dict[str, str]()
    more = _around(model, blocks)
    while True:
        between, path = _between(model, args, kwargs, {*analyses, *more})
        waiting = [name for name in more if name not in analyses]
        more = []
        for name in waiting:
            calls = [call.call for call in between.calls if call.region == name]
            try:
                if not calls:
                    raise CaptureError("it is not called in this forward of the model")
                analyses[name] = analyse_calls(
                    model, name, calls, captures, SharedMemory(named_tensors(model)), {}, options
                )
            except CaptureError as error:
                children = [f"{name}.{child}" for child, _ in model.get_submodule(name).named_children()]
                more += [child for child in children if _holds_weights(model.get_submodule(child))]
                if not more and calls:
                    failed[name] = str(error)
        if set(waiting) <= analyses.keys():
            break
        more += [name for name in waiting if name in analyses]
    tensors = named_tensors(model)
    refused: dict[WeightDim, str] = {}
    while True:
        found = find_joints(model, between, analyses, refused=refused, experiments=options.experiments)
        why = not_followed(model, args, kwargs, between, found, tensors, path)
        why = why or on_other_paths(model, args, kwargs, between, found, path, options.experiments)
        if not why:
            break
        refused |= why
    logger("discover").info(
        "couplings across regions: %s; %d refused",
        ", ".join(j.name for j in found.joints) or "none",
        len(found.refusals),
    )
    # A module between blocks that no coupling reaches runs its own Python.
    used = {
        name: analysis
        for name, analysis in found.analyses.items()
        if name in blocks or found.edges.get(name) or analysis.discovery.couplings
    }
    in_order = {name: used[name] for name, _ in model.named_modules() if name in used}
    return Chosen(in_order, failed, found.joints, found.refusals, flow_of(between, found))


def _between(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], regions: Set[str]
) -> tuple[Between, ForwardPath]:
    """Run forwards until one calls every region; return it, or the first."""
    first: Between | None = None
    for attempt in range(ATTEMPTS):
        between = follow_between(model, args, kwargs, regions, path=ForwardPath(attempt))
        called = [call.region for call in between.calls]
        if set(called) == regions:
            return between, ForwardPath(attempt)
        if first is not None and attempt > 2 and called == [call.region for call in first.calls]:
            break  # nothing is drawn
        first = first or between
    assert first is not None
    return first, ForwardPath()


def _around(model: nn.Module, blocks: Collection[str]) -> list[str]:
    """Return the largest modules with weights that hold no block and lie in none."""
    parents = {".".join(name.split(".")[:end]) for name in blocks for end in range(len(name.split(".")))}
    waiting, seen = [name for name, _ in model.named_children()], set[int]()
    found: list[str] = []
    while waiting:
        name = waiting.pop(0)
        module = model.get_submodule(name)
        if id(module) in seen or name in blocks or not _holds_weights(module):
            continue
        seen.add(id(module))  # it may have another name
        if name in parents or type(module).forward is nn.Module.forward:
            waiting += [f"{name}.{child}" for child, _ in module.named_children()]
        else:
            found.append(name)
    return found


def _holds_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
