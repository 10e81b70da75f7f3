"""Ops that torch emits for its functions and modules, traced as torch.export does, before autograd decomposes them."""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

CALLS = 3  # kept of each op
KINDS = 2  # of samples per op: which tensors and arguments it is given
DTYPES = (torch.float64, torch.float32, torch.bool, torch.int64, torch.complex64)

# Functions of torch.nn.functional that op_db does not have.
FUNCTIONS: dict[str, Callable[[], Any]] = {
    **{
        f"adaptive_max_pool{n}d_with_indices": lambda n=n: getattr(F, f"adaptive_max_pool{n}d")(
            t(1, 2, *[4] * n), [2] * n, return_indices=True
        )
        for n in (1, 2, 3)
    },
    **{
        f"fractional_max_pool{n}d_with_indices": lambda n=n: getattr(F, f"fractional_max_pool{n}d")(
            t(1, 2, *[4] * n), 2, output_size=2, return_indices=True
        )
        for n in (2, 3)
    },
    **{
        f"max_pool{n}d_with_indices": lambda n=n: getattr(F, f"max_pool{n}d")(t(1, 2, *[4] * n), 2, return_indices=True)
        for n in (1, 2, 3)
    },
    **{f"lp_pool{n}d": lambda n=n: getattr(F, f"lp_pool{n}d")(t(1, 2, *[4] * n), 2.0, 2) for n in (1, 2, 3)},
    **{f"dropout{n}d": lambda n=n: getattr(F, f"dropout{n}d")(t(1, 2, *[4] * n)) for n in (1,)},
    **{
        name: lambda name=name: getattr(F, name)(t(3, 4).clone())
        for name in ("celu_", "elu_", "hardtanh_", "leaky_relu_", "relu_", "rrelu_", "selu_")
    },
    "affine_grid": lambda: F.affine_grid(t(1, 2, 3), [1, 2, 4, 4]),
    "conv_tbc": lambda: torch.conv_tbc(t(5, 2, 3), t(2, 3, 4), t(4)),
    "grouped_mm": lambda: F.grouped_mm(
        t(32, 16).bfloat16(), t(2, 16, 16).bfloat16(), offs=torch.tensor([16, 32], dtype=torch.int32)
    ),
    "fold": lambda: F.fold(t(1, 12, 9), (4, 4), (2, 2)),
    "gumbel_softmax": lambda: F.gumbel_softmax(t(3, 4), hard=True),
    "multi_head_attention_forward": lambda: nn.MultiheadAttention(4, 2).double()(t(3, 1, 4), t(3, 1, 4), t(3, 1, 4)),
    "native_channel_shuffle": lambda: F.native_channel_shuffle(t(1, 4, 2, 2), 2),
    "rrelu": lambda: F.rrelu(t(3, 4), training=True),
    "sigmoid": lambda: F.sigmoid(t(3, 4)),
    "softmin": lambda: F.softmin(t(3, 4), -1),
    "tanh": lambda: F.tanh(t(3, 4)),
    "threshold_": lambda: F.threshold_(t(3, 4).clone(), 0.1, 0.0),
    "unfold": lambda: F.unfold(t(1, 3, 4, 4), 2),
    "upsample": lambda: F.upsample(t(1, 2, 4, 4), scale_factor=2),
}
# Modules of torch.nn that module_db does not have.
MODULES: dict[str, Callable[[], Any]] = {
    "AdaptiveLogSoftmaxWithLoss": lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2]).double().log_prob(t(3, 4)),
    "CosineSimilarity": lambda: nn.CosineSimilarity()(t(3, 4), t(3, 4)),
    "CrossMapLRN2d": lambda: nn.LocalResponseNorm(2)(t(1, 4, 3, 3)),
    "ChannelShuffle": lambda: nn.ChannelShuffle(2)(t(1, 4, 2, 2)),
    "EmbeddingBag": lambda: nn.EmbeddingBag(5, 4).double()(torch.tensor([[1, 2]])),
    "Flatten": lambda: nn.Flatten()(t(2, 3, 4)),
    "Fold": lambda: nn.Fold((4, 4), (2, 2))(t(1, 12, 9)),
    "Hardsigmoid": lambda: nn.Hardsigmoid()(t(3, 4)),
    "PairwiseDistance": lambda: nn.PairwiseDistance()(t(3, 4), t(3, 4)),
    "PixelShuffle": lambda: nn.PixelShuffle(2)(t(1, 4, 2, 2)),
    "PixelUnshuffle": lambda: nn.PixelUnshuffle(2)(t(1, 4, 2, 2)),
    "RReLU": lambda: nn.RReLU()(t(3, 4)),
    "TransformerDecoder": lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8), 1).double()(
        t(3, 1, 4), t(3, 1, 4)
    ),
    "TripletMarginLoss": lambda: nn.TripletMarginLoss()(t(3, 4), t(3, 4), t(3, 4)),
    "TripletMarginWithDistanceLoss": lambda: nn.TripletMarginWithDistanceLoss()(t(3, 4), t(3, 4), t(3, 4)),
    "Unflatten": lambda: nn.Unflatten(1, (2, 2))(t(1, 4)),
    "Unfold": lambda: nn.Unfold(2)(t(1, 3, 4, 4)),
    "Upsample": lambda: nn.Upsample(scale_factor=2)(t(1, 2, 4, 4)),
    "UpsamplingBilinear2d": lambda: nn.UpsamplingBilinear2d(scale_factor=2)(t(1, 2, 4, 4)),
    "UpsamplingNearest2d": lambda: nn.UpsamplingNearest2d(scale_factor=2)(t(1, 2, 4, 4)),
    **{
        name: lambda name=name: getattr(nn, name)()(t(2, 3, *[4] * int(name[-2])))
        for name in ("Dropout1d", "Dropout2d", "Dropout3d")
    },
    **{name: lambda name=name: getattr(nn, name)()(t(2, 3)) for name in ("AlphaDropout", "Dropout", "Identity")},
    "FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout()(t(2, 3, 4, 4)),
    **{
        f"MaxUnpool{n}d": lambda n=n: getattr(nn, f"MaxUnpool{n}d")(2)(
            *getattr(F, f"max_pool{n}d")(t(1, 2, *[4] * n), 2, return_indices=True)
        )
        for n in (1, 2, 3)
    },
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(3).double().eval()(t(2, 3, 4)),
    "LazyLinear": lambda: nn.Linear(4, 3).double()(t(2, 4)),
    **{
        f"LazyBatchNorm{n}d": lambda n=n: getattr(nn, f"BatchNorm{n}d")(3).double()(t(2, 3, *[4] * n))
        for n in (1, 2, 3)
    },
    **{
        f"LazyInstanceNorm{n}d": lambda n=n: getattr(nn, f"InstanceNorm{n}d")(3).double()(t(2, 3, *[4] * n))
        for n in (1, 2, 3)
    },
    "NLLLoss2d": lambda: nn.NLLLoss()(t(2, 3, 4, 4), torch.zeros(2, 4, 4).long()),
}
WITHOUT_OPS = {
    *("Container", "DataParallel", "Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "RNNBase"),
    *("RNNCellBase", "Sequential", "assert_int_or_pair", "boolean_dispatch", "handle_torch_function"),
    *("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"),
}
# Functions and modules that torch cannot trace on a CPU, and those that ask for values, and so do not export.
UNTRACED = {
    "sparse.sampled_addmm", "sparse.mm", "torch._scaled_mm_v2", "torch._scaled_mm",
    "torch.ops.aten._flash_attention_forward", "torch.ops.aten._efficient_attention_forward",
    "nn.functional.gaussian_nll_loss", "gaussian_nll_loss", "GaussianNLLLoss", "nn.functional.batch_norm",
    "jiterator_unary", "jiterator_binary", "jiterator_4inputs_with_extra_args", "jiterator_binary_return_by_ref",
    "jiterator_2inputs_2outputs", "scaled_mm", "scaled_grouped_mm",
}  # fmt: skip


def t(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.1


def public_names() -> set[str]:
    """The functions of torch.nn.functional and the modules of torch.nn."""
    functions = {name for name, value in vars(F).items() if callable(value) and not inspect.isclass(value)}
    here = ("torch.nn.functional", "torch._C", "torch.nn.modules.utils", "None")
    ours = {name for name in functions if (getattr(getattr(F, name), "__module__", None) or "None").startswith(here)}
    modules = {n for n, value in vars(nn).items() if inspect.isclass(value) and issubclass(value, nn.Module)}
    return {name for name in ours | modules if not name.startswith("_")}


class Seen(NamedTuple):
    """Who emits an op, and its first few calls in their graphs."""

    names: set[str]
    nodes: list[fx.Node]


def emitted() -> tuple[dict[Any, Seen], dict[str, str]]:
    """The ops in the graphs of all functions and modules; and what could not be traced."""
    seen: dict[Any, Seen] = defaultdict(lambda: Seen(set(), []))
    failed: dict[str, str] = {}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        for name, calls in (*_of_op_db(), *_of_modules(), *((n, [c]) for n, c in (FUNCTIONS | MODULES).items())):
            traced = 0
            for call in calls:
                try:
                    for node in nodes_of(call):
                        seen[node.target].names.add(name)
                        if len(seen[node.target].nodes) < CALLS:
                            seen[node.target].nodes.append(node)
                    traced += 1
                except Exception as error:  # whatever torch raises where it cannot trace
                    failed.setdefault(name, f"{type(error).__name__}: {error}"[:200])
            if traced:
                failed.pop(name, None)
    return seen, failed


def nodes_of(call: Callable[[], Any]) -> list[fx.Node]:
    """The nodes of one call that make tensors."""
    graph = make_fx(lambda _: call(), pre_dispatch=True)(torch.zeros(1)).graph
    return [node for node in graph.nodes if node.op == "call_function" and makes_tensors(node.target)]


def makes_tensors(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and any("Tensor" in str(r.type) for r in target._schema.returns)


def _of_op_db() -> Iterator[tuple[str, list[Callable[[], Any]]]]:
    for op in op_db:
        dtype = next((dtype for dtype in DTYPES if dtype in op.dtypes), None)
        if dtype is None:
            yield op.name, [lambda: _raise("no dtype on a CPU")]
            continue
        kinds: dict[Any, Any] = {}
        for sample in list(op.sample_inputs("cpu", dtype, requires_grad=False)):
            leaves = pytree.tree_leaves((sample.input, sample.args, sample.kwargs))
            kinds.setdefault((tuple(map(type, leaves)), tuple(sample.kwargs)), sample)
        samples = list(kinds.values())[:KINDS]
        yield op.name, [_call(op.op, sample) for sample in samples]
        for other in (*(alias.op for alias in op.aliases), op.inplace_variant):
            if other is not None and samples:
                yield op.name, [_call(other, samples[0])]


def _call(function: Any, sample: Any) -> Callable[[], Any]:
    first = sample.input
    own = [first.clone()] if isinstance(first, Tensor) and first.layout == torch.strided else [first]
    return lambda: function(*own, *sample.args, **sample.kwargs)


def _of_modules() -> Iterator[tuple[str, list[Callable[[], Any]]]]:
    for of in module_db:
        calls = []
        for training in (True, False):
            inputs = of.module_inputs_func(
                of, device="cpu", dtype=torch.float64, requires_grad=False, training=training
            )
            for given in list(inputs)[:1]:
                module = of.module_cls(*given.constructor_input.args, **given.constructor_input.kwargs)
                module = module.double().train(training)
                if given.forward_input is not None:
                    calls.append(_forward(module, given.forward_input))
        yield of.module_cls.__name__, calls


def _forward(module: nn.Module, given: Any) -> Callable[[], Any]:
    return lambda: module(*given.args, **given.kwargs)


def _raise(why: str) -> None:
    raise RuntimeError(why)
