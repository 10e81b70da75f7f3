"""Widths: how much of each unit of a GGUF file stays, so that what its metadata can say is what its tensors are.

settle     layers that must be alike, key heads that must have as many heads each, multiples of a number
left_over  what is gone and the format cannot do without
metadata   the numbers that say what stays
"""

from __future__ import annotations

import numpy as np

from ecospa_fx.errors import FormatError

from .files import Mask
from .units import Layers, Names, UnitRange, Units


def put_back(keep: Mask, count: int) -> Mask:
    """As many as asked for: the first of those that are gone stay too."""
    keep = keep.copy()
    keep[np.flatnonzero(~keep)[: max(0, count - int(keep.sum()))]] = True
    return keep


def settle(names: Names, layers: Layers, *, per_layer: bool, round_to: int, heads: bool) -> list[str]:
    """Choose what stays, and say what cannot go although it is gone: unequal layers, or key heads with unequal groups.

    Args:
        names: of the file.
        layers: their `keep` is changed.
        per_layer: each block has the widths that are left in it.
        round_to: feed-forward lengths are multiples of this, or as before.
        heads: whether heads go.

    Raises:
        FormatError: heads should go, and their slopes follow from how many there are.
    """
    slopes = names.key(names.gguf.Keys.Attention.MAX_ALIBI_BIAS)
    if heads and names.file.value(slopes):
        raise FormatError(f"{slopes} is set: each head has a slope by its number, so that none can go; use heads=False")
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
    return reasons + _settle_heads(names, layers, per_layer, heads)


def _settle_heads(names: Names, layers: Layers, per_layer: bool, heads: bool) -> list[str]:
    reasons, grouped = [], {}
    for block, queries in layers.queries.items():
        kv = layers.keys[block]
        asked = queries.keep.reshape(len(kv.keep), -1)  # [key heads, query heads of each]
        if (asked.any(axis=1) & ~kv.keep).any():
            reasons.append(f"some {kv.what} are gone, and not the heads that ask for them")
            kv.keep = kv.keep | asked.any(axis=1)
        if not heads:
            if not queries.keep.all():
                reasons.append(
                    f"{int((~queries.keep).sum())} of the {len(queries.keep)} {queries.what} are gone, which "
                    "heads=True cuts: some loaders derive more from their number (see docs/going-out.md)"
                )
            kv.keep, asked = np.ones_like(kv.keep), np.ones_like(asked)
        sizes = asked.sum(axis=1)[kv.keep]
        if sizes.min() < sizes.max():
            reasons.append(
                f"key heads of block {block} have {sizes.min()} to {sizes.max()} query heads, and the format gives all "
                "as many"
            )
        grouped[block] = asked, int(sizes.max())
    if not grouped:
        return reasons
    key = next(iter(layers.queries.values())).key
    separate = per_layer or isinstance(names.file.value(key), list)
    counts = {block: (int(layers.keys[block].keep.sum()), size) for block, (_, size) in grouped.items()}
    most = tuple(max(each) for each in zip(*counts.values(), strict=True))
    if not separate and set(counts.values()) != {most}:
        totals = [kv * size for kv, size in counts.values()]
        reasons.append(_unequal(key, min(totals), most[0] * most[1]))
    for block, (asked, _) in grouped.items():
        kv, queries = layers.keys[block], layers.queries[block]
        many, size = counts[block] if separate else most
        kv.keep = put_back(kv.keep, many)
        queries.keep = np.stack(
            [put_back(row, size) if stays else np.zeros_like(row) for row, stays in zip(asked, kv.keep, strict=True)]
        ).ravel()
    return reasons


def _unequal(key: str, least: int, most: int) -> str:
    return (
        f"layers keep {least} to {most} of {key}, and one number for all is what most loaders take (per_layer=True "
        "writes one for each: see docs/going-out.md for those that read it)"
    )


def metadata(names: Names, layers: Layers) -> dict[str, int | list[int]]:
    """What of the metadata changes: a number where all layers agree and the file has one, else one for each layer.

    Raises:
        FormatError: the length of heads would have to be said, and is not the same in all blocks.
    """
    changed: dict[str, int | list[int]] = {}
    for key in dict.fromkeys(units.key for units in layers.all()):
        before = names.values(key)
        if before is None:  # as many key heads as heads, then and now
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
        # Absent, they are derived from the number of heads, which is another one now.
        for template, kinds in ((keys.KEY_LENGTH, layers.keys), (keys.VALUE_LENGTH, layers.queries)):
            key = names.key(template)
            lengths = {units.runs[0].size for units in kinds.values()}
            if names.file.value(key) is None:
                if len(lengths) > 1:
                    raise FormatError(f"heads are {sorted(lengths)} long in different blocks, and {key} is one number")
                changed[key] = lengths.pop()
    return changed


def kept_axes(layers: Layers) -> dict[tuple[str, int], Mask]:
    """What stays of each axis on which units lie."""
    kept: dict[tuple[str, int], Mask] = {}
    for units in layers.all():
        for run in units.runs:
            mask = kept.setdefault((run.tensor.name, run.axis), np.ones(run.tensor.shape[run.axis], dtype=np.bool_))
            mask[run.start : run.start + run.units * run.size] = np.repeat(units.keep, run.size)
    return kept


def left_over(names: Names, layers: Layers) -> list[str]:
    """What is marked and lies on no unit that is gone as a whole: why the format cannot do without it."""
    reasons = []
    on: dict[tuple[str, int], list[tuple[Units, UnitRange]]] = {}
    for units in layers.all():
        for run in units.runs:
            on.setdefault((run.tensor.name, run.axis), []).append((units, run))
    for tensor in names.file.tensors.values():
        if not tensor.holes:
            continue
        rest, why = [], None
        for axis, gone in enumerate(tensor.gone):
            free = gone.copy()
            for _, run in on.get((tensor.name, axis), ()):
                whole = np.logical_and.reduce([other.gone.all(axis=1) for other in _together(layers, run)])
                free[run.start : run.start + run.units * run.size] &= ~np.repeat(whole, run.size)
                if free[run.start : run.start + run.units * run.size].any():
                    kept = (~run.gone).sum(axis=1)[~whole]
                    why = (
                        f"`{tensor.name}`: heads keep {kept.min()} to {kept.max()} of {run.size} entries, and GGUF "
                        "knows one length of heads for all layers, from which scale and rotary angles follow"
                        if run.size > 1
                        else f"`{tensor.name}` has lost {int(free.sum())} of {len(free)} entries that others have not"
                    )
            rest.append(gone & ~free)
            if why is None and free.any():
                why = (
                    f"`{tensor.name}` has lost {int(free.sum())} of {len(free)} entries along dim {axis}, and GGUF has "
                    "no name for their number"
                )
        if why is None and tensor.marks(tensor.values(tuple(~gone for gone in rest))).any():
            why = f"`{tensor.name}` has lost single entries: experts that keep other rows each, say"
        if why is not None:
            reasons.append(why)
    return reasons


def _together(layers: Layers, run: UnitRange) -> list[UnitRange]:
    return next(units.runs for units in layers.all() if any(other is run for other in units.runs))


def check_followed(names: Names, layers: Layers) -> None:
    """Refuse to cut units where another tensor of their block has as many entries and lost others.

    Raises:
        FormatError: there is one.
    """
    taken = {(run.tensor.name, run.axis) for units in layers.all() for run in units.runs}
    for units in layers.all():
        if units.keep.all():
            continue
        sizes = {run.units * run.size for run in units.runs} | {len(units.keep)}
        for tensor in names.file.tensors.values():
            for axis, gone in enumerate(tensor.gone):
                inside = tensor.name.startswith(f"blk.{units.block}.") and (tensor.name, axis) not in taken
                if inside and gone.any() and len(gone) in sizes and not names.of_embedding(gone):
                    raise FormatError(
                        f"`{tensor.name}` has lost {int(gone.sum())} of {len(gone)} entries, others than the "
                        f"{units.what}, and may have to be as wide as these; it is not known how to cut it"
                    )
