"""Every registered axis rule, tested by experiment and looked up by the name of its op.

Each op runs in a module whose tensor operands are parameters, so that everything is an axis that could shrink. What
a rule leaves free must then be free: the shrunk program equals the masked one on any selection, and an entry of an
operand reaches only the entries of the output that the axes relate to it. Samples come from torch's own `op_db`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from rule_calls import UNREACHED, Call, Calls, calls_of, registered, repeated
from torch import Tensor, nn

from ecospa_fx.errors import CaptureError, RuleError
from ecospa_fx.passes.axes.algebra import Atom, Expr, Product, Segments, atoms_of, size_of
from ecospa_fx.passes.axes.selection import index_of, mask_of, touched
from ecospa_fx.passes.capture.capture import capture
from ecospa_fx.passes.capture.compare_eager import relative_error, run
from ecospa_fx.passes.graph.nodes import place
from ecospa_fx.passes.graph.tensors import sliced, swapped
from ecospa_fx.passes.infer.infer import infer_axes
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.relations import SameDims, moved_operand
from ecospa_fx.passes.rewrite.masked import masked
from ecospa_fx.passes.rewrite.rewrite import rewrite
from ecospa_fx.passes.rules import OPS, OpInfo, axis_rule

aten = torch.ops.aten
LEAVES = "it leaves the region as output"
TOLERANCE = 1e-9
UNUSED = torch.zeros(2)  # a region takes at least one tensor


def inferred(calls: Sequence[Call]) -> list[tuple[Calls, AxisFacts]]:
    """Capture and infer calls in one graph, or one by one where a call cannot be exported."""
    module = Calls(calls)
    try:
        captured = capture(module, (UNUSED,), {}, check=False)
    except CaptureError:
        if len(calls) == 1:
            return [] if calls[0].held else inferred([replace(calls[0], held=True)])
        return [found for call in calls for found in inferred([call])]
    return [(module, infer_axes(captured))]


def pinned(axis_facts: AxisFacts, name: str | None = None) -> set[Atom]:
    """Return the atoms that an op pins, or one op by name; not results of the region, which are sliced and compared."""
    facts = [fact for fact in axis_facts.facts if fact.role == "pinned" and not fact.reason.startswith(LEAVES)]
    facts = [fact for fact in facts if name in (None, getattr(fact.node.target, "_opname", ""))]
    return {atom for fact in facts for atom in atoms_of(fact.expr)}


def atoms(axis_facts: AxisFacts) -> list[Atom]:
    groups = (*axis_facts.parameters.values(), *(exprs for outputs in axis_facts.values.values() for exprs in outputs))
    made = (*axis_facts.made.values(), *(source.exprs for source in axis_facts.sources))
    found = {atom: None for exprs in (*groups, *made) for expr in exprs for atom in atoms_of(expr)}
    return sorted(found, key=lambda atom: atom.serial)


def results_of(axis_facts: AxisFacts) -> list[tuple[Expr, ...] | None]:
    """Return the axes of each result, None where it depends on no parameter."""
    (out,) = (node for node in axis_facts.captured.graph.nodes if node.op == "output")
    nodes = pytree.tree_leaves(out.args)
    return [axis_facts.values[node][0] if node in axis_facts.values else None for node in nodes]


def unpredictable(axis_facts: AxisFacts) -> bool:
    """Return True if results are random or uninitialised; their sizes can be compared all the same."""
    targets = [
        node.target for node in axis_facts.captured.graph.nodes if isinstance(node.target, torch._ops.OpOverload)
    ]
    return any(torch.Tag.nondeterministic_seeded in op.tags or "empty" in op._opname for op in targets)


def steps(exprs: Sequence[Expr], kept: dict[Atom, Tensor]) -> dict[int, Tensor]:
    return {dim: mask_of(expr, kept).nonzero().flatten() for dim, expr in enumerate(exprs) if touched(expr, kept)}


def selections(free: Sequence[Atom]) -> Iterator[dict[Atom, Tensor]]:
    """Yield selections of every free atom alone, by one entry and by a random part, and of all at once."""
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
    whole = dict((*module.named_parameters(), *module.named_buffers()))
    expected = run(axis_facts.captured, whole, (UNUSED,), interpreter=masked(axis_facts, kept, (UNUSED,)))
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
    if moved.dtype == torch.bool:  # a mask, which shrinks with what it masks
        moved[place] = ~moved[place]
    else:
        moved[place] = (0.37 - moved[place]).abs()  # some ops take numbers of one sign only
    before = run(axis_facts.captured, whole, (UNUSED,))
    after = run(axis_facts.captured, whole | {name: moved}, (UNUSED,))
    summed = {
        atom for fact in axis_facts.facts if fact.role in ("contracted", "reduced") for atom in atoms_of(fact.expr)
    }
    mine = {atom for expr in axis_facts.parameters[name] for atom in atoms_of(expr)}
    for exprs, a, b in zip(results_of(axis_facts), before, after, strict=True):
        if a.shape != b.shape:  # values decide how many results there are
            assert exprs is not None and not set(free) & mine & {atom for expr in exprs for atom in atoms_of(expr)}
            continue
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
    """Mark the entries of a result at positions of `atom` that are in `here`, and those that do not run along it."""
    at, bare = torch.zeros_like(result), torch.ones_like(result)
    for dim, expr in enumerate(exprs):
        if atom in atoms_of(expr):
            index = index_of(expr, atom).view([-1 if d == dim else 1 for d in range(result.ndim)])
            at = at | torch.isin(index, torch.tensor(sorted(here)))
            bare = bare & (index < 0)
    return at | bare


def groups(calls: Sequence[Call], size: int = 4) -> Iterator[tuple[Calls, AxisFacts]]:
    """Capture and infer calls, some at a time: most of the time goes into captures."""
    return (found for i in range(0, len(calls), size) for found in inferred(calls[i : i + size]))


@pytest.fixture(scope="module", params=registered())
def op(request: pytest.FixtureRequest) -> tuple[str, list[tuple[Calls, AxisFacts]]]:
    """Return an op by name, and its calls; tests of one op run one after another and share them."""
    return request.param, list(groups(calls_of(request.param)))


@pytest.mark.filterwarnings("ignore:.*degrees of freedom is <= 0")  # of the variance of one entry that is left
def test_rule_is_exact(op: tuple[str, list[tuple[Calls, AxisFacts]]]) -> None:
    name, analysed = op
    exercised = False
    for module, axis_facts in analysed:
        exercised |= any(getattr(node.target, "_opname", "") == name for node in axis_facts.operands)
        stuck = pinned(axis_facts)
        free = [a for a in atoms(axis_facts) if a not in stuck and type(a.size) is int and a.size > 1]
        for kept in ({}, *selections(free)):  # first the ops as the program calls them, with nothing removed
            check_selection(module, axis_facts, kept)
        if not unpredictable(axis_facts):
            for parameter in axis_facts.parameters:
                check_entry(module, axis_facts, parameter, free)
    assert exercised != (name in UNREACHED), f"{name}: {'reached' if exercised else 'no sample reaches it'}"


def reordered(expr: Expr, atom: Atom, order: Tensor) -> Tensor:
    """Return the positions along an axis from which its entries come when those of an atom change places."""
    match expr:
        case Atom():
            return order if expr is atom else torch.arange(expr.size)
        case Product():
            index = torch.zeros(1, dtype=torch.long)
            for factor in expr.factors:
                index = (index[:, None] * size_of(factor) + reordered(factor, atom, order)).flatten()
            return index
        case Segments():
            starts = accumulate((size_of(part) for part in expr.parts), initial=0)
            return torch.cat([start + reordered(part, atom, order) for start, part in zip(starts, expr.parts)])


def places(tensor: Tensor, exprs: Sequence[Expr], atom: Atom, order: Tensor) -> Tensor:
    """Return a tensor with the entries of an atom in another order."""
    for dim, expr in enumerate(exprs):
        if atom in atoms_of(expr):
            tensor = tensor.index_select(dim, reordered(expr, atom, order))
    return tensor


def test_what_takes_all_that_is_left_does_not_know_positions(op: tuple[str, list[tuple[Calls, AxisFacts]]]) -> None:
    """The masked graph runs such an op on fewer entries, where it could not see that order counts."""
    _, analysed = op
    for module, axis_facts in analysed:
        if unpredictable(axis_facts):
            continue
        whole = {n: tensor.detach() for n, tensor in (*module.named_parameters(), *module.named_buffers())}
        names = axis_facts.captured.tensors
        exprs_of = {names[s.node.name]: s.exprs for s in axis_facts.sources if s.node.name in names}
        exprs_of |= axis_facts.parameters
        stuck = pinned(axis_facts)
        reduced = [fact.expr for fact in axis_facts.facts if fact.role == "reduced"]
        for atom in dict.fromkeys(a for expr in reduced for a in atoms_of(expr) if a not in stuck):
            order = torch.randperm(atom.size)
            moved = {n: places(tensor, exprs_of.get(n, ()), atom, order) for n, tensor in whole.items()}
            before, after = (run(axis_facts.captured, each, (UNUSED,)) for each in (whole, moved))
            for exprs, a, b in zip(results_of(axis_facts), before, after, strict=True):
                same = relative_error(places(a, exprs or (), atom, order), b) <= TOLERANCE
                assert same, f"{atom}\n{axis_facts.captured.graph}"


def test_an_op_in_place_or_under_another_name_is_called_as_it_is() -> None:
    """Its rule is that of another; the way in which programs call it is its own."""
    calls = [call for name in repeated() for call in calls_of(name)[:1]]
    assert len(calls) > 100
    for module, axis_facts in groups(calls, 12):
        check_selection(module, axis_facts, {})


# Ops whose rule pins an axis that experiments on these calls let through, and why the rule is right.
STRICT: dict[str, str] = {
    **dict.fromkeys(
        (
            "adaptive_avg_pool2d",
            "adaptive_avg_pool3d",
            "adaptive_max_pool2d",
            "adaptive_max_pool3d",
            "_upsample_bilinear2d_aa",
        ),
        "these calls resize to the size that there is; as an argument of the op, it would not follow a shrink",
    ),
    **dict.fromkeys(
        ("max_unpool2d", "max_unpool3d"), "where two entries go to one position, the last of them stays there"
    ),
    "isin": "zero, which removed entries count as, may be among the others",
    "linalg_matrix_rank": "the least singular value that counts depends on the sizes, unless it is given",
    "linalg_pinv": "one of its samples counts no singular value at all",
    "nonzero_static": "its samples ask for less entries than there are",
    "unique_consecutive": "no two entries of its samples are equal",
}


def test_rule_is_not_stricter_than_it_need_be(op: tuple[str, list[tuple[Calls, AxisFacts]]]) -> None:
    """Where the entries along an axis pass through one by one, or removed ones count as zero, no rule pins the axis."""
    name, analysed = op
    free = {}
    for module, axis_facts in analysed:
        if unpredictable(axis_facts):
            continue
        for atom in pinned(axis_facts, name):
            if type(atom.size) is int and atom.size > 2:
                free |= {f"{place} {how}": None for place, how in let_through(module, axis_facts, atom)}
    assert bool(free) == (name in STRICT), f"{name}: {'; '.join(free) or 'nothing is stricter than it need be'}"


# Ops that only move entries without their relation saying so, and why not.
COMPUTED: dict[str, str] = {
    "nan_to_num": "all entries of its samples are finite",
    "combinations": "of its pairs, no axis expression says which entries they hold",
    **dict.fromkeys(("hardshrink", "softshrink"), "their samples keep entries that are large enough"),
    "repeat_interleave": "without a dim it flattens, too, and no axis expression says that",
}


def test_an_op_that_only_moves_entries_is_known_to(op: tuple[str, list[tuple[Calls, AxisFacts]]]) -> None:
    """That an op moves entries follows from its relation, and experiments agree: a weight is told through such ops."""
    name, analysed = op
    unknown = []
    for module, axis_facts in analysed:
        named = {p: n for p, n in axis_facts.captured.tensors.items() if n in axis_facts.parameters}
        for node, operands in axis_facts.operands.items():
            if getattr(node.target, "_opname", "") != name or len(operands) != 1 or unpredictable(axis_facts):
                continue
            (x,) = operands
            if x.node.name not in named or not x.shape or not all(type(size) is int and size > 1 for size in x.shape):
                continue  # of a dim with one entry, nothing but that entry can be computed
            number = int(named[x.node.name].split("_")[0][1:])
            call = module.calls[number]
            if call.in_place or call.cast or not isinstance(call.function, type(torch.add)):
                continue
            moves = only_moves(module, number, named[x.node.name])
            told = node in axis_facts.relations and moved_operand(axis_facts.relations[node]) is not None
            assert moves or not told, f"call {number} of {name} is told to move entries, and computes"
            if moves and not told:
                unknown.append(f"call {number}: {axis_facts.relations.get(node)}")
    assert bool(unknown) == (name in COMPUTED), f"{name}: {'; '.join(unknown) or 'nothing is unknown'}"


def only_moves(module: Calls, number: int, name: str) -> bool:
    """Return True if the results of a call hold the operand's entries, from the same positions each time, and zeros."""
    whole = {n: tensor.detach() for n, tensor in (*module.named_parameters(), *module.named_buffers())}
    origins: Tensor | None = None
    for _ in range(3):
        values = torch.randn_like(whole[name]).flatten()
        try:
            results = module.results(number, whole | {name: values.view(whole[name].shape)})
        except RuntimeError:  # it takes some values only
            return False
        if not results or not all(result.is_floating_point() for result in results):
            return False
        found = torch.cat([result.flatten().to(values.dtype) for result in results])
        same = found[:, None] == values.to(results[0].dtype).to(values.dtype)
        if not ((found == 0) | same.any(1)).all() or (len(found) and (found == 0).all()):
            return False
        at = torch.where(found == 0, -1, same.long().argmax(1))
        if origins is not None and not torch.equal(origins, at):
            return False
        origins = at
    return True


def let_through(module: Calls, axis_facts: AxisFacts, atom: Atom) -> Iterator[tuple[str, str]]:
    """Yield the dims along a pinned atom, if selecting its entries selects results, or removed ones count as zero."""
    tensors = {name: tensor.detach() for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    exprs = dict(axis_facts.parameters)
    for source in axis_facts.sources:
        exprs |= {name: source.exprs for p, name in axis_facts.captured.tensors.items() if p == source.node.name}
    at = {name: [d for d, e in enumerate(each) if e == atom] for name, each in exprs.items()}
    at = {name: dims for name, dims in at.items() if dims}
    calls = {name.split("_")[0] for name in at}
    if len(calls) != 1 or any(atom in atoms_of(e) and e != atom for each in exprs.values() for e in each):
        return
    number = int(calls.pop()[1:])
    through: list[set[int]] | None = None
    passing = summed = True
    for sign in (0, 1, -1) * 3:
        drawn = {n: redrawn(t, sign) if n.startswith(f"t{number}_") else t for n, t in tensors.items()}
        keep = torch.randperm(atom.size)[: int(torch.randint(2, atom.size, ()))].sort().values
        small, zeroed = dict(drawn), dict(drawn)
        for name, dims in at.items():
            for dim in dims:
                small[name] = small[name].index_select(dim, keep)
                mask = torch.zeros(atom.size, dtype=torch.bool).index_fill(0, keep, True)
                shape = [-1 if d == dim else 1 for d in range(drawn[name].ndim)]
                zeroed[name] = zeroed[name] * mask.view(shape) if zeroed[name].is_floating_point() else zeroed[name]
        try:
            whole, part, masked = (module.results(number, each) for each in (drawn, small, zeroed))
        except Exception:  # the op holds sizes, or indices beyond those that are left
            return
        through = narrowed_down(through, whole, part, keep) if passing else None
        passing &= through is not None
        summed &= all(a.shape == b.shape and relative_error(a, b) <= TOLERANCE for a, b in zip(masked, part))
        if not passing and not summed:
            return
    place = ", ".join(f"{name}{dims}" for name, dims in at.items())
    if passing:
        yield place, f"passes through to {through}"
    else:
        yield place, "is summed over"


def narrowed_down(
    before: list[set[int]] | None, whole: list[Tensor], part: list[Tensor], keep: Tensor
) -> list[set[int]] | None:
    """Return the dims of each result along which `part` is a selection of `whole`; None where it is not."""
    found = []
    for i, (a, b) in enumerate(zip(whole, part, strict=True)):
        dims = {
            d
            for d in range(a.ndim)
            if a.ndim == b.ndim and a.shape[d] > int(keep.max()) and torch.equal(a.index_select(d, keep), b)
        }
        if not (dims := dims if before is None else dims & before[i]):
            return None
        found.append(dims)
    return found or None


def redrawn(tensor: Tensor, sign: int) -> Tensor:
    """Draw other entries of the same kind, of any sign or (1 and -1) of one; classes and conditions stay."""
    if not tensor.is_floating_point():
        return tensor
    drawn = torch.randn_like(tensor)
    return sign * (drawn.abs() + 0.1) if sign else drawn


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


def test_a_resize_that_raises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
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
