"""Application: the commands, their exit codes, and one line per error.

Exit codes: 0 done, 1 failed, 2 the command line is wrong (an option, a name, a path), 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from ecospa_fx.errors import EcoSpaError

from . import compare, compress, demo, doctor, explain, graph, report, shrink, train, trim, verify
from .console import FAILED, INTERRUPTED, WRONG, CommandError, complain

app = typer.Typer(
    name="ecospa-fx",
    help="Find what can shrink in a PyTorch model, prove it, look at it, and shrink it while it trains.",
    epilog="Models: hf/TYPE, timm/NAME, a saved directory, file.py:factory. Completion: --install-completion.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
for command in (explain, verify, graph, report, compress, shrink, trim, train, compare, doctor, demo):
    command.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = f"ecospa-fx {words[0]}" if words and not words[0].startswith("-") else "ecospa-fx"
    try:
        code = app(words, prog_name="ecospa-fx", standalone_mode=False)
    except CommandError as error:
        return complain(name, error, error.code)
    except EcoSpaError as error:
        return complain(name, error, FAILED)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "ecospa_fx":
            raise  # a broken installation, not a missing extra
        return complain(name, f"{error.name} is not installed: pip install 'ecospa-fx[hf,timm,report]'", FAILED)
    except (KeyboardInterrupt, typer.Abort):
        return complain(name, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        return FAILED  # the reader of the output, such as `head`, has closed the pipe
    except typer.Exit as done:
        return done.exit_code
    except Exception as error:
        # Mistakes in options: typer has its own copy of click, whose exceptions have no public name but this method.
        if not hasattr(error, "format_message"):
            raise
        return complain(name, f"{error.format_message()} (see --help)", WRONG)
    if code == INTERRUPTED and words[:1] != ["demo"]:  # typer handles Ctrl-C itself; the demo has printed this already
        return complain(name, "interrupted", INTERRUPTED)
    return code if isinstance(code, int) else 0
