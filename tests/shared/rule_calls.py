"""Calls of every registered op: samples from torch's own `op_db`, and by hand what those do not reach."""

from __future__ import annotations

import operator
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from transformers.integrations import moe  # noqa: F401  (registers an op)

from ecospa_fx.passes.rules import OPS, OpInfo

aten = torch.ops.aten
SAMPLES = 4  # calls per op and variant
GENERATOR = torch.Generator().manual_seed(0)


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
        own = {name: getattr(self, name) for name in (*self._parameters, *self._buffers)}
        return [result for i in range(len(self.calls)) for result in self.results(i, own)]

    def results(self, i: int, operands: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors that call `i` gives with these operands."""
        call, (leaves, spec) = self.calls[i], self.leaves[i]
        given = [
            leaf
            if not isinstance(leaf, Tensor)
            else operands[f"t{i}_{j}"].to(leaf.dtype)
            if call.cast
            else operands[f"t{i}_{j}"]
            for j, leaf in enumerate(leaves)
        ]
        if call.in_place:
            first = next(j for j, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
            given[first] = given[first].clone()
        args, kwargs = pytree.tree_unflatten(given, spec)
        return [out for out in pytree.tree_leaves(call.function(*args, **kwargs)) if isinstance(out, Tensor)]


def t(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=GENERATOR)


def classes(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 3


def bits(op: Any) -> Callable[..., Tensor]:
    return lambda x, y: op(x > 0, y > 0)


def whole(op: Any) -> Callable[..., Tensor]:
    return lambda x, y: op((4 * x).long().abs(), (2 * y).long().abs())


def written(make: Any) -> Callable[..., Tensor]:
    return lambda x: make((3, 4), dtype=x.dtype).mul_(x)


def offsets() -> Tensor:
    """Where each of three groups of rows ends; one has none."""
    return torch.tensor([2, 2, 6], dtype=torch.int32)


# Calls that op_db lacks, or has with dims of one entry only. A new rule for an op that op_db knows needs no line.
BY_HAND: dict[str, list[Call]] = {
    "_fused_rms_norm": [Call(aten._fused_rms_norm.default, (t(3, 4), [4], t(4), 1e-6))],
    "_log_softmax": [Call(aten._log_softmax.default, (t(2, 3, 4), 1, False))],
    "_safe_softmax": [Call(aten._safe_softmax.default, (t(2, 3, 4), -1))],
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
        Call(aten._weight_norm.default, (t(3, 4), t(), -1)),
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
BY_HAND |= {
    # ops that op_db does not have under their own name
    **{name: [Call(whole(getattr(aten, name).Tensor), (t(3, 4), t(4)))] for name in ("__lshift__", "__rshift__")},
    **{
        name: [Call(whole(getattr(aten, name).Tensor), (t(3, 4), t(4)))]
        for name in ("__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__")
    },
    "_conj": [Call(lambda x: torch.view_as_real(torch.view_as_complex(x).conj().resolve_conj()), (t(3, 4, 2),))],
    "_conj_physical": [
        Call(lambda x: torch.view_as_real(aten._conj_physical.default(torch.view_as_complex(x))), (t(3, 4, 2),))
    ],
    "_neg_view": [Call(lambda x: aten._neg_view.default(x) * 2, (t(3, 4),))],
    "_lu_with_info": [Call(lambda x: aten._lu_with_info.default(x)[:1], (t(2, 3, 3),))],
    **{
        f"_{name}_backward_data": [
            Call(getattr(aten, f"_{name}_backward_data").default, (t(3, 4), t(3, 4).softmax(1), 1, torch.float64))
        ]
        for name in ("softmax", "log_softmax")
    },
    **{
        name: [Call(getattr(aten, name).vec, (t(2, 3, *(4,) * space), [3] * space, *flag, None))]
        for name, space, *flag in (
            ("_upsample_nearest_exact1d", 1),
            ("_upsample_nearest_exact2d", 2),
            ("_upsample_nearest_exact3d", 3),
            ("upsample_nearest3d", 3),
            ("upsample_trilinear3d", 3, False),
        )
    },
    **{
        f"max_pool{space}d_with_indices": [
            Call(getattr(aten, f"max_pool{space}d_with_indices").default, (t(*shape, *(4,) * space), [2] * space))
            for shape in ((2, 3), (3,))
        ]
        for space in (1, 2, 3)
    },
    **{
        name: [Call(getattr(aten, name).default, (t(3, 4), t(3, 4)))]
        for name in ("copy", "sigmoid_backward", "tanh_backward", "silu_backward", "gelu_backward")
    },
    "threshold_backward": [Call(aten.threshold_backward.default, (t(3, 4), t(3, 4), 0.1))],
    "zero": [Call(aten.zero.default, (t(3, 4),))],
    "poisson": [Call(lambda x: aten.poisson.default(x.abs()), (t(3, 4),))],
    "binomial": [Call(lambda x, y: aten.binomial.default(x.abs().round(), y.sigmoid()), (t(3, 4), t(3, 4)))],
    "random_": [Call(lambda x: x.clone().random_(), (t(3, 4),))],
    "native_dropout": [Call(aten.native_dropout.default, (t(3, 4), 0.5, True))],
    **{name: [Call(written(getattr(torch, name)), (t(3, 4),))] for name in ("rand", "randn")},
    "randint": [Call(written(lambda size, dtype: torch.randint(9, size, dtype=dtype)), (t(3, 4),))],
    "empty_permuted": [Call(lambda x: torch.empty_permuted((3, 4), (1, 0), dtype=x.dtype).copy_(x), (t(3, 4),))],
    "empty_strided": [Call(lambda x: torch.empty_strided((3, 4), (4, 1), dtype=x.dtype).copy_(x), (t(3, 4),))],
    "eye": [Call(written(lambda size, dtype: torch.eye(*size, dtype=dtype)), (t(3, 4),))],
    "fake_quantize_per_tensor_affine": [
        Call(aten.fake_quantize_per_tensor_affine.default, (t(3, 4).float(), 0.1, 0, -128, 127))
    ],
    "frobenius_norm": [Call(aten.frobenius_norm.dim, (t(2, 3, 4), [1], keep)) for keep in (True, False)],
    "nuclear_norm": [Call(aten.nuclear_norm.dim, (t(3, 4, 5), [1, 2])), Call(aten.nuclear_norm.default, (t(3, 4),))],
    "linalg_matrix_exp": [Call(torch.linalg.matrix_exp, (t(2, 3, 3),))],
    "matrix_H": [Call(lambda x: x.H, (t(3, 4),))],
    "slice_scatter": [Call(aten.slice_scatter.default, (t(3, 6, 4), t(3, 2, 4), 1, 1, 5, 2))],
    "unsafe_split_with_sizes": [Call(aten.unsafe_split_with_sizes.default, (t(3, 6), [1, 3, 2], 1))],
    "logspace": [Call(lambda x: torch.logspace(0, 1, 4, dtype=x.dtype).mul_(x), (t(4),))],
    "norm": [Call(aten.norm.ScalarOpt_dim, (t(2, 3, 4), 2, [1], keep)) for keep in (True, False)],
    "multi_margin_loss": [Call(torch.nn.functional.multi_margin_loss, (t(4, 3), classes(4)))],
    "histogramdd": [Call(lambda x: torch.histogramdd(x, [2, 3])[0], (t(5, 2),))],
    "istft": [
        Call(lambda x: torch.istft(torch.view_as_complex(x), 4, window=torch.ones(4).double()), (t(2, 3, 6, 2),))
    ],
    "embedding_renorm_": [
        Call(lambda w, i: aten.embedding_renorm_.default(w.clone(), i, 1.0, 2.0), (t(5, 4), classes(3)))
    ],
    "affine_grid_generator": [Call(torch.nn.functional.affine_grid, (t(2, 2, 3), [2, 3, 4, 5]))],
    "conv_tbc": [Call(torch.conv_tbc, (t(5, 2, 3), t(2, 3, 4), t(4), 1))],
    "gru_cell": [Call(aten.gru_cell.default, (t(2, 3), t(2, 4), t(12, 3), t(12, 4), t(12), t(12)))],
    "lstm_cell": [
        Call(
            lambda x, h, c, *weights: aten.lstm_cell.default(x, [h, c], *weights),
            (t(2, 3), t(2, 4), t(2, 4), t(16, 3), t(16, 4), t(16), t(16)),
        ),
        Call(lambda x, h, c, *w: aten.lstm_cell.default(x, [h, c], *w), (t(3), t(4), t(4), t(16, 3), t(16, 4))),
    ],
    **{
        name: [Call(getattr(aten, name).default, (t(2, 3), t(2, 4), t(4, 3), t(4, 4), t(4), t(4)))]
        for name in ("rnn_tanh_cell", "rnn_relu_cell")
    },
}
BY_HAND["lstm"] += [
    Call(
        lambda x, h, c, *weights: aten.lstm.input(x, [h, c], list(weights), False, 2, 0.0, False, True, False),
        (t(3, 2, 4), t(4, 2, 5), t(4, 2, 5), *(t(20, n) for n in (4, 5, 4, 5, 10, 5, 10, 5))),
    )
]  # two layers, two directions
BY_HAND["lstm"] += [
    Call(
        lambda x, h, c, *weights: aten.lstm.input(x, [h, c], list(weights), True, 1, 0.0, False, False, False),
        (t(3, 2, 4), t(1, 2, 3), t(1, 2, 5), t(20, 4), t(20, 3), t(20), t(20), t(3, 5)),
    ),
    Call(
        lambda x, n, h, c, *weights: aten.lstm.data(x, n, [h, c], list(weights), False, 1, 0.0, False, False),
        (t(5, 4), torch.tensor([2, 2, 1]), t(1, 2, 5), t(1, 2, 5), t(20, 4), t(20, 5)),
    ),
]  # projected, packed
BY_HAND["gru"].append(
    Call(
        lambda x, n, h, *weights: aten.gru.data(x, n, h, list(weights), True, 1, 0.0, False, True),
        (t(5, 4), torch.tensor([2, 2, 1]), t(2, 2, 5), *(t(*s) for s in ((15, 4), (15, 5), (15,), (15,)) * 2)),
    )
)
BY_HAND["index"] += [
    Call(lambda x, i, j: x[:, i, j], (t(3, 4, 5, 2), classes(2, 1), classes(3))),
    Call(lambda x, i, j: x[i, :, j], (t(3, 4, 5), classes(2, 3), classes(3))),
]
BY_HAND["einsum"] += [
    Call(lambda x, y: torch.einsum("...qe,...ke->...qk", x, y), (t(2, 3, 4), t(2, 5, 4))),
    Call(lambda x, y: torch.einsum("b...i,io", x, y), (t(2, 3, 4), t(4, 5))),
]
BY_HAND["squeeze"].append(Call(lambda x: torch.squeeze(x), (t(3, 1, 4),)))
# A class must stay one when an entry moves; samples of as_strided read beyond the tensor that they are given.
ONLY_BY_HAND = {"as_strided", "one_hot", "multi_margin_loss", "histogramdd"}
UNCHECKED = {"segment_reduce", "to_sparse", "sparse_sampled_addmm"}  # lengths out of bounds, results that are not dense
UNREACHED: dict[str, str] = {
    "_grouped_mm": "it takes no float64",
    "scalar_tensor": "it makes a number, which has no axes",
    "lift_fresh": "it is of constants, of which no axis is asked",
    "view": "canonicalise makes a reshape of it",
    "_unsafe_view": "canonicalise makes a reshape of it",
    "view_as": "canonicalise makes a reshape of it",
    "_scaled_mm": "it takes no float64",
    "_flash_attention_forward": "it runs on GPUs only",
    "_efficient_attention_forward": "it runs on GPUs only",
    "conj": "of real numbers it does nothing, and torch.export writes it as `_conj`",
    **dict.fromkeys(
        ("cov", "corrcoef", "ctc_loss", "linalg_lstsq"), "torch.export cannot tell its result without the values"
    ),
    **dict.fromkeys(("resize_", "resize_as_"), "torch resizes no tensor that has a gradient"),
    "split_copy": "torch.export makes split_with_sizes_copy of it",
    "tril_indices": "its entries are integers, which no parameter is written into",
    "triu_indices": "its entries are integers, which no parameter is written into",
    **dict.fromkeys(
        ("dequantize", "quantize_per_channel", "quantize_per_tensor", "fake_quantize_per_channel_affine"),
        "torch.export has no fake tensors of quantised numbers",
    ),
}  # name -> why no sample can reach it here


def named(op: Any) -> str:
    return op.rpartition("::")[2] if isinstance(op, str) else op._opname


def registered() -> list[str]:
    """The names of all ops that have a rule of their own, or a refusal that a sample reaches."""
    rules = _rules()
    refused = {n for n in rules if rules[n].refused and (n not in sampled() or n in UNCHECKED)}
    return sorted(rules.keys() - set(repeated()) - refused)


def repeated() -> list[str]:
    """The names of ops that have the rule of another: in place, into a copy, or under another name."""
    rules = _rules()
    first: dict[int, str] = {}
    bases = {name: name.removesuffix("_") if name[-1] == "_" else name.removesuffix("_copy") for name in rules}
    variants = {n for n, base in bases.items() if base != n and base in rules and rules[base].axes is rules[n].axes}
    return sorted(n for n, info in rules.items() if n in variants or first.setdefault(id(info), n) != n)


def _rules() -> dict[str, OpInfo]:
    rules: dict[str, OpInfo] = {}
    for op, info in OPS.items():
        if op is not operator.getitem:
            rules.setdefault(named(op), info)
    return rules


def sampled() -> set[str]:
    return {name for op in op_db for name in known_as(op)} | set(BY_HAND)


def known_as(op: Any) -> set[str]:
    names = {op.name, op.aten_name or op.name, *(alias.name for alias in op.aliases)}
    return {name.rpartition(".")[2] for name in names} | {op.name.split(".")[0], op.name.replace(".", "_")}


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
            if name.startswith("special_"):
                samples = samples[:2]  # of the many functions that torch computes entry by entry
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
