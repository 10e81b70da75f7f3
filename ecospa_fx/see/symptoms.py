"""Signs that shrinking goes wrong: the failures of the paper (arXiv 2511.11641), seen and said.

the loss stays up after a shrink      spike
one layer is all but gone             collapse
widths that run no faster             width
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Literal

from torch import nn

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.train.loss_spikes import LossSpikes

COLLAPSED = 0.1
"""Share of its entries at which a coupling may have collapsed, if the others have kept much more."""

APART = 4
"""How many times as much of it the median coupling then has."""

SymptomKind = Literal["spike", "collapse", "width"]


@dataclass(frozen=True)
class Symptom:
    """Something a person should look at.

    Attributes:
        kind: `"spike"`, `"collapse"` or `"width"`.
        step: training step it was seen at.
        about: the coupling or weight; empty where it is the model.
        text: what it is, with the numbers, and what to do.
    """

    kind: SymptomKind
    step: int
    about: str
    text: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.text}"


def spike(spikes: LossSpikes, step: int, shrunk_at: int, waits: bool) -> Symptom | None:
    """The loss has not got over the last shrink.

    Args:
        spikes: has seen the losses and the shrink.
        step: now.
        shrunk_at: step of that shrink.
        waits: the trainer is told the loss too, and waits with the next one.
    """
    if not spikes.spiking or spikes.before is None or spikes.level is None:
        return None
    way = "the next one waits for it" if waits else "trainer.step(loss=loss) lets the next one wait for it"
    rise = f", {spikes.level / spikes.before - 1:.0%} above" if spikes.before > 0 else ", above"
    text = (
        f"the loss is {spikes.level:.4g}{rise} the {spikes.before:.4g} before the shrink at step {shrunk_at}; {way}. "
        "If it does not come down, shrink less at a time: a larger theta, a smaller top_k, more steps between"
    )
    return Symptom("spike", step, "", text)


def collapses(couplings: Iterable[Coupling], step: int, said: Collection[str] = ()) -> list[Symptom]:
    """Couplings that have lost almost all, while the others have not.

    Args:
        couplings: at their sizes now.
        step: now.
        said: names of those that need not be said again.
    """
    shares = {c: c.size / c.original_size for c in couplings}
    middle = median(shares.values()) if shares else 0.0
    return [
        Symptom(
            "collapse",
            step,
            coupling.name,
            f"`{coupling.name}` has {coupling.size} of {coupling.original_size} entries left ({share:.1%}), the median "
            f"coupling {middle:.0%}: its layer takes hardly part any more. min_keep= or frozen= keeps more of it",
        )
        for coupling, share in shares.items()
        if share <= COLLAPSED and share * APART <= middle and coupling.name not in said
    ]


def odd_widths(model: nn.Module, couplings: Iterable[Coupling], step: int, multiple: int) -> Symptom | None:
    """Widths that have shrunk to what the hardware does not like.

    Args:
        model: whose weights they are.
        couplings: at their sizes now.
        step: now.
        multiple: what the hardware does like: of 8 entries, as a rule, with tensor cores and 16 bits.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    changed = [c for c in couplings if c.size != c.original_size]
    sizes = {(m.parameter, m.dim): parameters[m.parameter].shape[m.dim] for c in changed for m in c.members if m.matrix}
    odd = {name: size for (name, _), size in sizes.items() if size % multiple}
    if not odd:
        return None
    name, size = next(iter(odd.items()))
    text = (
        f"{len(odd)} of {len(sizes)} widths that have shrunk are no multiples of {multiple}, such as {size} of "
        f"`{name}`: they may run no faster than {size + -size % multiple}. round_to={multiple} keeps multiples"
    )
    return Symptom("width", step, name, text)
