"""Check of a sized program against the same program written at smaller sizes: a plain module that knows no graph.

Of the library it takes which entries of each parameter are left. All else that the smaller module computes (what an
average counts, what a norm divides by, what a view's sizes are) is its own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ecospa_fx.errors import EcoSpaError
from ecospa_fx.passes.axes.selection import Selected, per_context_or_shared, touched, whole
from ecospa_fx.passes.find.discover import RegionCoupling, discover
from ecospa_fx.passes.graph.tensors import named_tensors, sliced
from ecospa_fx.passes.infer.infer import infer_axes
from ecospa_fx.passes.rewrite.verify import compare

from .check import TOLERANCE, Failure, Tally, difference, of_plain, of_shrunk, positions_of
from .programs import RandomProgram
from .sized import resized, widths_of
from .trace import trace

SMALLER = "smaller"


def check_smaller(program: RandomProgram, tally: Tally | None = None, seed: int = 0) -> Failure | None:
    """Return the first failure of a sized program, or None. A program that does not run has none."""
    tally = Tally() if tally is None else tally
    try:
        model, args = program.build()
        expected, _ = of_plain(model, args)
    except Exception:  # a program cut short may fail in any way
        return None
    if not all(bool(out.isfinite().all()) for out in expected if out.is_floating_point()):
        return None
    try:
        return _first_failure(program, model, args, [out.shape for out in expected], tally, random.Random(seed))
    except EcoSpaError as error:
        return Failure(type(error).__name__, str(error))
    except Exception as error:
        return Failure(SMALLER, f"{type(error).__name__}: {str(error).splitlines()[0]}")


def _first_failure(
    program: RandomProgram,
    model: nn.Module,
    args: tuple[Tensor, ...],
    shapes: Sequence[torch.Size],
    tally: Tally,
    rng: random.Random,
) -> Failure | None:
    axis_facts = infer_axes(trace(model, args))
    couplings = discover(axis_facts).couplings
    tensors = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
    for width in widths_of(program):
        mine = [coupling for coupling in couplings if coupling.atom.size % width == 0]
        if not mine:
            continue
        count = rng.randint(2, width - 1)
        kept = {coupling.atom: _choice(coupling, width, count, rng) for coupling in mine}
        keep = positions_of(axis_facts, kept)
        small = _small(resized(program, {width: count}), model, keep, shapes)
        if small is None:
            continue
        tally.smaller += 1
        tally.reduced += any(fact.role == "reduced" and touched(fact.expr, kept) for fact in axis_facts.facts)
        name = f"{width} to {count}"
        masking = compare(axis_facts, kept, model, tensors, args, name)
        if not max(masking.output_error, masking.gradient_error) <= TOLERANCE:
            return Failure("masking", f"{name}: output {masking.output_error:.1e}, gradient "
                           f"{masking.gradient_error:.1e} of {masking.worst_gradient or 'nothing'}")  # fmt: skip
        names = [name for name, _ in model.named_parameters()]
        error = difference(names, of_plain(small, args), of_shrunk(axis_facts, kept, model, tensors, args))
        if error:
            return Failure(SMALLER, f"{name}: {error}")
    return None


def _choice(coupling: RegionCoupling, width: int, count: int, rng: random.Random) -> Selected:
    """Select as many entries of a coupling as a smaller program has, different ones in each of its contexts."""
    size, context = coupling.atom.size, coupling.context
    rows = 1 if context is None else context.size
    masks = torch.zeros(rows, size, dtype=torch.bool)
    for row in masks:
        row[rng.sample(range(size), size // width * count)] = True
    return masks[0] if context is None else per_context_or_shared(context, masks, whole(context))


def _small(
    program: RandomProgram, model: nn.Module, keep: Mapping[str, dict[int, Tensor]], shapes: Sequence[torch.Size]
) -> nn.Module | None:
    """Build a smaller module with what is left of the tensors of a model; None if it would have other sizes."""
    try:
        small, args = program.build()
        outputs = small(*args)
    except Exception:  # its sizes fit nowhere else
        return None
    left = {name: sliced(tensor.detach(), keep.get(name, {})) for name, tensor in named_tensors(model).items()}
    held = named_tensors(small)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sizes = [out.shape for out in outputs]
    if sizes != [*shapes] or any(held[name].shape != tensor.shape for name, tensor in left.items()):
        return None
    with torch.no_grad():
        for name, tensor in left.items():
            held[name].copy_(tensor)
    return small
