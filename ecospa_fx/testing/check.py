"""Check of one random program: everything found in it must be exact.

There are two references. Masking in the captured graph (`passes.rewrite.verify`) is the definition. The second uses no
graph: the program's own Python, with the removed rows and columns set to zero. It applies if zero weights make zero
contributions, which is checked on the values that the graph computes.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ecospa_fx.errors import EcoSpaError
from ecospa_fx.passes.axes.selection import (
    Selected,
    Selection,
    broadcast_mask,
    mask_of,
    per_context_or_shared,
    touched,
    whole,
)
from ecospa_fx.passes.capture.compare_eager import relative_error, run
from ecospa_fx.passes.find.discover import RegionCoupling, discover
from ecospa_fx.passes.graph.isolate import forked_rng
from ecospa_fx.passes.graph.nodes import argument_nodes, tensor_meta
from ecospa_fx.passes.graph.tensors import named_tensors, sliced, swapped
from ecospa_fx.passes.infer.infer import infer_axes
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.region_graph import RegionGraph
from ecospa_fx.passes.rewrite.rewrite import rewrite
from ecospa_fx.passes.rewrite.verify import compare, output_error

from .programs import RandomProgram
from .trace import trace

TOLERANCE = 1e-9  # in float64, of the largest entry
MOST_ALONE = 1  # number of couplings checked alone, beside all of them together
ALL_GO = 0.2  # share of selections that keep nothing of a coupling which may lose all


@dataclass(frozen=True)
class Failure:
    """A bug that a program shows: its kind, and details in `what`."""

    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}"


@dataclass
class Tally:
    """Counts of the checks so far.

    Attributes:
        programs: programs that ran.
        shrinkable: programs with couplings.
        comparisons: comparisons of shrunk with masked programs.
        twins: comparisons of shrunk programs with zeroed weights, where these apply.
        smaller: comparisons of sized programs with the same at smaller sizes, see `check_smaller`.
        reduced: those in which an average, a norm, a maximum or a softmax runs over what has shrunk.
        exported: programs that went through torch.export too.
        kinds: couplings found, by kind.
        missing: programs with an op that has no rule, by op.
    """

    programs: int = 0
    shrinkable: int = 0
    comparisons: int = 0
    twins: int = 0
    smaller: int = 0
    reduced: int = 0
    exported: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())
        missing = ", ".join(f"{op} ({count})" for op, count in self.missing.most_common())
        return (
            f"{self.programs} programs ({self.exported} through torch.export too), {self.shrinkable} with couplings "
            f"({kinds}); {self.comparisons} comparisons with masking, {self.twins} with zeroed weights, "
            f"{self.smaller} with plain modules of smaller sizes ({self.reduced} of them reduce what shrinks); "
            f"ops without a rule: {missing or 'none'}"
        )


def check(program: RandomProgram, tally: Tally | None = None, seed: int = 0) -> Failure | None:
    """Return the first failure of a program, or None. A program that does not run has none."""
    try:
        model, args = program.build()
    except Exception:  # a program cut short may fail in any way
        return None
    return check_model(model, args, tally, seed)


def check_model(
    model: nn.Module, args: tuple[Tensor, ...], tally: Tally | None = None, seed: int = 0
) -> Failure | None:
    """Return the first failure of a module in float64 that takes and returns tensors, or None. See `check`."""
    tally = Tally() if tally is None else tally
    try:
        with torch.no_grad():
            outputs = model(*args)
    except Exception:
        return None
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not all(bool(out.isfinite().all()) for out in outputs if out.is_floating_point()):
        return None
    tally.programs += 1
    try:
        captured = trace(model, args)
        return _first_failure(model, args, captured, outputs, tally, seed)
    except EcoSpaError as error:
        return Failure(type(error).__name__, str(error))
    except Exception as error:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        where = frame.tb_frame.f_code.co_name if frame is not None else ""
        return Failure(f"{type(error).__name__} in {where}", str(error).split("\n")[0])


def _first_failure(
    model: nn.Module,
    args: tuple[Tensor, ...],
    captured: RegionGraph,
    outputs: tuple[Tensor, ...],
    tally: Tally,
    seed: int,
) -> Failure | None:
    tensors = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
    for a, b in zip(outputs, run(captured, tensors, args), strict=True):
        if output_error(a, b) > TOLERANCE:
            return Failure("capture", "the graph differs from the program")
    axis_facts = infer_axes(captured)
    couplings = discover(axis_facts).couplings
    tally.missing.update(axis_facts.missing.keys())
    tally.kinds.update(coupling.kind for coupling in couplings)
    tally.shrinkable += bool(couplings)
    rng = random.Random(seed)
    masks = {coupling.atom: _choice(coupling, rng) for coupling in couplings}
    selections: list[tuple[str, Selection]] = [(c.name, {c.atom: masks[c.atom]}) for c in couplings]
    if len(couplings) > MOST_ALONE:
        selections = rng.sample(selections, MOST_ALONE)
    if len(couplings) > 1:
        selections.insert(0, ("all together", masks))
    for name, kept in selections:
        comparison = compare(axis_facts, kept, model, tensors, args, name)
        tally.comparisons += 1
        worst = max(comparison.output_error, comparison.gradient_error)
        if not worst <= TOLERANCE:
            return Failure("masking", f"{name}: output {comparison.output_error:.1e}, gradient "
                           f"{comparison.gradient_error:.1e} of {comparison.worst_gradient or 'nothing'}")  # fmt: skip
        if name != selections[0][0]:
            continue
        error = _differs_from_zeroed(axis_facts, kept, model, tensors, args)
        tally.twins += error is not None
        if error:
            return Failure("zeroing", f"{name}: {error}")
    return None


def _choice(coupling: RegionCoupling, rng: random.Random) -> Selected:
    """Select some entries of a coupling at random, not all; mostly different ones in each of its contexts.

    Of a coupling that needs none, sometimes none.
    """
    size, context = coupling.atom.size, coupling.context
    if coupling.last_stays is None and rng.random() < ALL_GO:
        return ~whole(coupling.atom)
    amount = rng.randint(coupling.least, size - 1)
    rows = context.size if context is not None and rng.random() < 0.8 else 1
    masks = torch.zeros(rows, size, dtype=torch.bool)
    for row in masks:
        row[rng.sample(range(size), amount)] = True
    return masks[0] if context is None or rows == 1 else per_context_or_shared(context, masks, whole(context))


# The twin that uses no graph


def _differs_from_zeroed(
    axis_facts: AxisFacts, kept: Selection, model: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Tensor, ...]
) -> str | None:
    """Describe how a shrunk program differs from zeroed weights; `""` if it does not, None if that says nothing."""
    zeroed = _zeroed(axis_facts, kept, tensors)
    if not _zero_at_contractions(axis_facts, kept, zeroed, args):
        return None
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in named_tensors(twin).items():
            tensor.copy_(zeroed[name])
    expected, gradients = of_plain(twin, args)
    keep = positions_of(axis_facts, kept)
    names = [name for name, _ in twin.named_parameters()]
    for i, name in enumerate(names):
        gradient = gradients[i]
        gradients[i] = None if gradient is None else sliced(gradient, keep.get(name, {}))
    return difference(names, (expected, gradients), of_shrunk(axis_facts, kept, model, tensors, args))


Results = tuple[list[Tensor], list[Tensor | None]]  # outputs, and gradients of parameters and then of arguments


def of_plain(model: nn.Module, args: tuple[Tensor, ...]) -> Results:
    """Run a plain module."""
    inputs = [arg.clone().requires_grad_(arg.is_floating_point()) for arg in args]
    return _results(model(*inputs), [*model.parameters(), *inputs])


def of_shrunk(
    axis_facts: AxisFacts, kept: Selection, model: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Tensor, ...]
) -> Results:
    """Run the program of a module in which only some entries are left."""
    captured, keep = axis_facts.captured, positions_of(axis_facts, kept)
    parameters = {captured.tensors[name] for name in captured.parameters}
    small = {n: sliced(t, keep.get(n, {})).clone().requires_grad_(n in parameters) for n, t in tensors.items()}
    for name, first in captured.same_storage.items():
        small[name] = small[first]
    program = rewrite(axis_facts, kept, model)
    inputs = [arg.clone().requires_grad_(arg.is_floating_point()) for arg in args]
    with forked_rng(model), swapped(model, small):
        outputs = program.run(model, *inputs, *program.constants)
    return _results(outputs, [*(small[name] for name, _ in model.named_parameters()), *inputs])


def difference(parameters: Iterable[str], expected: Results, found: Results) -> str | None:
    """Describe how results differ; `""` if they do not, None if what is expected is not finite."""
    for i, (a, b) in enumerate(zip(expected[0], found[0], strict=True)):
        if not bool(a.isfinite().all()):
            return None
        if output_error(a, b) > TOLERANCE:
            return f"output {i} by {output_error(a, b):.1e}"
    scale = max((float(g.abs().max()) for g in expected[1] if g is not None and g.numel()), default=0.0)
    names = [*parameters]
    names += [f"argument {i}" for i in range(len(expected[1]) - len(names))]
    for name, full, cut in zip(names, expected[1], found[1], strict=True):
        if full is None or cut is None:
            if any(gradient is not None and bool(gradient.any()) for gradient in (full, cut)):
                return f"the gradient of {name} is missing on one side"
            continue
        if not bool(full.isfinite().all()):
            return None
        largest = float(full.abs().max()) if full.numel() else 0.0
        if full.shape == cut.shape and not full.numel():
            continue
        if full.shape != cut.shape or float((full - cut).abs().max()) > TOLERANCE * max(largest, 1e-3 * scale):
            return f"the gradient of {name} by {relative_error(full, cut):.1e}"
    return ""


def positions_of(axis_facts: AxisFacts, kept: Selection) -> dict[str, dict[int, Tensor]]:
    """Return the positions that are left of each tensor, along each dim that loses entries."""
    masks = _masks(axis_facts, kept).items()
    return {name: {dim: mask.nonzero().flatten() for dim, mask in of_dims.items()} for name, of_dims in masks}


def _masks(axis_facts: AxisFacts, kept: Selection) -> dict[str, dict[int, Tensor]]:
    """Return the masks of kept entries of each tensor, along each dim that loses entries."""
    return {
        name: {dim: mask_of(expr, kept) for dim, expr in enumerate(exprs) if touched(expr, kept)}
        for name, exprs in axis_facts.parameters.items()
    }


def _zeroed(axis_facts: AxisFacts, kept: Selection, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters with removed entries set to zero, and buffers as they are."""
    captured = axis_facts.captured
    parameters = {captured.tensors[name] for name in captured.parameters}
    zeroed = dict(tensors)
    for name, masks in _masks(axis_facts, kept).items():
        for dim, mask in masks.items():
            if name in parameters:
                zeroed[name] = zeroed[name].index_fill(dim, (~mask).nonzero().flatten(), 0.0)
    return zeroed | {name: zeroed[first] for name, first in captured.same_storage.items()}


def _results(outputs: Any, leaves: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Compute outputs, and gradients of a fixed projection of them."""
    outs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    generator = torch.Generator().manual_seed(2)
    projections = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outs]
    terms = [(out * each).sum() for out, each in zip(outs, projections, strict=True) if out.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(sum(terms[1:], terms[0]), wanted, allow_unused=True) if terms else [None] * len(wanted)
    grad_of = dict(zip(map(id, wanted), grads, strict=True))
    return [out.detach() for out in outs], [grad_of.get(id(leaf)) for leaf in leaves]


def _zero_at_contractions(
    axis_facts: AxisFacts, kept: Selection, zeroed: Mapping[str, Tensor], args: tuple[Tensor, ...]
) -> bool:
    """Check that, with zeroed weights, every contraction has a factor that is zero at each removed entry.

    Where another reduction runs over such an axis, removed entries are absent, and no zeros are that.
    """
    if any(fact.role == "reduced" and touched(fact.expr, kept) for fact in axis_facts.facts):
        return False
    wanted: dict[str, list[list[tuple[int, Tensor]]]] = {}
    for fact in axis_facts.facts:
        if fact.role == "contracted" and touched(fact.expr, kept):
            occurrences = [i for i, arg in enumerate(argument_nodes(fact.node)) if tensor_meta(arg)]
            factors = [
                (occurrence, broadcast_mask(operand.exprs, dim, kept))
                for occurrence, operand in zip(occurrences, axis_facts.operands[fact.node], strict=True)
                for dim, expr in enumerate(operand.exprs)
                if expr == fact.expr and operand.node in [o.node for o in fact.operands]
            ]
            wanted.setdefault(fact.node.name, []).append(factors)
    zero = True

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            nonlocal zero
            for factors in wanted.get(n.name, ()):
                nodes = argument_nodes(n)
                values = ((self.env[nodes[i]], stays) for i, stays in factors)
                zero &= any(not bool(value.masked_fill(stays, 0).any()) for value, stays in values)
            return super().run_node(n)

    with torch.no_grad():
        run(axis_facts.captured, zeroed, args, interpreter=Watching)
    return zero


def zeroing_is_removing(model: nn.Module, args: tuple[Tensor, ...]) -> bool:
    """Check that a model has couplings, and that zero weights are equal to removed ones for each of them."""
    axis_facts = infer_axes(trace(model, args))
    tensors = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
    selections = [{c.atom: _choice(c, random.Random(0))} for c in discover(axis_facts).couplings]
    return bool(selections) and all(
        _zero_at_contractions(axis_facts, kept, _zeroed(axis_facts, kept, tensors), args) for kept in selections
    )
