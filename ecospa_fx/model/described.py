"""Described: a model and the numbers of what describes it, such as a configuration, with the sizes they can express."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ecospa_fx.plan import Plan

from .compiled import CompiledModel
from .made_values import difference_of_made
from .making import Maker, Number, Solution, Wanted, Where, solve, wanted_under


class Described:
    """A compiled model and a function that makes it from numbers.

    Args:
        model: the model.
        compiled: its state.
        maker: makes it from numbers, at its original sizes if none of them is changed.
        what: a name of what holds the numbers, for messages.
    """

    def __init__(self, model: nn.Module, compiled: CompiledModel, maker: Maker, what: str) -> None:
        self.model, self.compiled, self.maker, self.what = model, compiled, maker, what
        self.kind = type(model).__name__

    def numbers(self, plan: Plan, *, values: bool = True, like: Mapping[Where, Number] | None = None) -> Any:
        """Return the numbers that must change, by the way to each; or why there are none.

        Args:
            plan: the plan.
            values: compare results as well, not shapes alone.
            like: change these numbers and no others; values are a start for those that the configuration is without.
        """
        wanted = wanted_under(self.model, self.compiled, plan)
        maker = self.maker
        if like is not None:
            known = {where: maker.numbers[where] for where in like if where in maker.numbers}
            start = {where: value for where, value in like.items() if where not in maker.numbers}
            maker = Maker(known, lambda changes: self.maker.make({**start, **changes}))
            solution = solve(maker, wanted)
            solution = Solution({**start, **solution.changes}, solution.wrong)
        else:
            solution = solve(maker, wanted)
        if solution.wrong:
            return self.says_no(wanted, min(solution.wrong, key=str))
        if values and not any(p.is_meta for p in self.model.parameters()):
            device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
            made = maker.in_memory(solution.changes, device)
            difference = difference_of_made(self.model, self.compiled, plan, made)
            if difference is not None:
                numbers = ", ".join(f"{'.'.join(map(str, where))}={new}" for where, new in solution.changes.items())
                return f"{self.what} with {numbers} gives the shapes of this {self.kind}, but {difference}"
        return solution.changes

    def says_no(self, wanted: Wanted, wrong: tuple[str, int | str]) -> str:
        """Say which size cannot be expressed."""
        name, dim = wrong
        where = f"`{name}`" if dim == "" else f"`{name}[{dim}]`"
        return (
            f"{self.what} cannot express the sizes of this {self.kind}: {where} is {wanted.facts.get(wrong)}, and "
            "no numbers in it give that together with the other sizes"
        )
