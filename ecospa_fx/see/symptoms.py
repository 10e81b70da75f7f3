"""Symptoms of shrinking gone wrong: the failures that the paper names (arXiv 2511.11641), found while training.

spike      the loss stays up after a shrink
collapse   one layer has lost almost all of its entries
width      widths that run no faster on this hardware
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Literal

from torch import nn

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.passes.graph.tensors import parameters_of
from ecospa_fx.train.loss_spikes import LossSpikes

COLLAPSED = 0.1
"""Remaining share of its entries at which a coupling counts as collapsed, if the others have kept much more."""

APART = 4
"""Factor by which the share of the median coupling must be larger then."""

SymptomKind = Literal["spike", "collapse", "width"]


@dataclass(frozen=True)
class Symptom:
    """A warning that a person should look at.

    Attributes:
        kind: `"spike"`, `"collapse"` or `"width"`.
        step: training step at which it was found.
        about: name of the coupling or weight; empty for the model.
        text: the trouble, with the numbers, and the way out.
    """

    kind: SymptomKind
    step: int
    about: str
    text: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.text}"


def spike(spikes: LossSpikes, step: int, shrunk_at: int, waits: bool) -> Symptom | None:
    """Check whether the loss has recovered from the last shrink; None if it has.

    Args:
        spikes: the losses and shrinks so far.
        step: the step now.
        shrunk_at: step of the last shrink.
        waits: the trainer gets the loss too, and postpones the next shrink.
    """
    if not spikes.spiking or spikes.before is None or spikes.level is None:
        return None
    way = "the next shrink waits for it" if waits else "with trainer.step(loss=loss) the next shrink would wait for it"
    rise = f", {spikes.level / spikes.before - 1:.0%} above" if spikes.before > 0 else ", above"
    text = (
        f"the loss is {spikes.level:.4g}{rise} the {spikes.before:.4g} before the shrink at step {shrunk_at}; {way}. "
        "If it does not come down, shrink less at a time: a larger theta, a smaller top_k, a longer interval"
    )
    return Symptom("spike", step, "", text)


def collapses(couplings: Iterable[Coupling], step: int, reported: Collection[str] = ()) -> list[Symptom]:
    """Find couplings that have lost almost all entries, while the others have not.

    Args:
        couplings: the couplings at their sizes now.
        step: the step now.
        reported: names of couplings that were reported before.
    """
    shares = {c: c.size / c.original_size for c in couplings}
    middle = median(shares.values()) if shares else 0.0
    return [
        Symptom(
            "collapse",
            step,
            coupling.name,
            f"`{coupling.name}` has {coupling.size} of {coupling.original_size} entries left ({share:.1%}), the median "
            f"coupling {middle:.0%}: its layer contributes almost nothing. min_keep= or frozen= keeps more of it",
        )
        for coupling, share in shares.items()
        if share <= COLLAPSED and share * APART <= middle and coupling.name not in reported
    ]


def odd_widths(model: nn.Module, couplings: Iterable[Coupling], step: int, multiple: int) -> Symptom | None:
    """Find widths that have shrunk to sizes which run slowly on the hardware.

    Args:
        model: the model that has the weights.
        couplings: the couplings at their sizes now.
        step: the step now.
        multiple: number that widths should be multiples of: 8 as a rule, for tensor cores with 16 bits.
    """
    parameters = dict(parameters_of(model, remove_duplicate=False))
    changed = [c for c in couplings if c.size != c.original_size]
    sizes = {(m.parameter, m.dim): parameters[m.parameter].shape[m.dim] for c in changed for m in c.members if m.matrix}
    odd = {name: size for (name, _), size in sizes.items() if size % multiple}
    if not odd:
        return None
    name, size = next(iter(odd.items()))
    text = (
        f"{len(odd)} of {len(sizes)} widths that have shrunk are not multiples of {multiple}, such as {size} of "
        f"`{name}`: they may run no faster than {size + -size % multiple}. round_to={multiple} keeps multiples"
    )
    return Symptom("width", step, name, text)
