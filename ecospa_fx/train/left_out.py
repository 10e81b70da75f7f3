"""LeftOut: the couplings that a sparsification step leaves out because nothing is known of them, and the reasons."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import NoCouplingError
from ecospa_fx.logs import logger
from ecospa_fx.model.lookup import couplings, regions_of, state_of
from ecospa_fx.model.own_memory import held_together
from ecospa_fx.score.estimator import CoupledEstimator
from ecospa_fx.score.judging import frozen_names

from .offered import ELSEWHERE
from .sparsifier import CoupledSparsifier

FROZEN = "its weights are frozen (requires_grad=False), so that no gradient says what they are worth"
PARTLY_FROZEN = "some of its weights are frozen (requires_grad=False), so that gradients say what a part of it is worth"
FROZEN_ALL = (
    "every weight on a coupling is frozen (requires_grad=False), so that no gradient says what they are worth; let "
    'some train, or judge them by something else: score="magnitude" and score="activation" need no gradients'
)
UNKNOWN = "the score says nothing of it"

WAY_OUT = (
    'Let them train, or judge them by something else: score="magnitude" and score="activation" need no gradients; '
    "frozen=[...] keeps them whole without this warning"
)


class LeftOut:
    """The couplings that were left out, said once each.

    Attributes:
        reasons: coupling name -> the reason, at the last sparsification step.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self._said: set[str] = set()

    def note(self, model: nn.Module, importance: Mapping[str, float], whole: Collection[str]) -> None:
        """Take note of the couplings without an importance.

        Args:
            model: the model.
            importance: coupling name -> its score, for those that were judged.
            whole: names of the couplings that stay whole by a setting.
        """
        frozen = frozen_names(model)
        self.reasons = {
            coupling.name: _reason(coupling, frozen)
            for coupling in couplings(model)
            if coupling.size and coupling.name not in importance and coupling.name not in whole
        }
        self.reasons |= dict.fromkeys(sorted(state_of(model).state.elsewhere), ELSEWHERE)
        self._said |= state_of(model).state.elsewhere  # where they were found
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            if name not in self._said:
                by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            self._said.update(names)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            listed = ", ".join(f"`{name}`" for name in names[:3])
            logger("shrink").warning("%s%s left out: %s. %s", listed, more, reason, WAY_OUT)


def all_frozen(model: nn.Module, estimators: Sequence[CoupledEstimator]) -> bool:
    """Decide whether an estimator reads gradients, and no coupling has a weight that trains."""
    if not any(estimator.reader.learns for estimator in estimators):
        return False
    frozen = frozen_names(model)
    matrices = [member.parameter in frozen for c in couplings(model) for member in c.members if member.matrix]
    return bool(matrices) and all(matrices)


def check_offered(model: nn.Module) -> None:
    """Refuse a sparsification step of a model without couplings.

    Raises:
        NoCouplingError: each of them is withdrawn, by a call of the model that needs its axis whole or by weights that
            lie in one buffer.
    """
    if not couplings(model):
        if together := held_together(model):
            raise NoCouplingError(f"no coupling of {type(model).__name__} can shrink: {together}")
        refusals = [str(refusal) for region in regions_of(model).values() for refusal in region.offers.refusals()]
        raise NoCouplingError(
            f"no coupling of {type(model).__name__} is left to shrink: a call of the model, in another mode or with "
            f"other arguments than the first, needs their axes whole{': ' if refusals else ''}{'; '.join(refusals[:3])}"
        )


def say_if_short(sparsifier: CoupledSparsifier) -> None:
    """Say so where no coupling can lose another entry, and the target is not reached: some have been withdrawn."""
    sizes = sparsifier.sizes()
    left, target = sizes.total({}), sparsifier.target_size(sizes)
    if left > target and not sparsifier.shrinkable():
        logger("shrink").warning(
            "the target is %s and %s are left, but no coupling can lose another entry: calls of the model since the "
            "start need the others whole",
            f"{target:,}", f"{left:,}",
        )  # fmt: skip


def _reason(coupling: Coupling, frozen: Collection[str]) -> str:
    matrices = [member.parameter in frozen for member in coupling.members if member.matrix]
    return FROZEN if all(matrices) else PARTLY_FROZEN if any(matrices) else UNKNOWN
