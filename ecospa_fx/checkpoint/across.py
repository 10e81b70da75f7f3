"""Couplings across regions in a save: plain values, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ecospa_fx.errors import CheckpointError
from ecospa_fx.model.compiled import CompiledModel
from ecospa_fx.model.joint_offers import joint_offers
from ecospa_fx.passes.find.joint import Joint
from ecospa_fx.passes.ir.border import Border


def describe_across(compiled: CompiledModel) -> dict[str, Any]:
    """Describe the couplings across the regions of a model, and the edges that they cross, as plain values."""
    state = compiled.state
    if not state.joints:
        return {}
    known = compiled.captured
    offers = joint_offers(state, compiled.regions)
    withheld = {o.joint.name for o in offers if known and not o.supported()} | state.withheld
    return {
        "joints": [
            {
                "name": joint.name, "kind": joint.kind, "size": joint.size, "linear": joint.linear,
                "members": [list(member) for member in joint.members],
                "outside": [list(member) for member in joint.outside],
                "matrices": list(joint.matrices), "producers": list(joint.producers),
                "shapes": {name: list(shape) for name, shape in joint.shapes.items()},
                "aliases": dict(joint.aliases),
            }
            for joint in state.joints
        ],
        "borders": {
            name: [[*edge, *of] for edge, of in region.border.along().items() if of is not None]
            for name, region in compiled.regions.items()
            if region.border
        },
        "withheld": sorted(withheld),
    }  # fmt: skip


def joints_in(about: Mapping[str, Any], where: str) -> tuple[tuple[Joint, ...], dict[str, Border], frozenset[str]]:
    """Read what `describe_across` wrote: the couplings, the borders by region, and the names that were withheld.

    Raises:
        CheckpointError: it is malformed.
    """
    try:
        joints = tuple(
            Joint(
                str(each["name"]), each["kind"], int(each["size"]), bool(each["linear"]),
                tuple((str(name), int(dim)) for name, dim in each["members"]),
                tuple((str(name), int(dim)) for name, dim in each["outside"]),
                tuple(map(str, each["matrices"])), tuple(map(str, each["producers"])),
                {str(name): tuple(map(int, shape)) for name, shape in each["shapes"].items()},
                {str(name): str(of) for name, of in each["aliases"].items()},
            )
            for each in about.get("joints", ())
        )  # fmt: skip
        borders = {
            str(region): Border.of(
                {
                    (str(kind), int(which) if kind == "result" else str(which), int(dim)): (str(name), int(of))
                    for kind, which, dim, name, of in edges
                }
            )
            for region, edges in about.get("borders", {}).items()
        }
        withheld = frozenset(map(str, about.get("withheld", ())))
        firsts = {joint.members[0] for joint in joints}
        if any(of not in firsts for border in borders.values() for of in border.along().values()):
            raise ValueError("a region shrinks along a dim that no coupling has")
        return joints, borders, withheld
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{where}: `across` is malformed: {type(error).__name__}: {error}") from error
