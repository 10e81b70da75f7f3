"""Cross-entropy of labels, and labels drawn from logits, in room for few rows of them.

A vocabulary of 49,152 words makes logits the largest activations of a small language model. `torch` holds three more
arrays of their size for backward; here it is one, the gradient. Everything else is made of some rows after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

CHUNK = 1 << 21
"""Logits that are looked at together: 8 MiB in float32."""


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross-entropy of labels, in float32 at least.

    Args:
        logits: `[rows, classes]`.
        labels: `[rows]`, the number of a class each.

    Returns:
        A scalar, as `torch.nn.functional.cross_entropy` has it.
    """
    if type(logits) is not Tensor:  # one that is spread over ranks, say
        return cross_entropy(logits.float(), labels)
    found: Tensor = _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return found


@torch.no_grad()
def drawn_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a label for each row from its softmax.

    Args:
        logits: `[rows, classes]`.
        generator: on the CPU, so that every device draws the same.

    Returns:
        `[rows]`.
    """
    found = []
    for part in _parts(logits):
        noise = torch.rand(part.shape, generator=generator).clamp_(min=1e-20).to(part.device)
        found.append((part.float() - noise.log_().neg_().log_()).argmax(-1))  # Gumbel's trick
    return torch.cat(found) if found else logits.new_zeros(0, dtype=torch.long)


def _parts(rows: Tensor) -> Iterator[Tensor]:
    """Yield some rows after another."""
    yield from rows.split(max(1, CHUNK // max(1, rows.shape[1])))


class _CrossEntropy(torch.autograd.Function):
    """The mean cross-entropy, which holds the logits for backward and nothing else of their size."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        sums = [part.to(_precise(part)).logsumexp(-1) for part in _parts(logits)]
        norms = torch.cat(sums) if sums else logits.new_zeros(0, dtype=_precise(logits))
        ctx.save_for_backward(logits, labels, norms)
        return (norms - logits.gather(1, labels[:, None])[:, 0].to(norms)).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor, None]:
        logits, labels, norms = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        begin = 0
        for part in _parts(logits):
            end = begin + len(part)
            shares = (part.to(norms) - norms[begin:end, None]).exp_()
            shares[torch.arange(len(part), device=part.device), labels[begin:end]] -= 1
            gradient[begin:end] = shares.mul_(along / len(logits))
            begin = end
        return gradient, None


def _precise(logits: Tensor) -> torch.dtype:
    """Return the dtype to add up in."""
    return torch.promote_types(logits.dtype, torch.float32)
