"""Registration: functions as operators `torch.ops.ecospa_fx.x`, each defined once in a process.

A second `torch.library.custom_op` of a name destroys the first: the dispatcher frees the operator's entry, while the
first function goes on calling through a reference to it. Such a call reads freed memory, a schema with any number of
arguments, and ends in `ValueError: vector::reserve` or a segmentation fault. So a name that is defined stays as it is.
"""

from collections.abc import Callable
from typing import Any

import torch


def operator(
    name: str, mutates: tuple[str, ...] = (), fake: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function to be the operator `ecospa_fx::name`; where there is one of that name, return that.

    Args:
        name: name of the operator.
        mutates: names of the arguments that it writes into.
        fake: the function that makes results of the right shape on tensors without entries.
    """

    def define(function: Callable[..., Any]) -> Any:
        known = getattr(torch.ops.ecospa_fx, name, None)
        if known is not None:
            return known.default
        made = torch.library.custom_op(f"ecospa_fx::{name}", function, mutates_args=mutates)
        if fake is not None:
            made.register_fake(fake)
        return made

    return define
