"""Widths of a GGUF file: the number of units that stay, so that its metadata can describe its tensors.

choose_widths      layers that must be equal, key heads that need equal groups, multiples of a number
unsupported_marks  removed entries that the format needs
metadata           the numbers of units that stay
"""

from __future__ import annotations

import numpy as np

from ecospa_fx.errors import FormatError

from .files import Mask
from .units import Layers, Names, UnitRange, Units


def put_back(keep: Mask, count: int) -> Mask:
    """Keep `count` entries: the first of the removed ones are put back."""
    keep = keep.copy()
    keep[np.flatnonzero(~keep)[: max(0, count - int(keep.sum()))]] = True
    return keep


def choose_widths(names: Names, layers: Layers, *, per_layer: bool, round_to: int, heads: bool) -> list[str]:
    """Choose the units that stay, and give reasons for putting some back: unequal layers or groups of heads.

    Args:
        names: names of the file.
        layers: the units, whose `keep` is changed.
        per_layer: keep the width of each block.
        round_to: make feed-forward lengths multiples of this, or keep the original length.
        heads: cut heads.

    Raises:
        FormatError: heads are to be cut, and their slopes depend on their number.
    """
    slopes = names.key(names.gguf.Keys.Attention.MAX_ALIBI_BIAS)
    if heads and names.file.value(slopes):
        raise FormatError(
            f"{slopes} is set: each head has a slope by its position, so none can be cut; use heads=False"
        )
    reasons = []
    for key in dict.fromkeys(units.key for units in layers.feeds):
        feeds = [units for units in layers.feeds if units.key == key]
        separate = per_layer or isinstance(names.file.value(key), list)
        counts: dict[int, int] = {}
        for units in feeds:
            counts[units.block] = max(counts.get(units.block, 0), int(units.keep.sum()))
        most = max(counts.values())
        if not separate and min(counts.values()) < most:
            reasons.append(_unequal(key, min(counts.values()), most))
        for units in feeds:
            count = counts[units.block] if separate else most
            units.keep = put_back(units.keep, min(-(-count // round_to) * round_to, len(units.keep)))
    return reasons + _choose_heads(names, layers, per_layer, heads)


def _choose_heads(names: Names, layers: Layers, per_layer: bool, heads: bool) -> list[str]:
    reasons, grouped = [], {}
    for block, queries in layers.queries.items():
        kv = layers.keys[block]
        groups = queries.keep.reshape(len(kv.keep), -1)  # [key heads, query heads of each]
        if (groups.any(axis=1) & ~kv.keep).any():
            reasons.append(f"some {kv.what} are removed, but not the query heads that use them")
            kv.keep = kv.keep | groups.any(axis=1)
        if not heads:
            if not queries.keep.all():
                reasons.append(
                    f"{int((~queries.keep).sum())} of the {len(queries.keep)} {queries.what} are removed, which "
                    "heads=True cuts; some loaders derive more from their number (see docs/going-out.md)"
                )
            kv.keep, groups = np.ones_like(kv.keep), np.ones_like(groups)
        sizes = groups.sum(axis=1)[kv.keep]
        if sizes.min() < sizes.max():
            reasons.append(
                f"key heads of block {block} have {sizes.min()} to {sizes.max()} query heads, and the format has one "
                "number for all"
            )
        grouped[block] = groups, int(sizes.max())
    if not grouped:
        return reasons
    key = next(iter(layers.queries.values())).key
    separate = per_layer or isinstance(names.file.value(key), list)
    counts = {block: (int(layers.keys[block].keep.sum()), size) for block, (_, size) in grouped.items()}
    most = tuple(max(each) for each in zip(*counts.values(), strict=True))
    if not separate and set(counts.values()) != {most}:
        totals = [kv * size for kv, size in counts.values()]
        reasons.append(_unequal(key, min(totals), most[0] * most[1]))
    for block, (groups, _) in grouped.items():
        kv, queries = layers.keys[block], layers.queries[block]
        many, size = counts[block] if separate else most
        kv.keep = put_back(kv.keep, many)
        queries.keep = np.stack(
            [put_back(row, size) if stays else np.zeros_like(row) for row, stays in zip(groups, kv.keep, strict=True)]
        ).ravel()
    return reasons


def _unequal(key: str, least: int, most: int) -> str:
    return (
        f"layers keep {least} to {most} of {key}, and most loaders take one number for all (per_layer=True writes one "
        "per layer: docs/going-out.md lists the loaders that read it)"
    )


def metadata(names: Names, layers: Layers) -> dict[str, int | list[int]]:
    """Return the changed metadata: one number if all layers agree and the file has one, else one per layer.

    Raises:
        FormatError: the length of heads must be written, and differs between blocks.
    """
    changed: dict[str, int | list[int]] = {}
    for key in dict.fromkeys(units.key for units in layers.all()):
        before = names.values(key)
        if before is None:  # as many key heads as query heads, before and now
            continue
        counts: dict[int, int] = {}
        for units in layers.all():
            if units.key == key:
                counts[units.block] = max(counts.get(units.block, 0), int(units.keep.sum()))
        now = [counts.get(block, count) for block, count in enumerate(before)]
        listed = isinstance(names.file.value(key), list)
        if now != before:
            alike = len(set(counts.values())) == 1
            changed[key] = next(iter(counts.values())) if alike and not listed else now
    keys = names.gguf.Keys.Attention
    if names.key(keys.HEAD_COUNT) in changed:
        # If absent, loaders derive them from the number of heads, which has changed.
        for template, kinds in ((keys.KEY_LENGTH, layers.keys), (keys.VALUE_LENGTH, layers.queries)):
            key = names.key(template)
            lengths = {units.runs[0].size for units in kinds.values()}
            if names.file.value(key) is None:
                if len(lengths) > 1:
                    raise FormatError(
                        f"heads of different blocks have lengths {sorted(lengths)}, and {key} is one number"
                    )
                changed[key] = lengths.pop()
    return changed


def kept_axes(layers: Layers) -> dict[tuple[str, int], Mask]:
    """Return the mask of entries that stay, for each axis with units."""
    kept: dict[tuple[str, int], Mask] = {}
    for units in layers.all():
        for run in units.runs:
            mask = kept.setdefault((run.tensor.name, run.axis), np.ones(run.tensor.shape[run.axis], dtype=np.bool_))
            mask[run.start : run.start + run.units * run.size] = np.repeat(units.keep, run.size)
    return kept


def unsupported_marks(names: Names, layers: Layers) -> list[str]:
    """Give reasons for the marked entries outside of removed units, which the format needs."""
    reasons = []
    units_on: dict[tuple[str, int], list[tuple[Units, UnitRange]]] = {}
    for units in layers.all():
        for run in units.runs:
            units_on.setdefault((run.tensor.name, run.axis), []).append((units, run))
    for tensor in names.file.tensors.values():
        if not tensor.holes:
            continue
        rest, why = [], None
        for axis, removed in enumerate(tensor.removed):
            outside = removed.copy()
            for _, run in units_on.get((tensor.name, axis), ()):
                cut = np.logical_and.reduce([other.removed.all(axis=1) for other in _together(layers, run)])
                outside[run.start : run.start + run.units * run.size] &= ~np.repeat(cut, run.size)
                if outside[run.start : run.start + run.units * run.size].any():
                    kept = (~run.removed).sum(axis=1)[~cut]
                    why = (
                        f"`{tensor.name}`: heads keep {kept.min()} to {kept.max()} of {run.size} entries, and GGUF "
                        "has one length of heads for all layers, from which scale and rotary angles follow"
                        if run.size > 1
                        else f"`{tensor.name}` has lost {int(outside.sum())} of {len(outside)} entries that "
                        "other tensors have kept"
                    )
            rest.append(removed & ~outside)
            if why is None and outside.any():
                why = (
                    f"`{tensor.name}` has lost {int(outside.sum())} of {len(outside)} entries along dim {axis}, and "
                    "GGUF has no key for their number"
                )
        if why is None and tensor.marks(tensor.values(tuple(~removed for removed in rest))).any():
            why = f"`{tensor.name}` has lost single entries: experts that keep different rows, for example"
        if why is not None:
            reasons.append(why)
    return reasons


def _together(layers: Layers, run: UnitRange) -> list[UnitRange]:
    return next(units.runs for units in layers.all() if any(other is run for other in units.runs))


def check_other_tensors(names: Names, layers: Layers) -> None:
    """Check that no other tensor of a block has as many entries as the cut units and lost different ones.

    Raises:
        FormatError: there is such a tensor.
    """
    taken = {(run.tensor.name, run.axis) for units in layers.all() for run in units.runs}
    for units in layers.all():
        if units.keep.all():
            continue
        sizes = {run.units * run.size for run in units.runs} | {len(units.keep)}
        for tensor in names.file.tensors.values():
            for axis, removed in enumerate(tensor.removed):
                inside = tensor.name.startswith(f"blk.{units.block}.") and (tensor.name, axis) not in taken
                if inside and removed.any() and len(removed) in sizes and not names.of_embedding(removed):
                    raise FormatError(
                        f"`{tensor.name}` has lost {int(removed.sum())} of {len(removed)} entries, not those of the "
                        f"{units.what}, although it may need the same width; cut_gguf does not know this tensor"
                    )
