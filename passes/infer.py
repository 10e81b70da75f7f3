"""Infer: give every dim of every tensor in a captured graph its axis expression.

    infer(captured)
      -> _taint           which values depend on a parameter; only ops on those need a rule
      -> per node: a rule's relation -> _solve -> Axes.unify / split / cut
      -> facts            who contracts, produces or pins which axis, and where

A value that depends on no parameter (an input, a mask, RoPE's cos and sin) is a *source*: each use gets axes of its own
and is index-selected where it enters, so that one table shared by all layers does not tie them together. What leaves
the region is pinned. What no rule is known for is pinned and counted. Sizes never decide anything: axes meet by position.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import sympy
import torch
from torch import fx

from ecospa_fx.errors import RuleError

from .axes import UNIT, Atom, Axes, Expr, Mismatch, Size, as_size, atoms_of, product, segments, size_of
from .capture import Captured, tensor_meta
from .rules import RULES, Rule
from .rules import registry as r
from .selection import on_diagonal

Exprs: TypeAlias = tuple[Expr, ...]
Role = Literal["pinned", "contracted", "free", "batch", "expanded", "nonlinear", "gate", "merge"]


@dataclass(frozen=True, eq=False)
class Fact:
    """What one op does to one axis. `reason` says it in words where the axis is pinned."""

    role: Role
    expr: Expr
    node: fx.Node
    reason: str = ""
    operands: tuple[r.Operand, ...] = ()


@dataclass(frozen=True, eq=False)
class Source:
    """One use of a value that depends on no parameter: argument number `occurrence` of `user`."""

    user: fx.Node
    occurrence: int
    node: fx.Node
    exprs: Exprs


@dataclass(eq=False)
class Inference:
    """All that is known about the axes of a captured graph.

    Attributes:
        captured: the graph it is about.
        values: axis expressions per output of each node that depends on a parameter.
        parameters: axis expressions per parameter and per buffer that shrinks with them, by name in the region.
        sources: uses of values that do not depend on a parameter.
        made: axes that an op made itself by repeating an operand.
        facts: what ops do to axes.
        missing: ops met that have no rule, with the nodes where.
    """

    captured: Captured
    axes: Axes = field(default_factory=Axes)
    values: dict[fx.Node, tuple[Exprs, ...]] = field(default_factory=dict)
    operands: dict[fx.Node, tuple[r.Operand, ...]] = field(default_factory=dict)
    parameters: dict[str, Exprs] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    made: dict[fx.Node, Exprs] = field(default_factory=dict)
    facts: list[Fact] = field(default_factory=list)
    missing: dict[str, list[fx.Node]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Inference:
        return self  # never changed once made

    def resolve(self, exprs: Exprs) -> Exprs:
        """`exprs` in normal form over final atoms."""
        return tuple(self.axes.resolve(expr) for expr in exprs)

    def pin(self, expr: Expr, node: fx.Node, reason: str) -> None:
        """Record that `expr` must stay whole."""
        if expr != UNIT:
            self.facts.append(Fact("pinned", expr, node, reason))


def infer(captured: Captured) -> Inference:
    """Infer the axes of `captured`.

    Returns:
        An `Inference` with every expression in normal form.

    Raises:
        RuleError: a registered rule fails on an op.
    """
    solver = _Solver(captured)
    for node in captured.graph.nodes:
        solver.visit(node)
    return solver.finish()


class _Solver:
    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.known = Inference(captured)
        self.axes = self.known.axes
        self.weighted = _taint(captured)

    def visit(self, node: fx.Node) -> None:
        if node not in self.weighted:
            return
        if node.op == "placeholder":
            self._enter(node)
        elif node.op == "output":
            for i, operand in enumerate(self._operands(node)):
                for expr in operand.exprs:
                    self.known.pin(expr, node, f"it leaves the region as output {i}")
        elif node.op == "call_function" and tensor_meta(node):
            self._call(node)

    def finish(self) -> Inference:
        known = self.known
        for axis_set in known.parameters.values():
            for expr in axis_set:
                for atom in on_diagonal(known.axes.resolve(expr)):
                    known.pin(atom, self._last, "it runs along two factors of one axis, a diagonal")
        for source in known.sources:
            for expr in known.resolve(source.exprs):
                if type(size_of(expr)) is not int:
                    known.pin(expr, source.user, "an input has it folded into a dynamic dim")
        known.values = {
            node: tuple(known.resolve(exprs) for exprs in outputs) for node, outputs in known.values.items()
        }
        known.parameters = {name: known.resolve(exprs) for name, exprs in known.parameters.items()}
        known.made = {node: known.resolve(exprs) for node, exprs in known.made.items()}
        known.sources = [Source(s.user, s.occurrence, s.node, known.resolve(s.exprs)) for s in known.sources]
        known.operands = {
            node: tuple(
                r.Operand(known.resolve(o.exprs), o.shape, o.node, o.weighted, o.parameter) for o in operands
            )
            for node, operands in known.operands.items()
        }
        known.facts = [Fact(f.role, known.axes.resolve(f.expr), f.node, f.reason, f.operands) for f in known.facts]
        return known

    @property
    def _last(self) -> fx.Node:
        return next(iter(reversed(self.captured.graph.nodes)))

    def _enter(self, node: fx.Node) -> None:
        """A parameter, or a buffer that shrinks with them."""
        name = self.captured.tensors[node.name]
        first = self.captured.same_storage.get(name, name)
        shape = _shape(node.meta["val"])
        if first in self.known.parameters and tuple(map(size_of, self.known.parameters[first])) == shape:
            exprs = self.known.parameters[first]
        else:
            exprs = tuple(self.axes.fresh(size) for size in shape)
        if first != name and exprs is not self.known.parameters.get(first):
            for expr in (*exprs, *self.known.parameters.get(first, ())):
                self.known.pin(expr, node, f"`{name}` and `{first}` are different views of one storage")
        if name in self.captured.shared_outside:
            for expr in exprs:
                self.known.pin(expr, node, f"`{name}` is used outside the region too, {self.captured.shared_outside[name]}")
        self.known.parameters[name] = exprs
        self.known.values[node] = (exprs,)

    def _call(self, node: fx.Node) -> None:
        operands = self._operands(node)
        if node.target is _GETITEM:
            source, i = node.args
            self.known.values[node] = (self.known.values[source][i],)
            return
        self.known.operands[node] = operands
        shapes = [_shape(meta) for meta in tensor_meta(node)]
        if not any(shapes) and not any(operand.exprs for operand in operands):
            self.known.values[node] = tuple(() for _ in shapes)  # numbers have no axes
            return
        rule = RULES.get(node.target)
        if rule is None:
            name = op_name(node)
            self.known.missing.setdefault(name, []).append(node)
            self._opaque(node, operands, shapes, f"no axis rule for {name}")
            return
        relation = self._apply(rule, node, operands)
        try:
            outputs = self._solve(relation, node, operands, shapes, rule.why)
            if len(outputs) != len(shapes) or any(
                len(o) != len(s) or any(size_of(e) != n for e, n in zip(o, s, strict=True))
                for o, s in zip(outputs, shapes, strict=True)
            ):
                raise Mismatch(f"the rule gives dims of {[tuple(map(size_of, o)) for o in outputs]}, the op has {shapes}")
            self.known.values[node] = tuple(outputs)
        except Mismatch as mismatch:
            self._opaque(node, operands, shapes, f"{op_name(node)}: {mismatch}")

    def _apply(self, rule: Rule, node: fx.Node, operands: tuple[r.Operand, ...]) -> r.Relation:
        waiting = iter(operands)

        def as_argument(value: Any) -> Any:
            if isinstance(value, fx.Node):
                if tensor_meta(value):
                    return next(waiting)
                return as_size(value.meta["val"])
            if isinstance(value, (list, tuple)):
                return [as_argument(item) for item in value]
            return value

        try:
            args, kwargs = as_argument(node.args), {name: as_argument(value) for name, value in node.kwargs.items()}
            relation = rule.axes(*args, **kwargs)
        except Exception as error:
            raise RuleError(
                f"the axis rule `{rule.axes.__name__}` failed on {op_name(node)} ({place(node)}) with "
                f"{type(error).__name__}: {error}; this is a bug in the rule, nothing was changed"
            ) from error
        return r.Pattern(relation, operands) if isinstance(relation, str) else relation

    def _operands(self, node: fx.Node) -> tuple[r.Operand, ...]:
        """The tensor arguments of `node` in order; sources get fresh axes for this use."""
        operands = []
        for occurrence, arg in enumerate(argument_nodes(node)):
            if not tensor_meta(arg) or isinstance(arg.meta["val"], (tuple, list)):
                continue
            shape = _shape(arg.meta["val"])
            if arg in self.weighted:
                operand = r.Operand(self.known.values[arg][0], shape, arg, True, self.parameter_behind(arg))
            else:
                operand = r.Operand(tuple(self.axes.fresh(size) for size in shape), shape, arg, False)
                self.known.sources.append(Source(node, occurrence, arg, operand.exprs))
            operands.append(operand)
        return tuple(operands)

    def parameter_behind(self, node: fx.Node) -> str | None:
        """The parameter that `node` is, or is a view or a cast of."""
        while node.op == "call_function" and node.target in _VIEWS:
            node = node.args[0]
        return self.captured.tensors.get(node.name) if node.op == "placeholder" else None

    def _opaque(self, node: fx.Node, operands: tuple[r.Operand, ...], shapes: list[Any], reason: str) -> None:
        for operand in operands:
            for expr in operand.exprs:
                self.known.pin(expr, node, reason)
        outputs = tuple(tuple(self.axes.fresh(size) for size in shape) for shape in shapes)
        for expr in (expr for exprs in outputs for expr in exprs):
            self.known.pin(expr, node, reason)
        self.known.values[node] = outputs

    def _pin(self, expr: Expr, node: fx.Node, why: str) -> None:
        self.known.pin(expr, node, f"{op_name(node)}: {why[:1].lower()}{why[1:]}")

    def _solve(
        self, relation: r.Relation, node: fx.Node, operands: tuple[r.Operand, ...], shapes: list[Any], why: str
    ) -> list[Exprs]:
        """The axes of the outputs of `node`, after recording what `relation` says about those of its operands."""
        axes, shape = self.axes, shapes[0]
        match relation:
            case r.Pattern():
                return [self._pattern(relation, node, shape, why)]
            case r.Pointwise():
                return [self._pointwise(relation, node, shape)]
            case r.Regrouped(x):
                return [tuple(axes.regroup(x.exprs, shape))]
            case r.Permuted(x, order):
                return [tuple(x.exprs[i] for i in order)]
            case r.Carried(x, pinned, dropped, keepdim):
                for i in pinned:
                    self._pin(x.exprs[i], node, why)
                for i in set(dropped) - set(pinned):
                    self.known.facts.append(Fact("contracted", x.exprs[i], node, operands=(x,)))
                if keepdim:
                    exprs = tuple(UNIT if i in dropped else expr for i, expr in enumerate(x.exprs))
                else:
                    exprs = tuple(expr for i, expr in enumerate(x.exprs) if i not in dropped)
                return [exprs for _ in shapes]
            case r.Sliced(x, dim, start, stop, step):
                return [_replaced(x.exprs, dim, self._sliced(relation, node, why))]
            case r.Parted(x, dim, sizes):
                return [_replaced(x.exprs, dim, piece) for piece in axes.cut(x.exprs[dim], sizes)]
            case r.Picked(x, dim, every):
                self._pin(x.exprs[dim], node, why)
                rest = x.exprs[:dim] + x.exprs[dim + 1 :]
                return [rest] * (len(shapes) if every else 1)
            case r.Joined(xs, dim):
                # The empty 1-d tensors that torch lets one concatenate carry nothing.
                xs = tuple(x for x in xs if x.ndim == len(shape))
                for i in range(len(shape)):
                    for other in xs[1:]:
                        if i != dim:
                            axes.unify(xs[0].exprs[i], other.exprs[i])
                return [_replaced(xs[0].exprs, dim, segments(*(x.exprs[dim] for x in xs)))]
            case r.Stacked(xs, dim):
                for other in xs[1:]:
                    for a, b in zip(xs[0].exprs, other.exprs, strict=True):
                        axes.unify(a, b)
                new = axes.fresh(len(xs))
                self._pin(new, node, why)
                return [(*xs[0].exprs[:dim], new, *xs[0].exprs[dim:])]
            case r.Expanded(x):
                return [self._expanded(x, node, shape)]
            case r.Repeated(x, times, interleaved):
                return [self._repeated(relation, node)]
            case r.Indexed(x, dim, index):
                self._pin(x.exprs[dim], node, why)
                self._free(x.exprs[dim + 1 :] + x.exprs[:dim], node, x)
                return [(*x.exprs[:dim], *index.exprs, *x.exprs[dim + 1 :])]
            case r.Created():
                return [tuple(axes.fresh(size) for size in shape) for shape in shapes]
            case r.Opaque(xs):
                self._opaque(node, xs, shapes, f"{op_name(node)}: {why[:1].lower()}{why[1:]}")
                return list(self.known.values[node])

    def _free(self, exprs: Exprs, node: fx.Node, x: r.Operand) -> None:
        for expr in exprs:
            self.known.facts.append(Fact("free", expr, node, operands=(x,)))

    def _sliced(self, relation: r.Sliced, node: fx.Node, why: str) -> Expr:
        x, (start, stop, step) = relation.x, (relation.start, relation.stop, relation.step)
        expr = x.exprs[relation.dim]
        size = x.shape[relation.dim]
        if step != 1:
            # A strided slice of the whole axis picks one entry of each row of `step`.
            if not (type(start) is int and start < step and stop == size):
                raise Mismatch(f"a slice {start}:{stop}:{step} of {size} entries")
            rows, column = self.axes.split(expr, step)
            self._pin(column, node, why)
            return rows
        if start == 0 and stop == size:
            return expr
        sizes = [start, as_size(stop - start), as_size(size - stop)]
        pieces = iter(self.axes.cut(expr, [s for s in sizes if s != 0]))
        if start != 0:
            next(pieces)
        return next(pieces)

    def _expanded(self, x: r.Operand, node: fx.Node, shape: tuple[Size, ...]) -> Exprs:
        new = len(shape) - x.ndim
        exprs = []
        for i, size in enumerate(shape):
            if i >= new and x.shape[i - new] == size:
                exprs.append(x.exprs[i - new])
            else:
                exprs.append(self.axes.fresh(size))
                self.known.facts.append(Fact("expanded", exprs[-1], node, operands=(x,)))
        return tuple(exprs)

    def _repeated(self, relation: r.Repeated, node: fx.Node) -> Exprs:
        x, times = relation.x, relation.times
        exprs = (*(UNIT for _ in range(len(times) - x.ndim)), *x.exprs)
        copies = tuple(self.axes.fresh(n) for n in times)
        self.known.made[node] = copies
        for copy in copies:
            self.known.facts.append(Fact("expanded", copy, node, operands=(x,)))
        if relation.interleaved:
            return tuple(product(expr, copy) for expr, copy in zip(exprs, copies, strict=True))
        return tuple(product(copy, expr) for expr, copy in zip(exprs, copies, strict=True))

    def _pointwise(self, relation: r.Pointwise, node: fx.Node, shape: tuple[Size, ...]) -> Exprs:
        exprs: list[Expr] = []
        for place in range(-len(shape), 0):
            here = [x for x in relation.operands if -place <= x.ndim and x.exprs[place] != UNIT]
            if not here:
                exprs.append(self.axes.fresh(shape[place]))
                continue
            expr = here[0].exprs[place]
            exprs.append(expr)
            for other in here[1:]:
                self.axes.unify(expr, other.exprs[place])
            self._pointwise_facts(relation, node, expr, here)
        return tuple(exprs)

    def _pointwise_facts(self, relation: r.Pointwise, node: fx.Node, expr: Expr, here: list[r.Operand]) -> None:
        activations = [x for x in here if x.weighted and x.parameter is None]
        meeting = tuple(activations) if len({x.node for x in activations}) > 1 else ()
        scaled = relation.how == "product" and len(here) > 1
        if relation.how == "nonlinear" or scaled:
            self.known.facts.append(Fact("nonlinear", expr, node))
        if meeting:
            self.known.facts.append(Fact("gate" if relation.how != "linear" else "merge", expr, node, operands=meeting))

    def _pattern(self, relation: r.Pattern, node: fx.Node, shape: tuple[Size, ...], why: str) -> Exprs:
        terms = [_Term(term) for term in relation.spec.split("->")[0].split(",")][: len(relation.operands)]
        out = _Term(relation.spec.split("->")[1])
        letters: dict[str, Expr] = {}
        held: dict[str, list[r.Operand]] = {}

        def meet(letter: str, expr: Expr) -> None:
            if letter not in letters or letters[letter] == UNIT:
                letters[letter] = expr
            elif expr != UNIT:
                self.axes.unify(letters[letter], expr)

        placed = [
            (term, operand, name, expr)
            for term, operand in zip(terms, relation.operands, strict=True)
            for name, expr in zip(term.names(operand.ndim), operand.exprs, strict=True)
        ]
        for term, operand, name, expr in placed:
            for letter in name if isinstance(name, tuple) else (name,):
                if not term.added:
                    held.setdefault(letter, []).append(operand)
            if not isinstance(name, tuple):
                meet(name, expr)
        # Products come second: single dims of other operands may name their letters.
        for _, _, name, expr in placed:
            if isinstance(name, tuple) and expr != UNIT:
                self._meet_product(name, expr, letters)
        exprs = []
        for name, size in zip(out.names(len(shape)), shape, strict=True):
            if isinstance(name, tuple):
                exprs.append(product(*(letters[letter] for letter in name)))
            else:
                exprs.append(letters.setdefault(name, self.axes.fresh(size)))
        for letter in {letter for term in (*terms, out) for letter in term.pinned}:
            if letter in letters:
                self._pin(letters[letter], node, why)
        for term, operand, name, expr in placed:
            # One entry meets many: the axis is one that this operand repeats along, as `expand` would have made it.
            if not (term.added or isinstance(name, tuple)) and expr == UNIT and letters[name] != UNIT:
                self.known.facts.append(Fact("expanded", letters[name], node, operands=(operand,)))
        self._pattern_facts(node, out, letters, held, sum(not term.added for term in terms))
        return tuple(exprs)

    def _meet_product(self, name: tuple[str, ...], expr: Expr, letters: dict[str, Expr]) -> None:
        """Unify a dim that is a product of letters, of which all but one may be known already."""
        rest = size_of(expr)
        for letter in name:
            if letter in letters:
                rest = _exactly(rest, size_of(letters[letter]))
        for letter in name:
            if letter not in letters:
                letters[letter] = self.axes.fresh(rest)
                rest = 1
        self.axes.unify(product(*(letters[letter] for letter in name)), expr)

    def _pattern_facts(
        self, node: fx.Node, out: _Term, letters: dict[str, Expr], held: dict[str, list[r.Operand]], factors: int
    ) -> None:
        for letter, operands in held.items():
            if letter not in out.letters and not (letter[0] == "." and "." in out.letters):
                role: Role = "contracted"
            else:
                role = "batch" if len(operands) == factors else "free"
            self.known.facts.append(Fact(role, letters[letter], node, operands=tuple(operands)))


class _Term:
    """One operand of a pattern, parsed: `... (h g) s! d`."""

    def __init__(self, text: str) -> None:
        text = text.strip()
        self.added = text.startswith("+")
        tokens = text.lstrip("+").replace("(", " ( ").replace(")", " ) ").split()
        self.pinned = {token.rstrip("!") for token in tokens if token.endswith("!")}
        self.dims: list[str | tuple[str, ...]] = []
        group: list[str] | None = None
        for token in (token.rstrip("!") for token in tokens):
            if token == "(":
                group = []
            elif token == ")":
                self.dims.append(tuple(group or ()))
                group = None
            elif group is not None:
                group.append(token)
            else:
                self.dims.append("." if token == "..." else token)
        self.letters = {letter for dim in self.dims for letter in (dim if isinstance(dim, tuple) else (dim,))}

    def names(self, ndim: int) -> list[str | tuple[str, ...]]:
        """The letter (or product of letters) of each of `ndim` dims; dims under `...` are numbered from the right."""
        if "." not in self.dims:
            if len(self.dims) != ndim:
                raise Mismatch(f"the rule names {len(self.dims)} dims of {ndim}")
            return self.dims
        at = self.dims.index(".")
        hidden = ndim - (len(self.dims) - 1)
        return [*self.dims[:at], *(f".{i}" for i in range(hidden, 0, -1)), *self.dims[at + 1 :]][max(0, -hidden) :]


def op_name(node: fx.Node) -> str:
    """Short name of the op of `node`, as a user would write it: `aten.softmax`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.namespace}.{node.target._opname}"
    return getattr(node.target, "__name__", str(node.target))


def place(node: fx.Node) -> str:
    """Where `node` comes from: module path and, where known, file and line."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    module = paths[-1].removeprefix("region").lstrip(".") if paths else ""
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File")]
    line = ""
    if frames:
        file, number = frames[-1].split('"')[1].rsplit("/", 1)[-1], frames[-1].split("line ")[1].split(",")[0]
        line = f"{file}:{number}"
    return ", ".join(part for part in (module, line) if part) or node.name


def argument_nodes(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments of `node`, in order, repeated where they repeat."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _shape(meta: torch.Tensor) -> tuple[Size, ...]:
    return tuple(map(as_size, meta.shape))


def _replaced(exprs: Exprs, dim: int, expr: Expr) -> Exprs:
    return (*exprs[:dim], expr, *exprs[dim + 1 :])


def _exactly(size: Size, divisor: Size) -> Size:
    from .axes import quotient

    result = quotient(size, divisor)
    if result is None:
        raise Mismatch(f"an axis of {size} is no multiple of {divisor}")
    return result


import operator  # noqa: E402

_GETITEM = operator.getitem
aten = torch.ops.aten
_VIEWS = {
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.t.default, aten.permute.default, aten.to.dtype,
    aten.unsqueeze.default, aten.squeeze.dim, aten.contiguous.default, aten.numpy_T.default, aten.alias.default,
    aten.detach.default, aten.slice.Tensor, aten.flatten.using_ints, aten.to.dtype_layout, aten.clone.default,
    aten.expand.default,
}  # fmt: skip


def _taint(captured: Captured) -> set[fx.Node]:
    """The nodes that depend on a parameter, through data flow or through a write into memory they are a view of."""
    weighted: set[fx.Node] = set()

    def direct(node: fx.Node) -> bool:
        return any(arg in weighted for arg in node.all_input_nodes)

    before = -1
    while before != len(weighted):
        before = len(weighted)
        for node in captured.graph.nodes:
            if node.op == "placeholder":
                if node.name in captured.parameters:
                    weighted.add(node)
                elif node.name in captured.tensors and _follows_parameters(node, weighted):
                    weighted.add(node)
            elif node.op != "get_attr" and direct(node):
                weighted.add(node)
                weighted.update(root for root in _written(node) if root.op != "placeholder")
    return weighted


def _follows_parameters(buffer: fx.Node, weighted: set[fx.Node]) -> bool:
    """Whether a buffer is used like a parameter (a batch norm's statistics) and so shrinks with them."""
    val = buffer.meta["val"]
    return bool(val.is_floating_point() and val.ndim and buffer.users and all(user in weighted for user in buffer.users))


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """The tensors whose memory `node` writes into, traced through views to where they were made."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
            while value.op == "call_function":
                yield value
                if value.target not in _VIEWS and value.target not in (aten.select.int, _GETITEM):
                    break
                value = value.args[0]
