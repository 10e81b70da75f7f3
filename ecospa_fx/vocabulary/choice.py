"""Choice: which tokens stay, from a list of them or from texts, closed over what they are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ecospa_fx.errors import ShrinkError

from .pieces import Pieces


@dataclass(frozen=True)
class Choice:
    """The tokens that stay.

    Attributes:
        kept: their ids, in order.
        asked: how many of them were asked for, or occur in the texts.
        notes: what a person should know about it.
    """

    kept: tuple[int, ...]
    asked: int
    notes: tuple[str, ...] = ()


def chosen(
    pieces: Pieces, keep: Iterable[int], counts: Mapping[int, int] | None, required: Iterable[int], size: int | None
) -> Choice:
    """Choose tokens.

    Args:
        pieces: those of the tokenizer.
        keep: ids that stay.
        counts: id -> how often it occurs in the texts; None without texts.
        required: ids that the model or the tokenizer cannot lose, beside those that `pieces` knows.
        size: how many stay; None for as many as are asked for.

    Raises:
        ShrinkError: more must stay than that.
    """
    wanted, notes = set(keep), []
    stay = _closed(pieces, {*pieces.required, *required} & pieces.tokens.keys())
    bare = len(stay)
    stay |= _closed(pieces, wanted)
    if size is not None and len(stay) > size:
        raise ShrinkError(
            f"size={size:,}, and {len(stay):,} tokens must stay: {bare:,} special, added and byte tokens, and the "
            f"{len(wanted):,} of keep= with what they are made of; choose a larger size"
        )
    if size is not None and size > len(pieces):
        raise ShrinkError(f"size={size:,}, and the tokenizer has {len(pieces):,} tokens")
    used = {i for i, count in (counts or {}).items() if count and i in pieces.tokens}
    if counts is not None:
        whole = stay | pieces.characters
        if size is None or len(whole) <= size // 2:
            stay = whole
        elif pieces.characters - used - stay:
            notes.append(
                f"{len(pieces.characters - used - stay):,} single characters that the texts do not hold have no place "
                "by right, since all of them would take more than half; a text with one that is gone becomes unknown"
            )
        order = _by_use(pieces, used, counts)
        for number in order:
            more = {number, *pieces.way(number)} - stay
            if size is None or len(stay) + len(more) <= size:
                stay |= more
        lost = used - stay
        if lost:
            total = sum(counts[i] for i in used)
            share = sum(counts[i] for i in lost) / total
            notes.append(f"{len(lost):,} tokens of the texts are gone; they were {share:.2%} of these")
    if size is not None:
        for number in sorted(pieces.tokens):
            if len(stay) == size:
                break
            more = {number, *pieces.way(number)} - stay
            if len(stay) + len(more) <= size:
                stay |= more
    return Choice(tuple(sorted(stay)), len((wanted | used) & stay), tuple(notes))


def _closed(pieces: Pieces, numbers: Iterable[int]) -> set[int]:
    return {each for number in numbers for each in (number, *pieces.way(number))}


def _by_use(pieces: Pieces, used: Iterable[int], counts: Mapping[int, int]) -> Iterator[int]:
    """Order tokens by how often they are used, on the way to others as well: what a token is made of comes first."""
    uses: Counter[int] = Counter()
    for number in used:
        for each in (number, *pieces.way(number)):
            uses[each] += counts[number]
    yield from sorted(uses, key=lambda i: (-uses[i], len(pieces.way(i)), i))
