"""Capture: one region of a model as an FX graph of ATen ops, at its original sizes.

    capture(module, args, kwargs)
      -> dry_run                  how its forward uses the objects of the call, such as caches
      -> export                   torch.export, behind a signature of tensors only; any dim that may be dynamic is
      -> assemble                 the exported program as a `RegionGraph`, in canonical form
      -> difference_from_eager    the graph against eager, outputs and gradients, before it is trusted

A *region* is any submodule: the root, a block, a single attention. Capture knows nothing of the model around it. A
graph belongs to one *signature* (argument structure, dtypes, devices, train or eval, dims that were specialised).
"""

from __future__ import annotations

import contextvars
import warnings
from collections.abc import Iterable, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ecospa_fx.errors import CaptureError
from ecospa_fx.passes.graph.isolate import isolated
from ecospa_fx.passes.graph.offloaded import refuse_offloaded
from ecospa_fx.passes.graph.tensors import at_original_sizes
from ecospa_fx.passes.ir.region_graph import Assigned, Filled, Forward, Originals, RegionGraph, described
from ecospa_fx.passes.ir.state_access import TENSOR, flattened, parted

from .assemble import assemble
from .compare_eager import NoBackward, UnderAutocast, difference_from_eager
from .data_sizes import data_sizes
from .dry_run import DryRun, dry_run
from .export import Flat, export, program_without_writes, refuse_foreign
from .hook_effects import refuse_effects
from .hooks import inner_hooks, noted
from .options import DEFAULTS, CaptureOptions


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
    filled: Filled = frozenset(),
    assigned: Sequence[Assigned] = (),
    own_hooks: bool = False,
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
        filled: the parts of objects that other calls of the region fill.
        assigned: places to which the forward assigns tensors at every call.
        own_hooks: the forward registers hooks itself, and that they become a part of the graph is nothing to tell.
        options: of the model's captures.

    Raises:
        CaptureError: torch.export fails, the graph disagrees with eager, or weights are offloaded.
    """
    refuse_offloaded(module, region)
    forward = forward or class_forward(module, region)
    on_meta = any(
        t.is_meta for t in (*pytree.tree_leaves((args, kwargs)), *module.parameters()) if isinstance(t, Tensor)
    )
    check = check and not on_meta
    hooks = inner_hooks(module)
    # In a fresh context, so that hooks that depend on context variables see none.
    context = contextvars.Context()
    dry = context.run(dry_run, module, args, kwargs, region, forward, originals, options)

    def attempt(observe: Iterable[str], under_autocast: bool = False, without_writes: bool = False) -> RegionGraph:
        # Tracing needs shapes only; the comparison with eager needs values.
        with at_original_sizes(module, originals.shapes() if originals else None):
            captured = _traced(
                module, args, kwargs, region, forward, static, observe, dry, filled, assigned, under_autocast,
                without_writes,
            )  # fmt: skip
        if check:
            with (
                at_original_sizes(module, originals.values() if originals else None),
                isolated(module),  # what hooks do, too
                noted(module, observe) as changes,
            ):
                try:
                    error = difference_from_eager(captured, module, forward, args, kwargs, gradients=options.gradients)
                except GuardOnDataDependentSymNode as without_values:
                    raise CaptureError(
                        f"{described(region)} was captured, but its graph computes with a tensor without values, which "
                        "torch.export has left in it, as of a transform inside (torch.func.grad); it is left as it is"
                    ) from without_values
                captured = replace(captured, data_sizes={} if error else data_sizes(captured, module, args, kwargs))
            changing = changes.reach(captured.constants.values())
            if changing:
                raise _HookChanges(changing)
            if isinstance(error, UnderAutocast) and not under_autocast:
                with suppress(CaptureError):  # the first reason is the better one
                    return attempt(observe, under_autocast=True)
            if isinstance(error, NoBackward) and not without_writes:
                with suppress(CaptureError):
                    return attempt(observe, under_autocast, without_writes=True)
            if error is not None:
                raise CaptureError(f"{described(region)} was captured, but {error}; it is left as it is")
        return captured

    if not hooks:
        return attempt(())
    observed = [*hooks] if check else []
    captured: RegionGraph | None = None
    while captured is None:
        try:
            captured = context.run(attempt, observed)
        except _HookChanges as error:
            observed = [path for path in observed if path not in error.paths]
        except CaptureError:
            if not observed:
                raise
            observed = []
    inside = [path for path in hooks if path not in observed]
    if inside and not own_hooks:
        if check:
            with at_original_sizes(module, originals.values() if originals else None):
                context.run(refuse_effects, module, inside, region, forward, args, kwargs)
        _warn_of_hooks(captured, inside)
    return captured


def class_forward(module: nn.Module, region: str) -> Forward:
    """Return the forward of a module's class.

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
    """Hooks that were taken for observers change values.

    Attributes:
        paths: of the submodules that they are on.
    """

    def __init__(self, paths: Set[str]) -> None:
        super().__init__(*paths)
        self.paths = paths


def _traced(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    region: str,
    forward: Forward,
    static: Set[tuple[int, int]],
    observe: Iterable[str],
    dry: DryRun,
    filled: Filled,
    assigned: Sequence[Assigned],
    under_autocast: bool,
    without_writes: bool,
) -> RegionGraph:
    """Trace the region into a graph of which the hooks of the submodules `observe` are no part."""
    leaves, spec = flattened((args, kwargs))
    leaves, objects = parted(leaves)
    flat = Flat(module, forward, leaves, spec, observe, objects, assigned)
    call_tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    state = dry.state
    while True:
        flat.state = state
        tensors = [*call_tensors, *(path.find(objects) for path in state)]
        program = export(flat, tensors, region, static, under_autocast)
        more = tuple(path for path in flat.tracker.tensors if path not in state)
        if not more:
            break
        state += more  # traced, the forward reads tensors that it does not read otherwise
    if without_writes:
        program = program_without_writes(program, module, region)
    flat.carried = replace(flat.carried, state=state)
    results = [leaf for leaf in flat.out_leaves if leaf is not TENSOR]
    if flat.kept != "NoneType":
        raise CaptureError(
            f"{described(region)} ({type(module).__name__}) returns a {flat.kept} that something else holds too (an "
            "attribute, a list), while its graph would make another one at every call: return a copy of it "
            "(dataclasses.replace), or let smaller submodules be captured (regions='auto' finds them)"
        )
    refuse_foreign(module, region, results, "returns", "call it so that it does not")
    for point in flat.points:
        values = [leaf for leaf in point.leaves if leaf is not TENSOR]
        refuse_foreign(module, region, values, f"has a hook on `{point.path}`, which takes", "remove the hook")
    return replace(assemble(program, flat, tensors, region, dry, filled), under_autocast=under_autocast)


def _warn_of_hooks(captured: RegionGraph, hooks: Sequence[str]) -> None:
    names = sorted(name for name in captured.hooked if name in hooks)
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(
            f"forward hooks on {shown} are part of the captured graph from now on: what they do to tensors stays, "
            "anything else they do (recording, printing) no longer happens. Register such hooks after the first call",
            stacklevel=2,
        )
