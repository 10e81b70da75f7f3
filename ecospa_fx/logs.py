"""Logs: `ECOSPA_LOGS=capture,shrink` shows what the passes do, in the manner of `TORCH_LOGS`.

Standard `logging` underneath: a logger per part, `ecospa_fx.<part>`, silent unless it is asked for here or by the
program's own handlers. `+part` shows details too, `-part` errors only, `all` stands for every part.

capture      a region became a graph: how long it took, how many nodes
axes         axes were inferred: how many atoms, which ops have no rule
discover     couplings and refusals of a region
shrink       what each shrink removed
recaptures   a call that no graph served, and how it differed from the last
"""

from __future__ import annotations

import logging
import os

from .errors import EcoSpaError

PARTS = ("capture", "axes", "discover", "shrink", "recaptures")
VARIABLE = "ECOSPA_LOGS"
ROOT = "ecospa_fx"


def logger(part: str) -> logging.Logger:
    """The logger of a part."""
    return logging.getLogger(f"{ROOT}.{part}")


def set_logs(parts: str) -> None:
    """Show the logs of some parts on stderr; those not named fall silent.

    >>> ecospa_fx.logs.set_logs("capture,+shrink")

    Args:
        parts: comma-separated, as in `ECOSPA_LOGS`.

    Raises:
        EcoSpaError: there is no such part.
    """
    levels: dict[str, int] = {}
    for asked in filter(None, (word.strip() for word in parts.split(","))):
        level = {"+": logging.DEBUG, "-": logging.ERROR}.get(asked[0], logging.INFO)
        name = asked.lstrip("+-")
        if name != "all" and name not in PARTS:
            raise EcoSpaError(f"{VARIABLE}: there is no log `{name}`; there are {', '.join(PARTS)} and all")
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
    """A handler of our own, to tell it from the program's."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("[%(name)s] %(message)s"))


def read_environment() -> None:
    """Take up `ECOSPA_LOGS`, if it is set. A mistake in it is warned of, not raised: an import must not fail."""
    try:
        if os.environ.get(VARIABLE):
            set_logs(os.environ[VARIABLE])
    except EcoSpaError as error:
        logging.getLogger(ROOT).warning("%s", error)
