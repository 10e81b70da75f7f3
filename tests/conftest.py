"""Before any test is collected: transformers and timm import beside a torchvision whose compiled ops are missing."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
# Tests of one room use models and helpers of another, and those in `shared`.
sys.path += [str(room) for room in sorted(TESTS.iterdir()) if room.is_dir() and room.name != "__pycache__"]

if not torch.cuda.is_available():
    # Read when Triton is imported: the same kernel tests run compiled on a GPU and interpreted without one.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what has been the default; Triton 3.9 warns of a change

from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops  # noqa: E402

tolerate_missing_torchvision_ops()
torch.set_num_threads(1)
# pytest captures logs of loggers that do not propagate by a handler on each. torch writes its trace, with the stack of
# every value, as soon as that logger has one.
logging.getLogger("torch.__trace").propagate = True


def pytest_runtest_setup() -> None:
    """Whatever a test before this one has set (Lightning does): more threads add up in another order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Take back what a test does to the environment: Lightning writes ranks into it, which other libraries read."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
