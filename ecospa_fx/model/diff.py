"""ModuleDiff: the sizes of every layer before and after a shrink."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from rich.table import Table
from rich.text import Text
from torch import nn

from ecospa_fx.passes.graph.tensors import parameters_of
from ecospa_fx.plan import Plan
from ecospa_fx.text import plain, starred

TensorShape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ModuleDiff:
    """The shapes of a model's parameters before and after a shrink.

    Attributes:
        before: parameter -> shape before, for those that changed.
        after: parameter -> shape now.
        classes: module -> name of its class.
        parameters_before: number of parameters of the model before.
        parameters_after: number of parameters now.
    """

    before: Mapping[str, TensorShape]
    after: Mapping[str, TensorShape]
    classes: Mapping[str, str]
    parameters_before: int
    parameters_after: int

    def __bool__(self) -> bool:
        return bool(self.before)

    def __repr__(self) -> str:
        return f"<ModuleDiff of {len(self.before)} parameters: {self.headline()}>"

    def headline(self) -> str:
        """Return the numbers of parameters before and after as a line of text."""
        share = self.parameters_after / max(1, self.parameters_before)
        return f"{self.parameters_before:,} -> {self.parameters_after:,} parameters (x {share:.3f})"

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False, show_edge=False, title=self.headline(), title_justify="left")
        table.add_column("layer", overflow="fold")
        table.add_column("times", justify="right")
        table.add_column("class")
        table.add_column("before", justify="right", no_wrap=True)
        table.add_column("after", justify="right", no_wrap=True)
        for layer, times, cls, before, after in self.rows():
            table.add_row(Text(layer), str(times), cls, words(before), words(after))
        return table

    def __str__(self) -> str:
        return plain(self.__rich__())

    def rows(self) -> list[tuple[str, int, str, TensorShape, TensorShape]]:
        """Return (layer, number of layers alike, class, shape before, shape after) of each matrix that changed."""
        folded: dict[tuple[str, str, TensorShape, TensorShape], list[str]] = {}
        for name, before in self.before.items():
            if len(before) > 1:
                layer, _, tensor = name.rpartition(".")
                shown = layer if tensor == "weight" else name
                key = starred(f"{shown}."), self.classes.get(layer, ""), before, self.after[name]
                folded.setdefault(key, []).append(shown)
        return [
            (key[0].rstrip(".") if len(layers) > 1 else layers[0], len(layers), *key[1:])
            for key, layers in folded.items()
        ]


def words(shape: TensorShape) -> str:
    """Write a shape as text: `64 x 32`."""
    return " x ".join(map(str, shape))


def shapes_of(model: nn.Module) -> dict[str, TensorShape]:
    """Return the shapes of the parameters, tied ones once."""
    return {name: tuple(p.shape) for name, p in parameters_of(model)}


def diff_of(model: nn.Module, before: Mapping[str, TensorShape]) -> ModuleDiff:
    """Compare the shapes of the model's parameters with those of `before`, from `shapes_of`."""
    after = shapes_of(model)
    changed = [name for name, shape in after.items() if before.get(name, shape) != shape]
    return ModuleDiff(
        {name: before[name] for name in changed},
        {name: after[name] for name in changed},
        {name: type(module).__name__ for name, module in model.named_modules()},
        sum(map(prod, before.values())),
        sum(map(prod, after.values())),
    )


def diff_since(model: nn.Module, plan: Plan) -> ModuleDiff:
    """Compare the shapes of the model's parameters with those before any shrink."""
    return diff_of(model, {name: plan.original_shapes.get(name, shape) for name, shape in shapes_of(model).items()})
