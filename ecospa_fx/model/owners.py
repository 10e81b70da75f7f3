"""Owners: the compiled model that each weight belongs to. Two that share one would shrink it without each other."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import TypeAlias

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ecospa_fx.errors import EcoSpaError
from ecospa_fx.passes.graph.tensors import parameters_of

Owner: TypeAlias = "tuple[weakref.ref[nn.Module], str, bool]"  # the model, the name in it, and if a region holds it

_OWNERS = WeakIdKeyDictionary()  # parameter -> Owner


def note_owner(model: nn.Module, regions: Collection[str]) -> None:
    """Take note of the weights of a compiled model, and which of them lie in its regions."""
    here, held = weakref.ref(model), _in_regions(model, regions)
    for name, parameter in parameters_of(model):
        _OWNERS[parameter] = here, name, id(parameter) in held


def check_owner(model: nn.Module, regions: Collection[str], key: str) -> None:
    """Refuse regions of a model that share a weight with another compiled model, if either could shrink it.

    Args:
        model: the model.
        regions: names of its regions.
        key: of a compiled model's `__dict__`, by which it is known to be one still.

    Raises:
        EcoSpaError: they do.
    """
    held = _in_regions(model, regions)
    for name, parameter in parameters_of(model):
        owner: Owner | None = _OWNERS.get(parameter)
        other = None if owner is None else owner[0]()
        if owner is None or other is None or other is model or key not in other.__dict__:
            continue
        _, theirs, in_region = owner
        if in_region or id(parameter) in held:
            mine, kind = type(model).__name__, type(other).__name__
            raise EcoSpaError(
                f"`{name}` of this {mine} is `{theirs}` of a {kind} that is compiled already, and each would shrink it "
                f"without the other. Compile one module that holds both, with a forward that calls them, or leave the "
                f"{kind} as it is: ecospa_fx.restore it"
            )


def _in_regions(model: nn.Module, regions: Collection[str]) -> set[int]:
    return {id(parameter) for name in regions for parameter in model.get_submodule(name).parameters()}
