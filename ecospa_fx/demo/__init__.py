"""Demo of EcoSpa: one small language model trained dense, with EcoSpa, and with the pairing broken."""

from __future__ import annotations

import argparse

from .options import options_from


def run(args: argparse.Namespace) -> int:
    """Run the demo with the options of the command line, see `add_demo_options`.

    Returns:
        Exit code: 0, or 1 if the reloaded model differs from the saved one.

    Raises:
        OptionError: an option cannot be used; the text is one line.
    """
    options = options_from(args)
    # Imported late, so that --help and a wrong option are answered before models and plots are imported.
    from .experiment import run_experiment

    return run_experiment(options)
