"""Generated code: Python that runs a graph on a live region, as fast as the region's own code would.

    generate(graph) -> a function `forward(self, *placeholders)`, its source, the names of what it returns

A small model spends its time in Python, so this is the code that a person would write: `torch.add(x, y)` instead of
`torch.ops.aten.add.Tensor(x, y)`, whose look-up and boxing cost more than the sum. Submodules are looked up once per
call, and names are dropped after their last use, so that memory is freed as in eager mode.
"""

from __future__ import annotations

import hashlib
import keyword
import linecache
import math
import operator
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from ecospa_fx.passes.graph.nodes import arguments

from .spelling import spelling

aten = torch.ops.aten


def generate(graph: fx.Graph) -> tuple[Callable[..., Any], str, tuple[str, ...]]:
    """Write and compile Python code for `graph`.

    Args:
        graph: its `get_attr` nodes name tensors, its `call_module` nodes submodules, of the region it will run on.

    Returns:
        `forward(region, *placeholders)`, its source, and the local that holds each of its results; `""` for others.
    """
    writer = _Source(graph)
    source, scope = writer.write()
    same = source, frozenset((name, _identity(value)) for name, value in scope.items())
    if (function := _FUNCTIONS.get(same)) is None:
        exec(_compile(source), scope)
        _FUNCTIONS[same] = function = scope["forward"]
    results: Any = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    return function, source, tuple(writer.names.get(each, "") for each in results)


_FUNCTIONS: WeakValueDictionary[tuple[str, frozenset[Any]], Callable[..., Any]] = WeakValueDictionary()
"""Functions by their source and the identity of their globals, one for equal blocks at equal sizes.

torch.compile keeps graphs by code object, and puts their names into the globals of the function that it met first: a
code object may have one dict of globals only, and equal blocks are to have one code object.
"""


def _identity(value: Any) -> Any:
    return value if isinstance(value, torch.device) else repr(value) if isinstance(value, float) else id(value)


def _compile(source: str) -> CodeType:
    name = f"<ecospa_fx {hashlib.sha1(source.encode()).hexdigest()[:8]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # tracebacks show its lines
    return compile(source, name, "exec")


class _Source:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.scope: dict[str, Any] = {"torch": torch}
        self.globals: dict[Any, str] = {}  # identity of a global value -> its name
        self.modules: dict[str, str] = {"": "self"}  # path of a submodule -> the local that holds it
        self.taken = {"self", "torch", *keyword.kwlist}
        self.names: dict[fx.Node, str] = {node: self._free(node.name) for node in graph.nodes}
        self.lines: list[str] = []
        self.depth = 0  # of blocks that lines are in

    def write(self) -> tuple[str, dict[str, Any]]:
        """Return the source, and the globals that it needs."""
        unread = {node for node in self.graph.nodes if node.op == "get_attr"}
        last = _last_uses(self.graph)
        for node in self.graph.nodes:
            if node.op == "placeholder" or node in unread:
                continue
            for arg in node.all_input_nodes:
                if arg in unread:
                    self._line(f"{self.names[arg]} = {self._attribute(arg.target)}")
                    unread.discard(arg)
            if node.target in (_enter_autocast, _exit_autocast):
                self._autocast(node)
                continue
            names = [self.names[arg] for arg in last.get(node, ())]
            drop = f";  {' = '.join(names)} = None" if names and node.op != "output" else ""
            self._line(self._statement(node) + drop)
        names = ["self", *(self.names[node] for node in self.graph.nodes if node.op == "placeholder")]
        return "\n".join([f"def forward({', '.join(names)}):", *self.lines, ""]), self.scope

    def _line(self, line: str) -> None:
        self.lines.append(f"    {'    ' * self.depth}{line}")

    def _autocast(self, node: fx.Node) -> None:
        """Begin or end a block in autocast of its own, which an error inside leaves, too."""
        if node.target is _enter_autocast:
            kind, dtype, enabled = map(self._text, node.args[:3])  # then the cache, which is off in captures
            self._line(f"with torch.autocast({kind}, dtype={dtype}, enabled={enabled}):")
            self.depth += 1
        else:
            if self.lines[-1].lstrip().startswith("with torch.autocast("):
                self._line("pass")
            self.depth -= 1

    def _statement(self, node: fx.Node) -> str:
        if node.op == "output":
            return f"return {self._text(node.args[0])}"
        return f"{self.names[node]} = {self._value(node)}"

    def _value(self, node: fx.Node) -> str:
        args = [self._text(arg) for arg in node.args]
        kwargs = [f"{key}={self._text(value)}" for key, value in node.kwargs.items()]
        if node.op == "call_module":
            return f"{self._module(str(node.target))}({', '.join(args + kwargs)})"
        target: Any = node.target
        if target is operator.getitem:
            return f"{args[0]}[{args[1]}]"
        if target is aten.sym_size.int:
            return f"{args[0]}.size({args[1]})"
        if target is aten.slice.Tensor and not kwargs:
            return f"{args[0]}[{self._slice(node)}]"
        match spelling(target):
            case "torch", name:
                return f"torch.{name}({', '.join(args + kwargs)})"
            case "nn", name:
                return f"{self._global(getattr(torch._C._nn, name), 'nn_' + name)}({', '.join(args + kwargs)})"
            # `to` takes a memory format by name only.
            case "method", name if "layout" not in node.kwargs and not any(
                isinstance(arg, torch.memory_format) for arg in node.args
            ):
                return f"{args[0]}.{name}({', '.join(args[1:] + kwargs)})"
        label = "_".join(str(target).split(".")) if isinstance(target, torch._ops.OpOverload) else target.__name__
        return f"{self._global(target, label)}({', '.join(args + kwargs)})"

    def _slice(self, node: fx.Node) -> str:
        rest: tuple[Any, ...] = (0, None, None, 1)[len(node.args) - 1 :]
        dim, start, stop, step = (*arguments(node)[1:], *rest)
        bounds = [bound if isinstance(bound, fx.Node) else None if bound == default else bound
                  for bound, default in ((start, 0), (stop, torch.iinfo(torch.int64).max), (step, 1))]  # fmt: skip
        texts = ["" if bound is None else self._text(bound) for bound in bounds]
        cut = f"{texts[0]}:{texts[1]}" + (f":{texts[2]}" if texts[2] else "")
        return ", ".join([":"] * dim + [cut] if dim >= 0 else ["...", cut] + [":"] * (-dim - 1))

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if type(value) in (list, fx.immutable_collections.immutable_list):
            return f"[{', '.join(map(self._text, value))}]"
        if type(value) is tuple:
            return f"({', '.join(map(self._text, value))}{',' if len(value) == 1 else ''})"
        if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
            return repr(value)
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return str(value)
        return self._global(value, type(value).__name__)

    def _global(self, value: Any, label: str) -> str:
        key = value if isinstance(value, (torch.device, float)) else id(value)
        if key not in self.globals:
            self.globals[key] = name = self._free(label)
            self.scope[name] = value
        return self.globals[key]

    def _attribute(self, path: str) -> str:
        module, _, name = path.rpartition(".")
        owner = self._module(module)
        plain = name.isidentifier() and not keyword.iskeyword(name)
        return f"{owner}.{name}" if plain else f"getattr({owner}, {name!r})"

    def _module(self, path: str) -> str:
        """Return the local that holds a submodule; `_modules` would be faster to read, but wrappers may lie between."""
        if path not in self.modules:
            attribute = self._attribute(path)
            self.modules[path] = local = self._free(path)
            self._line(f"{local} = {attribute}")
        return self.modules[path]

    def _free(self, label: str) -> str:
        """Take a name that is still free."""
        base = name = "".join(c if c.isalnum() or c == "_" else "_" for c in label)
        if not name.isidentifier():
            base = name = f"_{name}"
        number = 1
        while name in self.taken:
            name, number = f"{base}_{number}", number + 1
        self.taken.add(name)
        return name


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Map each node to the values that no later node uses; not arguments, which their caller holds anyway."""
    last: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for arg in _once(node.all_input_nodes):
            if arg not in seen:
                seen.add(arg)
                if arg.op != "placeholder":
                    last.setdefault(node, []).append(arg)
    return last


def _once(nodes: list[fx.Node]) -> Iterator[fx.Node]:
    yield from dict.fromkeys(nodes)
