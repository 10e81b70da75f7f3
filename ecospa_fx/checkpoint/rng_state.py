"""Randomness: the state of every generator that training draws from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ecospa_fx.errors import CheckpointError


def random_state() -> dict[str, Any]:
    """The states of the generators of Python, numpy, torch on the CPU, and torch on every CUDA device once in use."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 (what others draw from)
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go on drawing where `random_state` was taken.

    Raises:
        CheckpointError: there are fewer CUDA devices here; nothing was changed then.
    """
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(state["cuda"]) > here:
        raise CheckpointError(
            f"the save holds random states of {len(state['cuda'])} CUDA devices and here are {here}, so that this run "
            "cannot go on as that one would have; pass rng=False to go on with other random numbers"
        )
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    for device, one in enumerate(state["cuda"]):
        torch.cuda.set_rng_state(one, device)


@contextmanager
def undrawn() -> Iterator[None]:
    """What is drawn inside does not count: afterwards every generator is where it was."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
