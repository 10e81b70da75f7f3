"""Nested calls: calls with nested tensors, whose samples have lengths of their own, made sample by sample.

No op on nested tensors mixes samples. torch makes them by itself of padded batches, in `nn.TransformerEncoder` without
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ecospa_fx.errors import CaptureError


def by_samples(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], named: str) -> Any:
    """Make a call with nested tensors of calls with plain ones; samples of equal shapes go together.

    Args:
        run: makes a call with plain tensors, `[samples, ...]`, and returns such.
        args: positional arguments.
        kwargs: keyword arguments.
        named: what is called, for messages.

    Returns:
        The results of `run`, as nested tensors.

    Raises:
        CaptureError: there are plain tensors beside them, which may belong to one sample each or to all; or no sample.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    nested = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_nested}
    counts = {leaf.size(0) for leaf in nested.values()}
    if len(counts) > 1 or any(isinstance(leaf, Tensor) and i not in nested for i, leaf in enumerate(leaves)):
        raise CaptureError(
            f"{named} is called with nested tensors and with others, of which nothing tells what belongs to which "
            "sample: pad them, or make all of them nested"
        )
    samples = list(zip(*(leaf.unbind() for leaf in nested.values()), strict=True))
    if not samples:
        raise CaptureError(
            f"{named} is called with nested tensors of no samples, whose results would be of no known size"
        )
    alike: dict[Any, list[int]] = {}
    for number, sample in enumerate(samples):
        alike.setdefault(tuple(tuple(part.shape) for part in sample), []).append(number)
    results: list[Any] = [None] * len(samples)
    for numbers in alike.values():
        batches = (torch.stack(parts) for parts in zip(*(samples[n] for n in numbers), strict=True))
        stacked = dict(zip(nested, batches, strict=True))
        call_args, call_kwargs = pytree.tree_unflatten([stacked.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
        result_leaves, result_spec = pytree.tree_flatten(run(*call_args, **call_kwargs))
        for place, number in enumerate(numbers):
            results[number] = [leaf[place] if isinstance(leaf, Tensor) else leaf for leaf in result_leaves]
    layout = next(iter(nested.values())).layout
    joined = [_joined(each, layout) for each in zip(*results, strict=True)]
    return pytree.tree_unflatten(joined, result_spec)


def _joined(parts: Sequence[Any], layout: torch.layout) -> Any:
    return torch.nested.as_nested_tensor([*parts], layout=layout) if isinstance(parts[0], Tensor) else parts[0]
