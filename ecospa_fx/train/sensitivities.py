"""Sensitivities: the measurements of `sensitivity` as a table, a plot, and shares that fit a limit.

Rises of several kinds add up in the search. They were measured one at a time, so this is a guess; a run measures it.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

from ecospa_fx.arguments import MODULE, NUMBER, optional, takes
from ecospa_fx.errors import EcoSpaError, TargetError
from ecospa_fx.model.cost import Cost, CostModel
from ecospa_fx.model.lookup import couplings, state_of
from ecospa_fx.ranks.wrappers import looks_inside
from ecospa_fx.text import plain

from .latency import Latency, LatencyModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#b0b0b0", "#f0e442")
"""Colours that colour-blind people can tell apart (Okabe and Ito)."""
STEP = 0.01  # share by which the search lets a kind go on


@dataclass(frozen=True)
class Measured:
    """The loss without a share of some couplings.

    Attributes:
        kind: their kind.
        layer: their layer; empty for all of the kind.
        share: share of the entries that was to go.
        removed: share that went, in whole entries of each coupling.
        entries: how many went.
        parameters: how many parameters went with them.
        loss: the loss then.
        rise: the loss, less that of the whole model.
    """

    kind: str
    layer: str
    share: float
    removed: float
    entries: int
    parameters: int
    loss: float
    rise: float

    def __str__(self) -> str:
        where = f" in {self.layer}" if self.layer else ""
        return f"-{self.removed:.0%} {self.kind}{where}: loss {self.loss:.4g} ({self.rise:+.2g})"


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The result of `sensitivity`; print it.

    Attributes:
        measured: a row for each kind, layer and share.
        loss: the loss of the whole model.
        parameters: its parameters.
        groups: (kind, layer) -> names of the couplings.
        by: `"kind"` or `"layer"`.
        seconds: seconds that it took.
        originals: coupling name -> entries before any shrink.
        costs: `"parameters"`, `"flops"` -> the cost of the model at any widths.
    """

    measured: tuple[Measured, ...]
    loss: float
    parameters: int
    groups: Mapping[tuple[str, str], tuple[str, ...]]
    by: str
    seconds: float
    originals: Mapping[str, int] = field(repr=False, default_factory=dict)
    costs: Mapping[str, CostModel] = field(repr=False, default_factory=dict)

    @property
    def shares(self) -> list[float]:
        """The shares that went."""
        return sorted({row.share for row in self.measured})

    def curve(self, kind: str, layer: str = "") -> list[tuple[float, float]]:
        """Return (share, rise) of some couplings, from (0, 0) on.

        Raises:
            TargetError: they were not measured.
        """
        rows = [row for row in self.measured if (row.kind, row.layer) == (kind, layer)]
        if not rows:
            known = ", ".join(dict.fromkeys(" ".join(filter(None, key)) for key in self.groups))
            raise TargetError(f"nothing was measured of {kind} {layer}".rstrip() + f"; there are {known:.300}")
        return [(0.0, 0.0), *sorted((row.removed, row.rise) for row in rows)]

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the rows as CSV, and write them to a file if one is given."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([field.name for field in fields(Measured)])
        writer.writerows(astuple(row) for row in self.measured)
        if path is not None:
            try:
                with open(path, "w", encoding="utf-8", newline="") as file:
                    file.write(text.getvalue())
            except OSError as error:
                raise EcoSpaError(f"{path} cannot be written: {error.strerror or error}") from error
        return text.getvalue()

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the rise of the loss over the share that goes: a line for each kind, thin ones for its layers.

        Args:
            path: a file to write, `.png`, `.svg` or `.pdf`.

        Raises:
            EcoSpaError: matplotlib is not installed, or the file cannot be written.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            raise EcoSpaError("a plot needs matplotlib: pip install matplotlib") from None
        figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)  # draws into memory, without a display
        axes = figure.subplots()
        kinds = list(dict.fromkeys(kind for kind, _ in self.groups))
        for kind, layer in self.groups:
            points = self.curve(kind, layer)
            first = next(each for each in self.groups if each[0] == kind) == (kind, layer)
            axes.plot(
                [100 * share for share, _ in points], [rise for _, rise in points], marker="o", markersize=3.5,
                color=COLOURS[kinds.index(kind) % len(COLOURS)], linewidth=0.8 if layer else 1.8,
                alpha=0.5 if layer else 1.0, label=kind if first else None,
            )  # fmt: skip
        largest = max((row.rise for row in self.measured), default=1.0)
        axes.set_yscale("symlog", linthresh=max(largest / 50, 1e-6))
        axes.set_xlabel("entries removed, % of each coupling")
        axes.set_ylabel(f"rise of the loss, from {self.loss:.3g}")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        if path is not None:
            try:
                figure.savefig(path)
            except (OSError, ValueError) as error:
                raise EcoSpaError(f"{path} cannot be written: {error}") from error
        return figure

    @takes(target=NUMBER, model=optional(MODULE))
    def targets(
        self, target: float, *, cost: Cost | Latency = "parameters", model: nn.Module | None = None
    ) -> dict[str, float]:
        """Choose the share of each kind that remains, so that the whole model fits a limit; a target for a trainer.

        Kinds go on by one hundredth of their entries at a time, each time the one by which the measured loss rises
        least for what it saves, up to the largest share that was measured.

        Args:
            target: share of its original cost that may remain.
            cost: `"parameters"` or `"flops"`; or, of a compiled `model`, `"bytes"` or a `Latency`, as of a trainer.
            model: the model that was measured.

        Returns:
            Kind, or name of a coupling, -> share of the entries that remains: a `target=`. Kinds that stay whole are
            not in it.

        Raises:
            TargetError: the limit is out of range, or not reached within the shares that were measured.
        """
        if model is None and not (isinstance(cost, str) and cost in self.costs):
            known = ", ".join(map(repr, self.costs))
            raise TargetError(f"cost={cost!r} needs the model, compiled: pass model=. Without it there are {known}")
        return _Search(self, self.costs[str(cost)] if model is None else _sizes(model, cost)).run(target)

    def rows(self) -> list[tuple[str, list[float | None]]]:
        """Return (kind and layer, rise at each share) for each line of the table; None where no entry would go."""
        at = {(row.kind, row.layer, row.share): row.rise for row in self.measured}
        return [(" ".join(filter(None, key)), [at.get((*key, share)) for share in self.shares]) for key in self.groups]

    @property
    def headline(self) -> str:
        """The loss of the whole model, and the meaning of the table, in a line."""
        if self.loss == 0:
            return "half the squared distance from the results of the whole model, without a share of the entries"
        return f"loss {self.loss:.4g} of the whole model; its rise without a share of the entries"

    def part(self, kind: str, layer: str = "") -> float:
        """Return the share of the model's parameters that one hundredth of the entries of some couplings has."""
        row = next(row for row in self.measured if (row.kind, row.layer) == (kind, layer))
        return row.parameters / (100 * row.removed) / max(1, self.parameters)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, show_edge=False)
        table.add_column("", overflow="fold")
        table.add_column("1% is", justify="right", no_wrap=True)
        for share in self.shares:
            table.add_column(f"-{share:.0%}", justify="right", no_wrap=True)
        for (name, rises), key in zip(self.rows(), self.groups, strict=True):
            cells = ("" if rise is None else f"{rise:+.3g}" for rise in rises)
            table.add_row(Text(name), f"{self.part(*key):.2%} of all", *cells)
        return table

    def __rich__(self) -> Group:
        return Group(Text(self.headline), self._table())

    def __str__(self) -> str:
        return f"{self.headline}\n{plain(self._table())}"


class _Search:
    """A greedy search for shares under a limit."""

    def __init__(self, table: Sensitivity, sizes: CostModel | LatencyModel) -> None:
        self.groups, self.originals, self.sizes = table.groups, table.originals, sizes
        gone = [name for names in table.groups.values() for name in names if name not in sizes.sizes]
        if gone:
            raise TargetError(f"this model has no `{gone[0]}`: it is not the one that was measured")
        self.curves = {key: table.curve(*key) for key in table.groups}

    def run(self, target: float) -> dict[str, float]:
        """Return the shares that remain."""
        if not 0 < target <= 1:
            raise TargetError(f"target={target!r} is out of range; it is a share, above 0 and at most 1")
        limit = target * self.sizes.original
        gone = dict.fromkeys(self.groups, 0.0)
        saved = {key: self._saved(key, gone) for key in gone}  # by all of a group; it changes little as others go
        while (now := self._cost(gone)) > limit:
            best: tuple[float, tuple[str, str], float] | None = None
            for key, share in gone.items():
                for further in self._steps(key, share) if saved[key] > 0 else ():
                    price = max(0.0, self._rise(key, further) - self._rise(key, share)) / (further - share) / saved[key]
                    if best is None or price < best[0]:
                        best = price, key, further
            if best is None:
                least = now / self.sizes.original
                raise TargetError(
                    f"target={target:g} is out of reach: with the largest shares that were measured {least:.3g} "
                    "remains; measure with larger shares="
                )
            # One hundredth of the way that is cheapest on average, so that others have their turn.
            _, key, further = best
            gone[key] = min(further, round(gone[key] + STEP, 6))
            saved[key] = self._saved(key, gone)
        left: dict[str, float] = {}
        for key, share in gone.items():
            for names in ([name] for name in self.groups[key]) if key[1] else [list(self.groups[key])]:
                now, before = sum(self.sizes.sizes[n] for n in names), sum(self.originals[n] for n in names)
                if share > 0:
                    left[names[0] if key[1] else key[0]] = round((1 - share) * now / before, 6)
        return left

    def _steps(self, key: tuple[str, str], share: float) -> list[float]:
        """Return the shares that a kind may go on to: the next hundredth, and all further ones that were measured."""
        last = self.curves[key][-1][0]
        return [] if share >= last else [min(last, share + STEP), *(s for s, _ in self.curves[key] if s > share + STEP)]

    def _saved(self, key: tuple[str, str], gone: Mapping[tuple[str, str], float]) -> float:
        """Return the cost that goes with all entries of a group, by that of the largest share that was measured."""
        last = self.curves[key][-1][0]
        if gone[key] >= last:
            return 0.0
        return (self._cost(dict(gone)) - self._cost({**gone, key: last})) / (last - gone[key])

    def _rise(self, key: tuple[str, str], share: float) -> float:
        for (a, x), (b, y) in pairwise(self.curves[key]):
            if share <= b:
                return x + (y - x) * (share - a) / (b - a)
        return self.curves[key][-1][1]

    def _cost(self, gone: Mapping[tuple[str, str], float]) -> int:
        keeps: dict[str, int] = {}
        for key, share in gone.items():
            for name in self.groups[key]:
                keeps[name] = max(1, math.ceil(self.sizes.sizes[name] * (1 - share) - 1e-9))  # as a target counts
        return self.sizes.total(keeps)


@looks_inside
def _sizes(model: nn.Module, cost: Cost | Latency) -> CostModel | LatencyModel:
    if not isinstance(cost, Latency):
        return CostModel(model, state_of(model), cost)
    flops = CostModel(model, state_of(model), "flops")
    cost.observe(model, flops)
    return LatencyModel(flops, cost, couplings(model))
