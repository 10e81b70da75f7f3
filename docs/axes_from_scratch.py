"""The compiler of ecospa_fx from scratch, in one file that imports torch only. Run it, and read it from top to bottom.

A hidden entry of a network lies in several weights at once: a row of one matrix, a column of the next, an entry of a
bias. To remove it is to remove it from all of them. This file finds such *couplings* in a traced model, without being
told what the model is, removes entries, and proves that what is left computes what masking would. Each section says
which file of the library does the same for real.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import fx, nn

aten = torch.ops.aten

# 1. A model -----------------------------------------------------------------------------------------------------------
# It has a gate whose two halves come out of one matrix, and three heads of two dims with a scale each. Many sizes are
# 6, which must not mean that the dims are one axis.


class Model(nn.Module):
    """A small network that knows nothing of this file."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.out = nn.Linear(6, 12), nn.Linear(6, 4), nn.Linear(4, 6)
        self.scale = nn.Parameter(torch.randn(3, 1))

    def forward(self, x):
        """Gate, scale heads, project."""
        gate, value = self.up(x).chunk(2, -1)
        heads = (nn.functional.silu(gate) * value).view(5, 3, 2)
        heads = heads.cumsum(-1) * self.scale
        return self.out(self.down(heads.view(5, 6)).relu())


torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
model, x = Model(), torch.randn(5, 6)

# 2. Capture -----------------------------------------------------------------------------------------------------------
# torch.export runs the forward once and writes down each op on tensors as a node of a graph. (passes/capture/)

exported = torch.export.export(model, (x,))
graph: fx.Graph = exported.graph
parameter_of = dict(exported.graph_signature.inputs_to_parameters)  # name of the node -> name of the parameter
print("1. The graph")
for node in graph.nodes:
    if node.op == "call_function":
        print(f"   {node.name:<12} {getattr(node.target, '__name__', node.target):<16} {node.args}")

# 3. Axes --------------------------------------------------------------------------------------------------------------
# Each dim of each tensor gets an *axis expression*. It says which entries the dim has, by names rather than by number:
#
#   Atom       a named extent, `a:12`. It is what can shrink.
#   Product    `(h d)`: rows of h, the last factor runs fastest. A view makes it.
#   Segments   `[g | v]`: one after the other. A concatenation makes it, or a chunk finds that it was there.
#
# Two dims are the same axis if their expressions are equal; equal sizes mean nothing. (passes/axes/algebra.py)


@dataclass(frozen=True, eq=False)  # compared by identity
class Atom:
    """A named extent."""

    name: str
    size: int

    def __repr__(self):
        return f"{self.name}:{self.size}"


@dataclass(frozen=True)
class Product:
    """Row-major flattening."""

    factors: tuple

    def __repr__(self):
        return f"({' '.join(map(repr, self.factors))})"


@dataclass(frozen=True)
class Segments:
    """Concatenation."""

    parts: tuple

    def __repr__(self):
        return f"[{' | '.join(map(repr, self.parts))}]"


UNIT = Product(())  # a dim of one entry


class Mismatch(Exception):
    """Two axes that cannot be the same."""


def factors_of(*axes):
    """List the factors of axes, from the slowest to the fastest."""
    return [factor for axis in axes for factor in (axis.factors if isinstance(axis, Product) else (axis,))]


def product(*axes):
    """Flatten a product of products; a product of one is that one."""
    factors = factors_of(*axes)
    return factors[0] if len(factors) == 1 else Product(tuple(factors))


def size_of(axis):
    """Count the entries of an axis."""
    match axis:
        case Atom():
            return axis.size
        case Product():
            return math.prod(map(size_of, axis.factors))
        case Segments():
            return sum(map(size_of, axis.parts))


def atoms_of(axis):
    """Collect the atoms of an axis."""
    inside = axis.factors if isinstance(axis, Product) else axis.parts if isinstance(axis, Segments) else ()
    return {axis} if isinstance(axis, Atom) else {atom for each in inside for atom in atoms_of(each)}


# 4. Unify -------------------------------------------------------------------------------------------------------------
# Knowledge is a table from atoms to the expressions that they turned out to be: union-find whose classes have an
# inside. `unify` adds to it, "these two dims are one axis"; `split` and `halve` look inside an atom and refine it.

bound: dict[Atom, object] = {}
names = iter("abcdefghijklmnopqrstuvwxyz")


def fresh(size):
    """Make a new axis about which nothing is known."""
    return Atom(next(names), size) if size > 1 else UNIT


def resolve(axis):
    """Write an axis with all that is known by now."""
    match axis:
        case Atom():
            return resolve(bound[axis]) if axis in bound else axis
        case Product():
            return product(*map(resolve, axis.factors))
        case Segments():
            return Segments(tuple(map(resolve, axis.parts)))


def unify(a, b):
    """Record that two dims are one axis, entry by entry."""
    a, b = resolve(a), resolve(b)
    if a == b:
        return
    if size_of(a) != size_of(b):
        raise Mismatch(f"{a} meets {b}")
    if isinstance(a, Atom) and isinstance(b, Atom):
        older, newer = sorted((a, b), key=lambda atom: atom.name)
        bound[newer] = older
    elif isinstance(a, Atom) or isinstance(b, Atom):
        atom, axis = (a, b) if isinstance(a, Atom) else (b, a)
        bound[atom] = axis
    elif isinstance(a, Product) and isinstance(b, Product):
        for one, other in zip(a.factors, regroup([b], [*map(size_of, a.factors)]), strict=True):
            unify(one, other)
    elif isinstance(a, Segments) and isinstance(b, Segments) and len(a.parts) == len(b.parts):
        for one, other in zip(a.parts, b.parts, strict=True):
            unify(one, other)
    else:
        raise Mismatch(f"{a} meets {b}")


def split(axis, inner):
    """See an axis as rows of `inner` entries."""
    if not isinstance(axis, Atom) or axis.size % inner:
        raise Mismatch(f"{axis} in rows of {inner}")
    bound[axis] = product(fresh(axis.size // inner), fresh(inner))
    return bound[axis].factors


def halve(axis):
    """See an axis as two parts of one size."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        bound[axis] = Segments((fresh(axis.size // 2), fresh(axis.size // 2)))
    return resolve(axis).parts


def regroup(axes, sizes):
    """Group the same entries, in the same order, into dims of other sizes: from the right, factor by factor."""
    factors, grouped = factors_of(*map(resolve, axes)), []
    for size in reversed(sizes):
        taken = UNIT
        while size_of(taken) < size:
            wanted, factor = size // size_of(taken), factors.pop()
            if size_of(factor) > wanted:
                outer, factor = split(factor, wanted)
                factors.append(outer)
            taken = product(factor, taken)
        if size_of(taken) != size:
            raise Mismatch(f"{taken} is not {size} entries")
        grouped.insert(0, taken)
    return grouped


# 5. Rules -------------------------------------------------------------------------------------------------------------
# A rule says what one op does to axes. It unifies what meets, returns the axes of the output, and records *facts*:
# an axis is contracted (summed over), free (brought by a weight, and left), or pinned (nothing may be removed from it).
# In the library a rule returns a relation, `"... k, n k, +n -> ... n"`, which one solver reads. (passes/rules/,
# docs/patterns.md, passes/infer/solve.py)


@dataclass(frozen=True, eq=False)
class Fact:
    """What one op does to one axis."""

    role: str
    axis: object
    reason: str = ""


RULES, facts = {}, []


def axis_rule(*ops):
    """Register a rule for ops."""
    return lambda rule: RULES.update(dict.fromkeys(ops, rule)) or rule


@axis_rule(aten.linear.default)
def linear(node, x, weight, bias):
    """`k` of the input meets the columns of the weight, which brings `n`."""
    (*rest, k), (n, columns) = x, weight
    unify(k, columns)
    unify(n, bias[0])
    facts.extend([Fact("contracted", k), Fact("free", n)])
    return (*rest, n)


@axis_rule(aten.silu.default, aten.relu.default, aten.mul.Tensor)
def pointwise(node, *operands):
    """Dims meet from the right; one of a single entry broadcasts."""
    longest = max(operands, key=len)
    output = list(longest)
    for operand in operands:
        for place in range(-len(operand), 0):
            if output[place] == UNIT:
                output[place] = operand[place]
            elif operand[place] != UNIT:
                unify(output[place], operand[place])
    return tuple(output)


@axis_rule(aten.cumsum.default)
def cumsum(node, x, dim):
    """Every entry along the axis feeds those behind it."""
    facts.append(Fact("pinned", x[dim], f"{node.name}: every entry along it feeds those behind it"))
    return x


@axis_rule(aten.view.default)
def view(node, x, sizes):
    """The same entries in the same order."""
    return tuple(regroup(x, sizes))


@axis_rule(aten.chunk.default)
def chunk(node, x, chunks, dim):
    """Two halves of one axis."""
    assert (chunks, dim) == (2, -1)
    return [(*x[:-1], half) for half in halve(x[-1])]


# 6. Infer -------------------------------------------------------------------------------------------------------------
# One walk over the graph. Parameters start with axes of which nothing is known, and so does the input. Something else
# makes the input and takes the output at their sizes, so both stay whole. (passes/infer/infer.py)

axes_of: dict[fx.Node, tuple] = {}
for node in graph.nodes:
    if node.op == "placeholder":
        axes_of[node] = tuple(map(fresh, node.meta["val"].shape))
        if node.name not in parameter_of:
            facts.extend(Fact("pinned", axis, "it enters the region") for axis in axes_of[node])
    elif node.target is operator.getitem:
        source, number = node.args
        axes_of[node] = axes_of[source][number]
    elif node.op == "call_function":
        axes_of[node] = RULES[node.target](node, *fx.node.map_arg(node.args, axes_of.get))
    else:
        facts.extend(Fact("pinned", axis, "it leaves the region") for axis in axes_of[node.args[0][0]])

node_of = {parameter: node for node in axes_of if (parameter := parameter_of.get(node.name))}
parameters = {name: tuple(map(resolve, axes_of[node_of[name]])) for name, _ in model.named_parameters()}
print("2. Axes of the parameters")
for name, axes in parameters.items():
    print(f"   {name:<12} {', '.join(map(str, axes))}")

# 7. Discover ----------------------------------------------------------------------------------------------------------
# An atom is a *coupling* if a weight brings it, another contracts it, and nothing pins it. Its *members* are the dims
# of parameters that it runs along. If something pins it, it is a *refusal* with the reason. (passes/find/discover.py)


def atoms_with(role):
    """Map each atom in a fact of that role to the first reason."""
    pairs = [(atom, fact.reason) for fact in facts if fact.role == role for atom in atoms_of(resolve(fact.axis))]
    return dict(reversed(pairs))


produced, contracted, pinned = map(atoms_with, ("free", "contracted", "pinned"))
couplings = [atom for atom in produced if atom in contracted and atom not in pinned]
couplings.sort(key=lambda atom: atom.name)
print("3. Couplings and refusals")
for atom in sorted({*produced, *contracted}, key=lambda atom: atom.name):
    members = [f"{name}[{i}]" for name, axes in parameters.items() for i, a in enumerate(axes) if atom in atoms_of(a)]
    verdict = "coupling" if atom in couplings else f"refusal, {pinned[atom]}"
    print(f"   {atom!r:<5} {', '.join(members)}: {verdict}")

# 8. Select ------------------------------------------------------------------------------------------------------------
# A selection is a bool mask per atom. The mask of any axis is read off its expression, and with it everything that a
# shrink changes. (passes/axes/selection.py) The positions that are left, per dim of a parameter, are the *plan*: it
# names parameters and no graph, so it can be saved and means the same to every graph of the model. (ecospa_fx/plan.py)


def mask_of(axis, kept):
    """Mark the entries of an axis that stay."""
    match axis:
        case Atom():
            return kept.get(axis, torch.ones(axis.size, dtype=torch.bool))
        case Product():
            mask = torch.ones(1, dtype=torch.bool)
            for factor in axis.factors:
                mask = (mask[:, None] & mask_of(factor, kept)).flatten()
            return mask
        case Segments():
            return torch.cat([mask_of(part, kept) for part in axis.parts])


def plan_of(kept):
    """List the positions that are left of each dim that loses entries."""
    masks = {(name, dim): mask_of(a, kept) for name, axes in parameters.items() for dim, a in enumerate(axes)}
    return {place: mask.nonzero().flatten().tolist() for place, mask in masks.items() if not mask.all()}


heads, ffn = couplings
kept = {heads: torch.tensor([True, False, True]), ffn: torch.tensor([True, True, False, True])}
print("4. The plan without head 1 and without hidden entry 2")
for (name, dim), positions in plan_of(kept).items():
    print(f"   {name}[{dim}]: {positions}")

# 9. Rewrite -----------------------------------------------------------------------------------------------------------
# Parameters are index-selected by the plan. The graph stays as it is, but for numbers in it that are sizes: those of a
# view become counts of the same axes. (passes/rewrite/rewrite.py, ecospa_fx/model/slicing.py)


def shrunk(kept):
    """Make a program and its parameters at the sizes that are left."""
    small = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for (name, dim), positions in plan_of(kept).items():
        small[name] = small[name].index_select(dim, torch.tensor(positions))
    copies: dict[fx.Node, fx.Node] = {}
    program = fx.Graph()
    program.output(program.graph_copy(graph, copies))
    for node, copy in copies.items():
        if node.target is aten.view.default:
            copy.args = (copy.args[0], [int(mask_of(resolve(axis), kept).sum()) for axis in axes_of[node]])
    return fx.GraphModule(nn.Module(), program), small


# 10. Prove ------------------------------------------------------------------------------------------------------------
# The claim: a shrunk program computes what the original does with the removed entries masked. To mask an entry is to
# set to zero the columns that contract it, so that nothing behind them sees it. It must hold for outputs and gradients,
# and for every selection, not for one. (passes/rewrite/verify.py)


def masked(kept):
    """Make a copy of the parameters in which removed entries are never seen."""
    full = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for node in graph.nodes:
        if node.target is aten.linear.default:
            name = parameter_of[node.args[1].name]
            full[name] *= mask_of(parameters[name][1], kept)
    return full


def run(program, values):
    """Return the output, and the gradients of the parameters."""
    leaves = {name: value.requires_grad_() for name, value in values.items()}
    inputs = [
        leaves[parameter_of[n.name]] if n.name in parameter_of else x for n in graph.nodes if n.op == "placeholder"
    ]
    (output,) = program(*inputs)
    return output, dict(zip(leaves, torch.autograd.grad(output.square().sum(), leaves.values()), strict=True))


def difference(kept):
    """Measure how far the shrunk program is from the masked one."""
    output, gradients = run(*shrunk(kept))
    expected, expected_gradients = run(fx.GraphModule(nn.Module(), graph), masked(kept))
    for (name, dim), positions in plan_of(kept).items():
        expected_gradients[name] = expected_gradients[name].index_select(dim, torch.tensor(positions))
    pairs = [(output, expected), *((gradients[name], expected_gradients[name]) for name in gradients)]
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def selections(atom):
    """Yield each way to keep some of the entries of an atom."""
    for bits in range(1, 2**atom.size):
        yield torch.tensor([bits >> i & 1 == 1 for i in range(atom.size)])


print("5. The program at the sizes that are left")
program, small = shrunk(kept)
for node in program.graph.nodes:
    if node.target is aten.view.default:
        print(f"   {node.name}: {node.args[1]}")
before, after = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in small.values())
print(f"   {before} parameters, {after} are left")
assert torch.allclose(run(fx.GraphModule(nn.Module(), graph), masked({}))[0], model(x))  # the graph is the model
differences = [difference({heads: a, ffn: b}) for a in selections(heads) for b in selections(ffn)]
assert max(differences) < 1e-12
print(f"6. Shrunk equals masked, outputs and gradients, in all {len(differences)} selections")
