"""Capture: one region of a model as an FX graph of ATen ops, at its original sizes.

    capture(module, args, kwargs)
      -> export           torch.export, behind a signature of tensors only; any dim that may be dynamic is
      -> fast_attention   causal masks and repeated keys become arguments
      -> clean            asserts and no-ops out, placeholders sorted by what they hold
      -> canonicalise     see there
      -> disagreement     the graph against eager, outputs and gradients, before it is trusted

A *region* is any submodule: the root, a block, a single attention. Capture knows nothing of what lies around it. A
graph belongs to one *signature* (argument structure, dtypes, devices, train or eval, dims that were specialised).
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import warnings
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from ecospa_fx.errors import CaptureError
from ecospa_fx.passes.axes.algebra import as_size
from ecospa_fx.passes.graph.canonicalise import canonicalise
from ecospa_fx.passes.graph.clean import clean, settle
from ecospa_fx.passes.graph.fast_attention import fast_attention
from ecospa_fx.passes.graph.inline import inline
from ecospa_fx.passes.graph.tensors import at_original_sizes, named_tensors, same_storage
from ecospa_fx.passes.ir.captured import Forward, Originals, RegionGraph, described
from ecospa_fx.passes.ir.signature import Signature, autocast_now, training_flags
from ecospa_fx.passes.ir.state_access import TENSOR, ObjectPath, flattened, parted
from ecospa_fx.passes.objects.live_calls import mark_bodies

from .compare_eager import difference_from_eager
from .dry_run import read_and_written
from .export import Flat, export, refuse_foreign
from .hooks import inner_hooks, noted
from .options import DEFAULTS, CaptureOptions

aten = torch.ops.aten


def capture(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    region: str = "",
    forward: Forward | None = None,
    originals: Originals | None = None,
    check: bool = True,
    static: Set[tuple[int, int]] = frozenset(),
    filled: Set[tuple[type, tuple[Any, ...]]] = frozenset(),
    options: CaptureOptions = DEFAULTS,
) -> RegionGraph:
    """Capture `module` as called with `args` and `kwargs`.

    Args:
        module: the region.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        region: name of the region, for messages.
        forward: the region's own forward where its class has been swapped.
        originals: stand-ins at original sizes for parameters and buffers that have shrunk since.
        check: compare the graph with eager, outputs and gradients, once.
        static: dims, as (tensor argument, dim), to specialise; torch.export decides about the others.
        filled: what other calls of the region put into objects, as (class of the object, path).
        options: of the model's captures.

    Raises:
        CaptureError: torch.export fails, or the graph disagrees with eager.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        raise CaptureError(
            f"{described(region)} is called in a way it has not been called in before while the model is being "
            "exported; call the model once with the same arguments before exporting it"
        )
    forward = forward or class_forward(module, region)
    on_meta = any(
        t.is_meta for t in (*pytree.tree_leaves((args, kwargs)), *module.parameters()) if isinstance(t, Tensor)
    )
    check = check and not on_meta
    hooks = inner_hooks(module)
    state, written, own_numbers = read_and_written(module, args, kwargs, region, forward, originals, options)

    def once(observe: Iterable[str]) -> RegionGraph:
        # What is traced needs shapes only; what is compared with eager needs values.
        with at_original_sizes(module, originals.shapes() if originals else None):
            captured = _captured(module, args, kwargs, region, forward, static, observe, state)
        captured.filled = filled
        captured.numbers = own_numbers
        captured.strangers = frozenset(
            place
            for place in captured.carried.state
            if place not in written and place not in captured.carried.stored
            and (captured.carried.types[place.number], place.path) not in filled
        )  # fmt: skip
        if check:
            with (
                at_original_sizes(module, originals.values() if originals else None),
                noted(module, observe) as changed,
            ):
                error = difference_from_eager(captured, module, forward, args, kwargs)
            if error is not None:
                raise CaptureError(f"{described(region)} was captured, but {error}; it is left as it is")
            if changed:
                raise _HookChanges
        return captured

    if not hooks:
        return once(())
    # Hooks that look for someone waiting outside, by a context variable, shall find nobody while this is a trial.
    trial = contextvars.Context()
    if check:
        with contextlib.suppress(CaptureError, _HookChanges):
            return trial.run(once, tuple(hooks))
    captured = trial.run(once, ())
    _warn_of_hooks(captured, hooks)
    return captured


def class_forward(module: nn.Module, region: str) -> Forward:
    """The forward of a module's class.

    Raises:
        CaptureError: its calls go elsewhere.
    """
    if "forward" in module.__dict__:
        raise CaptureError(
            f"{described(region)} has a forward on the instance, which its class does not know of: compile the model "
            "before whatever put it there (accelerate's prepare, a wrapper)"
        )
    return type(module).forward


class _HookChanges(Exception):
    """A hook that was taken for an observer changes values."""


def _captured(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    region: str,
    forward: Forward,
    static: Set[tuple[int, int]],
    observe: Iterable[str],
    state: tuple[ObjectPath, ...],
) -> RegionGraph:
    """The region as a graph in which the hooks of the submodules `observe` have no part."""
    leaves, spec = flattened((args, kwargs))
    leaves, objects = parted(leaves)
    flat = Flat(module, forward, leaves, spec, observe, objects)
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    while True:
        flat.state = state
        tensors = [*given, *(place.find(objects) for place in state)]
        program = export(flat, tensors, region, static)
        more = tuple(place for place in flat.tracker.tensors if place not in state)
        if not more:
            break
        state += more  # traced, it reads what it does not read otherwise
    flat.carried = replace(flat.carried, state=state)
    results = [leaf for leaf in flat.out_leaves if leaf is not TENSOR]
    refuse_foreign(module, region, results, "returns", "call it so that it does not")
    for point in flat.points:
        values = [leaf for leaf in point.leaves if leaf is not TENSOR]
        refuse_foreign(module, region, values, f"has a hook on `{point.path}`, which takes", "remove the hook")
    return _collect(program, flat, module, region, leaves, spec, tensors)


def _warn_of_hooks(captured: RegionGraph, hooks: Mapping[str, int]) -> None:
    names = sorted(name for name in captured.hooked if name in hooks)
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(
            f"forward hooks on {shown} are part of the captured graph from now on: what they do to tensors stays, "
            "anything else they do (recording, printing) no longer happens. Register such hooks after the first call",
            stacklevel=2,
        )


def _collect(
    program: torch.export.ExportedProgram,
    flat: Flat,
    module: nn.Module,
    region: str,
    leaves: list[Any],
    spec: pytree.TreeSpec,
    tensors: list[Tensor],
) -> RegionGraph:
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    inline(graph, program.graph_module)
    mark_bodies(graph, len(flat.carried.stored), region)
    held: dict[str, str] = {}
    parameters: set[str] = set()
    constants: dict[str, Any] = {}
    inputs: list[str] = []
    for entry in program.graph_signature.input_specs:
        name, target = entry.arg.name, (entry.target or "").removeprefix("region.")
        if entry.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            held[name] = target
            if entry.kind is InputKind.PARAMETER:
                parameters.add(name)
        elif entry.kind is InputKind.USER_INPUT:
            inputs.append(name)
        else:
            constants[name] = program.constants[entry.target]
    for node in list(graph.nodes):
        if node.op == "get_attr":
            constants[node.name] = getattr(program.graph_module, node.target)
    settle(graph, inputs[len(inputs) - len(flat.state) :])
    fast_attention(graph)
    clean(graph)
    canonicalise(graph, constants)
    signature = Signature(
        spec,
        tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves),
        tuple(
            (t.dtype, t.device, tuple(as_size(size) for size in node.meta["val"].shape))
            for t, node in zip(tensors, (n for n in graph.nodes if n.name in set(inputs)), strict=True)
        ),
        training_flags(module),
        {symbol: (_number(span.lower), _number(span.upper)) for symbol, span in program.range_constraints.items()},
        autocast_now(),
    )
    named = named_tensors(module)
    return RegionGraph(
        region=region, graph=graph, tensors=held, parameters=parameters, constants=constants, inputs=inputs,
        signature=signature, sizes={name: named[name].shape for name in held.values()},
        out_spec=flat.out_spec, out_leaves=flat.out_leaves, same_storage=same_storage(module, held.values()),
        hooked={path: number for path, number in inner_hooks(module).items() if path not in flat.observe},
        observed=tuple(flat.points), carried=flat.carried,
    )  # fmt: skip


def _number(bound: Any) -> float:
    """A bound of a dynamic dim as a plain number: calls are compared with it, and sympy is slow."""
    return int(bound) if isinstance(bound, (int, sympy.Integer)) else math.copysign(math.inf, 1 if bound > 0 else -1)
