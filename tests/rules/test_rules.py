"""Every registered axis rule, tested by experiment and looked up by the name of its op.

Each op runs in a module whose tensor operands are parameters, so that everything is an axis that could shrink. What
a rule leaves free must then be free: the shrunk program equals the masked one on any selection, and an entry of an
operand reaches only the entries of the output that the axes relate to it. Samples come from torch's own `op_db`.
"""

from __future__ import annotations

import operator
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from transformers.integrations import moe  # noqa: F401  (registers an op)

from ecospa_fx.errors import CaptureError, RuleError
from ecospa_fx.passes.axes.algebra import Atom, Expr, atoms_of
from ecospa_fx.passes.axes.selection import index_of, mask_of, touched
from ecospa_fx.passes.capture.capture import capture
from ecospa_fx.passes.capture.compare_eager import relative_error, run
from ecospa_fx.passes.graph.nodes import place
from ecospa_fx.passes.graph.tensors import sliced, swapped
from ecospa_fx.passes.infer.infer import infer_axes
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.relations import SameDims
from ecospa_fx.passes.rewrite.rewrite import rewrite
from ecospa_fx.passes.rewrite.verify import Masked, contraction_masks
from ecospa_fx.passes.rules import OPS, OpInfo, axis_rule

aten = torch.ops.aten
LEAVES = "it leaves the region as output"
SAMPLES = 4  # calls per op and variant
TOLERANCE = 1e-9
GENERATOR = torch.Generator().manual_seed(0)
UNUSED = torch.zeros(2)  # a region takes at least one tensor


@dataclass(frozen=True)
class Call:
    """One call of an op: `function(*args, **kwargs)`."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    in_place: bool = False
    cast: bool = False  # the op takes no floats: its operands are parameters that are cast
    held: bool = False  # all operands but the first are buffers: torch refuses their gradients


class Calls(nn.Module):
    """Runs calls whose floating operands are parameters and whose other tensors are buffers."""

    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__()
        self.calls, self.leaves = calls, []
        for i, call in enumerate(calls):
            leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
            first = next((j for j, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), 0)
            for j, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    name, value = f"t{i}_{j}", leaf.detach().clone(memory_format=torch.contiguous_format)
                    if (leaf.is_floating_point() or call.cast) and not (call.held and j > first):
                        self.register_parameter(name, nn.Parameter(value.double()))
                    else:
                        self.register_buffer(name, value)
            self.leaves.append((leaves, spec))

    def forward(self, _: Tensor) -> list[Tensor]:
        results: list[Tensor] = []
        for i, (call, (leaves, spec)) in enumerate(zip(self.calls, self.leaves, strict=True)):
            leaves = [self.operand(call, i, j, leaf) for j, leaf in enumerate(leaves)]
            if call.in_place:
                first = next(j for j, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
                leaves[first] = leaves[first].clone()
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            results += [out for out in pytree.tree_leaves(call.function(*args, **kwargs)) if isinstance(out, Tensor)]
        return results

    def operand(self, call: Call, i: int, j: int, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        operand = getattr(self, f"t{i}_{j}")
        return operand.to(leaf.dtype) if call.cast else operand


def t(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=GENERATOR)


def classes(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 3


def bits(op: Any) -> Callable[..., Tensor]:
    return lambda x, y: op(x > 0, y > 0)


def offsets() -> Tensor:
    """Where each of three groups of rows ends; one has none."""
    return torch.tensor([2, 2, 6], dtype=torch.int32)


# What op_db does not reach, or not with every dim larger than one. A new rule for an op that op_db knows needs no line.
BY_HAND: dict[str, list[Call]] = {
    "_fused_rms_norm": [Call(aten._fused_rms_norm.default, (t(3, 4), [4], t(4), 1e-6))],
    "_log_softmax": [Call(aten._log_softmax.default, (t(2, 3, 4), 1, False))],
    "_softmax": [Call(aten._softmax.default, (t(2, 3, 4), -1, False))],
    "_to_copy": [Call(aten._to_copy.default, (t(3, 4),), {"dtype": torch.float32})],
    "_unsafe_view": [Call(aten._unsafe_view.default, (t(3, 4), [3, 2, 2]))],
    "_upsample_bicubic2d_aa": [Call(aten._upsample_bicubic2d_aa.default, (t(2, 3, 4, 4), [2, 2], False))],
    "_upsample_bilinear2d_aa": [Call(aten._upsample_bilinear2d_aa.default, (t(2, 3, 4, 4), [2, 2], False))],
    "adaptive_max_pool2d": [Call(aten.adaptive_max_pool2d.default, (t(2, 3, 4, 4), [2, 2]))],
    # Capture drops an alias unless something is written into it.
    "alias": [Call(lambda x: aten.alias.default(x.clone()).add_(1), (t(3, 4),))],
    "arange": [Call(lambda x: torch.arange(4, dtype=x.dtype).mul_(x), (t(4),))],
    "bernoulli_": [Call(aten.bernoulli_.float, (t(3, 4), 0.5), in_place=True)],
    "broadcast_tensors": [Call(torch.broadcast_tensors, (t(3, 4), t(4), t(2, 1, 4)))],
    "contiguous": [Call(lambda x: x.T.contiguous(), (t(3, 4),))],
    "copy_": [Call(aten.copy_.default, (t(3, 4), t(4)), in_place=True)],
    "cross_entropy_loss": [
        Call(torch.nn.functional.cross_entropy, (t(4, 3), classes(4))),
        Call(torch.nn.functional.cross_entropy, (t(4, 3), t(4, 3).softmax(1))),
        Call(torch.nn.functional.cross_entropy, (t(4, 3), classes(4), t(3).abs()), {"reduction": "none"}),
    ],
    "detach": [Call(aten.detach.default, (t(3, 4),))],
    "detach_": [Call(aten.detach_.default, (t(3, 4),), in_place=True)],
    # A tensor made of sizes alone depends on a parameter once one is written into it.
    "empty": [Call(lambda x: torch.empty(3, 4, dtype=x.dtype).copy_(x), (t(3, 4),))],
    "feature_dropout": [Call(aten.feature_dropout.default, (t(2, 3, 4), 0.5, True))],
    "full": [Call(lambda x: torch.full((3, 4), 2.0, dtype=x.dtype).add_(x), (t(3, 4),))],
    "gelu_": [Call(aten.gelu_.default, (t(3, 4),), in_place=True)],
    "hardswish_": [Call(aten.hardswish_.default, (t(3, 4),), in_place=True)],
    "hardtanh_": [Call(aten.hardtanh_.default, (t(3, 4),), in_place=True)],
    "index": [
        Call(lambda x, i: x[:, i], (t(3, 4, 5), classes(6))),
        Call(lambda x, i: x[i], (t(3, 4), classes(2, 2))),
        Call(lambda x, i, j: x[i, j], (t(3, 4), classes(5), classes(5))),
        Call(lambda x, mask: x[:, mask], (t(3, 4), torch.tensor([True, False, True, True]))),
    ],
    "instance_norm": [Call(torch.nn.functional.instance_norm, (t(2, 3, 4), None, None, t(3), t(3)))],
    "mm": [Call(lambda x: torch.mm(x, x), (t(4, 4),))],
    "matmul": [Call(lambda x: x @ x.T @ x, (t(4, 4),)), Call(torch.matmul, (t(3, 1, 2, 4), t(5, 4, 2)))],
    "scaled_dot_product_attention": [
        Call(torch.nn.functional.scaled_dot_product_attention, (t(2, 4, 3, 8), t(2, 2, 5, 8), t(2, 2, 5, 6)), more)
        for more in ({"enable_gqa": True}, {"enable_gqa": True, "attn_mask": t(2, 4, 3, 5)})
    ],
    "einsum": [
        Call(lambda x, y: torch.einsum("ii,ij->j", x, y), (t(3, 3), t(3, 4))),
        Call(lambda x, y: torch.einsum("bk,kn->nb", x, y), (t(3, 1), t(4, 2))),
    ],
    "lift_fresh_copy": [Call(aten.lift_fresh_copy.default, (t(3, 4),))],
    "max_pool1d": [
        Call(aten.max_pool1d.default, (t(2, 3, 4), [3], [1], [1])),
        Call(aten.max_pool1d.default, (t(3, 4), [3], [1], [1])),
    ],
    "max_pool2d": [
        Call(aten.max_pool2d.default, (t(2, 3, 4, 5), [3], [1], [1])),
        Call(aten.max_pool2d.default, (t(3, 4, 5), [3], [1], [1])),
    ],
    "max_pool3d": [
        Call(aten.max_pool3d.default, (t(2, 3, 4, 5, 6), [3], [1], [1])),
        Call(aten.max_pool3d.default, (t(3, 4, 5, 6), [3], [1], [1])),
    ],
    "linalg_vector_norm": [Call(aten.linalg_vector_norm.default, (t(2, 3, 4), 2, [1], keep)) for keep in (True, False)],
    "mse_loss": [Call(aten.mse_loss.default, (t(3, 4), t(3, 4), reduction)) for reduction in (0, 1, 2)],
    "narrow": [Call(lambda x: (aten.narrow.default(x, 1, 1, 3), aten.narrow.default(x, -1, -2, 2)), (t(3, 6),))],
    "mT": [Call(lambda x: x.mT, (t(2, 3, 4),))],
    "mH": [Call(lambda x: x.mH, (t(2, 3, 4),))],
    "adjoint": [Call(aten.adjoint.default, (t(2, 3, 4),))],
    "swapdims": [Call(aten.swapdims.default, (t(2, 3, 4), 0, -1))],
    "moveaxis": [Call(aten.moveaxis.int, (t(2, 3, 4), 0, -1))],
    "movedim": [Call(torch.movedim, (t(2, 3, 4), 0, -1)), Call(torch.movedim, (t(2, 3, 4), -1, 1))],
    "nll_loss": [Call(aten.nll_loss.default, (t(4, 3), classes(4)))],
    "nll_loss_nd": [Call(aten.nll_loss_nd.default, (t(4, 3), classes(4)))],
    "numpy_T": [Call(lambda x: x.T, (t(3, 4),))],
    "ones": [Call(lambda x: torch.ones(3, 4, dtype=x.dtype).mul_(x), (t(3, 4),))],
    "rand_like": [Call(aten.rand_like.default, (t(3, 4),))],
    "relu6_": [Call(aten.relu6_.default, (t(3, 4),), in_place=True)],
    "relu_": [Call(aten.relu_.default, (t(3, 4),), in_place=True)],
    "slice": [
        Call(lambda x: (x[:, 1:4], x[..., -2:], x[:-1]), (t(3, 6, 4),)),
        Call(lambda x: (x[:, ::2], x[:, 1::2], x[:, -6::3], x[:, -5::3]), (t(3, 6),)),
    ],
    "squeeze": [Call(aten.squeeze.dim, (t(3, 1, 4), d)) for d in (0, 1)]
    + [Call(aten.squeeze.dims, (t(3, 1, 4), [0, 1]))],
    "type_as": [Call(aten.type_as.default, (t(3, 4), t(2).float()))],
    "upsample_bicubic2d": [Call(aten.upsample_bicubic2d.vec, (t(2, 3, 4, 4), [4, 4], False, None))],
    "upsample_bilinear2d": [Call(aten.upsample_bilinear2d.vec, (t(2, 3, 4, 4), [4, 4], False, None))],
    "upsample_linear1d": [Call(aten.upsample_linear1d.vec, (t(2, 3, 4), [4], False, None))],
    "upsample_nearest1d": [Call(aten.upsample_nearest1d.vec, (t(2, 3, 4), [4], None))],
    "upsample_nearest2d": [Call(aten.upsample_nearest2d.vec, (t(2, 3, 4, 4), [4, 4], None))],
    "zeros": [Call(lambda x: torch.zeros(3, 4, dtype=x.dtype).add_(x), (t(3, 4),))],
}
BY_HAND |= {
    **{name: [Call(bits(getattr(aten, name).Tensor), (t(3, 4), t(4)))] for name in ("__and__", "__or__", "__xor__")},
    "imag": [Call(lambda x: torch.view_as_complex(x).imag, (t(3, 4, 2),))],
    "real": [Call(lambda x: torch.view_as_complex(x).real, (t(3, 4, 2),))],
    "fft_fftshift": [Call(aten.fft_fftshift.default, (t(3, 4), [1])), Call(aten.fft_fftshift.default, (t(3, 4),))],
    "fft_ifftshift": [Call(aten.fft_ifftshift.default, (t(3, 4), [0]))],
    "grid_sampler": [Call(aten.grid_sampler.default, (t(2, 3, 4, 5), t(2, 3, 2, 2).tanh(), 0, 0, False))],
    "_weight_norm": [
        Call(aten._weight_norm.default, (t(3, 4, 5), t(3, 1, 1), 0)),
        Call(aten._weight_norm.default, (t(3, 4, 5), t(1, 1, 5), 2)),
    ],
    "col2im": [Call(aten.col2im.default, (t(2, 12, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]))],
    "gru": [
        Call(
            lambda x, h, a, b: aten.gru.input(x, h, [a, b], False, 1, 0.0, False, False, True),
            (t(2, 3, 4), t(1, 2, 5), t(15, 4), t(15, 5)),
        )
    ],
    "edge": [Call(torch.ops.ecospa_fx.edge, (t(3, 4), 0, -1, True))],
    "grouped_mm_fallback": [Call(torch.ops.transformers.grouped_mm_fallback, (t(6, 4), t(3, 4, 5), offsets()))],
    "im2col": [Call(aten.im2col.default, (t(2, 3, 4, 5), [2, 2], [1, 1], [0, 0], [1, 1]))],
    "index_put": [
        Call(lambda x, i, v: aten.index_put.default(x, [None, i], v), (t(3, 4), torch.tensor([2, 0]), t(3, 2)))
    ],
    "index_put_": [
        Call(lambda x, i, v: x.clone().index_put_((i,), v), (t(4, 3), torch.tensor([2, 0]), t(2, 3))),
        Call(lambda x, i, v: x.clone().index_put_((i,), v), (t(4, 3), torch.tensor([2, 0]), t(3))),
        Call(
            lambda x, i, j, v: x.clone().index_put_((i, j), v),
            (t(4, 3, 5), torch.tensor([2, 0]), torch.tensor([1, 2]), t(2, 5)),
        ),
    ],
    "lstm": [
        Call(
            lambda x, h, c, a, b: aten.lstm.input(x, [h, c], [a, b], False, 1, 0.0, False, False, True),
            (t(2, 3, 4), t(1, 2, 5), t(1, 2, 5), t(20, 4), t(20, 5)),
        )
    ],
    "rnn_relu": [
        Call(
            lambda x, h, a, b: aten.rnn_relu.input(x, h, [a, b], False, 1, 0.0, False, False, True),
            (t(2, 3, 4), t(1, 2, 5), t(5, 4), t(5, 5)),
        )
    ],
    "rnn_tanh": [
        Call(
            lambda x, h, a, b: aten.rnn_tanh.input(x, h, [a, b], False, 1, 0.0, False, False, True),
            (t(2, 3, 4), t(1, 2, 5), t(5, 4), t(5, 5)),
        )
    ],
    "masked_scatter_": [
        Call(lambda x, m, v: x.clone().masked_scatter_(m, v), (t(3, 4), torch.arange(12).view(3, 4) % 2 == 0, t(6)))
    ],
    "as_strided": [Call(lambda x: x.as_strided((3, 3, 2), (4, 1, 1)), (t(3, 4),))],
    "one_hot": [Call(lambda x: torch.nn.functional.one_hot((x > 0).long(), 3), (t(3, 4),))],
    "histc": [Call(lambda x: torch.histc(x, 4, -1.0, 1.0), (t(3, 4),))],
    "polar": [Call(lambda a, b: torch.view_as_real(torch.polar(a, b)), (t(3, 4), t(3, 4)))],
    "complex": [Call(lambda a, b: torch.view_as_real(torch.complex(a, b)), (t(3, 4), t(3, 4)))],
    "reshape_as": [Call(lambda x, y: x.reshape_as(y) + 1, (t(3, 8), t(3, 2, 4)))],
    "view_as": [Call(lambda x, y: x.view_as(y) + 1, (t(3, 8), t(3, 2, 4)))],
    "view_as_complex": [Call(lambda x: torch.view_as_real(torch.view_as_complex(x) * 2), (t(3, 4, 2),))],
    "view_as_real": [Call(lambda x: torch.view_as_real(torch.view_as_complex(x) * 2), (t(3, 4, 2),))],
    "group_norm": [Call(torch.nn.functional.group_norm, (t(2, 6, 4), 3, t(6), t(6)))],
    "conv2d": [Call(torch.nn.functional.conv2d, (t(2, 6, 4, 4), t(9, 2, 3, 3), t(9)), {"groups": 3})],
    "conv_transpose2d": [
        Call(torch.nn.functional.conv_transpose2d, (t(2, 6, 4, 4), t(6, 3, 3, 3), t(9)), {"groups": 3}),
        Call(torch.nn.functional.conv_transpose2d, (t(2, 6, 4, 4), t(6, 1, 3, 3), t(6)), {"groups": 6}),
    ],
}
BY_HAND["index"] += [
    Call(lambda x, i, j: x[:, i, j], (t(3, 4, 5, 2), classes(2, 1), classes(3))),
    Call(lambda x, i, j: x[i, :, j], (t(3, 4, 5), classes(2, 3), classes(3))),
]
BY_HAND["einsum"] += [
    Call(lambda x, y: torch.einsum("...qe,...ke->...qk", x, y), (t(2, 3, 4), t(2, 5, 4))),
    Call(lambda x, y: torch.einsum("b...i,io", x, y), (t(2, 3, 4), t(4, 5))),
]
BY_HAND["squeeze"].append(Call(lambda x: torch.squeeze(x), (t(3, 1, 4),)))
# What is a class must stay one when an entry moves; samples of as_strided read beyond the tensor that they are given.
ONLY_BY_HAND = {"as_strided", "one_hot"}
UNREACHED: dict[str, str] = {
    "_grouped_mm": "it takes no float64",
    "view": "canonicalise makes a reshape of it",
}  # name -> why no sample can reach it here


def registered() -> list[str]:
    """The names of all ops that have a rule."""
    return sorted(
        {op.rpartition("::")[2] if isinstance(op, str) else op._opname for op in OPS if op is not operator.getitem}
    )


def known_as(op: Any) -> set[str]:
    names = {op.name, op.aten_name or op.name, *(alias.name for alias in op.aliases)}
    return {name.rpartition(".")[2] for name in names} | {op.name.split(".")[0]}


def calls_of(name: str) -> list[Call]:
    """A few small calls of the op called `name`, as different from each other as its samples are."""
    torch.manual_seed(zlib.crc32(name.encode()))
    calls = list(BY_HAND.get(name, ()))
    for op in op_db:
        if name in ONLY_BY_HAND:
            continue
        if name in known_as(op):
            aliases = {alias.name: alias.op for alias in op.aliases}
            function = op.op if name in op.name.split(".") else aliases.get(name, op.op)
        elif name.endswith("_") and name[:-1] in known_as(op) and op.inplace_variant is not None:
            function = op.inplace_variant
        else:
            continue
        dtype = next((d for d in (torch.float64, torch.bool, torch.int64) if d in op.dtypes), None)
        if dtype is None:
            continue
        cast = dtype is not torch.float64
        in_place = function is op.inplace_variant
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sparse samples announce themselves as they are made
            samples = different(op.sample_inputs("cpu", dtype, requires_grad=False))
        for sample in samples:
            # torch drops arguments at their defaults, and capture reads `slice(x)` as ill-formed.
            if not (in_place and sample.broadcasts_input) and not (name == "slice" and len(sample.args) < 2):
                calls.append(Call(function, (sample.input, *sample.args), dict(sample.kwargs), in_place, cast))
    return calls


def different(samples: Iterator[Any]) -> list[Any]:
    """The samples with most dims of more than one entry, one per kind of call."""
    kinds: dict[Any, Any] = {}
    for sample in list(samples):  # all are drawn first, because some are written to once they are handed out
        leaves = pytree.tree_leaves((sample.input, sample.args, sample.kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors or not all(map(ordinary, tensors)):
            continue
        long = tuple(sum(size > 1 for size in x.shape) for x in tensors)
        others = repr([leaf for leaf in leaves if not isinstance(leaf, Tensor)])
        kinds.setdefault((tuple(x.ndim for x in tensors), long, others), (sum(long), sample))
    ranked = sorted(kinds.values(), key=lambda kind: -kind[0])
    # The largest come first, but a few of the others keep numbers, vectors and broadcasting among them.
    chosen = ranked[:SAMPLES] + ranked[SAMPLES :: max(1, len(ranked) // 3)]
    return [sample for _, sample in chosen]


def ordinary(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_complex() and 0 < x.numel() <= 4000 and bool(x.isfinite().all())


def inferred(calls: Sequence[Call]) -> list[tuple[Calls, AxisFacts]]:
    """Captured and inferred in one graph, or one by one where a call cannot be exported."""
    module = Calls(calls)
    try:
        captured = capture(module, (UNUSED,), {}, check=False)
    except CaptureError:
        if len(calls) == 1:
            return [] if calls[0].held else inferred([replace(calls[0], held=True)])
        return [found for call in calls for found in inferred([call])]
    return [(module, infer_axes(captured))]


def pinned(axis_facts: AxisFacts) -> set[Atom]:
    """Atoms that an op pins. That results leave the region is no matter here: they are sliced, then compared."""
    facts = [fact for fact in axis_facts.facts if fact.role == "pinned" and not fact.reason.startswith(LEAVES)]
    return {atom for fact in facts for atom in atoms_of(fact.expr)}


def atoms(axis_facts: AxisFacts) -> list[Atom]:
    groups = (*axis_facts.parameters.values(), *(exprs for outputs in axis_facts.values.values() for exprs in outputs))
    made = (*axis_facts.made.values(), *(source.exprs for source in axis_facts.sources))
    found = {atom: None for exprs in (*groups, *made) for expr in exprs for atom in atoms_of(expr)}
    return sorted(found, key=lambda atom: atom.serial)


def results_of(axis_facts: AxisFacts) -> list[tuple[Expr, ...] | None]:
    """Axes of each result, None where it depends on no parameter."""
    (out,) = (node for node in axis_facts.captured.graph.nodes if node.op == "output")
    nodes = pytree.tree_leaves(out.args)
    return [axis_facts.values[node][0] if node in axis_facts.values else None for node in nodes]


def unpredictable(axis_facts: AxisFacts) -> bool:
    """Whether results are random or uninitialised; their sizes can be compared all the same."""
    targets = [
        node.target for node in axis_facts.captured.graph.nodes if isinstance(node.target, torch._ops.OpOverload)
    ]
    return any(torch.Tag.nondeterministic_seeded in op.tags or "empty" in op._opname for op in targets)


def steps(exprs: Sequence[Expr], kept: dict[Atom, Tensor]) -> dict[int, Tensor]:
    return {dim: mask_of(expr, kept).nonzero().flatten() for dim, expr in enumerate(exprs) if touched(expr, kept)}


def selections(free: Sequence[Atom]) -> Iterator[dict[Atom, Tensor]]:
    """Every free atom alone, by one entry and by a random part, and all at once."""
    together = {}
    for atom in free:
        order = torch.randperm(atom.size)
        for amount in {1, int(torch.randint(1, atom.size, ()))}:
            together[atom] = torch.zeros(atom.size, dtype=torch.bool).index_fill(0, order[:amount], True)
            yield {atom: together[atom]}
    if len(free) > 1:
        yield together


def check_selection(module: Calls, axis_facts: AxisFacts, kept: dict[Atom, Tensor]) -> None:
    """Assert that the shrunk program equals the masked graph."""

    class Here(Masked):
        masks = contraction_masks(axis_facts, kept, (UNUSED,))

    whole = dict((*module.named_parameters(), *module.named_buffers()))
    expected = run(axis_facts.captured, whole, (UNUSED,), interpreter=Here)
    small = {
        name: sliced(tensor.detach(), steps(axis_facts.parameters[name], kept))
        if name in axis_facts.parameters
        else tensor
        for name, tensor in whole.items()
    }
    program = rewrite(axis_facts, kept, module)
    with swapped(module, small):
        found = program.run(module, UNUSED, *program.constants)
    random = unpredictable(axis_facts)
    for exprs, a, b in zip(results_of(axis_facts), expected, found, strict=True):
        a = a if exprs is None else sliced(a, steps(exprs, kept))
        same = a.shape == b.shape and (random or relative_error(a, b) <= TOLERANCE)
        assert same, f"selecting {kept}: {a} became {b}\n{axis_facts.captured.graph}\n{program.source}"


def check_entry(module: Calls, axis_facts: AxisFacts, name: str, free: Sequence[Atom]) -> None:
    """Assert that one entry of a parameter reaches only those of the results that the axes relate to it."""
    whole = {n: tensor.detach() for n, tensor in (*module.named_parameters(), *module.named_buffers())}
    place = tuple(int(torch.randint(size, ())) for size in whole[name].shape)
    moved = whole[name].clone()
    moved[place] = 0.37 - moved[place]
    before = run(axis_facts.captured, whole, (UNUSED,))
    after = run(axis_facts.captured, whole | {name: moved}, (UNUSED,))
    summed = {atom for fact in axis_facts.facts if fact.role == "contracted" for atom in atoms_of(fact.expr)}
    mine = {atom for expr in axis_facts.parameters[name] for atom in atoms_of(expr)}
    for exprs, a, b in zip(results_of(axis_facts), before, after, strict=True):
        changed = (a != b) & ~((a != a) & (b != b))
        assert exprs is not None or not changed.any()
        if not changed.any():
            continue
        theirs = {atom for expr in exprs for atom in atoms_of(expr)}
        for atom in (set(free) - summed) & mine & theirs:
            here = {int(index_of(expr, atom)[i]) for expr, i in zip(axis_facts.parameters[name], place, strict=True)}
            if here != {-1}:
                assert not (changed & ~related(exprs, changed, atom, here - {-1})).any(), (
                    f"{name}{place} along {atom}\n{axis_facts.captured.graph}"
                )


def related(exprs: tuple[Expr, ...], result: Tensor, atom: Atom, here: set[int]) -> Tensor:
    """Where a result is at a position of `atom` that is in `here`, or does not run along it."""
    at, bare = torch.zeros_like(result), torch.ones_like(result)
    for dim, expr in enumerate(exprs):
        if atom in atoms_of(expr):
            index = index_of(expr, atom).view([-1 if d == dim else 1 for d in range(result.ndim)])
            at = at | torch.isin(index, torch.tensor(sorted(here)))
            bare = bare & (index < 0)
    return at | bare


@pytest.mark.parametrize("name", registered())
def test_rule_is_exact(name: str) -> None:
    exercised = False
    calls = calls_of(name)
    for module, axis_facts in (found for i in range(0, len(calls), 4) for found in inferred(calls[i : i + 4])):
        exercised |= any(getattr(node.target, "_opname", "") == name for node in axis_facts.operands)
        stuck = pinned(axis_facts)
        free = [a for a in atoms(axis_facts) if a not in stuck and type(a.size) is int and a.size > 1]
        for kept in selections(free):
            check_selection(module, axis_facts, kept)
        if not unpredictable(axis_facts):
            for parameter in axis_facts.parameters:
                check_entry(module, axis_facts, parameter, free)
    assert exercised != (name in UNREACHED), f"{name}: {'reached' if exercised else 'no sample reaches it'}"


def test_what_no_sample_reaches_is_in_the_table() -> None:
    assert set(UNREACHED) <= set(registered())


class Model(nn.Module):
    """`relu(x @ weight)`, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.weight)


def relu_node(axis_facts: AxisFacts) -> Any:
    (node,) = (node for node in axis_facts.captured.graph.nodes if node.target is aten.relu.default)
    return node


def test_a_second_rule_for_an_op_is_refused() -> None:
    before = dict(OPS)
    with pytest.raises(ValueError) as error:
        axis_rule(aten.linear.default)(lambda *_: "")
    assert str(error.value) == "aten.linear.default has an axis rule already: linear"
    assert before == OPS


def test_a_rule_that_raises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: Any) -> SameDims:
        raise KeyError("no such dim")

    monkeypatch.setitem(OPS, aten.relu.default, OpInfo(broken, None))
    captured = capture(Model(), (torch.ones(2, 3),), {})
    with pytest.raises(RuleError) as error:
        infer_axes(captured)
    where = place(relu_node(AxisFacts(captured)))
    assert where.startswith("test_rules.py:")
    assert str(error.value) == (
        f"the axis rule `broken` failed on aten.relu ({where}) with KeyError: 'no such dim'; "
        "this is a bug in the rule, nothing was changed"
    )
    assert isinstance(error.value.__cause__, KeyError)


def test_a_follow_that_raises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(site: Any) -> None:
        raise IndexError("too far")

    monkeypatch.setitem(OPS, aten.relu.default, OpInfo(OPS[aten.relu.default].axes, broken))
    module = Model()
    axis_facts = infer_axes(capture(module, (torch.ones(2, 3),), {}))
    (columns,) = atoms_of(axis_facts.parameters["weight"][1])
    with pytest.raises(RuleError) as error:
        rewrite(axis_facts, {columns: torch.tensor([True, False, True, True])}, module)
    assert str(error.value) == (
        f"the sizes of aten.relu ({place(relu_node(axis_facts))}) cannot follow a shrink: its rule failed with "
        "IndexError: too far; this is a bug in the rule, nothing was changed"
    )


def test_an_op_without_a_rule_pins_what_it_touches_and_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OPS, aten.relu.default)
    axis_facts = infer_axes(capture(Model(), (torch.ones(2, 3),), {}))
    node = relu_node(axis_facts)
    assert axis_facts.missing == {"aten.relu": [node]}
    reasons = defaultdict(list)
    for fact in axis_facts.facts:
        if fact.node is node:
            reasons[fact.reason].append(fact.expr)
    # Rows and columns of the operand, then those of the result, which are axes of their own.
    assert list(reasons) == ["no axis rule for aten.relu"]
    operand, result = axis_facts.operands[node][0].exprs, axis_facts.values[node][0]
    assert reasons["no axis rule for aten.relu"] == [*operand, *result]
    assert not set(operand) & set(result)
    assert axis_facts.parameters["weight"][1] == operand[1]
