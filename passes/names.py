"""Names: what the tensors of a module are called, in it and in the model around it."""

from __future__ import annotations

from torch import Tensor, nn


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under every name they have: a tied one occurs once per name."""
    return dict((*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)))


def join(region: str, name: str) -> str:
    """The name in the model of something that a region calls `name`."""
    return f"{region}.{name}" if region else name
