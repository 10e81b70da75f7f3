"""Random state: the states of all random number generators that training uses."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ecospa_fx.errors import CheckpointError


def random_state() -> dict[str, Any]:
    """Return the states of the generators of Python, numpy, torch on the CPU, and torch on CUDA devices if in use."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 (other code draws from it)
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the states that `random_state` returned.

    Raises:
        CheckpointError: there are fewer CUDA devices here; no generator is changed then.
    """
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(state["cuda"]) > here:
        raise CheckpointError(
            f"the save holds random states of {len(state['cuda'])} CUDA devices and this machine has {here}, so the "
            "run cannot continue with the same random numbers; pass rng=False to continue with others"
        )
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    for device, one in enumerate(state["cuda"]):
        torch.cuda.set_rng_state(one, device)


@contextmanager
def rng_preserved() -> Iterator[None]:
    """Restore every generator at the end of the block."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
