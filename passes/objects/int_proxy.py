"""Integer proxy: a stand-in for an integer attribute of a module, which records its uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ecospa_fx.passes.ir.state_access import OPERATORS, AttributePath


class IntProxy:
    """A stand-in for an integer attribute of a module, which records its uses.

    Attributes:
        attribute: the attribute.
        value: its value.
        used: whether the region's own code computed with it, or did anything else than compare it or look up by it.
        compared: its comparisons with integers: operator, the integer, outcome.
        inside: tells whether the code of an object is running.
    """

    __slots__ = ("attribute", "compared", "inside", "used", "value")

    def __init__(self, attribute: AttributePath, value: int) -> None:
        self.attribute, self.value = attribute, value
        self.used = False
        self.inside: Callable[[], bool] = lambda: False
        self.compared: list[tuple[str, Any, bool]] = []

    def __hash__(self) -> int:
        self._use()
        return hash(self.value)

    def __index__(self) -> int:
        self._use()
        return self.value

    def __bool__(self) -> bool:
        return bool(self.__ne__(0))

    def _use(self) -> None:
        self.used = self.used or not self.inside()


def _comparing(name: str) -> Any:
    def compare(self: IntProxy, other: Any) -> bool:
        if type(other) is not int:
            self._use()
            return bool(OPERATORS[name](self.value, other.value if isinstance(other, IntProxy) else other))
        result = bool(OPERATORS[name](self.value, other))
        if not self.inside():
            self.compared.append((name, other, result))
        return result

    return compare


def _computing(name: str) -> Any:
    def compute(self: IntProxy, *others: Any) -> Any:
        self._use()
        return getattr(self.value, name)(*(o.value if isinstance(o, IntProxy) else o for o in others))

    return compute


for _name in OPERATORS:
    setattr(IntProxy, f"__{_name}__", _comparing(_name))


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    setattr(IntProxy, f"__{_name}__", _computing(f"__{_name}__"))
    setattr(IntProxy, f"__r{_name}__", _computing(f"__r{_name}__"))


for _name in ("neg", "abs", "int", "float", "str", "repr", "format", "round"):
    setattr(IntProxy, f"__{_name}__", _computing(f"__{_name}__"))
