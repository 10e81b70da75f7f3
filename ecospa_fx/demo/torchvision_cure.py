"""Cure for a torchvision without compiled ops, so that transformers and timm can be imported beside it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch


def tolerate_missing_torchvision_ops() -> None:
    """Make transformers importable beside a torchvision that was built for another torch.

    A torchvision without compiled ops for this torch (the usual case beside a CPU build of torch) fails on import with
    `operator torchvision::nms does not exist`, and every import of a transformers model fails with it, although none
    of the models used here calls such an op. The error comes from registering shape functions for ops that are not
    there, so exactly those registrations are skipped while torchvision is imported, and nothing else is.

    It does nothing if torchvision is absent or already imported, and changes nothing if its ops exist. For the demo,
    the tests and the benches only: a library must not change how another library is imported.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    library: Any = torch.library
    register_fake = library.register_fake

    def lenient_register_fake(op: Any, *args: Any, **kwargs: Any) -> Any:
        registered = register_fake(op, *args, **kwargs)
        return _skipping_absent_ops(registered) if callable(registered) and isinstance(op, str) else registered

    library.register_fake = lenient_register_fake
    try:
        importlib.import_module("torchvision")
    finally:
        library.register_fake = register_fake


def _skipping_absent_ops(decorator: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        try:
            return decorator(function)
        except RuntimeError as error:
            if "operator torchvision::" in str(error) and "does not exist" in str(error):
                return function
            raise

    return register
