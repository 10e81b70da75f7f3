"""Command line: `ecospa-fx COMMAND`, the same as `python -m ecospa_fx COMMAND`."""

from .app import main

__all__ = ["main"]
