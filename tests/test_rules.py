"""Every registered axis rule, tested by experiment and looked up by the name of its op.

Each op runs in a module whose tensor operands are parameters, so that everything is an axis that could shrink. What a
rule leaves free must then be free: the shrunk program equals the masked one on any selection, and an entry of an operand
reaches only the entries of the output that the axis expressions relate to it. Samples come from torch's own `op_db`.
"""

from __future__ import annotations

import operator
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.utils import stateless
from torch.testing._internal.common_methods_invocations import op_db

from ecospa_fx.errors import CaptureError, RuleError
from ecospa_fx.passes.axes import Atom, Expr, atoms_of
from ecospa_fx.passes.capture import capture, relative_error, run
from ecospa_fx.passes.infer import Inference, infer
from ecospa_fx.passes.rewrite import rewrite
from ecospa_fx.passes.rules import RULES, Rule, axis_rule
from ecospa_fx.passes.rules.registry import Carried
from ecospa_fx.passes.selection import index_of, mask_of
from ecospa_fx.passes.shrink import sliced
from ecospa_fx.passes.verify import Masked, contraction_masks

aten = torch.ops.aten
LEAVES = "it leaves the region as output"
SAMPLES = 4  # calls per op and variant
TOLERANCE = 1e-9
UNUSED = torch.zeros(2)  # a region takes at least one tensor


@dataclass(frozen=True)
class Call:
    """One call of an op: `function(*args, **kwargs)`."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    in_place: bool = False
    cast: bool = False  # the op takes no floats: its operands are parameters that are cast


class Calls(nn.Module):
    """Runs calls whose floating operands are parameters and whose other tensors are buffers."""

    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__()
        self.calls, self.leaves = calls, []
        for i, call in enumerate(calls):
            leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
            for j, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    name, value = f"t{i}_{j}", leaf.detach().clone(memory_format=torch.contiguous_format)
                    if leaf.is_floating_point() or call.cast:
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
    return torch.randn(shape, dtype=torch.float64)


def classes(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 3


# What op_db does not reach, or not with every dim larger than one. A rule added for an op that op_db knows needs nothing here.
BY_HAND: dict[str, list[Call]] = {
    "_fused_rms_norm": [Call(aten._fused_rms_norm.default, (t(3, 4), [4], t(4), 1e-6))],
    "_log_softmax": [Call(aten._log_softmax.default, (t(2, 3, 4), 1, False))],
    "_softmax": [Call(aten._softmax.default, (t(2, 3, 4), -1, False))],
    "_to_copy": [Call(aten._to_copy.default, (t(3, 4),), {"dtype": torch.float32})],
    "_unsafe_view": [Call(aten._unsafe_view.default, (t(3, 4), [3, 2, 2]))],
    "_upsample_bicubic2d_aa": [Call(aten._upsample_bicubic2d_aa.default, (t(2, 3, 4, 4), [2, 2], False))],
    "_upsample_bilinear2d_aa": [Call(aten._upsample_bilinear2d_aa.default, (t(2, 3, 4, 4), [2, 2], False))],
    "alias": [Call(aten.alias.default, (t(3, 4),))],
    "bernoulli_": [Call(aten.bernoulli_.float, (t(3, 4), 0.5), in_place=True)],
    "copy_": [Call(aten.copy_.default, (t(3, 4), t(4)), in_place=True)],
    "cross_entropy_loss": [
        Call(torch.nn.functional.cross_entropy, (t(4, 3), classes(4))),
        Call(torch.nn.functional.cross_entropy, (t(4, 3), t(4, 3).softmax(1))),
        Call(torch.nn.functional.cross_entropy, (t(4, 3), classes(4), t(3).abs()), {"reduction": "none"}),
    ],
    "detach": [Call(aten.detach.default, (t(3, 4),))],
    "detach_": [Call(aten.detach_.default, (t(3, 4),), in_place=True)],
    "feature_dropout": [Call(aten.feature_dropout.default, (t(2, 3, 4), 0.5, True))],
    "gelu_": [Call(aten.gelu_.default, (t(3, 4),), in_place=True)],
    "hardswish_": [Call(aten.hardswish_.default, (t(3, 4),), in_place=True)],
    "hardtanh_": [Call(aten.hardtanh_.default, (t(3, 4),), in_place=True)],
    "index": [
        Call(lambda x, i: x[:, i], (t(3, 4, 5), classes(6))),
        Call(lambda x, i: x[i], (t(3, 4), classes(2, 2))),
        Call(lambda x, i, j: x[i, j], (t(3, 4), classes(5), classes(5))),
        Call(lambda x, mask: x[:, mask], (t(3, 4), torch.tensor([True, False, True, True]))),
    ],
    "lift_fresh_copy": [Call(aten.lift_fresh_copy.default, (t(3, 4),))],
    "nll_loss_nd": [Call(aten.nll_loss_nd.default, (t(4, 3), classes(4)))],
    "numpy_T": [Call(lambda x: x.T, (t(3, 4),))],
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
    "upsample_nearest2d": [Call(aten.upsample_nearest2d.vec, (t(2, 3, 4, 4), [4, 4], None))],
}
UNREACHED: dict[str, str] = {}


def registered() -> list[str]:
    """The names of all ops that have a rule."""
    return sorted({op._opname for op in RULES if op is not operator.getitem})


def known_as(op: Any) -> set[str]:
    names = {op.name, op.aten_name or op.name, *(alias.name for alias in op.aliases)}
    return {name.rpartition(".")[2] for name in names} | {op.name.split(".")[0]}


def calls_of(name: str) -> list[Call]:
    """A few small calls of the op called `name`, as different from each other as its samples are."""
    torch.manual_seed(zlib.crc32(name.encode()))
    calls = list(BY_HAND.get(name, ()))
    for op in op_db:
        if name in known_as(op):
            aliases = [alias.op for alias in op.aliases if alias.name.rpartition(".")[2] == name]
            function = aliases[0] if aliases else op.op
        elif name.endswith("_") and name[:-1] in known_as(op) and op.inplace_variant is not None:
            function = op.inplace_variant
        else:
            continue
        dtype = next((d for d in (torch.float64, torch.bool, torch.int64) if d in op.dtypes), None)
        if dtype is None:
            continue
        cast = dtype is not torch.float64
        in_place = function is op.inplace_variant
        samples = op.sample_inputs("cpu", dtype, requires_grad=False)
        for sample in different(s for s in samples if not (in_place and s.broadcasts_input)):
            calls.append(Call(function, (sample.input, *sample.args), dict(sample.kwargs), in_place, cast))
    return calls


def different(samples: Iterator[Any]) -> list[Any]:
    """The samples with most dims of more than one entry, one per kind of call."""
    kinds: dict[Any, Any] = {}
    for sample in samples:
        tensors = [x for x in pytree.tree_leaves((sample.input, sample.args, sample.kwargs)) if isinstance(x, Tensor)]
        if not tensors or any(x.layout != torch.strided or x.is_complex() or not 0 < x.numel() <= 4000 for x in tensors):
            continue
        long = tuple(sum(size > 1 for size in x.shape) for x in tensors)
        kinds.setdefault((tuple(x.ndim for x in tensors), long, tuple(sorted(sample.kwargs))), (sum(long), sample))
    ranked = sorted(kinds.values(), key=lambda kind: -kind[0])
    # The largest come first, but one of every rank keeps numbers and vectors among them.
    chosen = ranked[:SAMPLES] + ranked[SAMPLES:: max(1, len(ranked) // 2)]
    return [sample for _, sample in chosen]


def inferred(calls: Sequence[Call]) -> list[tuple[Calls, Inference]]:
    """Captured and inferred in one graph, or one by one where a call cannot be exported."""
    module = Calls(calls)
    try:
        captured = capture(module, (UNUSED,), {}, check=False)
    except CaptureError:
        if len(calls) == 1:
            return []
        return [found for call in calls for found in inferred([call])]
    return [(module, infer(captured))]


def pinned(inference: Inference) -> set[Atom]:
    """Atoms that an op pins. That results leave the region is no matter here: they are sliced, then compared."""
    facts = [fact for fact in inference.facts if fact.role == "pinned" and not fact.reason.startswith(LEAVES)]
    return {atom for fact in facts for atom in atoms_of(fact.expr)}


def atoms(inference: Inference) -> list[Atom]:
    groups = (*inference.parameters.values(), *(exprs for outputs in inference.values.values() for exprs in outputs))
    made = (*inference.made.values(), *(source.exprs for source in inference.sources))
    found = {atom: None for exprs in (*groups, *made) for expr in exprs for atom in atoms_of(expr)}
    return sorted(found, key=lambda atom: atom.serial)


def results_of(inference: Inference) -> list[tuple[Expr, ...] | None]:
    """Axes of each result, None where it depends on no parameter."""
    (out,) = (node for node in inference.captured.graph.nodes if node.op == "output")
    nodes = pytree.tree_leaves(out.args)
    return [inference.values[node][0] if node in inference.values else None for node in nodes]


def unpredictable(inference: Inference) -> bool:
    """Whether results are random or uninitialised; their sizes can be compared all the same."""
    targets = [node.target for node in inference.captured.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return any(torch.Tag.nondeterministic_seeded in op.tags or "empty" in op._opname for op in targets)


def steps(exprs: Sequence[Expr], kept: dict[Atom, Tensor]) -> dict[int, Tensor]:
    return {dim: mask_of(expr, kept).nonzero().flatten() for dim, expr in enumerate(exprs)}


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


def check_selection(module: Calls, inference: Inference, kept: dict[Atom, Tensor]) -> None:
    """Assert that the shrunk program equals the masked graph."""

    class Here(Masked):
        masks = contraction_masks(inference, kept)

    whole = dict((*module.named_parameters(), *module.named_buffers()))
    expected = run(inference.captured, whole, (UNUSED,), interpreter=Here)
    small = {
        name: sliced(tensor.detach(), steps(inference.parameters[name], kept)) if name in inference.parameters else tensor
        for name, tensor in whole.items()
    }
    program = rewrite(inference, kept, module)
    with stateless._reparametrize_module(module, small):
        found = program.run(module, UNUSED, *program.constants)
    random = unpredictable(inference)
    for exprs, a, b in zip(results_of(inference), expected, found, strict=True):
        a = a if exprs is None else sliced(a, steps(exprs, kept))
        said = f"selecting {kept}\n{inference.captured.graph}\n{program.source}"
        assert a.shape == b.shape, said
        assert random or relative_error(a, b) <= TOLERANCE, said


def check_entry(module: Calls, inference: Inference, name: str, free: Sequence[Atom]) -> None:
    """Assert that one entry of a parameter reaches only those of the results that the axes relate to it."""
    whole = {n: tensor.detach() for n, tensor in (*module.named_parameters(), *module.named_buffers())}
    place = tuple(int(torch.randint(size, ())) for size in whole[name].shape)
    moved = whole[name].clone()
    moved[place] = 0.37 - moved[place]
    before = run(inference.captured, whole, (UNUSED,))
    after = run(inference.captured, whole | {name: moved}, (UNUSED,))
    summed = {atom for fact in inference.facts if fact.role == "contracted" for atom in atoms_of(fact.expr)}
    for exprs, a, b in zip(results_of(inference), before, after, strict=True):
        if exprs is None:
            assert torch.equal(a, b)
            continue
        changed = (a != b) & ~((a != a) & (b != b))
        for atom in set(free) - summed:
            here = {int(index_of(expr, atom)[i]) for expr, i in zip(inference.parameters[name], place, strict=True)}
            related = [index_of(expr, atom) for expr in exprs]
            # Entries may meet where the atom has the same position, or where one of them does not run along it.
            allowed = torch.ones_like(changed)
            if here - {-1} and any(bool((index >= 0).any()) for index in related):
                allowed = torch.zeros_like(changed)
                bare = torch.ones_like(changed)
                for dim, index in enumerate(related):
                    index = index.view([-1 if d == dim else 1 for d in range(changed.ndim)])
                    bare &= index < 0
                    for position in here - {-1}:
                        allowed |= index == position
                allowed |= bare
            assert not (changed & ~allowed).any(), f"{name}{place} along {atom}\n{inference.captured.graph}"


@pytest.mark.parametrize("name", registered())
def test_rule_is_exact(name: str) -> None:
    exercised = False
    for module, inference in inferred(calls_of(name)):
        exercised |= any(getattr(node.target, "_opname", "") == name for node in inference.operands)
        free = [atom for atom in atoms(inference) if atom not in pinned(inference) and atom.size > 1]
        for kept in selections(free):
            check_selection(module, inference, kept)
        if not unpredictable(inference):
            for parameter in inference.parameters:
                check_entry(module, inference, parameter, free)
    assert exercised != (name in UNREACHED), f"{name}: {'reached' if exercised else 'no sample reaches it'}"
