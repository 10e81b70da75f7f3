"""Size guards: the questions about dynamic sizes that a forward asked, answered as in the call that was captured.

A forward that branches on `x.shape[1] % 2` is another graph for odd sizes than for even ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import sympy
import torch
from torch.utils._sympy.printers import PythonPrinter


@dataclass(frozen=True, eq=False)
class SizeGuards:
    """Conditions on sizes that hold for every call that a graph serves.

    Attributes:
        symbols: the sizes that they are about, in the order in which `holds` takes them.
        text: all conditions, as Python of the names `n0`, `n1`, ..; empty where there are none.
        holds: return whether the conditions hold for these sizes.
    """

    symbols: tuple[sympy.Symbol, ...] = ()
    text: str = ""
    holds: Callable[..., bool] = lambda: True

    @staticmethod
    def of(conditions: Iterable[sympy.Basic], known: Iterable[sympy.Symbol]) -> SizeGuards:
        """Collect the conditions that can be checked: those about sizes that a call's tensors have."""
        sizes = set(known)
        checked = [c for c in dict.fromkeys(conditions) if c.free_symbols and c.free_symbols <= sizes]
        if not checked:
            return SizeGuards()
        symbols = sorted({symbol for c in checked for symbol in c.free_symbols}, key=str)
        names = {symbol: sympy.Symbol(f"n{i}", integer=True, positive=True) for i, symbol in enumerate(symbols)}
        text = " and ".join(f"({PythonPrinter().doprint(c.xreplace(names))})" for c in checked)
        answers = eval(f"lambda {', '.join(map(str, names.values()))}: {text}", {"math": math, "torch": torch})

        def holds(*sizes: int) -> bool:
            try:
                return bool(answers(*sizes))
            except ZeroDivisionError:  # a remainder by the size of something that these sizes leave empty
                return False

        return SizeGuards(tuple(symbols), text, holds)

    def hold_for(self, sizes: Mapping[sympy.Symbol, int]) -> bool:
        """Return whether the conditions hold for the sizes of a call."""
        return self.holds(*(sizes[symbol] for symbol in self.symbols))
