"""CheckpointSizes: the checkpoints of a Trainer of transformers, and a model that takes the sizes of one.

The Trainer loads the weights of a checkpoint before it calls any callback, to resume and to end with the best model.
So a hook on `load_state_dict` recognises them: weights of other sizes are those of a checkpoint, bit for bit, or are
left to torch, which refuses them.

A Trainer of another library may make a new model from the files of a checkpoint first, as that of sentence-transformers
does. Those files do not say sizes, so what it cannot load is read from the directory of ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from ecospa_fx.checkpoint.directory import read_save, saved_files
from ecospa_fx.checkpoint.rebuild import Saved, read_model, refit
from ecospa_fx.errors import CheckpointError, EcoSpaError
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.old_weights import of_other_sizes
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.plan import Plan

DIRECTORY = "ecospa_fx"
"""The directory inside a checkpoint that `ecospa_fx.save` writes and `ecospa_fx.load` reads."""


class CheckpointSizes:
    """A hook of `load_state_dict`: a compiled model takes the sizes of the checkpoint whose weights it is given.

    Attributes:
        directories: where checkpoints lie; the Trainer writes to the first, and to one below it for each run of a
            search for hyperparameters.
        taken: the checkpoint whose sizes a model has taken last.
    """

    def __init__(self) -> None:
        self.directories: list[Path] = []
        self.taken: Path | None = None

    def look_in(self, args: TrainingArguments) -> None:
        """Look for checkpoints where the Trainer with these arguments writes them, and where it is told to resume."""
        resumed = args.resume_from_checkpoint
        elsewhere = [Path(resumed).parent] if isinstance(resumed, str) else []
        self.directories = [Path(args.output_dir), *elsewhere]

    def of_step(self, state: TrainerState) -> Path:
        """Return the directory of ours in the checkpoint of the step that training is at."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_hyper_param_search:
            found = [path for path in self._checkpoints() if path.name == name and path.parent != self.directories[0]]
            return (found[0] if found else self.directories[0] / name) / DIRECTORY
        if self.taken is not None and self.taken.name == name:
            return self.taken / DIRECTORY
        return self.directories[0] / name / DIRECTORY

    def missing(self, step: int | str, source: Path) -> CheckpointError:
        """Return the error of a checkpoint that was saved without this callback."""
        return CheckpointError(
            f"training resumes at step {step}, but {source} is missing, without which it is unknown how far the model "
            "had shrunk; resume from a checkpoint in output_dir that was saved with this callback"
        )

    def __call__(self, model: nn.Module, weights: dict[str, Any], prefix: str, *given: Any) -> None:
        """Bring the model to the sizes of the weights.

        Raises:
            CheckpointError: they are of a checkpoint that does not say how far the model had shrunk.
        """
        odd = of_other_sizes(model, weights, prefix)
        if not odd or MODEL not in model.__dict__:
            return
        now: Plan = model.__dict__[MODEL].plan
        own = named_tensors(model)
        sizes = {name: now.original_shapes.get(name, tuple(tensor.shape)) for name, tensor in own.items()}
        for checkpoint in self._checkpoints():
            source = checkpoint / DIRECTORY
            if not source.is_dir():
                if _is_in(odd, checkpoint / SAFE_WEIGHTS_NAME):
                    raise self.missing(checkpoint.name.rpartition("-")[2], source)
            elif _has_sizes(source, odd, sizes):
                saved = read_save(source, read_model)
                if _is_of(odd, saved):
                    take(model, saved)
                    self.taken = checkpoint
                    return
        where = " and ".join(map(str, dict.fromkeys(self.directories)))
        given[-1].append(
            "A compiled model takes other sizes with the weights of a checkpoint of EcoSpaCallback only, and in "
            f"{where} is none that holds these; ecospa_fx.load makes a model from one that lies elsewhere"
        )

    def stand_in(self, trainer: Trainer) -> None:
        """Load what a Trainer with a way of its own to load a checkpoint cannot load."""
        if type(trainer)._load_from_checkpoint is not Trainer._load_from_checkpoint:
            trainer._load_from_checkpoint = partial(self._load, trainer, trainer._load_from_checkpoint)

    def _load(self, trainer: Trainer, theirs: Callable[..., None], directory: str, *given: Any) -> None:
        try:
            theirs(directory, *given)
        except Exception as error:
            source = Path(directory) / DIRECTORY
            if isinstance(error, EcoSpaError) or not source.is_dir() or MODEL not in trainer.model.__dict__:
                raise
            take(trainer.model, read_save(source, read_model))
            self.taken = Path(directory)

    def _checkpoints(self) -> Iterator[Path]:
        """Yield the checkpoints there are, the newest first."""
        found = {
            path
            for directory in self.directories
            for pattern in (f"{PREFIX_CHECKPOINT_DIR}-*", f"*/{PREFIX_CHECKPOINT_DIR}-*")
            for path in directory.glob(pattern)
            if path.is_dir()
        }
        yield from sorted(found, key=lambda path: (path.stat().st_mtime, path), reverse=True)


def calling_trainer() -> Trainer | None:
    """Find the Trainer that calls a callback: it tells it of all but itself."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), Trainer):
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]


def take(model: nn.Module, saved: Saved) -> None:
    """Give a model the sizes and weights of a save; whether each of its modules trains stays as it is."""
    modes = [(module, module.training) for module in model.modules()]
    refit(model, saved)
    for module, training in modes:
        module.training = training


def _has_sizes(source: Path, odd: Mapping[str, Tensor], original: Mapping[str, tuple[int, ...]]) -> bool:
    """Decide by the plan alone whether a save may hold weights."""
    try:
        saved = Plan.from_json((saved_files(source) / "plan.json").read_text(encoding="utf-8"))
    except (CheckpointError, OSError):
        return False
    return all(
        tuple(tensor.shape) == (saved.shape(name) if name in saved.original_shapes else original[name])
        for name, tensor in odd.items()
    )


def _is_of(odd: Mapping[str, Tensor], saved: Saved) -> bool:
    aliases = saved.about["aliases"]
    held = {name: saved.tensors.get(aliases.get(name, name)) for name in odd}
    return all(
        (mine := held[name]) is not None and torch.equal(mine.cpu(), tensor.detach().cpu())
        for name, tensor in odd.items()
    )


def _is_in(odd: Mapping[str, Tensor], file: Path) -> bool:
    """Decide whether a file of weights holds tensors of these names and sizes."""
    try:
        with safe_open(file, framework="pt") as weights:
            held = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return False
    return all(name not in held or held[name] == tuple(tensor.shape) for name, tensor in odd.items())
