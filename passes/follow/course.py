"""Course: how far a region's own forward came, and where and why it failed."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ecospa_fx.passes.ir.region_graph import Forward

from .given import GIVEN

_NOT_THE_MODEL = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))  # torch, and these passes


class Course:
    """The modules that a forward has entered, in order, and those that it was in when it failed."""

    def __init__(self) -> None:
        self.entered: list[str] = [""]
        self.inside: list[tuple[str, nn.Module]] = []
        self.failed = False
        self.place: tuple[int, ...] = ()  # the instruction at which it failed, in each function of the model
        self.events = 0
        self.shapes = 0  # of all that was computed up to the end, in one number

    @property
    def reached(self) -> tuple[int, ...]:
        """How far the forward came: modules entered and left, and instructions. None where it ran to a wrong end."""
        return (self.events, *self.place) if self.failed else ()

    def nearest(self, module: str) -> tuple[int, int]:
        """Return a key by which modules sort: around the place of the failure first, then those entered last."""
        around = ["", *(path for path, _ in self.inside)]
        if not self.failed:
            return (0, 0)
        if module in around:
            return (0, -around.index(module))
        last = next((i for i, path in enumerate(reversed(self.entered)) if path == module), len(self.entered))
        return (1, last)


class Failed(Exception):
    """A forward fails; the message says where and why."""


def own_forward(module: nn.Module, forward: Forward, args: Any, kwargs: Any, course: Course | None = None) -> Any:
    """Run a region's own forward.

    Raises:
        Failed: it fails.
    """
    course = Course() if course is None else course
    inside = course.inside
    if GIVEN in module.__dict__:
        forward = type(module).forward  # takes only some entries of what it is given
    with _running(module, course), _noted_shapes(course):
        try:
            return forward(module, *args, **kwargs)
        except Exception as error:
            course.failed = True
            frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
            course.place = tuple(f.f_lasti for f in frames if not f.f_code.co_filename.startswith(_NOT_THE_MODEL))
            path, failing = inside[-1] if inside else ("", module)
            where = f" in `{path}` ({type(failing).__name__})" if path else ""
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise Failed(f"fails{where}: {lines[0]}") from error


@contextmanager
def _running(module: nn.Module, course: Course) -> Iterator[None]:
    """Note the calls of submodules, for messages and to tell how far a forward came."""

    def entering(path: str, child: nn.Module, _: Any) -> None:
        course.inside.append((path, child))
        course.entered.append(path)
        course.events += 1

    def leaving(*_: Any) -> None:
        course.inside.pop()
        course.events += 1

    handles = []
    for path, child in module.named_modules():
        if path:
            handles.append(child.register_forward_pre_hook(partial(entering, path)))
            handles.append(child.register_forward_hook(leaving))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _noted_shapes(TorchFunctionMode):
    """A context that notes the shapes of what is computed: two courses of the same shapes are the same."""

    def __init__(self, course: Course) -> None:
        super().__init__()
        self._course = course

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` and note the shapes of what it gives."""
        result = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            self._course.shapes = hash((self._course.shapes, _shapes(result)))
        return result


def _shapes(result: Any) -> Any:
    if isinstance(result, Tensor):
        return tuple(result.shape)
    if isinstance(result, (tuple, list)):
        return tuple(map(_shapes, result))
    return result if type(result) in (int, bool) else type(result)
