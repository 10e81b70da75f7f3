"""Watch: the record of a model that shrinks while it trains, shown live and written down.

trainer, losses -> Watch -> progress (rich) | a table | JSON lines | TensorBoard | a plot of widths
                         -> symptoms of trouble, as warnings
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from ecospa_fx.arguments import NUMBER, PATH, WHOLE, either, having, optional, takes
from ecospa_fx.errors import EcoSpaError
from ecospa_fx.logs import logger
from ecospa_fx.model.lookup import couplings
from ecospa_fx.text import plain
from ecospa_fx.train.loss_spikes import LossSpikes, number_of

from .report.training import training_of
from .symptoms import Symptom, collapses, odd_widths, spike

if TYPE_CHECKING:
    from ecospa_fx.train.trainer import EcoSpaTrainer

AROUND = 10
"""Steps before and after a shrink over which the table averages the loss."""

MULTIPLE = 8
"""Number of entries that widths on a GPU should be multiples of."""


class Watch:
    """A record of a model that shrinks while it trains: shown live, written to a file, with warnings of trouble.

    >>> with ecospa_fx.Watch(trainer, steps=len(loader), lines="run.jsonl") as watch:
    ...     for batch in loader:
    ...         loss = model(**batch).loss
    ...         ...
    ...         trainer.step(loss=loss)
    ...         watch.step(loss)
    >>> print(watch)

    It warns of a loss that stays up after a shrink, of a layer that has lost almost all entries, and, on a GPU, of
    widths that will run no faster. Warnings go to the log `shrink` and are kept in `signs`.

    Args:
        trainer: the trainer of the run.
        steps: number of steps, for a progress bar, which is shown in a terminal only; None: no progress bar.
        lines: a file to which each step, shrink, wait and warning is appended as one line of JSON.
        tensorboard: a directory, or a `SummaryWriter`: loss, size, importance and width of each coupling.
        multiple: number that widths should be multiples of; None: 8 if the model is on a GPU, else no check.

    Attributes:
        losses: loss of each step.
        sizes: parameters after each step.
        signs: the warnings so far.

    Raises:
        EcoSpaError: TensorBoard is not installed, or the file cannot be written.
    """

    @takes(
        trainer=having("an EcoSpaTrainer", "steps", "history", "postponed", "size"), steps=optional(WHOLE),
        lines=optional(PATH), tensorboard=optional(either(PATH, having("a writer of TensorBoard", "add_scalar"))),
        multiple=optional(NUMBER),
    )  # fmt: skip
    def __init__(
        self,
        trainer: EcoSpaTrainer,
        *,
        steps: int | None = None,
        lines: str | os.PathLike[str] | None = None,
        tensorboard: Any = None,
        multiple: int | None = None,
    ) -> None:
        self.trainer, self.multiple = trainer, multiple
        self.losses: list[float] = []
        self.sizes: list[int] = []
        self.signs: list[Symptom] = []
        self._first = trainer.steps
        self._seen = len(trainer.history), len(trainer.postponed)
        self._original = trainer.size
        self._spikes, self._said_spike = LossSpikes(), True
        self._writer = tensorboard if hasattr(tensorboard, "add_scalar") else _writer(tensorboard)
        self._opened_writer = self._writer is not tensorboard
        self._lines = None if lines is None else Path(lines)
        self._write()  # an empty write finds out now if the file cannot be written
        self._progress: Progress | None = None
        if steps is not None:
            self._progress, self._task = _bar(steps)

    def __enter__(self) -> Watch:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the progress bar, and the TensorBoard writer if this class opened it."""
        if self._progress is not None:
            self._progress.stop()
        if self._writer is not None and self._opened_writer:
            self._writer.close()
            self._writer = None

    def step(self, loss: Tensor | float) -> None:
        """Record a training step; call it after `trainer.step()`.

        Args:
            loss: the loss of the step. A tensor is read at once, which synchronises with a GPU.
        """
        value = number_of(loss)
        trainer, step, size = self.trainer, self.trainer.steps, self.trainer.size
        self.losses.append(value)
        self.sizes.append(size)
        self._spikes.update(value)
        self._write({"step": step, "loss": value if math.isfinite(value) else str(value), "size": size})
        self._scalars(step, {"loss": value, "size": size, "share": size / self._original})
        shrinks, postponed = self._seen
        for entry in trainer.postponed[postponed:]:
            self._write({"event": "wait", **entry})
        for entry in trainer.history[shrinks:]:
            self._shrunk(entry)
        self._seen = len(trainer.history), len(trainer.postponed)
        if not self._said_spike:
            waits = trainer.hears_the_loss
            self._say(spike(self._spikes, step, trainer.history[-1]["step"], waits))
        if self._progress is not None:
            self._progress.update(self._task, completed=step - self._first, shown=self._shown(value, size))

    def _shrunk(self, entry: dict[str, Any]) -> None:
        step, now = entry["step"], couplings(self.trainer.model)
        self._spikes.mark_shrink()
        self._said_spike = False
        widths = {coupling.name: coupling.size for coupling in now}
        self._write({"event": "shrink", **entry, "widths": widths})
        self._scalars(step, {f"width/{name}": size for name, size in widths.items()})
        self._scalars(step, {f"importance/{name}": value for name, value in entry["importance"].items()})
        for sign in collapses(now, step, {sign.about for sign in self.signs if sign.kind == "collapse"}):
            self._say(sign)
        multiple = self.multiple
        if multiple is None and any(p.device.type != "cpu" for p in self.trainer.model.parameters()):
            multiple = MULTIPLE
        if multiple is not None and not any(sign.kind == "width" for sign in self.signs):
            self._say(odd_widths(self.trainer.model, now, step, multiple))

    def _say(self, sign: Symptom | None) -> None:
        if sign is None:
            return
        self._said_spike = self._said_spike or sign.kind == "spike"
        self.signs.append(sign)
        self._write({"event": "sign", "step": sign.step, "kind": sign.kind, "about": sign.about, "text": sign.text})
        logger("shrink").warning("%s", sign)

    def _write(self, record: dict[str, Any] | None = None) -> None:
        if self._lines is None:
            return
        try:
            with self._lines.open("a") as file:  # closed at once, so that lines survive a kill
                file.write("" if record is None else json.dumps(record) + "\n")
        except OSError as error:
            raise EcoSpaError(f"lines={str(self._lines)!r} cannot be written: {error.strerror or error}") from error

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def _shown(self, loss: float, size: int) -> str:
        return f"loss {loss:.3f}  size x {size / self._original:.2f}{importance_range(self.trainer)}"

    def table(self) -> Table:
        """Build a table of the shrinks so far: size, removed entries, and the loss around each."""
        title = f"{self._original:,} -> {self.trainer.size:,} parameters (x {self.trainer.size / self._original:.3f})"
        table = Table(box=None, pad_edge=False, title=title, title_justify="left")
        for column in ("step", "parameters", "share", "couplings", "entries", "loss before", "after"):
            table.add_column(column, justify="right")
        for entry in self.trainer.history:
            at = entry["step"] - self._first
            before, after = self.losses[max(0, at - AROUND) : at], self.losses[at : at + AROUND]
            table.add_row(
                str(entry["step"]), f"{entry['size']:,}", f"x {entry['size'] / self._original:.3f}",
                str(len(entry["removed"])), str(sum(entry["removed"].values())), _mean(before), _mean(after),
            )  # fmt: skip
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return "\n".join([plain(self.table()), *(f"! {sign}" for sign in self.signs)])

    def report(self) -> dict[str, Any]:
        """Return the data that `Explanation.report(training=...)` and `save_widths` take."""
        return training_of(self.trainer, self.losses, sizes=self.sizes)


def importance_range(trainer: EcoSpaTrainer) -> str:
    """Format the lowest and the highest importance of a coupling at the last shrink, for a progress display."""
    scored = [entry["importance"].values() for entry in trainer.history[-1:] if entry["importance"]]
    return f"  importance {min(scored[0]):.0e} to {max(scored[0]):.0e}" if scored else ""


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.4g}" if values else ""


def _bar(steps: int) -> tuple[Progress, TaskID]:
    console = Console(stderr=True)
    progress = Progress(
        BarColumn(bar_width=14), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    return progress, progress.add_task("training", total=steps, shown="")


def _writer(directory: Any) -> Any:
    if directory is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise EcoSpaError("tensorboard= needs TensorBoard: pip install tensorboard") from None
    try:
        return SummaryWriter(str(directory))
    except OSError as error:
        raise EcoSpaError(f"tensorboard={str(directory)!r} cannot be written: {error.strerror or error}") from error
