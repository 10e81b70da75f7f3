"""Analysis: capture one region as it was called, infer its axes and discover its couplings."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ecospa_fx.logs import logger
from ecospa_fx.passes.axes.algebra import atoms_of, size_of
from ecospa_fx.passes.capture.capture import capture
from ecospa_fx.passes.capture.compare_eager import difference_from_eager
from ecospa_fx.passes.capture.options import DEFAULTS, CaptureOptions
from ecospa_fx.passes.capture.reads import AttributeReads, filled_read, recorded_reads
from ecospa_fx.passes.capture.rehearse import rehearsed
from ecospa_fx.passes.graph.python_state import COMPILED, OWN, StateChange, same
from ecospa_fx.passes.graph.tensors import at_original_sizes, named_tensors
from ecospa_fx.passes.infer.infer import infer_axes
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.border import NO_BORDER, Border, argument_names
from ecospa_fx.passes.ir.guards import forward_read, same_contents
from ecospa_fx.passes.ir.region_graph import Assigned, Filled, Forward, Originals, RegionGraph
from ecospa_fx.passes.ir.region_graph import Call as Call
from ecospa_fx.passes.ir.signature import autocast_now, training_flags
from ecospa_fx.passes.ir.state_access import ObjectPath, flattened, parted

from .confirm import unconfirmed_ops
from .discover import Discovery, discover
from .fingerprint import Fingerprint, fingerprint, settings


@dataclass(frozen=True, eq=False)
class Analysis:
    """One region, analysed for one call signature.

    Attributes:
        name: of the region in the model.
        captured: its graph.
        axis_facts: the axes of that graph.
        discovery: its couplings and refusals.
        seconds: CPU time per pass; none for a graph that was captured of an equal block.
        filled: the changes to caches that the first call of this kind makes; the graph is that of later calls.
        first_only: what that call does beside these, in words; None if nothing.
        others: analyses of other calls of the region in the same forward, which this graph does not serve.
    """

    name: str
    captured: RegionGraph
    axis_facts: AxisFacts
    discovery: Discovery
    seconds: dict[str, float]
    filled: tuple[StateChange, ...] = ()
    first_only: str | None = None
    others: tuple[Analysis, ...] = ()


Captures = list[tuple[Analysis, Fingerprint]]


def analyse(
    module: nn.Module,
    name: str,
    call: Call,
    shared_outside: Mapping[str, str] | None = None,
    *,
    forward: Forward | None = None,
    originals: Originals | None = None,
    filled: Filled = frozenset(),
    moving: frozenset[str] = frozenset(),
    border: Border = NO_BORDER,
    assigned: Sequence[Assigned] = (),
    own_hooks: bool = False,
    check: bool = True,
    options: CaptureOptions = DEFAULTS,
) -> Analysis:
    """Capture one region as it was called, infer its axes and discover its couplings.

    Args:
        module: the region.
        name: its name in the model.
        call: positional and keyword arguments.
        shared_outside: see `RegionGraph`.
        forward: see `capture`.
        originals: see `capture`.
        filled: see `capture`.
        moving: see `RegionGraph`.
        border: see `RegionGraph`.
        assigned: see `capture`.
        own_hooks: see `capture`.
        check: see `capture`.
        options: of the model's captures.

    Raises:
        CaptureError: it cannot be captured, or the graph disagrees with eager.
    """
    seconds = {"export": 0.0, "infer": 0.0, "discover": 0.0}
    static: frozenset[tuple[int, int]] = frozenset()
    while True:
        start = time.thread_time()
        captured = capture(
            module, *call, region=name, forward=forward, originals=originals, check=check, static=static,
            filled=filled, assigned=assigned, own_hooks=own_hooks, options=options,
        )  # fmt: skip
        captured = replace(
            captured, shared_outside=shared_outside or {}, moving=moving, border=border,
            argument_names=argument_names(forward or type(module).forward, *call),
        )  # fmt: skip
        captured_at = time.thread_time()
        axis_facts = infer_axes(captured, options.experiments)
        seconds["export"] += captured_at - start
        seconds["infer"] += time.thread_time() - captured_at
        cutting = _dims_that_cut_parameters(axis_facts) | _dims_of_windows(axis_facts)
        if not cutting - static:
            break
        static |= cutting
    start = time.thread_time()
    discovery = discover(axis_facts)
    seconds["discover"] = time.thread_time() - start
    unconfirmed: set[str] = set()
    while axis_facts.experiments and (more := _unconfirmed(axis_facts, discovery, module, call, originals)):
        unconfirmed |= more
        axis_facts = infer_axes(captured, True, unconfirmed)
        discovery = discover(axis_facts)
    _log(name or "the model", captured, axis_facts, discovery, seconds)
    return Analysis(name, captured, axis_facts, discovery, seconds)


def _log(
    name: str, captured: RegionGraph, axis_facts: AxisFacts, discovery: Discovery, seconds: dict[str, float]
) -> None:
    logger("capture").info("%s: %d nodes in %.2f s", name, len(captured.graph.nodes), seconds["export"])
    logger("capture").debug("%s: %s", name, captured.signature.tensors)
    missing = ", ".join(sorted(axis_facts.missing)) or "none"
    axes = len(axis_facts.values)
    logger("axes").info(
        "%s: axes of %d values in %.3f s, ops without a rule: %s", name, axes, seconds["infer"], missing
    )
    for parameter, exprs in axis_facts.parameters.items():
        logger("axes").debug("%s: %s%s", name, parameter, list(exprs))
    couplings = ", ".join(f"{c.name} ({c.atom.size})" for c in discovery.couplings) or "none"
    logger("discover").info("%s: couplings %s; %d refused", name, couplings, len(discovery.refusals))
    for refusal in discovery.refusals:
        logger("discover").debug("%s: refused %s", name, refusal)


def _unconfirmed(
    axis_facts: AxisFacts, discovery: Discovery, module: nn.Module, call: Call, originals: Originals | None
) -> set[str]:
    """Name the ops whose rule by experiment does not equal masking in this region."""
    named = named_tensors(module) | dict(originals.values() if originals else {})
    tensors = {name: tensor.detach() for name, tensor in named.items()}
    leaves, objects = parted(flattened(call)[0])
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    inputs += [place.find(objects) for place in axis_facts.captured.carried.state]
    return unconfirmed_ops(axis_facts, discovery, module, tensors, inputs)


def _dims_that_cut_parameters(axis_facts: AxisFacts) -> frozenset[tuple[int, int]]:
    """Return the dynamic dims of inputs, as (input, dim), whose size divides the axis of a parameter.

    A table of rotary angles, for example, has half a head's entries along its last dim. If that dim were dynamic, the
    parts of the head would have unknown sizes; such a dim is a property of the model and is specialised.
    """
    sizes = [size_of(atom) for exprs in axis_facts.parameters.values() for expr in exprs for atom in atoms_of(expr)]
    symbols = {symbol for size in sizes if isinstance(size, sympy.Expr) for symbol in size.free_symbols}
    return frozenset(
        (i, dim)
        for i, (_, _, shape) in enumerate(axis_facts.captured.signature.tensors)
        for dim, size in enumerate(shape)
        if isinstance(size, sympy.Expr) and size.free_symbols & symbols
    )


def _dims_of_windows(axis_facts: AxisFacts) -> frozenset[tuple[int, int]]:
    """Return the dynamic dims of tensors in objects whose size fitted no rule: the window of a convolution, say.

    Such a size is a property of the object and is specialised, unless an argument has it too, like the batch.
    """
    tensors = axis_facts.captured.signature.tensors
    called = len(tensors) - len(axis_facts.captured.state)
    given = {size for _, _, shape in tensors[:called] for size in shape}
    return frozenset(
        (called + i, dim)
        for i, (_, _, shape) in enumerate(tensors[called:])
        for dim, size in enumerate(shape)
        if isinstance(size, sympy.Symbol) and size in axis_facts.unsolved and size not in given
    )


def analyse_once(
    module: nn.Module,
    name: str,
    call: Call,
    outside: Mapping[str, str],
    captures: Captures,
    *,
    forward: Forward | None = None,
    originals: Originals | None = None,
    filled: Filled = frozenset(),
    moving: frozenset[str] = frozenset(),
    border: Border = NO_BORDER,
    options: CaptureOptions = DEFAULTS,
) -> Analysis:
    """Analyse a region, or share the analysis of an equal block that was captured for an equal call.

    Args:
        module: the region.
        name: its name in the model.
        call: positional and keyword arguments.
        outside: see `RegionGraph.shared_outside`.
        captures: analyses of blocks captured so far, with their fingerprints; grows.
        forward: see `capture`.
        originals: see `capture`.
        filled: see `capture`.
        moving: see `RegionGraph`.
        border: see `RegionGraph`.
        options: of the model's captures.

    Raises:
        CaptureError: it cannot be captured, or the graph disagrees with eager.
    """
    forward = forward or type(module).forward
    settled: dict[str, Any] = {
        "forward": forward, "originals": originals, "filled": filled, "moving": moving, "border": border,
        "options": options,
    }  # fmt: skip
    if outside:  # axes are pinned that equal blocks may shrink
        return _analyse_watched(module, name, call, outside, **settled)[0]
    with at_original_sizes(module, originals.shapes() if originals else None):
        equal = [analysis for analysis, mark in captures if mark.fits(module)]
    for analysis in equal:
        shared = _shared(analysis, module, name, call, forward, originals, filled, moving, border, options.gradients)
        if shared is not None:
            return shared
    analysis, reads = _analyse_watched(module, name, call, outside, **settled)
    if analysis.filled:
        return analysis  # it speaks of the caches of this block
    with at_original_sizes(module, originals.shapes() if originals else None):
        captures.append((analysis, fingerprint(module, reads, analysis.captured.index_attributes.values)))
    return analysis


def _analyse_watched(
    module: nn.Module, name: str, call: Call, outside: Mapping[str, str], **arguments: Any
) -> tuple[Analysis, AttributeReads]:
    """Analyse a region, and record all that its forward reads in Python."""
    forward, originals = arguments["forward"], arguments.get("originals")
    with rehearsed(module, *call, name, forward, originals) as rehearsal:
        every = {(path, name) for path, child in module.named_modules() for name in vars(child)}
        before = settings(module, every)
        with recorded_reads(module, rehearsal.code) as reads:
            analysis = analyse(
                module, name, call, outside, assigned=rehearsal.assigned, own_hooks=rehearsal.hooking, **arguments
            )
        created = {(path, name) for path, child in module.named_modules() for name in vars(child)} - every
        read = {(path, name) for path, names in reads.attributes.items() for name in names - OWN - COMPILED}
        read |= rehearsal.cleared  # a call that finds something there clears it
        # An attribute that a forward changes itself (a counter) is not a setting.
        constants = {
            where: value
            for where, value in settings(module, read - created).items()
            if same(before.get(where, value), value) or same_contents(before.get(where), value)
        }
        replaced = {(place.path, place.name) for place in rehearsal.assigned if not place.buffer}
        constants = {where: value for where, value in constants.items() if where not in replaced}
        named = dict(module.named_modules(remove_duplicate=False))
        # Capture puts stand-ins into a module for a time, such as fake weights into the list of an nn.LSTM.
        others = tuple(read for read in reads.others({*constants, *replaced}) if read.holds(named))
    others += tuple(forward_read(child, path) for path, child in named.items() if path)
    others += tuple(filled_read(module, change) for change in rehearsal.filled if change.is_seen)
    captured = replace(analysis.captured, settings=constants, reads=others)
    analysis = replace(analysis, filled=rehearsal.filled, first_only=rehearsal.first_only)
    analysis = replace(analysis, captured=captured, axis_facts=replace(analysis.axis_facts, captured=captured))
    return analysis, reads.attributes


def _shared(
    analysis: Analysis,
    module: nn.Module,
    name: str,
    call: Call,
    forward: Any,
    originals: Originals | None,
    filled: Filled,
    moving: frozenset[str],
    border: Border,
    gradients: bool,
) -> Analysis | None:
    """Return the analysis of an equal block for this one, if it serves the call and agrees with the eager forward."""
    start = time.thread_time()
    if analysis.captured.under_autocast and autocast_now() != analysis.captured.signature.autocast:
        return None
    # Other graphs are traced without autocast: one may serve under any, once it has been compared under it.
    signature = replace(analysis.captured.signature, autocast=autocast_now())
    captured = replace(analysis.captured, region=name, signature=signature)
    indices = captured.index_attributes
    values = indices.of(module)
    if values is None:
        return None
    if values:
        captured = replace(
            captured,
            settings=settings(module, captured.settings),
            carried=indices.within(captured.carried, values),
            strangers=frozenset(indices.put(place, values) for place in captured.strangers),
            filled=frozenset((cls, indices.put(ObjectPath(0, path), values).path) for cls, path in captured.filled),
        )
    known = captured.filled, captured.moving, captured.border
    if known != (filled, moving, border) or captured.difference(call, module, training_flags(module)) is not None:
        return None
    on_meta = any(t.is_meta for t in (*pytree.tree_leaves(call), *module.parameters()) if isinstance(t, Tensor))
    if not on_meta:
        with at_original_sizes(module, originals.values() if originals else None):
            error = difference_from_eager(captured, module, forward, *call, once=True, gradients=gradients)
            if error is not None:
                return None
    stored = {indices.put(place, values): exprs for place, exprs in analysis.axis_facts.stored.items()}
    axis_facts = replace(analysis.axis_facts, captured=captured, stored=stored)
    checked = time.thread_time()
    discovery = discover(axis_facts)
    if axis_facts.experiments and _unconfirmed(axis_facts, discovery, module, call, None):
        return None
    seconds = {"export": checked - start, "infer": 0.0, "discover": time.thread_time() - checked}
    return Analysis(name, captured, axis_facts, discovery, seconds)
