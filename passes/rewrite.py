"""Rewrite: the graph of a region at the sizes that a plan leaves.

    rewrite(inference, kept, region)
      -> _copy        the captured graph, with inputs and constants as arguments
      -> sources      see there: they are index-selected where they are used
      -> follow       sizes held as arguments become counts, bounds become prefix sums (one `follow` per rule)
      -> _bind        parameters are read from the live region; its nn.Linears are called as modules
      -> Program      Python code that runs with the region as `self`

Always starts from the captured graph at original sizes, so shrinking twice is shrinking once by the composition.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from ecospa_fx.carried import Stored
from ecospa_fx.errors import RuleError

from .axes import Expr, Size, as_size, size_of
from .capture import Captured
from .generate import generate
from .hooks import calls_itself, fire
from .inference import Inference
from .live import go_live, pass_edges
from .nodes import op_name, place
from .rules import rule_for
from .rules.registry import Operand
from .selection import Kept, count, in_first_contexts, mask_of, touched
from .sources import select_sources

aten = torch.ops.aten


@dataclass(eq=False)
class Program:
    """A region's forward as generated code.

    Attributes:
        captured: the graph it was made from, at original sizes.
        inference: the axes of that graph.
        run: `run(region, *inputs, *objects, *constants)` returns the output tensors.
        constants: lifted tensors, subgraphs and index tensors that `run` takes.
        source: the generated code, to read.
        called: submodules that the code calls as they are.
        state: sizes of the tensors in objects of the call that it takes.
        check: see `fits`; made when it is first needed.
    """

    captured: Captured
    inference: Inference
    run: Any
    constants: tuple[Any, ...]
    source: str
    called: frozenset[str] = frozenset()
    state: tuple[tuple[Size, ...], ...] = ()
    check: Callable[[Sequence[Tensor]], bool] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self  # holds no module: it runs on whichever region calls it

    def __call__(self, region: nn.Module, inputs: Sequence[Any]) -> Any:
        """Run one call and give its results the structure that the region's own forward gives them.

        Args:
            region: the live region.
            inputs: the tensors of the call, those in its objects, and these.
        """
        return self.returned(region, inputs, self.run(region, *inputs, *self.constants))

    def returned(self, region: nn.Module, inputs: Sequence[Any], tensors: Any) -> Any:
        """What the region returns where the code returned `tensors`; those that hooks look at go to them."""
        captured = self.captured
        objects: Sequence[Any] = inputs[len(captured.inputs) :]
        if captured.carried.effects:
            waiting = iter(tensors[len(tensors) - sum(isinstance(v, Stored) for _, v in captured.carried.effects) :])
            for place, value in captured.carried.effects:
                place.put(objects, next(waiting) if isinstance(value, Stored) else value)
        if captured.observed:
            fire(region, captured.observed, tensors[captured.returned :], captured.region, objects)
        return captured.result(tensors[: captured.returned], objects)

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the sizes of a call, of its tensors and of what objects hold, are such as the program serves."""
        if self.check is None:
            self.check = self.captured.signature.checker(self.state)
        return self.check(tensors)


class Site:
    """One op whose arguments a rule's `follow` may rewrite for the new sizes.

    Attributes:
        target: the op; assign to make it another.
        args: every argument by its name in the op's schema, defaults filled in; assign to change one.
        operands: the tensor arguments with their axes at original sizes.
        outputs: axes of each output.
        made: axes that the op made itself by repeating.
    """

    def __init__(self, node: fx.Node, original: fx.Node, inference: Inference, kept: Kept) -> None:
        target: Any = node.target
        self.target = target
        self.operands: tuple[Operand, ...] = inference.operands[original]
        self.outputs = inference.values[original]
        self.made = inference.made.get(original, ())
        self._node, self._kept = node, in_first_contexts(kept)  # sizes and bounds are the same in every one
        arguments = target._schema.arguments
        self.args = {a.name: a.default_value for a in arguments} | dict(node.kwargs)
        self.args |= {a.name: value for a, value in zip(arguments, node.args, strict=False)}

    def touched(self, expr: Expr) -> bool:
        """Whether `expr` has lost entries."""
        return touched(expr, self._kept)

    def count(self, expr: Expr) -> int:
        """Number of entries of `expr` that stay."""
        return int(count(expr, self._kept))

    def kept_before(self, expr: Expr, bound: int) -> int:
        """Number of entries of `expr` that stay before position `bound`, read as Python reads slice bounds."""
        return int(mask_of(expr, self._kept)[:bound].sum()) if bound < size_of(expr) else bound

    def resized(self, size: Any, expr: Expr) -> Any:
        """`size`, an int or a node that computes one, scaled from the original extent of `expr` to what stays."""
        if isinstance(size, int):
            return size if size == -1 else self.count(expr)
        # A dynamic factor times static ones: the ratio of the static ones is exact.
        ratio = sympy.sympify(count(expr, self._kept)) / size_of(expr)
        with self._node.graph.inserting_before(self._node):
            scaled = self._node.graph.call_function(operator.mul, (size, int(ratio.p)))
            return self._node.graph.call_function(operator.floordiv, (scaled, int(ratio.q)))

    def resize_output(self, *names: str) -> None:
        """Rewrite the argument that lists the sizes of the output, under whichever of `names` the op has it."""
        name = next(name for name in names if name in self.args)
        # `expand` may name more dims than the operand has, never fewer than the output.
        self.args[name] = [
            self.resized(size, expr) if self.touched(expr) else size
            for size, expr in zip(self.args[name], self.outputs[0], strict=True)
        ]

    def repeats(self) -> Any:
        """The numbers of copies that stay, as `repeat` (a list) or `repeat_interleave` (one int) takes them."""
        given = self.args["repeats"]
        if isinstance(given, (list, tuple)):
            return [self.count(m) if self.touched(m) else n for n, m in zip(given, self.made, strict=True)]
        return next(self.count(copy) for copy in self.made if self.touched(copy))

    def apply(self) -> None:
        """Write the arguments back into the node."""
        self._node.target = self.target
        schema = self.target._schema.arguments
        self._node.args = tuple(self.args[a.name] for a in schema if not a.kwarg_only and a.name in self.args)
        self._node.kwargs = {a.name: self.args[a.name] for a in schema if a.kwarg_only and a.name in self.args}


def rewrite(
    inference: Inference, kept: Kept, region: nn.Module, watched: Sequence[fx.Node] = (), live: bool = True
) -> Program:
    """The program of a region under a selection.

    Args:
        inference: axes of the captured graph.
        kept: what stays of each atom.
        region: the live region; only the types of its modules are looked at.
        watched: nodes of the captured graph whose values `run` returns after the outputs.
        live: methods of objects are called, not computed as they were traced; `run` takes the objects then.

    Raises:
        RuleError: the `follow` of a rule fails.
    """
    captured = inference.captured
    graph, new, objects, constants = _copy(captured, live)
    constants |= select_sources(graph, inference, kept, new)
    for original, node in new.items():
        rule = rule_for(original.target)
        if rule is None or rule.follow is None or original not in inference.operands:
            continue
        axes = (*inference.values[original], *(o.exprs for o in inference.operands[original]))
        if not any(touched(expr, kept) for exprs in (*axes, inference.made.get(original, ())) for expr in exprs):
            continue
        site = Site(node, original, inference, kept)
        try:
            rule.follow(site)
        except Exception as error:
            raise RuleError(
                f"the sizes of {op_name(original)} ({place(original, captured.region)}) cannot follow a shrink: its "
                f"rule failed with {type(error).__name__}: {error}; this is a bug in the rule, nothing was changed"
            ) from error
        site.apply()
    sizes = _sizes_now(inference, kept)
    if live:
        go_live(captured.carried, graph, new, objects, sizes)
    else:
        pass_edges(graph)
    if watched:
        output = next(node for node in reversed(graph.nodes) if node.op == "output")
        output.args = ((*output.args[0], *(new[node] for node in watched)),)
    _bind(captured, region, graph, new)
    run, source = generate(graph)
    called = frozenset(node.target for node in graph.nodes if node.op == "call_module")
    by_name = {node.name: node for node in captured.graph.nodes if node.op == "placeholder"}
    state = tuple(tuple(sizes(by_name[name])) for name in captured.state)
    return Program(captured, inference, run, tuple(constants.values()), source, called, state)


def _sizes_now(inference: Inference, kept: Kept) -> Callable[[fx.Node], Sequence[Size]]:
    uniform = in_first_contexts(kept)

    def sizes(node: fx.Node) -> Sequence[Size]:
        if node in inference.values:
            return [count(expr, uniform) for expr in inference.values[node][0]]
        return [as_size(size) for size in node.meta["val"].shape]

    return sizes


def _copy(captured: Captured, live: bool) -> tuple[fx.Graph, dict[fx.Node, fx.Node], list[fx.Node], dict[fx.Node, Any]]:
    """The captured graph as a new one that takes inputs, objects, then constants; and which node became which."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    constants: dict[fx.Node, Any] = {}
    by_name = {node.name: node for node in captured.graph.nodes if node.op in ("placeholder", "get_attr")}
    for name in captured.inputs:
        new[by_name[name]] = graph.placeholder(name)
    objects = [graph.placeholder(f"held_{i}") for i in range(len(captured.carried.types) if live else 0)]
    for name, value in captured.constants.items():
        new[by_name[name]] = node = graph.placeholder(name)
        constants[node] = value
    for name, held in captured.tensors.items():
        if by_name[name].users:
            new[by_name[name]] = graph.get_attr(held)
    for node in captured.graph.nodes:
        if node not in new and node.op not in ("placeholder", "get_attr"):
            new[node] = graph.node_copy(node, new.__getitem__)
    return graph, new, objects, constants


def _bind(captured: Captured, region: nn.Module, graph: fx.Graph, new: dict[fx.Node, fx.Node]) -> None:
    """Call the region's own nn.Linears, so that hooks and wrappers put on them later work too; drop what is unused."""
    for node in list(graph.nodes):
        if node.target is not aten.linear.default:
            continue
        weight, bias = node.args[1], (*node.args, None)[2]
        if weight.op != "get_attr" or (bias is not None and bias.op != "get_attr"):
            continue
        path = weight.target.rpartition(".")[0]
        module = region.get_submodule(path)
        own = (f"{path}.weight", f"{path}.bias" if getattr(module, "bias", None) is not None else None)
        free = path not in captured.hooked  # else its hooks would run twice
        if free and calls_itself(module) and own == (weight.target, bias.target if bias else None):
            with graph.inserting_before(node):
                call = graph.call_module(path, (node.args[0],))
            node.replace_all_uses_with(call)
            graph.erase_node(node)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
