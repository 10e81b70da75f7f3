"""Logs of the passes: `ECOSPA_LOGS=capture,shrink` shows them, in the manner of `TORCH_LOGS`.

Based on standard `logging`: a logger per part, `ecospa_fx.<part>`, silent unless enabled here or by the program's
own handlers. `+part` shows details too, `-part` errors only, `all` stands for every part.

capture      each captured region: seconds and number of nodes
axes         inferred axes: number of atoms, ops without a rule
discover     couplings and refusals of each region
shrink       entries removed by each shrink
recaptures   calls that no graph served, and their difference from the last call
"""

from __future__ import annotations

import logging
import os

from .arguments import TEXT, takes
from .errors import EcoSpaError

PARTS = ("capture", "axes", "discover", "shrink", "recaptures")
VARIABLE = "ECOSPA_LOGS"
ROOT = "ecospa_fx"


def logger(part: str) -> logging.Logger:
    """Return the logger of a part."""
    return logging.getLogger(f"{ROOT}.{part}")


@takes(parts=TEXT)
def set_logs(parts: str) -> None:
    """Show the logs of the named parts on stderr, and silence the others.

    >>> ecospa_fx.logs.set_logs("capture,+shrink")

    Args:
        parts: names with commas, as in `ECOSPA_LOGS`.

    Raises:
        EcoSpaError: a part does not exist.
    """
    levels: dict[str, int] = {}
    for word in filter(None, (part.strip() for part in parts.split(","))):
        level = {"+": logging.DEBUG, "-": logging.ERROR}.get(word[0], logging.INFO)
        name = word.lstrip("+-")
        if name != "all" and name not in PARTS:
            raise EcoSpaError(f"{VARIABLE}: there is no log `{name}`; the logs are {', '.join(PARTS)}, and `all`")
        levels |= dict.fromkeys(PARTS if name == "all" else (name,), level)
    for name in PARTS:
        each = logger(name)
        for handler in [h for h in each.handlers if isinstance(h, _Stderr)]:
            each.removeHandler(handler)
        each.setLevel(levels.get(name, logging.NOTSET))
        each.propagate = name not in levels
        if name in levels:
            each.addHandler(_Stderr())


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """The handler of this module, to tell it from those of the program."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("[%(name)s] %(message)s"))


def _read_environment() -> None:
    """Apply `ECOSPA_LOGS`, if it is set. A mistake in it is a warning, because an import must not fail."""
    try:
        if os.environ.get(VARIABLE):
            set_logs(os.environ[VARIABLE])
    except EcoSpaError as error:
        logging.getLogger(ROOT).warning("%s", error)


_read_environment()
