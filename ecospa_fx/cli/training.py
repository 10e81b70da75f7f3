"""Training runs of `ecospa-fx train`: model and data, the steps, and the files at the end."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ecospa_fx
from ecospa_fx.errors import EcoSpaError
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.see.report import latency_of, training_of

from .console import FAILED, CommandError, show, show_json, write
from .datasets import Images, Text, channels, read_images, read_text
from .models import Named, fields_of, named_model, remember_source, write_pretrained

EVALUATIONS, BATCHES = 10, 4
OWN = {"model", "optimizer", "before_shrink", "also"}  # arguments of the trainer that are not settings


def watching(trainer: ecospa_fx.EcoSpaTrainer, out: Path, steps: int, tensorboard: Path | None) -> ecospa_fx.Watch:
    """Create the watch of a run, which shows it in a terminal and writes it down line by line."""
    lines = out / "history.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        lines.unlink(missing_ok=True)
        return ecospa_fx.Watch(trainer, steps=steps, lines=lines, tensorboard=tensorboard)
    except (OSError, EcoSpaError) as error:
        raise CommandError(f"{out} cannot be written: {error}" if isinstance(error, OSError) else str(error)) from None


def more_settings(texts: list[str]) -> dict[str, Any]:
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


def model_and_data(
    name: str, text: Path | None, images: Path | None, batch_size: int, context: int, fields: list[str] | None,
    factory: str | None,
) -> tuple[Named, Text | Images, list[str] | None]:  # fmt: skip
    """Make the model and read its data; the fields of the model are those given, and those that the data ask for."""
    if images is None:
        data = read_text(text, batch_size, context)
        fields = _bytes(name, fields)
        return named_model(name, fields=fields, factory=factory, causal=True), data, fields
    fields = _classes(name, images, batch_size, fields)
    return *_classifier(name, images, batch_size, fields, factory), fields


def _call(named: Named) -> Callable[[Tensor], tuple[tuple[Tensor, ...], dict[str, Any]]]:
    """Return a function from a batch to the arguments of a call."""
    kwargs = dict(named.kwargs or {})
    key = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
    rest = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
    return lambda batch: ((batch,), {}) if key is None else ((), {key: batch, **rest})


def _forward(named: Named, data: Text | Images) -> Callable[[Tensor], Tensor]:
    """Return a function from a batch to logits, whatever the model names its input and wraps its output in."""
    model, call = named.model, _call(named)

    def forward(batch: Tensor) -> Tensor:
        args, kwargs = call(batch)
        output = model(*args, **kwargs)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    return forward


class TrainingRun:
    """A training run and its curves."""

    def __init__(
        self, named: Named, data: Text | Images, settings: dict[str, Any], lr: float, weight_decay: float
    ) -> None:
        model = named.model
        self.model, self.data, self.forward, self.lr = model, data, _forward(named, data), lr
        self.call = _call(named)
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

    def latency(self, before: nn.Module) -> dict[str, Any]:
        """Time a forward beside that of the model as it was."""
        args, kwargs = self.call(next(iter(self.data.validation(1)))[0])
        return latency_of(before, self.model, args, kwargs)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Compute the mean loss on held-out data."""
        self.model.eval()
        losses = [self.loss(x, y).item() for x, y in self.data.validation(BATCHES)]
        return sum(losses) / max(1, len(losses))


def write_run(
    run: TrainingRun, out: Path, name: str, fields: list[str] | None, factory: str | None, settings: dict[str, Any]
) -> None:
    """Save the model of a run, its curves and the report.

    Args:
        run: the run.
        out: directory for the files.
        name: the model's, from the command line.
        fields: `FIELD=VALUE` for its configuration.
        factory: FILE.PY:NAME that makes the original of a saved model.
        settings: what was chosen for the run, to be compared with other runs.
    """
    training = training_of(run.trainer, run.losses, sizes=run.sizes, valid=run.valid)
    training |= {
        "parameters": run.original,
        "settings": {"model": name, "set": " ".join(fields or []), **settings},
        "latency": run.latency(named_model(name, fields=fields, factory=factory).model),
    }
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


def tell(run: TrainingRun, out: Path, as_json: bool) -> None:
    """Print how a run has ended."""
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
