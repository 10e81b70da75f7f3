"""Save, load and resume: a shrunk model and the state of its training, in safetensors and JSON, without pickle.

save -> directory.py       a directory that holds a complete save at every moment
     -> rebuild.py         the model, its plan, its regions
     -> training_state.py  optimizers, schedules, random number generators

docs/checkpoints.md describes every file, for readers without this library.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ecospa_fx.arguments import FACTORY, FLAG, MODULE, PATH, TRAINING, instance, optional, shown, takes
from ecospa_fx.errors import ArgumentError
from ecospa_fx.model.lookup import check_optimizer, compiled_state
from ecospa_fx.model.optimizer_state import several
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.ranks.fsdp2 import reshard
from ecospa_fx.ranks.members import ranks_of
from ecospa_fx.ranks.shards import is_sharded
from ecospa_fx.ranks.wrappers import looks_inside
from ecospa_fx.train.nested import NestedSizes
from ecospa_fx.train.trainer import EcoSpaTrainer

from .directory import ALONE, Draft, Save, read_save, saving
from .nested_sizes import at_size, write_sizes
from .rebuild import Saved, check_same, filled, is_as_saved, read_model, rebuild, refitted, write_model
from .resized_copies import copies_resized
from .sharded import save_by_all
from .training_state import Training, as_tuple, by_name, read_training, resume_training, write_training


@takes(
    model=MODULE, directory=PATH, **TRAINING,
    nested=optional(instance("what trainer.nested() returned", NestedSizes)),
)  # fmt: skip
@looks_inside
def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    trainer: EcoSpaTrainer | None = None,
    scheduler: Any = None,
    scaler: Any = None,
    also: Mapping[str, Any] | Iterable[Any] | None = None,
    nested: NestedSizes | None = None,
) -> None:
    """Write a compiled model, and the state of its training, to a directory.

    At every moment the directory holds one complete save, the old one or the new one, even if the process is killed.
    Save between steps, after `zero_grad`: gradients are not saved.

    Args:
        model: a compiled model.
        directory: the directory. An earlier save in it is replaced once the new one is complete; other files stay.
        optimizer: an optimizer, or several, whose state is saved.
        trainer: the trainer, whose schedule and scores are saved.
        scheduler: a learning-rate scheduler, or several.
        scaler: a `torch.amp.GradScaler`.
        also: other objects, by name or as a list: averaged weights, a data loader (anything with `state_dict` and
            `load_state_dict`), `torch.Generator`, `numpy.random.Generator`, `random.Random`.
        nested: sizes of the model, of which `load(size=)` takes one; they share the weights in the directory.

    Raises:
        EcoSpaError: the model is not compiled, or `nested` is of another model.
        OptimizerError: an optimizer holds none of its parameters.
        CheckpointError: some state cannot be saved without pickle, or another process is saving there.
    """
    compiled = compiled_state(model)
    training = Training(
        tuple(several(() if optimizer is None else optimizer)), as_tuple(scheduler), scaler, trainer, by_name(also)
    )
    for each in training.optimizer:
        check_optimizer(model, each)
    reshard(model)

    def write(draft: Draft) -> None:
        write_model(draft, model, compiled)
        write_training(draft, model, training)
        if nested is not None:
            write_sizes(draft, model, nested)

    if any(map(is_sharded, model.parameters())):
        save_by_all(ranks_of(model), Path(directory), write)
    else:
        with saving(Path(directory)) as draft:
            write(draft)


@takes(directory=PATH, factory=optional(FACTORY))
def load(
    directory: str | os.PathLike[str],
    factory: Callable[[], nn.Module] | None = None,
    *,
    device: torch.device | str | None = None,
    size: float | str | None = None,
) -> nn.Module:
    """Load a saved model, compiled and at the sizes at which it was saved.

    Random number generators keep their states, whatever the factory draws.

    Args:
        directory: a directory that `save` wrote.
        factory: makes the original, unshrunk model; its weights are replaced. It may make it on the meta device, which
            takes no time and no memory. A Hugging Face model needs no factory: it is rebuilt from its config.
        device: device of the model; None: as the factory places it, and meta tensors on the CPU. `"meta"`: the model
            at the sizes of the save and without values, to be sharded over ranks, `to_empty`, and filled by `resume`.
        size: the target of one of the sizes that were saved with `nested=`; None: the largest.

    Raises:
        CheckpointError: the directory is incomplete, altered, of another format version, or of another model.
    """
    home = None if device is None else _device(device)
    values = home is None or home.type != "meta"
    with torch.device("cpu"):  # within torch.device("meta") only the factory makes tensors there
        saved = read_save(
            Path(directory),
            lambda save: at_size(save, read_model(save, values=values), size),
            values=values,
        )
    return rebuild(saved, factory, home)


@takes(directory=PATH, model=MODULE, rng=FLAG, **TRAINING)
@looks_inside
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
    """Restore a save: the model, optimizers, trainer and the rest go on as if training had never stopped there.

    Make all objects first, as for a new run, then call this once, right before the loop; or call it within a run, to
    go back to an earlier save. Either all of them take their state, or none is changed. A model that is not as it was
    saved, such as a new one at its full size or one that has been trained since, gets the sizes and the weights of the
    save; its parameters stay the same objects.

    Args:
        directory: the directory that `save` wrote and `load` read.
        model: the model that `load` returned, the one that was saved, or a new one, compiled as for a new run.
        optimizer: as given to `save`.
        trainer: as given to `save`, made with the same settings.
        scheduler: as given to `save`.
        scaler: as given to `save`.
        also: as given to `save`, or a part of it.
        rng: restore the global generators of Python, numpy and torch, too.

    Raises:
        CheckpointError: the directory does not hold this state, or holds that of other objects or of another model.
        OptimizerError: an optimizer holds none of the model's parameters.
    """
    compiled, source = compiled_state(model), Path(directory)
    training = Training(
        tuple(several(() if optimizer is None else optimizer)), as_tuple(scheduler), scaler, trainer, by_name(also)
    )
    for each in training.optimizer:
        check_optimizer(model, each)
    ranks = ranks_of(model)
    sharded = any(map(is_sharded, model.parameters()))
    reshard(model)

    def take() -> None:
        def read(save: Save) -> tuple[Saved, dict[str, dict[str, Any]]]:
            saved = read_model(save, named_tensors(model) if sharded else {})
            return saved, read_training(save, training, rng, model)

        # Ranks that share a model see one directory; those that each have all of it may have copies.
        saved, state = read_save(source, read, ranks=ranks if sharded else ALONE)
        if sharded:
            check_same(model, compiled.plan, saved)
        ranks.meet("resume")
        as_saved = not sharded and is_as_saved(model, compiled.plan, saved)
        with ExitStack() as stack:
            if not as_saved:
                stack.enter_context((filled if sharded else refitted)(model, saved))
            if not sharded:
                stack.enter_context(copies_resized(model, training.stateful("also"), state.get("also", {}), saved))
            resume_training(model, training, state, str(source))
            ranks.meet("resume")

    ranks.together("resume", take)


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except Exception as error:
        line = str(error).split("\n")[0]
        raise ArgumentError(f"load: `device` is {shown(device)}; it must be a device: {line}") from error
