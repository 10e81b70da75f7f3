"""EcoSpaCallback: shrink while the Trainer of transformers trains, and go on from its checkpoints.

on_init_end      compile; the model waits for its first call
on_train_begin   the schedule begins, or goes on where the checkpoint was taken
on_step_end      a sparsification step, if one is due (gradients were read right before the optimizer's step)
on_save          `ecospa_fx.save` into the Trainer's checkpoint
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ecospa_fx.api import compile
from ecospa_fx.checkpoint.directory import read_save
from ecospa_fx.checkpoint.rebuild import read_model, rebuild
from ecospa_fx.checkpoint.save_load import resume, save
from ecospa_fx.errors import CheckpointError, WrapperError
from ecospa_fx.logs import logger
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.state import Execution
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.train.trainer import EcoSpaTrainer

DIRECTORY = "ecospa_fx"
"""The directory inside a checkpoint that `ecospa_fx.save` writes and `ecospa_fx.load` reads."""


class EcoSpaCallback(TrainerCallback):
    """Shrinks the model of a transformers `Trainer` while it trains.

    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[EcoSpaCallback(target=0.5, end=8000)])
    >>> trainer.train()

    The optimizer's state shrinks along, the learning-rate schedule goes on. After an interruption build the model as
    for a new run, from its config, and call `trainer.train(resume_from_checkpoint=True)`. Each checkpoint holds a
    directory `ecospa_fx`, from which `ecospa_fx.load` builds the shrunk model.

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
        self._loss: float | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Compile the model, and prepare it to be given the weights of a shrunk checkpoint.

        Raises:
            WrapperError: the Trainer will spread the model over devices.
        """
        _check_one_device(args)
        model = given["model"]
        compile(model, execution=self.execution)
        model.register_load_state_dict_pre_hook(_keep_for_later)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Begin the schedule, or go on with it."""
        model = given["model"]
        source = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / DIRECTORY
        if state.global_step and self.trainer is None:
            if not source.is_dir():
                raise CheckpointError(
                    f"training resumes at step {state.global_step}, but {source} is missing, without which it is "
                    "unknown how far the model had shrunk; resume from a checkpoint in output_dir that was saved with "
                    "this callback"
                )
            rebuild(read_save(source, read_model), lambda: model, None)
        if self.trainer is None:
            self.trainer = EcoSpaTrainer(model, given["optimizer"], **self.settings)
            if state.global_step:
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
        if args.should_save:
            directory = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / DIRECTORY
            save(given["model"], directory, trainer=self.trainer)


def _check_one_device(args: TrainingArguments) -> None:
    spread = {
        "DistributedDataParallel": args.world_size > 1,
        "DataParallel": args.n_gpu > 1,
        "FSDP": bool(args.fsdp),
        "DeepSpeed": bool(args.deepspeed),
    }
    for wrapper, used in reversed(spread.items()):
        if used:
            raise WrapperError(
                f"this Trainer wraps the model in {wrapper} (world_size={args.world_size}, n_gpu={args.n_gpu}), whose "
                "gradients are kept at sizes of their own, which a shrink would change under it: ranks would drift "
                "apart. Train in one process on one device: without torchrun, with CUDA_VISIBLE_DEVICES=0"
            )


def _keep_for_later(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Replace weights of other sizes by the model's own: `on_train_begin` loads them, with their checkpoint's plan.

    The Trainer loads weights before it calls any callback.
    """
    if MODEL not in model.__dict__:
        return
    own = named_tensors(model)
    for name in [name for name, value in state_dict.items() if name in own and own[name].shape != value.shape]:
        state_dict[name] = own[name].detach()


__all__ = ["EcoSpaCallback"]
