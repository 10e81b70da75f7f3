"""Flow: the share of what flows along couplings that a shrink removes.

An entry lets flow what it adds to a sum: the norm of its activation times that of its weights, squared (see
`activations.py`). In a model trained for long a few entries carry most of it, and a rule that looks at weights alone
may remove these first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.logs import logger
from ecospa_fx.model.lookup import compiled_state, couplings, regions_of
from ecospa_fx.model.observers import still_watching
from ecospa_fx.score.activations import ActivationScores

MUCH = 0.2
"""Share of what flows along a coupling above which its removal is worth a warning, unless it is in proportion."""
IN_PROPORTION = 2.0
"""Share of what flows, as a multiple of the share of entries, that is no surprise."""


class _Shortly(ActivationScores):
    """Activations of the forwards right before a shrink."""

    active = False

    def wants(self, module: nn.Module) -> bool:
        """Return whether a shrink comes next; never in compiled code, which would be compiled anew for it."""
        # In this order: torch.compile guards what comes before the answer.
        return not torch.compiler.is_compiling() and self.active and super().wants(module)


class Flow:
    """Reads activations in the training step before a shrink, where a graph runs that they can be read from.

    Args:
        model: a compiled model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._scores: _Shortly | None = None

    @property
    def watching(self) -> bool:
        """True while the next step is read."""
        return self._scores is not None and self._scores.active

    def watch(self, soon: bool) -> None:
        """Read the next step, or not.

        Args:
            soon: whether a shrink may come with it.
        """
        self._scores = still_watching(self._scores, self.model)
        if self._scores is None and regions_of(self.model) and compiled_state(self.model).execution != "module":
            self._scores = _Shortly(self.model)
        if self._scores is not None:
            if soon and not self._scores.active:
                self._scores.reset()
            self._scores.active = soon

    def shares(self, keeps: Mapping[Coupling, Tensor]) -> dict[str, float]:
        """Compute the share of what flows that goes, by name of each coupling of which that is known.

        Args:
            keeps: coupling -> entries to keep.
        """
        if self._scores is None:
            return {}
        shares: dict[str, float] = {}
        with self._scores.at_once():
            for coupling in couplings(self.model):
                keep = keeps.get(coupling)
                scores = None if keep is None else self._scores.entries(coupling, by_context=keep.ndim == 2)
                total = 0.0 if scores is None else float(scores.square().sum())
                if keep is not None and scores is not None and 0 < total < float("inf"):
                    shares[coupling.name] = max(0.0, 1.0 - float(scores.gather(-1, keep).square().sum()) / total)
        return shares

    def detach(self) -> None:
        """Stop reading."""
        if self._scores is not None:
            self._scores.detach()
            self._scores = None


def warn_of_flow(
    shares: Mapping[str, float], keeps: Mapping[Coupling, Tensor], step: int, described: Mapping[str, str]
) -> None:
    """Say so where what goes carries much of what flows, and far more than its share of the entries.

    Args:
        shares: coupling name -> share of what flows that goes.
        keeps: coupling -> entries to keep.
        step: the training step.
        described: names of the rule and the scores by which entries go, see `Policy.described`.
    """
    gone = {coupling: 1.0 - keep.shape[-1] / coupling.size for coupling, keep in keeps.items()}
    much = sorted(
        (
            (shares[coupling.name], coupling)
            for coupling, entries in gone.items()
            if shares.get(coupling.name, 0.0) > max(MUCH, IN_PROPORTION * entries)
        ),
        key=lambda pair: (-pair[0], pair[1].name),
    )
    if not much:
        return
    share, coupling = much[0]
    more = f", and {len(much) - 1} more couplings lose as much out of proportion" if len(much) > 1 else ""
    order = described["index_score"]
    advice = (
        f'index_score={order!r} does not see that: index_score="taylor_positions" does, and so does policy="adaptive"'
    )
    if described["policy"] == "adaptive" or order == "taylor_positions":
        advice = "by what was read of the loss at each position, it depends less on them than that says"
    logger("shrink").warning(
        "step %d: the %d of %d entries that `%s` loses carry %.0f%% of what flows there%s; %s",
        step, coupling.size - keeps[coupling].shape[-1], coupling.size, coupling.name, 100 * share, more, advice,
    )  # fmt: skip
