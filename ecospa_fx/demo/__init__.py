"""EcoSpa seen at work: one small language model trained dense, with EcoSpa, and with the pairing broken."""

from __future__ import annotations

import argparse

from .options import options_from


def run(args: argparse.Namespace) -> int:
    """Run the demo as the command line asks for it, see `add_demo_options`.

    Returns:
        Exit code: 0, or 1 when the saved model does not come back as it was.

    Raises:
        OptionError: When an option cannot be used; its text is one line.
    """
    options = options_from(args)
    # Late, so that --help and a wrong option are answered before models and plots are imported.
    from .experiment import run_experiment

    return run_experiment(options)
