"""ecospa-fx train: a causal language model on text, or a classifier on images, that shrinks while it trains."""

from __future__ import annotations

import inspect
import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ecospa_fx
from ecospa_fx.errors import EcoSpaError
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.see.report.training import training_of

from . import options as o
from .console import FAILED, CommandError, at_work, check_directory, show, show_json, write
from .datasets import Images, Text, channels, read_images, read_text
from .models import Named, fields_of, named_model, remember_source, write_pretrained

EPILOG = """\
\b
Examples:
  ecospa-fx train hf/llama --text book.txt --steps 1000 --target 0.5 --out runs/llama
  ecospa-fx train timm/vit_tiny_patch16_224 --images photos --steps 500 --out runs/vit
  ecospa-fx train hf/gpt2 --set n_layer=4 --set n_embd=128 --end 800 --trainer top_k=0.5
  ecospa-fx train hf/gpt2 --config run.toml        options by their long names: steps = 1000

It writes model/ (ecospa_fx.load reads it), training.json, history.jsonl and report.html. Text is read as bytes.
"""
EVALUATIONS, BATCHES = 10, 4
OWN = {"model", "optimizer", "before_shrink", "also"}  # arguments of the trainer that are not settings


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
    target: Annotated[float, typer.Option(help="share of the parameters that remains")] = 0.5,
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
    """Train a causal language model on text, or a classifier on images, while it shrinks."""
    check_directory(out)
    if text is not None and images is not None:
        raise CommandError("--text and --images cannot be used together; pass one of them")
    first = start if start is not None else round(0.3 * steps)
    last = end if end is not None else max(first + 1, round(0.8 * steps))
    settings: dict[str, Any] = {
        "target": target, "top_k": top_k, "theta": theta, "start": first, "end": last, "score": score,
        "min_keep": min_keep, "round_to": round_to, "uniform": uniform, "multiple_of": o.multiples_of(multiple_of),
        "deployable": deployable,
        "interval": interval if interval is not None else max(1, (last - first) // 10),
        **_more(more or []),
    }  # fmt: skip
    torch.manual_seed(seed)
    data: Text | Images
    with at_work(f"making {model}"):
        if images is None:
            data = read_text(text, batch_size, context)
            fields = _bytes(model, fields)
            named = named_model(model, fields=fields, factory=factory, causal=True)
        else:
            fields = _classes(model, images, batch_size, fields)
            named, data = _classifier(model, images, batch_size, fields, factory)
    forward = _forward(named, data)
    run = _Run(named.model, data, forward, settings, lr, weight_decay)
    with watching(run.trainer, out, steps, tensorboard) as watch:
        for loss in run.steps(steps, seed):
            watch.step(loss)
    with at_work("saving and writing the report"):
        _write(run, out, model, fields)
    _tell(run, out, as_json)


def watching(trainer: ecospa_fx.EcoSpaTrainer, out: Path, steps: int, tensorboard: Path | None) -> ecospa_fx.Watch:
    """Create the watch of a run, which shows it in a terminal and writes it down line by line."""
    lines = out / "history.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        lines.unlink(missing_ok=True)
        return ecospa_fx.Watch(trainer, steps=steps, lines=lines, tensorboard=tensorboard)
    except (OSError, EcoSpaError) as error:
        raise CommandError(f"{out} cannot be written: {error}" if isinstance(error, OSError) else str(error)) from None


def _more(texts: list[str]) -> dict[str, Any]:
    """Parse settings of the trainer that have no option of their own."""
    settings = fields_of(texts)
    names = [name for name in inspect.signature(ecospa_fx.EcoSpaTrainer).parameters if name not in OWN]
    for name in settings:
        if name not in names:
            raise CommandError(f"--trainer {name}: EcoSpaTrainer has no such setting; it has {', '.join(names)}")
    return settings


def _bytes(name: str, fields: list[str] | None) -> list[str]:
    """Add a vocabulary of bytes to the fields of a model that is made here."""
    fields = list(fields or [])
    chosen = not name.startswith("hf/") or any(field.startswith("vocab_size=") for field in fields)
    return fields if chosen else [*fields, "vocab_size=256"]


def _classes(name: str, folder: Path, batch_size: int, fields: list[str] | None) -> list[str]:
    """Add the number of classes in the folder to the fields of a model that is made here."""
    count = read_images(folder, batch_size, (3, 8, 8), (0.5,) * 3, (0.5,) * 3).classes
    field = {"timm": "num_classes", "hf": "num_labels"}.get(name.partition("/")[0])
    return [*(fields or []), *([f"{field}={count}"] if field else [])]


def _classifier(
    name: str, folder: Path, batch_size: int, fields: list[str], factory: str | None
) -> tuple[Named, Images]:
    named = named_model(name, fields=fields, factory=factory)
    tensors = [*named.args, *(named.kwargs or {}).values()]
    shape = next((tuple(t.shape[1:]) for t in tensors if isinstance(t, Tensor) and t.ndim == 4), None)
    if shape is None:
        raise CommandError(f"{name} takes no images; name a classifier, or pass --text for a language model")
    size = (int(shape[0]), int(shape[1]), int(shape[2]))
    mean, std = (channels((0.5, 0.5, 0.5), size[0]) for _ in range(2))
    return named, read_images(folder, batch_size, size, mean, std)


def _forward(named: Named, data: Text | Images) -> Callable[[Tensor], Tensor]:
    """Return a function from a batch to logits, whatever the model names its input and wraps its output in."""
    model, kwargs = named.model, dict(named.kwargs or {})
    key = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
    rest = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}

    def forward(batch: Tensor) -> Tensor:
        output = model(batch) if key is None else model(**{key: batch}, **rest)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    return forward


class _Run:
    """A training run and its curves."""

    def __init__(
        self, model: nn.Module, data: Text | Images, forward: Callable[[Tensor], Tensor], settings: dict[str, Any],
        lr: float, weight_decay: float,
    ) -> None:  # fmt: skip
        self.model, self.data, self.forward, self.lr = model, data, forward, lr
        self.losses: list[float] = []
        self.sizes: list[int] = []
        self.valid: list[tuple[int, float]] = []
        self.original = sum(p.numel() for p in model.parameters())
        if MODEL not in model.__dict__:
            ecospa_fx.compile(model, execution="graph" if settings["deployable"] is None else "module")
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
        self.trainer = ecospa_fx.EcoSpaTrainer(model, self.optimizer, **settings)

    def steps(self, count: int, seed: int) -> Iterator[float]:
        """Train, and yield the loss of each step."""
        warmup = max(1, count // 20)
        rate = lambda step: min((step + 1) / warmup, 0.1 + 0.9 * max(0.0, 1 - step / count))  # noqa: E731
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        every = max(1, count // EVALUATIONS)
        for step, (x, y) in enumerate(self.data.training(count, seed), 1):
            self.model.train()
            loss = self.loss(x, y)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.trainer.step()
            self.optimizer.zero_grad()
            schedule.step()
            self.losses.append(loss.item())
            self.sizes.append(self.trainer.size)
            if step % every == 0 or step == count:
                self.valid.append((step, self.evaluate()))
            yield self.losses[-1]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the mean cross entropy in nats."""
        logits = self.forward(x)
        if logits.shape[-1] < self.data.classes:
            raise CommandError(
                f"the model has {logits.shape[-1]} classes and the data {self.data.classes}; set num_classes or "
                "vocab_size with --set"
            )
        return cross_entropy(logits.flatten(0, -2), y.flatten())

    @torch.no_grad()
    def evaluate(self) -> float:
        """Compute the mean loss on held-out data."""
        self.model.eval()
        losses = [self.loss(x, y).item() for x, y in self.data.validation(BATCHES)]
        return sum(losses) / max(1, len(losses))


def _write(run: _Run, out: Path, name: str, fields: list[str] | None) -> None:
    training = training_of(run.trainer, run.losses, sizes=run.sizes, valid=run.valid)
    try:
        out.mkdir(parents=True, exist_ok=True)
        ecospa_fx.save(run.model, out / "model", optimizer=run.optimizer, trainer=run.trainer)
        remember_source(out / "model", name, fields)
        if run.trainer.deployment is not None:
            write_pretrained(run.model, out)
    except OSError as error:
        raise CommandError(f"{out} cannot be written: {error.strerror or error}", FAILED) from None
    write(out / "training.json", json.dumps(training) + "\n")
    ecospa_fx.explain(run.model).report(out / "report.html", training=training)


def _tell(run: _Run, out: Path, as_json: bool) -> None:
    change = ecospa_fx.diff(run.model)
    if as_json:
        show_json(
            {
                "loss": run.losses[-1],
                "validation_loss": run.valid[-1][1],
                "parameters": run.trainer.size,
                "original_parameters": run.original,
                "shrinks": len(run.trainer.history),
                "out": str(out),
            }
        )
    else:
        show(
            change,
            "",
            f"validation loss {run.valid[-1][1]:.3f} nats; {out}: model, training.json, history.jsonl, report.html",
        )


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(train)
