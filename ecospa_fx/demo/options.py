"""Options of the demo, and the checks before any work is done."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

HEAD_DIM = 32
"""Width of an attention head, in channels: small enough that a narrow model still has several heads."""

EXAMPLES = """\
examples:
  python -m ecospa_fx demo                              GPT-2, 5 to 10 minutes
  python -m ecospa_fx demo --steps 200 --layers 2       a quick look, a minute
  python -m ecospa_fx demo --arch llama --target 0.4    another one, smaller
  python -m ecospa_fx demo --text book.txt --out book   your own file or folder

exit codes: 0 done, 1 failed or the reloaded model differs from the saved one,
2 an option is wrong, 130 interrupted
"""


class OptionError(ValueError):
    """An option that cannot be used; the text is the one line that the user sees."""


@dataclass(frozen=True)
class Options:
    """The settings of one demo.

    Attributes:
        text: file or folder to learn from, or None for the interpreter's standard library.
        arch: transformers model type of a causal language model.
        target: fraction of the parameters that remain, in (0, 1).
        steps: optimizer steps of each of the three runs.
        seed: seed of the initial weights and of the data order.
        out: folder that receives the results.
        batch_size: windows per step.
        context: bytes per window.
        width: hidden size, in channels.
        layers: transformer blocks.
    """

    text: Path | None = None
    arch: str = "gpt2"
    target: float = 0.5
    steps: int = 840
    seed: int = 0
    out: Path = Path("runs/demo")
    batch_size: int = 8
    context: int = 128
    width: int = 192
    layers: int = 4

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            OptionError: an option cannot be used; one line names it, its value and the accepted values.
        """
        if not 0 < self.target < 1:
            raise OptionError(f"--target {self.target:g} is not between 0 and 1; 0.5 keeps half of the parameters")
        for option, value, least in (
            ("--steps", self.steps, 20),
            ("--batch-size", self.batch_size, 1),
            ("--context", self.context, 8),
            ("--layers", self.layers, 1),
        ):
            if value < least:
                raise OptionError(f"{option} {value} is too small; the minimum is {least}")
        if self.width < HEAD_DIM or self.width % HEAD_DIM:
            raise OptionError(f"--width {self.width} is not a positive multiple of {HEAD_DIM}, the width of one head")
        if self.text is not None and not self.text.exists():
            raise OptionError(f"--text {self.text}: no such file or folder")
        if self.out.exists() and not self.out.is_dir():
            raise OptionError(f"--out {self.out} is a file; name a folder")

    @property
    def start(self) -> int:
        """First sparsification step, late enough that coupled weights have learned to work together."""
        return round(0.3 * self.steps)

    @property
    def end(self) -> int:
        """Step by which the target is reached; the last fifth of the run is for recovery."""
        return round(0.8 * self.steps)

    @property
    def interval(self) -> int:
        """Steps between shrinks, so that about ten of them lie between `start` and `end`."""
        return max(1, (self.end - self.start) // 10)


def add_demo_options(parser: argparse.ArgumentParser) -> None:
    """Declare the demo's options on `parser`; defaults are those of `Options`."""
    default = Options()
    add = parser.add_argument
    add("--text", type=Path, metavar="PATH", help="file or folder to learn from (default: Python's standard library)")
    add("--arch", default=default.arch, help="transformers model type: gpt2, llama, gpt_neox, qwen2 (default: gpt2)")
    add("--target", type=float, default=default.target, help="fraction of parameters to keep (default: %(default)s)")
    add("--steps", type=int, default=default.steps, help="training steps of each run (default: %(default)s)")
    add("--seed", type=int, default=default.seed, help="seed of weights and data order (default: %(default)s)")
    add("--out", type=Path, default=default.out, metavar="DIR", help="folder for the results (default: %(default)s)")
    add("--batch-size", type=int, default=default.batch_size, help="windows per step (default: %(default)s)")
    add("--context", type=int, default=default.context, help="bytes per window (default: %(default)s)")
    add("--width", type=int, default=default.width, help="hidden size (default: %(default)s)")
    add("--layers", type=int, default=default.layers, help="transformer blocks (default: %(default)s)")


def options_from(args: argparse.Namespace) -> Options:
    """Convert parsed arguments to checked options.

    Raises:
        OptionError: a value cannot be used.
    """
    return Options(**{name: getattr(args, name) for name in Options.__dataclass_fields__})
