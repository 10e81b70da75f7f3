"""Joined regions: blocks and what lies between them, with the couplings that cross their edges.

joined(model, args, kwargs, analyses)
  -> _more            modules that hold weights outside of the blocks (an embedding, a head) are regions too
  -> follow_between   what the model runs between its regions
  -> find_joints      the couplings across
  -> followed         the model's own Python between the regions, tried at the sizes that a shrink leaves
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ecospa_fx.errors import CaptureError
from ecospa_fx.logs import logger
from ecospa_fx.passes.capture.between import Between, follow_between
from ecospa_fx.passes.capture.options import DEFAULTS, CaptureOptions
from ecospa_fx.passes.capture.record import record_all
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.passes.ir.border import WeightDim

from .analyse import Analysis, Captures
from .analyse_calls import analyse_calls
from .joints import Joint, find_joints
from .joints_tried import not_followed
from .left_whole import Refusal
from .regions import choose

_ATTEMPTS = 16  # forwards in which a region is looked for that others, drawn at random, may leave out


@dataclass(frozen=True, eq=False)
class Chosen:
    """The regions of a model.

    Attributes:
        analyses: the regions by name.
        failed: submodules that were not captured, with the reasons.
        joints: the couplings that cross their edges.
        refusals: axes that cross them and cannot shrink, with the reasons.
    """

    analyses: dict[str, Analysis]
    failed: dict[str, str]
    joints: tuple[Joint, ...] = ()
    refusals: tuple[Refusal, ...] = ()


def choose_regions(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    how: str | Sequence[str] = "auto",
    captures: Captures | None = None,
    options: CaptureOptions = DEFAULTS,
) -> Chosen:
    """Choose the regions of a model, and analyse them.

    Args:
        model: the model; left as it is.
        args: positional arguments of a call.
        kwargs: keyword arguments of a call.
        how: as `choose` takes it, or `"joined"`: blocks, and what lies between them.
        captures: gets the captured blocks, for equal ones to share.
        options: of the model's captures.

    Raises:
        CaptureError: nothing can be captured.
    """
    captures = [] if captures is None else captures
    if how != "joined":
        return Chosen(*choose(model, args, kwargs, how, captures, options))
    blocks, failed = choose(model, args, kwargs, "blocks", captures, options)
    if "" in blocks:
        return Chosen(blocks, failed)
    found = joined(model, args, kwargs, blocks, captures, options)
    return replace(found, failed=failed | found.failed)


def joined(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    blocks: Mapping[str, Analysis],
    captures: Captures,
    options: CaptureOptions,
) -> Chosen:
    """Add regions to those of a model, and find the couplings that cross their edges."""
    analyses, failed = _with_more(model, args, kwargs, blocks, captures, options)
    between, attempt = _between(model, args, kwargs, analyses)
    tensors = named_tensors(model)
    refused: dict[WeightDim, str] = {}
    while True:
        found = find_joints(model, between, analyses, refused=refused, experiments=options.experiments)
        why = not_followed(model, args, kwargs, between, found, tensors, attempt)
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
    return Chosen(in_order, failed, found.joints, found.refusals)


def _between(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], analyses: Mapping[str, Analysis]
) -> tuple[Between, int]:
    """Run forwards until one calls every region; return it, or the first."""
    first: Between | None = None
    for attempt in range(_ATTEMPTS):
        between = follow_between(model, args, kwargs, analyses, attempt=attempt)
        if {call.region for call in between.calls} == set(analyses):
            return between, attempt
        first = first or between
        if [call.region for call in first.calls] == [call.region for call in between.calls] and attempt > 2:
            break  # nothing is drawn
    assert first is not None
    return first, 0


def _with_more(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    blocks: Mapping[str, Analysis],
    captures: Captures,
    options: CaptureOptions,
) -> tuple[dict[str, Analysis], dict[str, str]]:
    """Capture the largest modules with weights that hold no block."""
    around = {"".join(name.rpartition(".")[:1]) for name in blocks}
    parents = {".".join(name.split(".")[:end]) for name in blocks for end in range(len(name.split(".")))} | around
    waiting = [name for name, _ in model.named_children()]
    top: list[str] = []
    seen: set[int] = set()
    while waiting:
        name = waiting.pop(0)
        module = model.get_submodule(name)
        if id(module) in seen:
            continue  # under another name
        seen.add(id(module))
        if name in blocks or not any(True for _ in model.get_submodule(name).parameters()):
            continue
        if name in parents or type(model.get_submodule(name)).forward is nn.Module.forward:
            waiting += [f"{name}.{child}" for child, _ in model.get_submodule(name).named_children()]
        else:
            top.append(name)
    names = {
        f"{name}.{inner}" if inner else name for name in top for inner, _ in model.get_submodule(name).named_modules()
    }
    used_outside: dict[str, str] = {}
    calls = record_all(model, args, kwargs, names, used_outside) if names else {}
    analyses, failed = dict(blocks), dict[str, str]()
    tensors = named_tensors(model)
    while top:
        name = top.pop(0)
        module = model.get_submodule(name)
        if not any(True for _ in module.parameters()):
            continue
        try:
            if name not in calls:
                raise CaptureError("it is not called in this forward of the model")
            analyses[name] = analyse_calls(model, name, calls[name], captures, tensors, used_outside, options)
        except CaptureError as error:
            children = [f"{name}.{child}" for child, _ in module.named_children()]
            if not children:
                failed[name] = str(error)
            top += children
    return analyses, failed
