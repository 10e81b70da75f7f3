"""The residual stream against FFN and attention: which entries go, at equal parameters.

PYTHONPATH=bench python -m experiments.residual [--seeds 3] [--steps 480] [--scale gpu]

A small GPT-2 on source text, its head untied, loses 40% of its parameters in five shrinks, early (25-65% of the run) or
late (70-90%), by the paper's rule and by the adaptive policy:

inside       hidden units and attention only
residual     the residual stream only
all          both

And in one stroke at the end, 20 and 30% of the entries of the stream, with no training after: `removed` (by the least
mean square of what norms return, times the squares of what reads it), with `norms` (their weights take over),
`absorbed` (all weights do), `rotated` (principal components), and that with both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS
from torch import Tensor, nn

import ecospa_fx
from experiments.results import arguments, dots, over_dense_table, run, show
from experiments.runs import Job, Training, Variant, row_of
from experiments.tasks import Text

WHEN = {"early": (0.25, 0.65), "late": (0.7, 0.9)}
INSIDE = ("*ffn*", "*qk*", "*vo*", "*heads*")
FROZEN = {"inside": ("*residual*",), "residual": INSIDE, "all": ()}
CALLS = 16
"""Batches that are read before one stroke."""


@dataclass(frozen=True)
class Untied(Text):
    """Its head is a weight of its own, as a rotation needs it."""

    def model(self) -> nn.Module:
        model: Any = super().model()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        return model


class NormsOnly:
    """Statistics of which only the part for norms is used."""

    def __init__(self, grams: ecospa_fx.Grams) -> None:
        self.absorbed = grams._norms.absorbed


def one_stroke(
    job: Job, variant: Variant, start: Training, batches: Sequence[Any], rows: Sequence[Mapping[str, Any]],
    place: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Remove entries of the stream of the trained model."""
    model: Any = start.model.eval()
    (coupling,) = [c for c in ecospa_fx.couplings(model) if c.kind == "residual"]
    keep = coupling.size - round(variant.settings["share"] * coupling.size)
    with ecospa_fx.Grams(model) as grams, torch.no_grad():
        for x, _ in batches[:CALLS]:
            model(x)
    if "rotated" in variant.name:
        done = ecospa_fx.rotate(model, [coupling], grams=grams)
        assert done.energy, str(done)
        entries = torch.arange(keep)
    else:
        entries = weights_of(model, coupling, grams).topk(keep).indices.sort().values
    absorb: Any = NormsOnly(grams) if "norms" in variant.name else grams if "absorbed" in variant.name else None
    ecospa_fx.shrink(model, {coupling.name: entries}, absorb=absorb)
    return row_of(job, start, variant.name, variant.labels)


def weights_of(model: nn.Module, coupling: ecospa_fx.Coupling, grams: ecospa_fx.Grams) -> Tensor:
    """Mean squares of each entry where it is read, times the squares of what reads it."""
    squares = torch.zeros(coupling.size)
    for member in coupling.members:
        absorber = grams._absorbers.found.get((member.parameter, member.dim))
        read = None if absorber is None else grams._grams.get(absorber.gram)
        if read is not None:
            columns = model.get_parameter(member.parameter).detach().square().movedim(member.dim, -1).flatten(0, -2)
            squares += read.moments.squares.diagonal() / read.moments.count * columns.sum(0)
    return squares


def variants() -> tuple[Variant, ...]:
    """All runs of one seed."""
    found = []
    for when, (begin, end) in WHEN.items():
        for where, frozen in FROZEN.items():
            for policy in ("paper", "adaptive"):
                settings = {"target": 0.6, "frozen": frozen, "policy": policy}
                labels = {"when": when, "removed": "40%"}
                found.append(Variant(f"{where}, {policy}", begin, end, settings, shrinks=5, labels=labels))
    for share in (0.2, 0.3):
        for name in ("removed", "norms", "absorbed", "rotated", "rotated, norms", "rotated, absorbed"):
            labels = {"when": "one stroke", "removed": f"{share:.0%} of the stream"}
            found.append(Variant(name, 1.0, None, {"share": share}, labels=labels, own=one_stroke))
    return tuple(found)


def main() -> None:
    options = arguments(__doc__, steps=480)
    text = Untied.of(options.scale)
    jobs = [Job("source text", text, options.steps, seed, variants(), regions="root") for seed in range(options.seeds)]
    rows = run("residual", jobs, options)
    for row in rows:
        row["panel"] = f"{row.get('removed')} removed, {row.get('when')}"
    show(
        f"{options.steps} steps, {options.seeds} seeds; loss in nats per byte",
        over_dense_table(rows, "when", "removed", "variant", also=("parameters", "seconds")),
    )
    removed = [row for row in rows if row["variant"] != "dense"]
    dots(removed, RESULTS / "residual.png", "panel", "variant", title="final loss over dense")


if __name__ == "__main__":
    main()
