"""Targets: the share that remains, of a cost or of the entries of each kind of coupling.

0.5                              half of the cost
{"ffn": 0.5, "heads": 0.75}      half of the hidden units of all FFNs together, three quarters of the heads
{"*.layers.0.*": 1, "ffn": 0.5}  by the names of couplings, as patterns; the first that fits counts, and before kinds
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, get_args

from ecospa_fx.arguments import shown
from ecospa_fx.couple.constraints import fits_name
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import TargetError
from ecospa_fx.model.cost import CostModel
from ecospa_fx.passes.find.discover import Kind

from .latency import LatencyModel

Target: TypeAlias = float | Mapping[str, float]


class EntryCounts:
    """The interface of `CostModel` in entries of some couplings.

    Args:
        couplings: the couplings.

    Attributes:
        sizes: coupling name -> entries now.
        original: entries before any shrink.
        prunable: the same.
    """

    def __init__(self, couplings: Sequence[Coupling]) -> None:
        self.sizes = {coupling.name: coupling.size for coupling in couplings}
        self.original = self.prunable = sum(coupling.original_size for coupling in couplings)

    def total(self, sizes: Mapping[str, int]) -> int:
        """Return the entries with couplings at `sizes`; those not named stay as they are."""
        return sum({**self.sizes, **{name: size for name, size in sizes.items() if name in self.sizes}}.values())


AnyCost: TypeAlias = CostModel | LatencyModel | EntryCounts


def check_target(target: object) -> None:
    """Refuse a target that is no share, nor a mapping of such.

    Raises:
        TargetError: naming the value.
    """
    shares = dict(target) if isinstance(target, Mapping) else {"": target}
    if not shares:
        raise TargetError("target={} names nothing that shrinks; pass a share of each kind, such as {'ffn': 0.5}")
    for key, share in shares.items():
        where = f"target[{key!r}]" if isinstance(target, Mapping) else "target"
        if not isinstance(key, str):
            raise TargetError(f"target has the key {shown(key)}; keys are kinds, or patterns of names of couplings")
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise TargetError(f"{where}={share!r} is out of range; it is a share, above 0 and at most 1")


def at_once(target: Target, part: float) -> Target:
    """Return the target of a part of the way, each share to that power: after all parts it is reached."""
    return {key: share**part for key, share in target.items()} if isinstance(target, Mapping) else target**part


def grouped(target: Mapping[str, float], couplings: Sequence[Coupling]) -> dict[str, list[Coupling]]:
    """Return the couplings that each key of a target means; those of none are left out.

    Raises:
        TargetError: a key is neither a kind of coupling that the model has, nor fits a name.
    """
    here = sorted({coupling.kind for coupling in couplings})
    kinds = [key for key in target if key in get_args(Kind)]
    patterns = [key for key in target if key not in kinds]
    for key in target:
        fits = any(c.kind == key for c in couplings) if key in kinds else any(fits_name(key, c) for c in couplings)
        if not fits:
            what = "is a kind of coupling that it does not have" if key in kinds else "is no kind, and fits no name"
            raise TargetError(
                f"target names {key!r}, which {what}: the kinds of this model are {', '.join(here)}, and "
                "ecospa_fx.couplings(model) lists the names"
            )
    groups: dict[str, list[Coupling]] = {key: [] for key in target}
    for coupling in couplings:
        key = next((each for each in patterns if fits_name(each, coupling)), coupling.kind)
        if key in groups:
            groups[key].append(coupling)
    return {key: group for key, group in groups.items() if group}
