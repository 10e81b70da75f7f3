"""ecospa-fx demo: one small language model trained dense, with EcoSpa, and with the pairing broken."""

from __future__ import annotations

import argparse
from typing import NoReturn

import typer

from ecospa_fx.demo import run
from ecospa_fx.demo.options import EXAMPLES, OptionError, add_demo_options
from ecospa_fx.errors import EcoSpaError

from .console import FAILED, INTERRUPTED, WRONG, complain

PROGRAM = "python -m ecospa_fx demo"

PACKAGES = ("transformers", "matplotlib")
"""Packages that the demo needs beyond the library."""


class _OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"{self.prog}: error: {message} (see --help)\n")


def demo(context: typer.Context) -> int:
    """Train a small model with and without this library.

    Dense, with EcoSpa, and with the pairing broken.
    """
    parser = _OneLineParser(
        prog=PROGRAM,
        description="Train a small language model three times on real text: dense, with\n"
        "EcoSpa down to a target size, and with rows and columns removed independently.\n"
        "Prints a table; writes plot, JSON, CSV and the shrunk model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_demo_options(parser)
    parsed = parser.parse_args(context.args)
    try:
        return run(parsed)
    except OptionError as error:
        return complain(PROGRAM, error, WRONG)
    except EcoSpaError as error:
        return complain(PROGRAM, f"failed: {error}", FAILED)
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        return complain(PROGRAM, f"{error.name} is not installed: pip install 'ecospa-fx[demo]'", FAILED)
    except KeyboardInterrupt:
        return complain(PROGRAM, "interrupted", INTERRUPTED)


def register(app: typer.Typer) -> None:
    """Add the command; its options are the demo's own."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(context_settings=settings, add_help_option=False)(demo)
