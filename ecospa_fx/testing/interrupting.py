"""Interrupting: Ctrl-C at one chosen line of this library."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any


class Interrupting:
    """A context in which a KeyboardInterrupt is raised at one line of this library, counted as they run; 0: at none."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __enter__(self) -> None:
        """Begin to count lines."""
        if self.left:
            sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        """Count no more."""
        if sys.gettrace() == self._trace:
            sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith("ecospa_fx.") or module.startswith("ecospa_fx.testing."):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace
