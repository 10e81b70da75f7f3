"""Conditions: where Python asks a tensor yes or no, and what it does if the answer is the other one.

`if mask.all():`, `torch.equal(a, b)`, and comparisons with a number that `item` has read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ecospa_fx.passes.graph.namespaces import user_line


class Conditions(TorchFunctionMode):
    """The answers that Python takes from tensors, those of one line the other way round.

    Args:
        ignored: tells whether answers do not count now.
        inverted: the line; None leaves all as they are.

    Attributes:
        lines: the lines that ask, in order.
    """

    def __init__(self, ignored: Callable[[], bool], inverted: str | None) -> None:
        super().__init__()
        self.lines: dict[str, None] = {}
        self._ignored, self._inverted, self._times = ignored, inverted, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function; its result counts if it is an answer, or a number that may be compared."""
        result = func(*args, **(kwargs or {}))
        if func not in _ANSWERS or self._ignored():
            return result
        match result:
            case bool():
                return self.answered(result)
            case int():
                return _ReadInt.of(result, self)
            case float():
                return _ReadFloat.of(result, self)
        return result

    def answered(self, answer: bool) -> bool:
        """Note an answer, and return it or its opposite."""
        if self._ignored():
            return answer
        line = user_line()
        self.lines[line] = None
        if line != self._inverted or self._times == MOST:
            return answer
        self._times += 1
        return not answer


MOST = 64
"""Answers of a line that are inverted: a loop may go on as long as they are."""

_ANSWERS = (
    Tensor.__bool__, Tensor.item, Tensor.is_nonzero, Tensor.equal, Tensor.allclose, torch.is_nonzero, torch.equal,
    torch.allclose,
)  # fmt: skip
"""Functions that return the value of a tensor, where that is a bool or a number that may be compared."""


class _Read:
    """A number that was read from a tensor: comparisons with it are answers."""

    conditions: Conditions

    @classmethod
    def of(cls, value: Any, conditions: Conditions) -> Any:
        number = cls(value)  # type: ignore[call-arg]
        number.conditions = conditions
        return number

    def __init_subclass__(cls) -> None:
        kind = cls.__mro__[2]
        for name in ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__", "__bool__"):
            setattr(cls, name, cls._asking(getattr(kind, name)))
        setattr(cls, "__hash__", kind.__hash__)  # noqa: B010 - one that compares has none by itself

    @staticmethod
    def _asking(compare: Callable[..., Any]) -> Callable[..., Any]:
        def ask(self: _Read, *other: Any) -> Any:
            answer = compare(self, *other)
            return answer if answer is NotImplemented else self.conditions.answered(answer)

        return ask


class _ReadInt(_Read, int):
    pass


class _ReadFloat(_Read, float):
    pass
