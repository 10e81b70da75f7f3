"""Step watch: one hook on the steps of all optimizers, and those who hear of them."""

from __future__ import annotations

import functools
import weakref
from typing import Any, Protocol

from torch.optim.optimizer import register_optimizer_step_pre_hook


class HearsSteps(Protocol):
    """Something that hears of every step, of this model's optimizers and of others, before it is taken."""

    def before_step(self, optimizer: Any) -> None:
        """Take note of a step, or raise to refuse it."""


_WATCHERS: weakref.WeakSet[HearsSteps] = weakref.WeakSet()


def watch_steps(watcher: HearsSteps) -> None:
    """Tell `watcher`, which is held weakly, of each step from now on."""
    _listen()
    _WATCHERS.add(watcher)


def unwatch_steps(watcher: HearsSteps) -> None:
    """Tell `watcher` of no step any more."""
    _WATCHERS.discard(watcher)


@functools.cache
def _listen() -> None:
    """Hear of the steps of all optimizers, once and for good.

    torch iterates over its hooks: one that went when a watcher is collected as garbage would break a step off.
    """

    def note(optimizer: Any, *_: Any) -> None:
        for watcher in list(_WATCHERS):
            watcher.before_step(optimizer)

    register_optimizer_step_pre_hook(note)
