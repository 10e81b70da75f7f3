"""Verification: a numerical check that a shrunk region equals the masked one, in outputs and gradients.

Masking is the definition of removal, see `passes.rewrite.masked`: the captured graph runs so at original sizes, and the
rewritten program must agree with it up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ecospa_fx.passes.axes.algebra import Expr
from ecospa_fx.passes.axes.selection import Selection, entries, mask_of, touched
from ecospa_fx.passes.capture.compare_eager import relative_error, run
from ecospa_fx.passes.graph.isolate import forked_rng, fresh_leaf, isolated, seed
from ecospa_fx.passes.graph.nodes import tensor_meta
from ecospa_fx.passes.graph.tensors import dense, sliced, swapped, twins
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.signature import with_autocast

from .draws import SameDraws
from .masked import masked
from .rewrite import rewrite
from .stored import compressed, layout

# Relative error up to which shrunk and masked count as equal; it comes from sums in another order.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Difference of a gradient, relative to the largest entry of all, that counts as rounding: 1024 roundings in float64
# (hundreds are left of a gradient that is zero, deep below a group norm with one entry per group), 64 in float32.
NOISE = {torch.float64: 2.3e-13, torch.float32: 7.6e-6, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Comparison:
    """The errors of a shrunk region against the masked one, for one selection, relative to the largest entry.

    Attributes:
        coupling: name of the comparison.
        removed: number of entries that the selection removes.
        output_error: largest difference of an output.
        gradient_error: largest difference of a gradient.
        worst_gradient: name of the parameter or argument with that gradient.
        tolerance: error up to which both count as equal.
    """

    coupling: str
    removed: int
    output_error: float
    gradient_error: float
    worst_gradient: str
    tolerance: float

    @property
    def ok(self) -> bool:
        """The verdict: both errors are within tolerance."""
        return max(self.output_error, self.gradient_error) <= self.tolerance


def compare(
    axis_facts: AxisFacts,
    kept: Selection,
    region: nn.Module,
    tensors: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    coupling: str,
) -> Comparison:
    """Run one call masked and shrunk, and compare outputs and gradients.

    Args:
        axis_facts: axes of the captured graph.
        kept: the selection.
        region: the live region; the types of its modules matter, its parameters do not.
        tensors: parameters and buffers at original sizes, by name in the region.
        inputs: the tensors of a call, and those in its objects, at original sizes.
        coupling: name of the comparison.
    """
    captured = axis_facts.captured
    draws = SameDraws(axis_facts, kept, captured.signature.dynamic_sizes(inputs))

    base: Any = masked(axis_facts, kept, inputs)

    class Here(base):
        def run_node(self, n: fx.Node) -> Any:
            self.now = n
            return super().run_node(n)

        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            return draws.call(self.now, super().call_function, args, kwargs)

    floating = {name: t for name, t in tensors.items() if t.is_floating_point()}
    # A buffer stays a buffer: torch refuses gradients of running statistics.
    trained = {captured.tensors[name] for name in captured.parameters} & floating.keys()
    positions = {name: _positions(exprs, kept) for name, exprs in axis_facts.parameters.items()}

    by_name = {node.name: node for node in captured.graph.nodes if node.op == "placeholder"}
    for i, name in enumerate(captured.arguments):  # tensors that shrink with the model around
        exprs = axis_facts.values[by_name[name]][0] if by_name[name] in axis_facts.values else ()
        positions[f"argument {i}"] = _positions(exprs, kept)
    full = {name: fresh_leaf(t) if name in trained else t.clone() for name, t in tensors.items()}
    count = len(inputs) - len(captured.state)
    full_inputs = [*(fresh_leaf(t) for t in inputs[:count]), *(t.detach().clone() for t in inputs[count:])]
    layouts = [
        layout(axis_facts.values[by_name[name]][0], kept) if by_name[name] in axis_facts.values else None
        for name in captured.state
    ]
    small_state = [
        t.detach().clone() if left is None else compressed(t.detach(), left)
        for t, left in zip(inputs[count:], layouts, strict=True)
    ]
    with forked_rng(region):
        seed(0)
        outputs = run(captured, full, full_inputs, constants=twins(captured.constants), interpreter=Here)
    cuts = [_positions(exprs, kept) for exprs in axis_facts.results]
    outputs = [_cut(out, positions) for out, positions in zip(outputs, cuts, strict=True)]

    small = {name: sliced(t, positions.get(name, {})).clone() for name, t in tensors.items()}
    called = [sliced(t, positions.get(f"argument {i}", {})) for i, t in enumerate(inputs[:count])]
    small_inputs = [*(fresh_leaf(t) for t in called), *small_state]
    program = rewrite(axis_facts, kept, region, live=False, stand_ins=draws.stand_ins())
    parameters = {name: nn.Parameter(t) if name in trained else t for name, t in small.items()}
    with isolated(region), swapped(region, parameters):  # hooks of a linear layer run, too
        seed(0)
        small_outputs = program.run(region, *small_inputs, *twins(dict(enumerate(program.constants))).values())
        small_outputs = small_outputs[: captured.returned]

    outputs_error = max((output_error(a, b) for a, b in zip(outputs, small_outputs, strict=True)), default=0.0)
    gradient_error, worst, tolerance = 0.0, "", _tolerance(axis_facts)
    gradients = _gradients(outputs, [*full.values(), *full_inputs])
    small_gradients = _gradients(small_outputs, [*parameters.values(), *small_inputs])
    names = [*full, *(f"argument {i}" for i in range(len(inputs)))]
    scale = max((float(g.abs().max()) for g in gradients if g is not None and g.numel()), default=0.0)
    for name, a, b in zip(names, gradients, small_gradients, strict=True):
        if a is not None:
            expected = sliced(a, positions.get(name, {}))
        elif b is not None:
            expected = torch.zeros_like(b)
        else:
            continue
        error = _gradient_error(expected, torch.zeros_like(expected) if b is None else b, scale, tolerance)
        if error > gradient_error:
            gradient_error, worst = error, name
    removed = sum(atom.size - entries(selected) for atom, selected in kept.items())
    return Comparison(coupling, removed, outputs_error, gradient_error, worst, tolerance)


def _positions(exprs: Sequence[Expr], kept: Selection) -> dict[int, Tensor]:
    """Return the positions that stay along each dim that has lost some."""
    return {dim: mask_of(expr, kept).nonzero().flatten() for dim, expr in enumerate(exprs) if touched(expr, kept)}


def _cut(tensor: Tensor, positions: Mapping[int, Tensor]) -> Tensor:
    """Cut a tensor to some positions, with gradients."""
    for dim, index in positions.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def _tolerance(axis_facts: AxisFacts) -> float:
    """Return the tolerance of the least precise dtype in the graph: a norm may compute in float32 for any input."""
    dtypes = {meta.dtype for node in axis_facts.values for meta in tensor_meta(node)}
    return max((TOLERANCE[dtype] for dtype in dtypes & TOLERANCE.keys()), default=1e-5)


def _gradients(outputs: Sequence[Any], leaves: list[Tensor]) -> list[Tensor | None]:
    """Return the gradients of a fixed random projection of the outputs."""
    generator = torch.Generator().manual_seed(1)
    projected = [
        (out, torch.randn(out.shape, generator=generator))  # of all, as a result may be a constant on one side
        for out in outputs
        if isinstance(out, Tensor) and (out.requires_grad or out.is_floating_point())
    ]
    terms = [(out * projection.to(out)).sum() for out, projection in projected if out.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not terms or not wanted:
        return [None] * len(leaves)
    with with_autocast():  # off: its casts in a backward would be more noise than those that a forward has made
        gradients = iter(torch.autograd.grad(sum(terms[1:], terms[0]), wanted, allow_unused=True))
    given = [next(gradients) if leaf.requires_grad else None for leaf in leaves]
    return [None if gradient is None else dense(gradient) for gradient in given]


def output_error(a: Tensor, b: Tensor) -> float:
    """Return the largest difference relative to the largest entry; 0 where both tensors are nothing but rounding.

    A sum over normalised values is zero but for rounding, whatever the weights are.
    """
    if a.shape == b.shape and a.is_floating_point() and a.numel() and _is_rounding(a) and _is_rounding(b):
        return 0.0
    return relative_error(a, b)


def _is_rounding(tensor: Tensor) -> bool:
    return float(tensor.detach().abs().max()) < 1e3 * torch.finfo(tensor.dtype).eps


def _gradient_error(a: Tensor, b: Tensor, scale: float, tolerance: float) -> float:
    """Return the largest difference relative to the largest entry, or to `scale` if it is rounding of larger numbers.

    Where terms cancel (in the gradient of a key's bias under softmax, or of a bias before a group norm over many
    positions) only noise is left, and its error relative to itself means nothing. `scale` is the largest entry of all
    gradients; differences up to `NOISE` times that count as rounding.
    """
    error = relative_error(a, b)
    if a.shape != b.shape or not a.numel():
        return error
    eps = torch.finfo(a.dtype).eps
    if _is_rounding(a) and _is_rounding(b):
        return 0.0
    difference = float((a - b).abs().max())
    # Where an op on the way computes in float32, gradients in float64 carry its rounding too; in 16 bits, all of it.
    inherited = tolerance if tolerance >= TOLERANCE[torch.float16] else tolerance / 100
    noise = max(NOISE.get(a.dtype, 64 * eps), inherited if tolerance > TOLERANCE.get(a.dtype, 0.0) else 0.0)
    return min(error, difference / scale) if difference <= noise * scale else error
