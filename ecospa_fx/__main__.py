"""Entry point of `python -m ecospa_fx`: the command line, see `ecospa_fx.cli`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
