"""Ranks: the processes that train one model together, and change it all together or not at all.

each rank prepares a change beside the old -> `together`: one all-reduce
    all are ready, and what they have prepared is the same -> each commits
    one has failed                                         -> its own error there, `RanksError` elsewhere, no change
    they differ                                            -> the same `RanksError` on each, no change
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, distributed

from ecospa_fx.errors import RanksError

Result = TypeVar("Result")
_NOBODY = -(2**62)
_LIMIT = 200  # characters of a value in a message


class Ranks:
    """Processes that decide together.

    Args:
        groups: process groups of this rank. A reduction goes over one after the other, as over the dims of a device
            mesh, so that it is over all their members. Without any this process decides alone.

    Attributes:
        groups: those of more than one process, each once.
    """

    def __init__(self, groups: Iterable[distributed.ProcessGroup] = ()) -> None:
        self.groups = tuple(dict.fromkeys(each for each in groups if distributed.get_world_size(each) > 1))

    def __bool__(self) -> bool:
        """Return whether there is more than one process."""
        return bool(self.groups)

    def together(
        self, doing: str, prepare: Callable[[], Result], facts: Callable[[Result], Mapping[str, object]] | None = None
    ) -> Result:
        """Prepare something on every rank, and return only if all have succeeded and have the same facts.

        Nothing that `prepare` does may be seen outside before this returns.

        Args:
            doing: words for a message, "shrink" say.
            prepare: does the work of this rank, any error included.
            facts: of the result, values of JSON by a few words each: these must be equal.

        Raises:
            RanksError: another rank has failed, or facts differ, or a rank does not answer.
        """
        if not self:
            return prepare()
        error: BaseException | None = None
        try:
            result = prepare()
            known = json.dumps(facts(result)) if facts is not None else "{}"
        except BaseException as raised:
            error, known = raised, "{}"
        try:
            self._settle(doing, error, known)
        except RanksError as others:
            if error is None:
                raise
            raise error from others
        if error is not None:
            raise error
        return result

    def _settle(self, doing: str, error: BaseException | None, known: str) -> None:
        """Compare with the other ranks.

        Raises:
            RanksError: not all are ready for the same.
        """
        me = distributed.get_rank()
        code = int.from_bytes(hashlib.sha256(known.encode()).digest()[:7])
        failed, most, least = self._most(doing, -me if error is not None else _NOBODY, code, -code)
        if failed != _NOBODY:
            text = self._told(doing, -failed, f"{type(error).__name__}: {error}" if error is not None else "")
            raise RanksError(
                f"{doing}: rank {-failed} cannot take part ({_shortened(text, 4 * _LIMIT)}), so no rank does; the "
                "model is unchanged on every rank"
            )
        if most == -least:
            return
        one, other = self._most(doing, -me if code == most else _NOBODY, -me if code != most else _NOBODY)
        first, second = (json.loads(self._told(doing, -each, known)) for each in (one, other))
        what = next((key for key in first if first[key] != second.get(key)), next(iter(first), "facts"))
        values = sorted([(-one, first.get(what)), (-other, second.get(what))])
        said = " and ".join(f"{_shortened(json.dumps(value), _LIMIT)} on rank {rank}" for rank, value in values)
        raise RanksError(
            f"{doing}: {what} differ between ranks, {said}; the model is unchanged on every rank. All ranks must make "
            "the same model, call it in the same ways and use the same settings"
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

    def mean(self, value: float, doing: str = "the loss") -> float:
        """Return the mean of a number over all ranks, the same on each, to the bit."""
        total = self.reduced(torch.tensor([value, 1.0], dtype=torch.float64), distributed.ReduceOp.SUM, doing)
        return float(total[0] / total[1])

    def reduced(self, values: Tensor, op: distributed.ReduceOp.RedOpType, doing: str) -> Tensor:
        """Reduce a tensor over all ranks, into a new one on the device of this one.

        Raises:
            RanksError: a rank does not answer.
        """
        result = values
        for group in self.groups:
            result = result.to(_device(group), copy=True)
            try:
                distributed.all_reduce(result, op, group)
            except RuntimeError as error:
                raise RanksError(
                    f"{doing}: another rank does not answer ({_shortened(str(error), _LIMIT)}); the model is unchanged "
                    "on this one. It has failed, or runs other code: see its own output"
                ) from error
        return result.to(values.device)

    @property
    def count(self) -> int:
        """The number of processes."""
        return math.prod(distributed.get_world_size(each) for each in self.groups)


def _device(group: distributed.ProcessGroup) -> torch.device:
    """Return a device whose tensors the group can reduce."""
    kinds = [part.partition(":")[0] for part in str(distributed.get_backend_config(group)).split(",")]
    if "cpu" in kinds or not kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.accelerator.current_device_index())


def _shortened(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
