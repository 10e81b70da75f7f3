"""The command line: `python -m ecospa_fx demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from ecospa_fx.demo import run
from ecospa_fx.demo.options import EXAMPLES, OptionError, add_demo_options
from ecospa_fx.errors import EcoSpaError

FAILED = 1
WRONG_OPTION = 2
INTERRUPTED = 130

DEMO_PACKAGES = ("transformers", "matplotlib")
"""What the demo needs beyond the library itself."""


class _OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line: what is wrong, without the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_OPTION, f"{self.prog}: error: {message} (see --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code: 0 done, 1 failed, 2 a wrong option, 130 interrupted."""
    parser = _OneLineParser(prog="python -m ecospa_fx", description="Train transformers while they become smaller.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a small language model dense, with EcoSpa, and with the pairing broken",
        description="Train a small language model three times on real text: dense, with EcoSpa down to a target size, "
        "and with rows and columns removed independently. Prints a table; writes plot, JSON, CSV and the shrunk model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_demo_options(demo)
    parsed = parser.parse_args(arguments)
    try:
        return run(parsed)
    except OptionError as error:
        print(f"{demo.prog}: error: {error}", file=sys.stderr)
        return WRONG_OPTION
    except EcoSpaError as error:
        print(f"{demo.prog}: failed: {error}", file=sys.stderr)
        return FAILED
    except ModuleNotFoundError as error:
        if error.name not in DEMO_PACKAGES:
            raise
        print(f"{demo.prog}: failed: {error.name} is not installed; pip install 'ecospa-fx[demo]'", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"{demo.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
