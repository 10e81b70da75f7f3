"""Interrupting: Ctrl-C at one chosen line of this library."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import ecospa_fx

_PACKAGE = str(Path(ecospa_fx.__file__).parent)


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
        path = frame.f_code.co_filename
        if not path.startswith(_PACKAGE) or "/testing/" in path:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace
