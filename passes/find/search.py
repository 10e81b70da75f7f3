"""Search: where a module cannot be captured, the largest submodules below it that can.

    Search.attempt(name)      capture one submodule as it was called, or keep the reason why not
    -> Search.below(name)     the nearest submodules below it that are called, largest first; if one fails, below it

A branch on the value of a tensor, or an object in the results that no graph can make, keeps a module from being one
graph. The attention and the MLP inside it can still be graphs: the module's own Python runs around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from ecospa_fx.errors import CaptureError

if TYPE_CHECKING:
    from .analyse import Analysis


@dataclass(eq=False)
class Search:
    """The submodules of a model that could be captured so far, and those that could not.

    Attributes:
        model: the model.
        analyse: captures and analyses one submodule by name; raises a `CaptureError` where it cannot.
        analyses: name -> analysis of a submodule that was captured.
        failed: name -> why a submodule could not be captured.
    """

    model: nn.Module
    analyse: Callable[[str], Analysis]
    analyses: dict[str, Analysis] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def attempt(self, name: str) -> None:
        """Capture a submodule, or keep the reason why it cannot be captured."""
        try:
            self.analyses[name] = self.analyse(name)
        except CaptureError as error:
            self.failed[name] = str(error)

    def below(self, name: str, calls: Mapping[str, Any]) -> None:
        """Capture submodules below one that cannot be captured; `calls` has those that are called."""
        for child in sorted(nearest(name, calls), key=self._size, reverse=True):
            if child in self.analyses:
                continue
            if child not in self.failed and not self._contains_captured(child):
                if not may_couple(self.model.get_submodule(child)):
                    continue
                self.attempt(child)
                if child in self.analyses:
                    continue
            self.below(child, calls)

    def coupled(self) -> dict[str, Analysis]:
        """Return the analyses with couplings, in the order of the model."""
        names = [name for name, _ in self.model.named_modules() if name in self.analyses]
        return {name: self.analyses[name] for name in names if self.analyses[name].discovery.couplings}

    def _size(self, name: str) -> int:
        return sum(p.numel() for p in self.model.get_submodule(name).parameters())

    def _contains_captured(self, name: str) -> bool:
        return any(other.startswith(f"{name}.") for other in self.analyses)


def nearest(name: str, calls: Mapping[str, Any]) -> Iterator[str]:
    """Find the submodules below `name` that are called, with no called module in between: containers are not called."""
    inside = [other for other in calls if other and (not name or other.startswith(f"{name}."))]
    names = set(inside)
    for other in inside:
        parents = other.removeprefix(f"{name}." if name else "").split(".")[:-1]
        prefixes = (".".join([*([name] if name else []), *parents[: i + 1]]) for i in range(len(parents)))
        if not any(prefix in names for prefix in prefixes):
            yield other


def may_couple(module: nn.Module) -> bool:
    """Return whether weights may meet in a module: it has several matrices, or one and submodules."""
    matrices = sum(p.ndim > 1 for p in module.parameters())
    return matrices > 1 or (matrices == 1 and any(True for _ in module.children()))
