"""Summary: a model layer by layer, in the manner of torchinfo: shapes, parameters, couplings along them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch.utils._pytree as pytree
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from ecospa_fx.arguments import CALL, MODULE, WHOLE, optional, takes
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.diff import words
from ecospa_fx.model.lookup import check_sizes, try_call
from ecospa_fx.passes.graph.tensors import parameters_of
from ecospa_fx.plan import Plan
from ecospa_fx.ranks.wrappers import looks_inside
from ecospa_fx.text import count, plain, size

OutputShape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """One module of a summary, or several that are alike.

    Attributes:
        name: name in the parent; `0-23` for several.
        cls: name of the class.
        depth: levels below the root.
        times: number of modules that are alike.
        shape: shape of the weight now.
        original: shape of the weight before any shrink.
        output: shape of the output, if inputs were given.
        parameters: parameters of these modules and all below; those of an earlier layer (tied) are not counted again.
        couplings: last parts of the names of the couplings along its own parameters.
    """

    name: str
    cls: str
    depth: int
    times: int
    shape: OutputShape
    original: OutputShape
    output: OutputShape
    parameters: int
    couplings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Summary:
    """A model layer by layer; print it.

    Attributes:
        model: name of the model's class.
        layers: the layers from the root down.
        parameters: number of parameters, tied ones counted once.
        original_parameters: number of parameters before any shrink.
        trainable: number of parameters that require gradients.
        bytes: bytes of the parameters.
    """

    model: str
    layers: tuple[Layer, ...]
    parameters: int
    original_parameters: int
    trainable: int
    bytes: int

    def __repr__(self) -> str:
        return f"<Summary of {self.model}: {self.parameters:,} parameters>"

    def total(self) -> str:
        """Format the last line: sizes of the whole model."""
        of = f" of {self.original_parameters:,}" if self.original_parameters != self.parameters else ""
        return f"{self.parameters:,}{of} parameters, {self.trainable:,} trainable, {size(self.bytes)}"

    def table(self) -> Table:
        """Build the table with a row per layer."""
        table = Table(box=None, pad_edge=False, show_edge=False)
        outputs, coupled = any(x.output for x in self.layers), any(x.couplings for x in self.layers)
        table.add_column("layer", overflow="fold")
        table.add_column("weight", overflow="fold")
        if outputs:
            table.add_column("output", overflow="fold")
        table.add_column("parameters", justify="right", no_wrap=True)
        if coupled:
            table.add_column("shrinks along", overflow="fold")
        for layer in self.layers:
            times = f" x{layer.times}" if layer.times > 1 else ""
            name = f"{'  ' * layer.depth}{layer.name}{times}"
            cells = [Text.assemble(name, (f" {layer.cls}" if layer.name != layer.cls else "", "dim"))]
            now = words(layer.shape)
            cells.append(Text(now if layer.shape == layer.original else f"{now} of {words(layer.original)}"))
            if outputs:
                cells.append(Text(words(layer.output)))
            cells.append(Text(count(layer.parameters) if layer.parameters else ""))
            if coupled:
                cells.append(Text(" ".join(layer.couplings)))
            table.add_row(*cells)
        return table

    def __rich__(self) -> Group:
        return Group(self.table(), Text(), Text(self.total(), style="bold"))

    def __str__(self) -> str:
        return f"{plain(self.table())}\n\n{self.total()}"


@dataclass
class _Walk:
    depth: int | None
    shapes: Mapping[str, OutputShape]
    plan: Plan
    couplings: Mapping[str, list[str]]
    layers: list[Layer] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def visit(self, run: list[nn.Module], name: str, path: str, depth: int) -> None:
        """Add a layer, or a run of equal layers, and the layers inside the first of them."""
        module = run[0]
        direct = dict(module.named_parameters(recurse=False))
        weight = next(((n, p) for n, p in direct.items() if p.ndim > 1), None) or next(iter(direct.items()), None)
        shape: OutputShape = tuple(weight[1].shape) if weight else ()
        full = f"{path}.{weight[0]}" if weight and path else (weight[0] if weight else "")
        fresh = {id(p): p for each in run for p in each.parameters() if id(p) not in self.seen}
        self.layers.append(
            Layer(
                name, type(module).__name__, depth, len(run), shape,
                self.plan.original_shapes.get(full, shape), self.shapes.get(path, ()),
                sum(p.numel() for p in fresh.values()), tuple(self.couplings.get(path, ())),
            )
        )  # fmt: skip
        if self.depth is None or depth < self.depth:
            for first, last, children in self._alike(module, path):
                shown = first if first == last else f"{first}-{last}"
                self.visit(children, shown, f"{path}.{first}" if path else first, depth + 1)
        self.seen |= fresh.keys()

    def _alike(self, module: nn.Module, path: str) -> list[tuple[str, str, list[nn.Module]]]:
        """List the children, runs of equal ones as one: (first name, last name, modules)."""
        runs: list[tuple[str, str, list[nn.Module]]] = []
        marks: list[Any] = []
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            mark = self._mark(child, inner) if name.isdigit() else None
            if runs and mark is not None and marks[-1] == mark and int(name) == int(runs[-1][1]) + 1:
                runs[-1] = runs[-1][0], name, [*runs[-1][2], child]
            else:
                runs.append((name, name, [child]))
                marks.append(mark)
        return runs

    def _mark(self, module: nn.Module, path: str) -> Any:
        """Return the properties that must be equal for two children to be shown as one."""
        kinds = tuple((n, type(m).__name__) for n, m in module.named_modules())
        return kinds, tuple((n, tuple(p.shape)) for n, p in parameters_of(module)), self.shapes.get(path)


@takes(model=MODULE, **CALL, depth=optional(WHOLE))
@looks_inside
def summary(
    model: nn.Module,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    depth: int | None = None,
) -> Summary:
    """Summarise a model layer by layer: class, weight, parameters; equal blocks as one.

    >>> print(ecospa_fx.summary(model))

    A compiled model that has been called also shows original sizes and the couplings along each layer.

    Args:
        model: any module; on the meta device too, without inputs.
        example_inputs: positional arguments of a call, to show the shapes of outputs as well.
        example_kwargs: keyword arguments of that call.
        depth: number of levels below the model to show; by default all.
    """
    compiled = model.__dict__.get(MODEL)
    couplings: dict[str, list[str]] = {}
    if compiled is not None and compiled.captured:
        for coupling in compiled.couplings():
            for member in coupling.members:
                tails = couplings.setdefault(member.parameter.rpartition(".")[0], [])
                tail = coupling.name.rpartition(".")[2]
                if tail not in tails:
                    tails.append(tail)
    plan = compiled.plan if compiled is not None else Plan()
    check_sizes(model)
    shapes = {}
    if example_inputs is not None or example_kwargs is not None:
        shapes = _output_shapes(model, tuple(example_inputs or ()), dict(example_kwargs or {}))
    walk = _Walk(depth, shapes, plan, couplings)
    walk.visit([model], type(model).__name__, "", 0)
    named = dict(parameters_of(model))
    return Summary(
        type(model).__name__,
        tuple(walk.layers),
        sum(p.numel() for p in named.values()),
        sum(prod(plan.original_shapes.get(name, tuple(p.shape))) for name, p in named.items()),
        sum(p.numel() for p in named.values() if p.requires_grad),
        sum(p.numel() * p.element_size() for p in named.values()),
    )


def _output_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, OutputShape]:
    """Return the shape of the first tensor that each module returns, but for modules inside a compiled region."""
    shapes: dict[str, OutputShape] = {}

    def hook(name: str) -> Any:
        def remember(_: nn.Module, __: Any, output: Any) -> None:
            tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            if tensors:
                shapes.setdefault(name, tuple(tensors[0].shape))

        return remember

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        try_call(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return shapes
