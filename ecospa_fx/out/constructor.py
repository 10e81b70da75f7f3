"""Constructor: the arguments with which a function makes a model at the sizes that a shrunk one has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ecospa_fx.arguments import FUNCTION, MODULE, takes
from ecospa_fx.errors import FormatError
from ecospa_fx.model.constructed import Constructed
from ecospa_fx.model.lookup import state_of
from ecospa_fx.ranks.wrappers import looks_inside


@takes(model=MODULE, make=FUNCTION)
@looks_inside
def constructor_arguments(model: nn.Module, make: Callable[..., nn.Module], /, **given: Any) -> dict[str, Any]:
    """Find the arguments with which `make` makes a model at the sizes that a compiled one has now.

    >>> make = functools.partial(timm.create_model, "vit_tiny_patch16_224")
    >>> arguments = ecospa_fx.constructor_arguments(model, make, depth=4)
    >>> make(**arguments).load_state_dict(model.state_dict())  # plain timm, without this library

    Arguments are found by trial, not by name: those whose numbers change sizes in proportion. What is made is run
    beside the program of the model, so that equal shapes that mean something else are refused.

    Args:
        model: a compiled model that has been called.
        make: a class, or a function that makes the original model: `make(**given)`.
        given: the arguments that it was made with.

    Returns:
        `given` with other numbers, and further arguments where those that were left out must change.

    Raises:
        FormatError: no arguments give these sizes: layers that differ, for example (`uniform="layers"`).
    """
    found = Constructed(model, state_of(model), make, given)
    numbers = found.numbers(state_of(model).plan)
    if isinstance(numbers, str):
        raise FormatError(f"{numbers}. EcoSpaTrainer(deployable=...) keeps a model to the sizes that can be expressed")
    return found.arguments(numbers)
