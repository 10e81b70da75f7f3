"""Ranks: the processes that train one model together, and change it all together or not at all.

each rank prepares a change beside the old -> `together`: one all-reduce
    all are ready, and what they have prepared is the same -> each commits
    one has failed                                         -> its own error there, `RanksError` elsewhere, no change
    they differ                                            -> the same `RanksError` on each, no change
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ecospa_fx.errors import RanksError

Result = TypeVar("Result")
_LIMIT = 200  # characters of a value in a message
_NOBODY = -(2**62)
_FREE = nullcontext()
_INSIDE: ContextVar[bool] = ContextVar("_INSIDE", default=False)
"""True within `together`, whose outermost call tells the others of an error on this rank."""


class Ranks:
    """Processes that decide together.

    Args:
        groups: process groups of this rank. A reduction goes over one after the other, as over the dims of a device
            mesh, so that it is over all their members. Without any this process decides alone.

    Attributes:
        groups: those of more than one process, each once.
    """

    def __init__(self, groups: Iterable[distributed.ProcessGroup] = ()) -> None:
        by_members = {tuple(distributed.get_process_group_ranks(each)): each for each in groups}
        self.groups = tuple(each for members, each in by_members.items() if len(members) > 1)

    def __bool__(self) -> bool:
        """Return whether there is more than one process."""
        return bool(self.groups)

    @property
    def is_first(self) -> bool:
        """True on the first rank, and where a process decides alone."""
        return all(distributed.get_rank(each) == 0 for each in self.groups)

    @property
    def count(self) -> int:
        """The number of processes."""
        return math.prod(distributed.get_world_size(each) for each in self.groups)

    @property
    def index(self) -> int:
        """The number of this process among them, from 0."""
        place = 0
        for each in self.groups:
            place = place * distributed.get_world_size(each) + distributed.get_rank(each)
        return place

    def together(
        self,
        doing: str,
        prepare: Callable[[], Result],
        facts: Callable[[Result], Mapping[str, object]] | None = None,
        commit: Callable[[], object] = lambda: None,
        held: AbstractContextManager[object] = _FREE,
        hint: str = "",
    ) -> Result:
        """Prepare something on every rank, and return only if all have succeeded and have the same facts.

        Nothing that `prepare` does may be seen outside before this returns. It may meet the other ranks itself, by
        methods of this class: an error on one rank is told at the next meeting, wherever the others are.

        Args:
            doing: words for a message, "shrink" say.
            prepare: does the work of this rank.
            facts: of the result, values of JSON by a few words each: these must be equal.
            commit: called once all are known to have succeeded.
            held: a context in which this rank cannot be interrupted, from the question until `commit` has returned.
            hint: a sentence on why facts may differ.

        Raises:
            RanksError: another rank has failed, or facts differ, or a rank does not answer.
        """
        if not self:
            result = prepare()
            commit()
            return result
        inside = _INSIDE.set(True) if not _INSIDE.get() else None
        try:
            result = prepare()
            known = json.dumps(facts(result)) if facts is not None else "{}"
        except RanksError:
            raise  # every rank has met it
        except BaseException as error:
            if inside is not None:  # otherwise the outermost call tells
                with suppress(RanksError):
                    self._met(doing, error, "")
            raise
        finally:
            if inside is not None:
                _INSIDE.reset(inside)
        with held:
            self._settle(doing, known, hint)
            commit()
        return result

    def mean(self, value: float | None, doing: str) -> float | None:
        """Return the mean of a number over the ranks that have one, the same on each, to the bit."""
        if not self:
            return value
        self.meet(doing)
        pair = [0.0 if value is None else value, float(value is not None)]
        total, count = self.reduced(torch.tensor(pair, dtype=torch.float64), distributed.ReduceOp.SUM, doing).tolist()
        return total / count if count else None

    def any(self, value: bool, doing: str) -> bool:
        """Return whether something is so on some rank."""
        if not self:
            return value
        self.meet(doing)
        return bool(self._most(doing, int(value))[0])

    def common(self, names: Iterable[str], doing: str) -> list[str]:
        """Return those of some names that every rank has, sorted."""
        mine = sorted(set(names))
        if not self or self.meet(doing, json.dumps(mine)):
            return mine
        everywhere = set(mine)
        for group in self.groups:
            everywhere.intersection_update(*self._gathered(sorted(everywhere), group, doing))
        return sorted(everywhere)

    def totals(self, named: Mapping[str, Tensor], doing: str) -> dict[str, Tensor]:
        """Add up tensors by name over all ranks; one that a rank lacks counts as zero there.

        A name under which ranks have tensors of other shapes is left out on each.

        Returns:
            Sums on the devices of the tensors of this rank, which are the same to the bit on each rank.
        """
        if not self:
            return dict(named)
        mine = {name: (list(each.shape), str(each.dtype)) for name, each in sorted(named.items())}
        known: dict[str, Any] = mine
        if not self.meet(doing, json.dumps(mine)):
            for group in self.groups:
                for name, spec in [pair for each in self._gathered(known, group, doing) for pair in each.items()]:
                    known = {**known, name: spec if known.get(name, spec) == spec else None}
            known = {name: known[name] for name in sorted(known) if known[name] is not None}
        sums: dict[str, Tensor] = {}
        for dtype in sorted({kind for _, kind in known.values()}):
            shapes = {name: shape for name, (shape, kind) in known.items() if kind == dtype}
            zero = torch.zeros((), dtype=getattr(torch, dtype.removeprefix("torch.")))
            parts = [named[name].flatten() if name in mine else zero.expand(math.prod(shapes[name])) for name in shapes]
            home = next((part.device for name, part in zip(shapes, parts, strict=True) if name in mine), zero.device)
            flat = self.reduced(torch.cat([part.to(home) for part in parts]), distributed.ReduceOp.SUM, doing)
            pieces = flat.split([math.prod(shape) for shape in shapes.values()])
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True):
                sums[name] = piece.view(shape).to(named[name].device if name in mine else home)
        return sums

    def first(self, value: Any, doing: str) -> Any:
        """Return a value of JSON that the first rank has, on all of them."""
        if not self or self.meet(doing, json.dumps(value)):
            return value
        (rank,) = self._most(doing, -distributed.get_rank())
        return json.loads(self._told(doing, -rank, json.dumps(value)))

    def gathered(self, value: Any, doing: str) -> dict[int, Any]:
        """Return the values of all ranks, which can be pickled, by the number of the rank."""
        found = {distributed.get_rank(): value} if self else {0: value}
        self.meet(doing)
        for group in self.groups:
            found = {rank: each for part in self._gathered(found, group, doing) for rank, each in part.items()}
        return found

    def said_by_first(self, text: str, doing: str) -> str:
        """Return the text of the first rank on all of them."""
        if not self:
            return text
        self.meet(doing)
        (rank,) = self._most(doing, -distributed.get_rank())
        return self._told(doing, -rank, text)

    def meet(self, doing: str, known: str = "") -> bool:
        """Meet the other ranks, and return whether all have the same text.

        This comes before anything else that ranks tell each other: a rank that has failed in between meets the others
        here, wherever they are, and so does one that has taken another way through the code.

        Raises:
            RanksError: one of them has failed, or is elsewhere.
        """
        return not self or self._met(doing, None, known)

    def agree(self, doing: str, facts: Mapping[str, object]) -> None:
        """Compare values of JSON, by a few words each.

        Raises:
            RanksError: they differ between ranks, or one has failed.
        """
        if self:
            self._settle(doing, json.dumps(facts))

    def _met(self, doing: str, error: BaseException | None, known: str) -> bool:
        me, code, place = distributed.get_rank(), _code(known), _code(doing)
        failed = _NOBODY if error is None else -me
        failed, most, least, furthest, nearest = self._most(doing, failed, code, -code, place, -place)
        if failed != _NOBODY:
            text = self._told(doing, -failed, f"{type(error).__name__}: {error}" if error is not None else "")
            raise RanksError(
                f"{doing}: rank {-failed} cannot take part ({_shortened(text, 4 * _LIMIT)}), so no rank does; the "
                "model is unchanged on every rank"
            )
        if furthest != -nearest:
            one, other = self._most(doing, *(-me if at else _NOBODY for at in (place == furthest, place != furthest)))
            places = sorted((-rank, self._told(doing, -rank, doing)) for rank in (one, other))
            said = " and ".join(f"`{text}` on rank {rank}" for rank, text in places)
            raise RanksError(
                f"ranks are at different places, {said}; the model is unchanged on every rank. All ranks must make the "
                "same model, call it in the same ways, and shrink it in the same steps"
            )
        return most == -least

    def _gathered(self, value: Any, group: distributed.ProcessGroup, doing: str) -> list[Any]:
        """Return the values of a group's ranks."""
        found: list[Any] = [None] * distributed.get_world_size(group)
        self._answered(doing, lambda: distributed.all_gather_object(found, value, group))
        return found

    def _settle(self, doing: str, known: str, hint: str = "") -> None:
        if self._met(doing, None, known):
            return
        me, first_code = -distributed.get_rank(), self._most(doing, _code(known))[0] == _code(known)
        one, other = self._most(doing, *(me if at else _NOBODY for at in (first_code, not first_code)))
        first, second = (json.loads(self._told(doing, -each, known)) for each in (one, other))
        what = next((key for key in {**first, **second} if first.get(key) != second.get(key)), "facts")
        values = sorted([(-one, first.get(what)), (-other, second.get(what))], key=lambda pair: pair[0])
        said = " and ".join(f"{_shortened(json.dumps(value), _LIMIT)} on rank {rank}" for rank, value in values)
        raise RanksError(
            f"{doing}: ranks differ in {what}, {said}; the model is unchanged on every rank. All ranks must make "
            f"the same model, call it in the same ways and use the same settings{hint and '. '}{hint}"
        )

    def _told(self, doing: str, rank: int, text: str) -> str:
        """Return the text of one rank on all of them."""
        mine = text.encode() if rank == distributed.get_rank() else b""
        (length,) = self._most(doing, len(mine))
        spelt = torch.zeros(max(length, 1), dtype=torch.int64)
        spelt[: len(mine)] = torch.tensor(list(mine), dtype=torch.int64)
        return bytes(self.reduced(spelt, distributed.ReduceOp.MAX, doing).tolist()[:length]).decode()

    def _most(self, doing: str, *numbers: int) -> list[int]:
        found: list[int] = self.reduced(torch.tensor(numbers), distributed.ReduceOp.MAX, doing).tolist()
        return found

    def reduced(self, values: Tensor, op: distributed.ReduceOp.RedOpType, doing: str) -> Tensor:
        """Reduce a tensor over all ranks, into a new one on the device of this one.

        All ranks must be there with a tensor of this shape and dtype, as they are right after a meeting.

        Raises:
            RanksError: a rank does not answer.
        """
        result = values
        for group in self.groups:
            result = result.to(_device(group, result.device), copy=True)
            self._answered(doing, functools.partial(distributed.all_reduce, result, op, group))
        return result.to(values.device)

    def _answered(self, doing: str, meet: Callable[[], object]) -> None:
        try:
            meet()
        except RuntimeError as error:
            raise RanksError(
                f"{doing}: another rank does not answer ({_shortened(str(error), _LIMIT)}); the model is unchanged on "
                "this one. It has failed, or runs other code: see its own output"
            ) from error


def _code(known: str) -> int:
    return int.from_bytes(hashlib.sha256(known.encode()).digest()[:7])


def _device(group: distributed.ProcessGroup, now: torch.device) -> torch.device:
    """Return the device to reduce a tensor on: its own, unless the group has no backend for it."""
    kinds = [part.partition(":")[0] for part in str(distributed.get_backend_config(group)).split(",")]
    if now.type in kinds:
        return now
    return torch.device("cpu") if "cpu" in kinds else torch.device(kinds[0], torch.accelerator.current_device_index())


def _shortened(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
