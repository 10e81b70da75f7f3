"""Regions: the choice of the submodules of a model to capture.

    choose(model, args, kwargs, how)
      -> record_all     one forward, to get the calls of each candidate
      -> analyse        capture, infer, discover, one region at a time
      -> Search         where that fails, the submodules below

By default the regions are the repeated blocks (the children of ModuleLists and Sequentials), where couplings close
inside every one of them and the root would not bring much more onto couplings (`coverage.py`); else the root; and where
the root cannot be captured, the largest submodules that can. Around regions the model's own Python keeps running:
loops, caches, checkpointing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from torch import nn

from ecospa_fx.errors import CaptureError
from ecospa_fx.logs import logger
from ecospa_fx.passes.capture.capture import class_forward
from ecospa_fx.passes.capture.options import DEFAULTS, CaptureOptions
from ecospa_fx.passes.capture.outside_numbers import OutsideNumbers
from ecospa_fx.passes.capture.record import record_all
from ecospa_fx.passes.graph.shared_memory import SharedMemory
from ecospa_fx.passes.graph.tensors import named_tensors

from .analyse import Analysis, Captures, _analyse_watched
from .analyse_calls import analyse_calls
from .coverage import KEPT, Coverage
from .search import Search


def choose(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    how: str | Sequence[str] = "auto",
    captures: Captures | None = None,
    options: CaptureOptions = DEFAULTS,
    numbers: OutsideNumbers | None = None,
) -> tuple[dict[str, Analysis], dict[str, str]]:
    """Choose the regions of a model, and analyse them.

    Args:
        model: the model; left as it is.
        args: positional arguments of a call.
        kwargs: keyword arguments of a call.
        how: `"auto"`, `"blocks"`, `"root"`, or names of submodules.
        captures: gets the captured blocks, for equal ones to share.
        options: of the model's captures.
        numbers: gets the numbers that the model reads outside of them.

    Returns:
        The regions by name; and submodules that were not captured, with the reasons.

    Raises:
        CaptureError: nothing can be captured.
    """
    captures = [] if captures is None else captures
    if how == "root":
        return {"": _root(model, args, kwargs, options)}, {}
    if not isinstance(how, str):
        return _named(model, args, kwargs, how, captures, options, numbers), {}
    if how not in ("auto", "blocks"):
        raise CaptureError(
            f"regions={how!r} is none of 'auto', 'blocks', 'joined', 'root' or a list of submodule names"
        )
    candidates = set(_candidates(model))
    used_outside: dict[str, str] = {}
    ends: set[str] = set()
    calls = record_all(model, args, kwargs, candidates, used_outside, ends, numbers, candidates) if candidates else {}
    memory = SharedMemory(named_tensors(model))
    search = Search(
        model, lambda name: analyse_calls(model, name, calls[name], captures, memory, used_outside, options)
    )
    blocks = [name for name in calls if not any(name.startswith(f"{other}.") for other in calls)]
    for name in blocks:
        search.attempt(name)
    uncalled = {name: UNCALLED for name in candidates - calls.keys() if _is_callable(model.get_submodule(name))}
    if blocks and len(search.coupled()) == len(blocks):
        if how == "blocks":
            return search.analyses, uncalled
        try:
            root = _root_if_it_covers_more(model, args, kwargs, search.analyses, ends, options)
        except CaptureError as error:
            return search.analyses, {"": str(error)} | uncalled
        return (search.analyses, uncalled) if root is None else ({"": root}, {})
    if how == "auto" or not blocks:
        try:
            return {"": _root(model, args, kwargs, options)}, search.failed
        except CaptureError as error:
            if not any(True for _ in model.children()):
                raise
            search.failed[""] = str(error)
            search.analyses = search.coupled()
    kept = set(search.analyses)
    try:
        names = {name for name, _ in model.named_modules()} - {""} - candidates
        calls |= record_all(model, args, kwargs, names, used_outside, numbers=numbers)
    except Exception as error:  # the call itself is at fault
        raise CaptureError(_nothing_captured(search.failed)) from error
    for name in [""] if "" in search.failed else list(search.failed):
        search.below(name, calls)
    search.analyses = {name: a for name, a in search.analyses.items() if name in kept or a.discovery.couplings}
    if not search.analyses:
        raise CaptureError(_nothing_captured(search.failed))
    in_order = {name: search.analyses[name] for name, _ in model.named_modules() if name in search.analyses}
    return in_order, search.failed | uncalled


def _root_if_it_covers_more(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    blocks: Mapping[str, Analysis],
    ends: Set[str],
    options: CaptureOptions,
) -> Analysis | None:
    """Analyse the root if blocks leave so much without coupling that it may be worth it; None where it is not.

    Raises:
        CaptureError: it may be, and cannot be captured.
    """
    coverage = Coverage(model, ends)
    share, most = coverage.share(coverage.on_couplings(blocks)), coverage.share(coverage.most(blocks))
    text = f"{len(blocks)} blocks bring {share:.0%} of the entries of matrices onto couplings, the root "
    if share >= KEPT * most:
        logger("discover").info("%sat most %.0f%%", text, 100 * most)
        return None
    try:
        root = _root(model, args, kwargs, options)
    except CaptureError as error:
        logger("discover").info("%scannot be captured: %s", text, error)
        raise
    whole = coverage.share(coverage.on_couplings({"": root}))
    logger("discover").info("%s%.0f%%", text, 100 * whole)
    return root if share < KEPT * whole else None


UNCALLED = "it is not called in this forward of the model, so its computation is unknown; it stays whole"


def _is_callable(module: nn.Module) -> bool:
    """Return whether a module has a forward, unlike a container."""
    return type(module).forward is not nn.Module.forward


def _nothing_captured(failed: Mapping[str, str]) -> str:
    inner = [why for name, why in failed.items() if name]
    if "" in failed and inner:
        return f"{failed['']}. Nor can a submodule: {inner[0]}"
    return next(iter(failed.values()))


def _root(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: CaptureOptions) -> Analysis:
    """Analyse the whole model as one region."""
    return _analyse_watched(model, "", (args, kwargs), {}, forward=class_forward(model, ""), options=options)[0]


def _named(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: Sequence[str],
    captures: Captures,
    options: CaptureOptions,
    numbers: OutsideNumbers | None,
) -> dict[str, Analysis]:
    """Analyse the regions that were asked for by name."""
    unknown = sorted(set(names) - {name for name, _ in model.named_modules()})
    if unknown:
        raise CaptureError(
            f"regions: {type(model).__name__} has no submodule `{unknown[0]}`; see model.named_modules()"
        )
    for name in names:
        inside = next((other for other in names if other != name and (not name or other.startswith(f"{name}."))), None)
        if inside is not None:
            raise CaptureError(
                f"regions: `{inside}` lies inside {f'`{name}`' if name else 'the model'}, whose graph has no call of "
                "it left; name one of them"
            )
    used_outside: dict[str, str] = {}
    calls = record_all(model, args, kwargs, set(names), used_outside, numbers=numbers)
    missing = [name for name in names if name not in calls]
    if missing:
        raise CaptureError(f"regions: `{missing[0]}` is not called in a forward of the model; name another")
    memory = SharedMemory(named_tensors(model))
    return {name: analyse_calls(model, name, calls[name], captures, memory, used_outside, options) for name in names}


def _candidates(model: nn.Module) -> Iterator[str]:
    """Yield the children of containers in which a class repeats and that have several matrices."""
    for name, container in model.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)):
            continue
        classes = Counter(type(child) for child in container)
        for key, child in container.named_children():
            matrices = sum(p.ndim > 1 for p in child.parameters())
            if classes[type(child)] > 1 and matrices > 1:
                yield f"{name}.{key}" if name else key
