"""Save and load a shrunk model, and what it takes to go on training it: safetensors and JSON, no pickle.

save -> saves.py            a directory that is whole at every moment
          -> rebuild.py         the model, its plan, its regions
          -> training_state.py  optimizers, schedules, generators of random numbers

docs/checkpoints.md describes every file, for whoever wants to read one without this library.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ecospa_fx.errors import CheckpointError, EcoSpaError
from ecospa_fx.model.compiled import MODEL, CompiledModel
from ecospa_fx.model.lookup import check_optimizer
from ecospa_fx.train.trainer import EcoSpaTrainer

from .directory import reading, saving
from .rebuild import read_model, rebuild, write_model
from .training_state import Training, listed, named, read_training, resume_training, write_training


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    trainer: EcoSpaTrainer | None = None,
    scheduler: Any = None,
    scaler: Any = None,
    also: Mapping[str, Any] | Iterable[Any] | None = None,
) -> None:
    """Write a compiled model, and what it takes to go on training it, to a directory.

    At every moment the directory holds one whole save, the old one or the new one, whatever is killed. Save between
    steps, after `zero_grad`: gradients are not saved.

    Args:
        model: a compiled model.
        directory: where. A save that is there is replaced once the new one is complete; other files stay.
        optimizer: its state goes along, or that of several.
        trainer: its schedule and scores go along.
        scheduler: a learning-rate scheduler, or several.
        scaler: a `torch.amp.GradScaler`.
        also: anything else, by name or as a list: averaged weights, a data loader (whatever has `state_dict` and
            `load_state_dict`), `torch.Generator`, `numpy.random.Generator`, `random.Random`.

    Raises:
        EcoSpaError: the model is not compiled.
        OptimizerError: an optimizer holds none of its parameters.
        CheckpointError: something cannot be saved without pickle, or another process is saving there.
    """
    compiled = _compiled(model)
    training = Training(listed(optimizer), listed(scheduler), scaler, trainer, named(also))
    for each in training.optimizer:
        check_optimizer(model, each)
    with saving(Path(directory)) as draft:
        write_model(draft, model, compiled)
        write_training(draft, model, training)
    compiled.save = draft.files["model.safetensors"]["sha256"]


def load(
    directory: str | os.PathLike[str],
    factory: Callable[[], nn.Module] | None = None,
    *,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Rebuild a saved model, compiled and at the sizes it was saved at.

    Random numbers that the factory draws do not count: generators are left where they were.

    Args:
        directory: what `save` wrote.
        factory: makes the original, unshrunk model; its weights are replaced. It may make it on the meta device, where
            that takes no time and no memory. A Hugging Face model needs none: it is rebuilt from its config.
        device: where it goes; None leaves everything where the factory puts it, and what has no memory on the CPU.

    Raises:
        CheckpointError: the directory is incomplete, altered, of another format version, or of another model.
    """
    saved, digest = reading(Path(directory), lambda save: (read_model(save), save.digest))
    model = rebuild(saved, factory, None if device is None else torch.device(device))
    model.__dict__[MODEL].save = digest
    return model


def resume(
    directory: str | os.PathLike[str],
    model: nn.Module,
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    trainer: EcoSpaTrainer | None = None,
    scheduler: Any = None,
    scaler: Any = None,
    also: Mapping[str, Any] | Iterable[Any] | None = None,
    rng: bool = True,
) -> None:
    """Give what was made for a loaded model the state it was saved with: training goes on as if it had never stopped.

    Make everything first, as for a new run, then call this once, right before the loop. Either all of it takes its
    state, or nothing is changed.

    Args:
        directory: what `save` wrote and `load` read.
        model: what `load` returned.
        optimizer: as given to `save`.
        trainer: as given to `save`, made with the same settings.
        scheduler: as given to `save`.
        scaler: as given to `save`.
        also: as given to `save`, or some of it.
        rng: let the generators of Python, numpy and torch go on where they were, too.

    Raises:
        CheckpointError: the directory holds no such state, or that of other things or of another model.
        OptimizerError: an optimizer holds none of the model's parameters.
    """
    compiled, source = _compiled(model), Path(directory)
    training = Training(listed(optimizer), listed(scheduler), scaler, trainer, named(also))
    for each in training.optimizer:
        check_optimizer(model, each)
    saved, digest = reading(source, lambda save: (read_training(save, training, rng), save.digest))
    if compiled.save not in (None, digest):
        raise CheckpointError(f"{source} has been saved to since this model was loaded from it; load it again")
    resume_training(model, training, saved, str(source))


def _compiled(model: nn.Module) -> CompiledModel:
    compiled: CompiledModel | None = model.__dict__.get(MODEL)
    if compiled is None:
        raise EcoSpaError(f"{type(model).__name__} is not compiled; call ecospa_fx.compile(model) first")
    return compiled
