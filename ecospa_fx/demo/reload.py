"""Reload check: load a saved model in a new process, and compare its logits with those saved beside it.

python -m ecospa_fx.demo.reload runs/demo/model      exit code 0: bitwise equal, 1: not
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ecospa_fx

from .torchvision_cure import tolerate_missing_torchvision_ops

QUESTION = "reload_check.safetensors"
"""File with token ids and the logits of the model for them before it was saved."""


def save_check(model: nn.Module, tokens: Tensor, directory: Path) -> None:
    """Write `tokens`, `[batch, context]`, and the logits for them, `[batch, context, 256]`, beside the model."""
    save_file({"tokens": tokens.contiguous(), "logits": _logits(model, tokens).contiguous()}, directory / QUESTION)


def compare_reloaded(directory: Path) -> tuple[bool, float]:
    """Load the model in `directory` and compute the logits for the saved tokens again.

    Returns:
        True if all logits are bitwise equal, and the largest absolute difference.
    """
    tolerate_missing_torchvision_ops()
    saved = load_file(directory / QUESTION)
    logits = _logits(ecospa_fx.load(directory), saved["tokens"])
    return torch.equal(logits, saved["logits"]), (logits - saved["logits"]).abs().max().item()


def reload_in_new_process(directory: Path) -> tuple[bool, str]:
    """Run the comparison of this file in a new interpreter.

    Returns:
        True if it succeeded, and the output of that process.
    """
    command = [sys.executable, "-m", "ecospa_fx.demo.reload", str(directory)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    output = finished.stdout.strip() or finished.stderr.strip()
    return finished.returncode == 0, output


@torch.no_grad()
def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model.eval()(tokens).logits
    return logits


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print the result, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ecospa_fx.demo.reload", description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="folder that ecospa_fx.save wrote, with the demo's saved logits")
    directory = parser.parse_args(arguments).directory
    equal, difference = compare_reloaded(directory)
    print(f"max abs difference of the logits: {difference:g} ({'bitwise equal' if equal else 'NOT equal'})")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
