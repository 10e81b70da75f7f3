"""ecospa-fx train: a causal language model on text, or a classifier on images, that shrinks while it trains."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .console import CommandError, at_work, check_directory

EPILOG = """\
\b
Examples:
  ecospa-fx train hf/llama --text book.txt --steps 1000 --target 0.5 \\
      --out runs/llama
  ecospa-fx train timm/vit_tiny_patch16_224 --images photos --steps 500 \\
      --out runs/vit
  ecospa-fx train hf/gpt2 --set n_layer=4 --set n_embd=128 --end 800 \\
      --trainer top_k=0.5
  ecospa-fx train hf/gpt2 \\
      --config run.toml        options by their long names: steps = 1000

It writes model/ (ecospa_fx.load reads it), training.json, history.jsonl and report.html. Text is read as bytes.
"""


def _config(context: typer.Context, value: Path | None) -> Path | None:
    """Take options from a TOML file; those on the command line win."""
    if value is not None:
        try:
            options = tomllib.loads(value.read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise CommandError(f"--config {value} cannot be read: {error}") from None
        names = {parameter.opts[-1].lstrip("-"): str(parameter.name) for parameter in context.command.params}
        unknown = [name for name in options if name.replace("_", "-") not in names]
        if unknown:
            raise CommandError(f"--config {value}: there is no option `{unknown[0]}`")
        named = {names[name.replace("_", "-")]: setting for name, setting in options.items()}
        context.default_map = {**(context.default_map or {}), **named}
    return value


def train(
    model: o.Model,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", is_eager=True, callback=_config, help="options from a TOML file")
    ] = None,
    text: Annotated[Path | None, typer.Option(metavar="PATH", help="file or folder (default: Python's)")] = None,
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="a folder of images per class")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="directory for the results")] = Path(
        "runs/train"
    ),
    steps: Annotated[int, typer.Option(min=1, help="training steps")] = 500,
    batch_size: Annotated[int, typer.Option(min=1, help="windows or images per step")] = 8,
    context: Annotated[int, typer.Option(min=8, help="bytes per window of text")] = 128,
    lr: Annotated[float, typer.Option(min=0, help="peak learning rate of AdamW")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(min=0, help="weight decay of AdamW")] = 0.01,
    seed: Annotated[int, typer.Option(help="seed of weights and data order")] = 0,
    target: o.Target = "0.5",
    top_k: Annotated[float, typer.Option(help="share of the couplings that shrink at a step")] = 0.3,
    theta: Annotated[float, typer.Option(help="share of its score that a coupling keeps at a step")] = 0.9,
    interval: Annotated[int | None, typer.Option(help="steps between shrinks (default: ten shrinks)")] = None,
    start: Annotated[int | None, typer.Option(help="step of the first shrink (default: 30 percent)")] = None,
    end: Annotated[int | None, typer.Option(help="step at which the target is reached (default: 80 percent)")] = None,
    score: Annotated[str, typer.Option(help="score of weights: fisher or magnitude")] = "fisher",
    min_keep: Annotated[int, typer.Option(help="entries that every coupling keeps")] = 1,
    round_to: Annotated[int, typer.Option(help="widths are multiples of this")] = 1,
    uniform: o.Uniform = None,
    multiple_of: o.MultipleOf = None,
    deployable: o.Deploy = None,
    more: Annotated[
        list[str] | None, typer.Option("--trainer", metavar="NAME=VALUE", help="any other setting of EcoSpaTrainer")
    ] = None,
    tensorboard: Annotated[Path | None, typer.Option(metavar="DIR", help="curves for TensorBoard")] = None,
    fields: o.Set = None,
    factory: o.Factory = None,
    as_json: o.Json = False,
) -> None:
    """Train a model on text or images while it shrinks.

    A causal language model takes text, a classifier images.
    """
    import torch

    from . import training

    check_directory(out)
    if text is not None and images is not None:
        raise CommandError("--text and --images cannot be used together; pass one of them")
    first = start if start is not None else round(0.3 * steps)
    last = end if end is not None else max(first + 1, round(0.8 * steps))
    settings: dict[str, Any] = {
        "target": o.target_of(target), "top_k": top_k, "theta": theta, "start": first, "end": last, "score": score,
        "min_keep": min_keep, "round_to": round_to, "uniform": uniform, "multiple_of": o.multiples_of(multiple_of),
        "deployable": deployable,
        "interval": interval if interval is not None else max(1, (last - first) // 10),
        **training.more_settings(more or []),
    }  # fmt: skip
    with at_work(f"making {model}"):
        torch.manual_seed(seed)
        named, data, fields = training.model_and_data(model, text, images, batch_size, context, fields, factory)
    run = training.TrainingRun(named, data, settings, lr, weight_decay)
    with training.watching(run.trainer, out, steps, tensorboard) as watch:
        for loss in run.steps(steps, seed):
            watch.step(loss)
    with at_work("saving and writing the report"):
        chosen = {"steps": steps, "seed": seed, "lr": lr, "batch size": batch_size, "context": context, **settings}
        training.write_run(run, out, model, fields, factory, chosen)
    training.tell(run, out, as_json)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(train)
