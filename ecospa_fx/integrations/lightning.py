"""EcoSpaCallback: shrink while Lightning trains, and go on from its checkpoints.

setup                the module is compiled and waits for its first call
on_load_checkpoint   a checkpoint that has shrunk: the module takes its sizes before anything else takes its state
on_fit_start         the schedule begins, or goes on where the checkpoint was taken
on_train_batch_end   a sparsification step, if the optimizer took a step and one is due
state_dict           the plan of the module and the state of the schedule, as plain values and tensors
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ecospa_fx.api import compile
from ecospa_fx.checkpoint.metadata import check_description, describe
from ecospa_fx.checkpoint.packing import Packer, Unpacker
from ecospa_fx.checkpoint.rebuild import Saved, refit, transient_buffers
from ecospa_fx.checkpoint.rng_state import random_state
from ecospa_fx.checkpoint.training_state import Training, resume_training
from ecospa_fx.collectives import is_distributed
from ecospa_fx.errors import CheckpointError, EcoSpaError
from ecospa_fx.logs import logger
from ecospa_fx.model.compiled import MODEL, CompiledModel
from ecospa_fx.model.copies import listed
from ecospa_fx.model.execution import Execution
from ecospa_fx.model.old_weights import look_first, of_other_sizes
from ecospa_fx.model.optimizer_state import innermost
from ecospa_fx.passes.follow.saved import changes_in
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.plan import Plan
from ecospa_fx.ranks.members import ranks_of
from ecospa_fx.train.batches import tokens_of
from ecospa_fx.train.trainer import EcoSpaTrainer

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch import callbacks as lightning_callbacks
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ImportError as error:
    raise ImportError(
        "this callback needs Lightning 2 (`import lightning`): pip install 'ecospa-fx[lightning]'", name="lightning"
    ) from error

FORMAT = 1
AVERAGING = tuple(
    getattr(lightning_callbacks, name)
    for name in ("StochasticWeightAveraging", "WeightAveraging")
    if hasattr(lightning_callbacks, name)
)
"""The callbacks of Lightning that average weights: in a copy of the LightningModule, which shrinks along."""


class EcoSpaCallback(Callback):
    """Shrinks a module while the `Trainer` of Lightning trains it.

    >>> trainer = Trainer(max_steps=10000, callbacks=[EcoSpaCallback(target=0.5, start=1000, end=8000)])
    >>> trainer.fit(lightning_module, loader)

    The optimizer's state shrinks along, the learning-rate schedule goes on, `ecospa_parameters` and `ecospa_shrinks`
    are logged. After an interruption make everything as for a new run and call `trainer.fit(..., ckpt_path="last")`;
    `trainer.validate`, `test` and `predict` take such a checkpoint too, with this callback. `load_checkpoint` makes a
    shrunk module from one.

    Lightning does not save the state of random generators; this callback does. A run that resumes at the end of an
    epoch, or within one with a loader that has `state_dict` and `load_state_dict`, goes on bit for bit.

    Args:
        module: name of the submodule of the LightningModule that shrinks. None: the only child that has parameters,
            else the LightningModule itself by its `forward`.
        execution: see `ecospa_fx.compile`.
        wait_for_loss: let shrinks wait while the training loss is high. It is read at every step, which a GPU waits
            for.
        rng: restore the generators of Python, numpy and torch from the checkpoint.
        settings: of `EcoSpaTrainer`. `interval`, `start` and `end` count batches at which an optimizer of the module
            took a step. The averages of Lightning's callbacks shrink along; such a run cannot be resumed.

    Of several optimizers (a GAN's) those count that hold parameters of the module. For a module that is frozen when
    training begins, as by `BackboneFinetuning`, the schedule begins when an optimizer is given its parameters.

    Attributes:
        trainer: the `EcoSpaTrainer`, once training has begun.

    Raises:
        EcoSpaError: the strategy cannot follow a shrink, or several modules could be meant.
        CheckpointError: a checkpoint has shrunk and does not say how far, or is of another model or other settings.
    """

    def __init__(
        self,
        module: str | None = None,
        *,
        execution: Execution = "graph",
        wait_for_loss: bool = False,
        rng: bool = True,
        **settings: Any,
    ) -> None:
        self.module, self.execution, self.wait_for_loss, self.rng = module, execution, wait_for_loss, rng
        self.settings = settings
        self.trainer: EcoSpaTrainer | None = None
        self._model: nn.Module | None = None
        self._prefix = ""
        self._saved: dict[str, Any] | None = None  # state of a checkpoint, for the training that begins next
        self._deferred: list[str] = []  # names of weights that wait for on_load_checkpoint
        self._within_epoch = False  # an epoch has begun and not ended
        self._generators: Mapping[str, Any] | None = None  # their state, for when the loader has been started
        self._hook: Any = None
        self._seen, self._batches, self._tokens = 0, 0, 0  # optimizer steps; batches and tokens since the last one
        self._before: EcoSpaTrainer | None = None  # that of the `fit` before
        self._all_own, self._stepped, self._handles = True, False, list[Any]()  # whether optimizers of the module step

    @property
    def state_key(self) -> str:
        """The name of the state in a checkpoint: one for each module that shrinks."""
        key: str = self._generate_state_key(module=self.module)
        return key

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compile the module, and prepare it to be given the weights of a shrunk checkpoint."""
        strategy = trainer.strategy
        if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or isinstance(strategy, DeepSpeedStrategy):
            raise EcoSpaError(
                f"{type(strategy).__name__} holds gradients of several devices at sizes of its own, which a "
                'shrink would change under it; use Trainer(strategy="ddp"), or train on one device: Trainer(devices=1)'
            )
        self._prefix, self._model = module_of(pl_module, self.module)
        compile(self._model, execution=self.execution)
        self._deferred = []
        self._hook = look_first(self._model, self._defer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove all hooks; the module stays compiled."""
        self._defer_no_more()
        while self._handles:
            self._handles.pop().remove()

    def _defer(self, model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Replace weights of other sizes by the module's own: Lightning loads them before it calls any callback."""
        if model is not self._model:  # a copy of it
            return
        own = named_tensors(model)
        for name in of_other_sizes(model, state_dict, prefix):
            state_dict[prefix + name] = own[name].detach()
            self._deferred.append(name)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Bring the module to the sizes of a checkpoint, with its weights."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None or self._model is None:
            return  # of a run without this callback; if that has shrunk, `_check_loaded` says so
        keys = [each.state_key for each in trainer.callbacks if isinstance(each, AVERAGING)]
        if trainer.training and ("averaging_state" in checkpoint or checkpoint["callbacks"].keys() & keys):
            raise CheckpointError(
                "this checkpoint holds averaged weights, which Lightning puts in place before their copy of the model "
                "can be told its sizes; resume from a run without an averaging callback"
            )
        fill(self._model, state, checkpoint["state_dict"], self._prefix)
        self._deferred = []
        self._saved = state

    def _defer_no_more(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _check_loaded(self) -> None:
        """Check that no weights wait any more; from here on those of other sizes are refused, as by any module."""
        self._defer_no_more()
        if self._deferred:
            raise CheckpointError(
                f"{len(self._deferred)} weights of this checkpoint have other sizes than the model's, the first is "
                f"`{self._deferred[0]}`, and it does not say which rows and columns are left: it holds no state of "
                f"{self.state_key}. Load one that was saved in training with this callback, and not with "
                "save_weights_only=True"
            )

    def _settings(self, pl_module: LightningModule) -> dict[str, Any]:
        return {"gradients": "step" if pl_module.automatic_optimization else "optimizer", **self.settings}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the schedule, or go on with it."""
        self._check_loaded()
        settings = self._settings(pl_module)
        if pl_module.automatic_optimization and settings["gradients"] == "optimizer":
            raise EcoSpaError(
                'gradients="optimizer" reads them as a step of the optimizer begins, and Lightning runs backward '
                'inside of it; use gradients="step"'
            )
        self._before, self.trainer = self.trainer, None
        self._seen = trainer.global_step
        self._begin(trainer, settings)
        if self.trainer is None:
            logger("shrink").warning(
                "%s is frozen, and no optimizer holds its parameters: it shrinks once one does", self._named
            )

    @property
    def _named(self) -> str:
        return self._prefix[:-1] or "the module"

    def _begin(self, trainer: Trainer, settings: Mapping[str, Any]) -> None:
        """Begin the schedule, unless the module is frozen and waits for an optimizer."""
        assert self._model is not None
        mine = {id(p) for p in self._model.parameters()}
        own = [
            each
            for each in trainer.optimizers
            if any(id(p) in mine for group in each.param_groups for p in group["params"])
        ]
        if not own and not any(p.requires_grad for p in self._model.parameters()):
            return
        also = list(listed(settings.get("also", ())))
        also += [each for each in trainer.callbacks if isinstance(each, AVERAGING) and each not in also]
        before, self._before, saved, self._saved = self._before, None, self._saved, None
        self.trainer = EcoSpaTrainer(self._model, own or trainer.optimizers, **{**settings, "also": also})
        self._all_own = len(own) == len(trainer.optimizers)
        for each in (inner for one in own for inner in innermost(one)):
            self._handles.append(each.register_step_post_hook(self._note_step))
        if saved is not None:
            read = _unpacked(saved)
            self._seen = read["optimizer_steps"]
            parts = {"trainer": {"trainer": read["trainer"]}}
            own = read["random"] if "random_of_ranks" not in read else _of_this_rank(read["random_of_ranks"])
            if self.rng and own is not None:
                parts["random"] = {"random": own}
                self._generators = parts["random"] if read["within_epoch"] else None
            resume_training(self._model, Training(trainer=self.trainer), parts, "the checkpoint")
        elif before is not None:  # training goes on in the same process
            before.detach()
            self.trainer.load_state_dict(before.state_dict())

    def _note_step(self, *_: Any) -> None:
        self._stepped = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the schedule of a module that was frozen."""
        if self.trainer is None:
            self._begin(trainer, self._settings(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Within an epoch, restore the generators once its loader has been started; compare schedule and run."""
        whole = trainer.estimated_stepping_batches  # negative where loaders do not say how long they are
        if self.trainer is not None and whole > 0 and _counts_evenly(trainer):
            self.trainer.warn_if_beyond(whole - trainer.global_step)
        if self._generators is not None:
            assert self._model is not None
            resume_training(self._model, Training(), {"random": self._generators}, "the checkpoint")
            self._generators = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, if an optimizer took one, and shrink if a shrink is due."""
        self._within_epoch = not trainer.is_last_batch
        self._batches += 1
        self._tokens += tokens_of(batch) or 0
        stepped = trainer.global_step != self._seen and (self._all_own or self._stepped)
        if self.trainer is None or not stepped:
            return  # gradients are being accumulated, or only other networks have learned
        self._seen, self._stepped = trainer.global_step, False
        shrinks = len(self.trainer.history)
        loss = outputs.get("loss") if self.wait_for_loss and isinstance(outputs, Mapping) else None
        share = self._batches / trainer.num_training_batches
        try:
            self.trainer.step(loss=loss, tokens=self._tokens or None, epochs=share)
        except EcoSpaError as error:
            if self._model is not None and not self._model.__dict__[MODEL].captured:
                raise EcoSpaError(
                    f"training_step did not call {self._prefix[:-1] or 'its own forward'}, so nothing "
                    'is known of it; name the submodule that it calls: EcoSpaCallback("backbone", ...)'
                ) from error
            raise
        self._batches = self._tokens = 0
        if len(self.trainer.history) > shrinks:
            logger("shrink").info("step %d: %s parameters", trainer.global_step, f"{self.trainer.size:,}")
        if trainer._results is not None and not trainer.barebones:
            numbers = {"ecospa_parameters": self.trainer.size, "ecospa_shrinks": len(self.trainer.history)}
            pl_module.log_dict({name: float(number) for name, number in numbers.items()}, on_step=True, on_epoch=False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the weights of a shrunk checkpoint have been loaded."""
        self._check_loaded()

    on_test_start = on_predict_start = on_validation_start

    def state_dict(self) -> dict[str, Any]:
        """Return the state for Lightning's checkpoints: plain values and tensors, nothing to unpickle.

        As Lightning does, all ranks must call it: each has generators of its own.
        """
        if self.trainer is None:
            return {}
        model, packer = self.trainer.model, Packer()
        ranks = ranks_of(model)
        compiled: CompiledModel = model.__dict__[MODEL]
        own, passing = named_tensors(model), transient_buffers(model)
        document = {
            "plan": compiled.plan.to_json(),
            "model": describe(model, compiled),
            "buffers": {name: own[name] for name in compiled.plan.original_shapes if name in passing},
            "trainer": {"class": type(self.trainer).__name__, "state": self.trainer.state_dict()},
            "random": random_state(),
            "optimizer_steps": self._seen,
            "within_epoch": self._within_epoch,
        }
        if ranks:
            states = ranks.gathered(random_state(), "save")
            document["random_of_ranks"] = {str(rank): state for rank, state in states.items()}
        packed = packer.pack(document, "EcoSpaCallback")
        # As they are now: a checkpoint that is kept in memory must not change with the training that goes on.
        return {"format": FORMAT, "state": packed, "tensors": {name: t.clone() for name, t in packer.tensors.items()}}


def _counts_evenly(trainer: Trainer) -> bool:
    """Return whether the steps of a run are known as it begins: those of one optimizer, after equally many batches."""
    changing = lightning_callbacks.GradientAccumulationScheduler
    return len(trainer.optimizers) == 1 and not any(isinstance(each, changing) for each in trainer.callbacks)


def load_checkpoint(path: Any, pl_module: LightningModule, module: str | None = None) -> LightningModule:
    """Give a LightningModule, made as for a new run, the sizes and weights of a checkpoint of a run that shrank.

    >>> model = load_checkpoint("last.ckpt", MyModule())

    Args:
        path: a checkpoint file.
        pl_module: as its class makes it.
        module: as given to the callback.

    Returns:
        `pl_module`, with the module that has shrunk compiled.

    Raises:
        CheckpointError: the checkpoint holds no state of such a callback, or is of another model.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    callback = EcoSpaCallback(module)
    state = (checkpoint.get("callbacks") or {}).get(callback.state_key)
    if state is None:
        raise CheckpointError(f"{path} holds no state of {callback.state_key}; its own are {_keys(checkpoint)}")
    callback._prefix, callback._model = module_of(pl_module, module)
    fill(callback._model, state, checkpoint["state_dict"], callback._prefix)
    hook = look_first(callback._model, callback._defer)
    pl_module.load_state_dict(checkpoint["state_dict"])  # the weights outside of the module that shrinks
    hook.remove()
    return pl_module


def module_of(pl_module: LightningModule, name: str | None) -> tuple[str, nn.Module]:
    """Return the prefix of its names and the module of a LightningModule that shrinks.

    Raises:
        EcoSpaError: there is no such submodule, or several could be meant.
    """
    kind = type(pl_module).__name__
    if name is not None:
        try:
            return f"{name}." if name else "", pl_module.get_submodule(name)
        except AttributeError as error:
            raise EcoSpaError(f"{kind} has no submodule `{name}`") from error
    children = {name: child for name, child in pl_module.named_children() if next(child.parameters(), None) is not None}
    own = next(pl_module.parameters(recurse=False), None) is not None
    if len(children) == 1 and not own:
        return next((f"{name}.", child) for name, child in children.items())
    if is_overridden("forward", pl_module) and (children or own):
        return "", pl_module
    raise EcoSpaError(
        f"which module of {kind} is to shrink? {', '.join(children) or 'None'} of its children have parameters before "
        'training begins, and it has no forward of its own; make it in __init__ and name it: EcoSpaCallback("model")'
    )


def fill(model: nn.Module, state: Mapping[str, Any], weights: Mapping[str, Any], prefix: str) -> None:
    """Give a module the sizes and weights of a checkpoint; if it has shrunk otherwise, it gets its full size first.

    Raises:
        CheckpointError: the checkpoint is of another module; this one is unchanged then.
    """
    read = _unpacked(state)
    about = read["model"]
    check_description(about, "the checkpoint")
    own, passing = named_tensors(model), transient_buffers(model)
    tensors = {
        name: weights[prefix + name].detach().clone()
        for name in own
        if name not in about["aliases"] and isinstance(weights.get(prefix + name), Tensor)
    }
    changes = changes_in(about["attributes"], "the checkpoint")
    saved = Saved(
        about, Plan.from_json(read["plan"]), tensors | read["buffers"], frozenset(passing), {}, None, changes,
        "the checkpoint",
    )  # fmt: skip
    refit(model, saved)


def _unpacked(state: Mapping[str, Any]) -> dict[str, Any]:
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"the checkpoint's state of the callback has format {state.get('format')!r}; this version of ecospa_fx "
            f"reads {FORMAT}"
        )
    read: dict[str, Any] = Unpacker(state["tensors"], "the checkpoint").unpack(state["state"])
    return read


def _of_this_rank(states: Mapping[str, Any]) -> Any:
    """Return the random state of this rank; None for one beyond those that saved, which draws numbers of its own."""
    return states.get(str(distributed.get_rank() if is_distributed() else 0))


def _keys(checkpoint: Mapping[str, Any]) -> str:
    return ", ".join(map(str, checkpoint.get("callbacks") or {})) or "none"


__all__ = ["EcoSpaCallback", "load_checkpoint"]
