"""EcoSpaCallback: shrink while the Trainer of transformers trains, and go on from its checkpoints.

on_init_end      compile; the model waits for its first call
on_train_begin   the schedule begins, or goes on where the checkpoint was taken
on_step_end      a sparsification step, if one is due (gradients were read right before the optimizer's step)
on_save          `ecospa_fx.save` into the Trainer's checkpoint
on_train_end     the best checkpoint, if the Trainer has loaded it, at its own sizes

`hf_checkpoints.py` brings the model to the sizes of weights that the Trainer loads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ecospa_fx.api import compile
from ecospa_fx.checkpoint.directory import read_save
from ecospa_fx.checkpoint.rebuild import Saved, read_model
from ecospa_fx.checkpoint.save_load import resume, save
from ecospa_fx.errors import CheckpointError, WrapperError
from ecospa_fx.logs import logger
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.execution import Execution
from ecospa_fx.model.lookup import plan
from ecospa_fx.model.old_weights import look_first
from ecospa_fx.model.optimizer_state import forget_resized
from ecospa_fx.ranks.members import sharing_ranks
from ecospa_fx.train.trainer import EcoSpaTrainer

from .hf_checkpoints import DIRECTORY, CheckpointSizes, calling_trainer, take

HOOK = "_ecospa_checkpoint_sizes"  # key in a model's __dict__ of the hook that this callback has put on it


class EcoSpaCallback(TrainerCallback):
    """Shrinks the model of a transformers `Trainer` while it trains.

    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[EcoSpaCallback(target=0.5, end=8000)])
    >>> trainer.train()

    The optimizer's state shrinks along, the learning-rate schedule goes on. Under torchrun all ranks shrink as one, and
    the wrapper that the Trainer makes, `DistributedDataParallel`, follows. After an interruption build the model as
    for a new run, from its config, and call `trainer.train(resume_from_checkpoint=True)`. Each checkpoint holds a
    directory `ecospa_fx`, from which `ecospa_fx.load` builds the shrunk model.

    Under FSDP2 (`fsdp=True`) the model is sharded before the Trainer loads a checkpoint. To go on, make it at the sizes
    of that one: `Trainer(ecospa_fx.load("run/checkpoint-500/ecospa_fx"), ...)`.

    With `load_best_model_at_end=True` the model has the sizes of the best checkpoint in the end, and a warning in the
    log `ecospa_fx.shrink` says so where these are not the last ones: the best model may be larger than the target.

    Also after training, and in the same process, the model takes the sizes of a checkpoint with its weights: another
    `trainer.train(resume_from_checkpoint=...)` goes on from there. Other weights of other sizes are refused.

    With `model_init` every `train()` begins with another model. Let `model_init` return `callback.prepare(model)` to
    resume: the Trainer fills that model before it calls any callback.

    Args:
        execution: see `ecospa_fx.compile`; with `"module"` the model generates with a cache after training as before.
        settings: of `EcoSpaTrainer`; `interval`, `start` and `end` count the Trainer's optimizer steps.

    Attributes:
        trainer: the `EcoSpaTrainer`, once training has begun.
    """

    def __init__(self, *, execution: Execution = "graph", **settings: Any) -> None:
        self.execution = execution
        self.settings = {"gradients": "optimizer", **settings}
        self.trainer: EcoSpaTrainer | None = None
        self._state: Any = None  # the compiled state that `trainer` was made for: another one has other sizes
        self._sizes = CheckpointSizes()
        self._loss: float | None = None

    def prepare(self, model: nn.Module) -> nn.Module:
        """Compile a model, and let it take the sizes of a checkpoint whose weights it is given; return it."""
        if MODEL not in model.__dict__ or not plan(model).original_shapes:
            compile(model, execution=self.execution)  # one that has taken sizes of a checkpoint is as it was there
        if HOOK not in model.__dict__:
            model.__dict__[HOOK] = look_first(model, self._sizes)
        return model

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Compile the model, and prepare it to be given the weights of a shrunk checkpoint.

        Raises:
            WrapperError: the Trainer will spread the model over devices in a way that cannot follow a shrink.
        """
        _check_wrapper(args)
        self._sizes.look_in(args)
        if (trainer := calling_trainer()) is not None:
            self._sizes.stand_in(trainer)
        if given.get("model") is not None:
            self.prepare(given["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Begin the schedule, or go on with it."""
        model, optimizer = given["model"], given["optimizer"]
        self._sizes.look_in(args)
        self.prepare(model)
        self._loss = None
        if state.global_step:
            source = self._sizes.of_step(state)
            if not source.is_dir():
                raise self._sizes.missing(state.global_step, source)
            if sharing_ranks(model):  # it has the sizes of the checkpoint, or the Trainer could not have filled it
                self._begin(model, optimizer)
                resume(source, model, trainer=self.trainer, rng=False)
            else:
                self._go_on_from(source, read_save(source, read_model), model, optimizer)
        elif self.trainer is None or self.trainer.model is not model:
            self._begin(model, optimizer)
        elif self.trainer.optimizer is not optimizer or self._state is not model.__dict__[MODEL]:
            before = self.trainer.state_dict()
            self._begin(model, optimizer)
            self.trainer.load_state_dict(before)
        assert self.trainer is not None
        if state.max_steps > 0:
            self.trainer.warn_if_beyond(state.max_steps - state.global_step)

    def _begin(self, model: nn.Module, optimizer: Optimizer) -> None:
        if self.trainer is not None:
            self.trainer.detach()
        self.trainer = EcoSpaTrainer(model, optimizer, **self.settings)
        self._state = model.__dict__[MODEL]

    def _go_on_from(self, source: Path, saved: Saved, model: nn.Module, optimizer: Optimizer) -> None:
        """Give the model the sizes and weights of a save, and the schedule the state in it."""
        take(model, saved)
        self._begin(model, optimizer)
        resume(source, model, trainer=self.trainer, rng=False)  # the Trainer has its own for the rest

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Count the step, and shrink if a shrink is due."""
        assert self.trainer is not None
        shrinks = len(self.trainer.history)
        self.trainer.step(loss=self._loss)
        self._loss = None
        if len(self.trainer.history) > shrinks:
            logger("shrink").info("step %d: %s parameters", state.global_step, f"{self.trainer.size:,}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Write size and shrinks into the Trainer's logs, and read the loss from them."""
        logs = given.get("logs") or {}
        self._loss = logs.get("loss", self._loss)
        if self.trainer is not None:
            numbers = {"ecospa_parameters": self.trainer.size, "ecospa_shrinks": len(self.trainer.history)}
            logs.update(numbers)
            if state.log_history:
                state.log_history[-1].update(numbers)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Save the shrunk model and the schedule into the checkpoint that has just been written."""
        if args.should_save or sharing_ranks(given["model"]):  # all ranks write their shards
            save(given["model"], self._sizes.of_step(state), trainer=self.trainer)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Go to the sizes of the best checkpoint, if the Trainer has loaded its weights."""
        model = given["model"]
        if self.trainer is not None and args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._finish_with(Path(state.best_model_checkpoint) / DIRECTORY, model, given["optimizer"])

    def _finish_with(self, source: Path, model: nn.Module, optimizer: Optimizer) -> None:
        if not source.is_dir():
            raise CheckpointError(
                f"the best checkpoint is {source.parent}, but {source} is missing, without which it is unknown how far "
                "the model had shrunk there; ecospa_fx.load gives the model of a checkpoint that has it"
            )
        saved = read_save(source, read_model)
        # Its weights have been loaded, at their sizes: those of an adapter alone may have fitted before.
        if plan(model) == saved.plan and model.__dict__[MODEL] is self._state:
            return
        assert self.trainer is not None
        last = len(self.trainer.history)
        self._go_on_from(source, saved, model, optimizer)
        forget_resized(optimizer)
        logger("shrink").warning(
            "the best checkpoint is %s: the model has its sizes again, %s parameters, after %d of %d shrinks",
            source.parent, f"{self.trainer.size:,}", len(self.trainer.history), last,
        )  # fmt: skip


def _check_wrapper(args: TrainingArguments) -> None:
    sharded = bool(args.fsdp)
    version = (getattr(args, "fsdp_plugin_args", None) or {}).get("fsdp_version", 1)
    if sharded and version == 2:
        if args.load_best_model_at_end:
            raise WrapperError(
                "load_best_model_at_end=True would load weights of other sizes into a model that FSDP2 has sharded "
                "already. Leave it out, and load the best checkpoint afterwards: ecospa_fx.load(checkpoint/ecospa_fx)"
            )
        sharded = False
    spread = {"DataParallel": args.n_gpu > 1, "FSDP1": sharded, "DeepSpeed": bool(args.deepspeed)}
    for wrapper, used in reversed(spread.items()):
        if used:
            raise WrapperError(
                f"this Trainer wraps the model in {wrapper} (world_size={args.world_size}, n_gpu={args.n_gpu}), whose "
                "gradients are kept at sizes of their own, which a shrink would change under it: ranks would drift "
                "apart. Train under torchrun, which wraps it in DistributedDataParallel, with FSDP2 (fsdp=True), or in "
                "one process on one device, with CUDA_VISIBLE_DEVICES=0"
            )


__all__ = ["EcoSpaCallback"]
