"""EcoSpaTrainer: the schedule. Scores while the model trains, shrinks it step by step, stops at the target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, Literal, Protocol, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.compensate.compensation import GATHERING, Compensation
from ecospa_fx.compensate.forecast import Forecast
from ecospa_fx.couple.constraints import Constraints, Frozen, HeadDims
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import EcoSpaError, OptimizerError, TargetError
from ecospa_fx.logs import logger
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.copies import copies_of, listed
from ecospa_fx.model.cost import Cost
from ecospa_fx.model.diff import ModuleDiff
from ecospa_fx.model.lookup import check_optimizer, is_captured
from ecospa_fx.model.optimizer_state import check_can_follow, several
from ecospa_fx.model.shrinking import shrink
from ecospa_fx.score.scores import Score, ScoreFunction
from ecospa_fx.score.step_watcher import StepWatcher

from .latency import Latency
from .loss_spikes import LossSpikes
from .policies import Adaptive, Paper, Policy, check_adaptive
from .schedule import Schedule, ScheduleUnit, SparsityCurve
from .sparsifier import Among, CoupledSparsifier, check_settings

Gradients = Literal["step", "optimizer", "backward"]
Preset = Literal["pretrain", "finetune"]
Policies = Literal["paper", "adaptive"]
BeforeShrink = Callable[[nn.Module, Mapping[Coupling, Tensor], Any], None]

PRESETS: dict[Preset, dict[str, float]] = {
    "pretrain": {"top_k": 0.3, "theta": 0.9},
    "finetune": {"top_k": 0.1, "theta": 0.95},
}
"""Settings by the advice of the paper: from scratch its own; what is already trained loses less at a time."""

MOST_POSTPONED = 10
"""Sparsification steps in a row that wait for the loss to come down; the next one no longer does."""


class LossListener(Protocol):
    """An object that follows training, such as `ecospa_fx.Watch`."""

    def step(self, loss: float) -> None:
        """Take the loss of a training step, after the trainer has taken that step."""


class EcoSpaTrainer:
    """Shrinks a model while it trains (arXiv 2511.11641).

    >>> trainer = EcoSpaTrainer(model, optimizer, target=0.5)
    >>> for batch in loader:
    ...     loss = model(**batch).loss
    ...     loss.backward()
    ...     optimizer.step()
    ...     trainer.step(loss=loss)
    ...     optimizer.zero_grad()

    Args:
        model: a compiled model; it may not have been called yet.
        optimizer: holds its parameters; their state is carried through every shrink. Or several, that hold some each.
        target: share of the model's original cost that remains at the end.
        cost: what that is a share of: `"parameters"`, `"flops"` of a forward, `"bytes"` of training (weights,
            gradients and optimizer state), or a `Latency`, the measured time of a forward.
        among: `"all"` of it, or what is `"prunable"`: on some coupling.
        policy: `"paper"`, or `"adaptive"`: what goes where is decided by what the loss is expected to rise by, and
            what stays takes over; `top_k`, `theta` and scores say nothing then. See docs/absorption.md.
        preset: `"pretrain"` or `"finetune"`: what `top_k` and `theta` are by default, 30% and 90% or 10% and 95%.
        top_k: share of the couplings that shrink at a sparsification step, the least important ones.
        theta: share of a coupling's score that is kept when it shrinks.
        interval: training steps between sparsification steps; or tokens or epochs, see `unit`. Where there is an end
            it is stretched or squeezed a little, so that the last one falls on it.
        start: training step of the first one.
        end: training step by which the target is reached. Where the paper's rule is too slow for that, more couplings
            take part, then theta gives way. Without it the rule runs until the target is reached.
        shape: how the size goes down to the target by `end`: `"linear"`, `"cubic"`, `"cosine"` or `"one_shot"`.
        shrinks: number of sparsification steps between `start` and `end`, in place of `interval`.
        unit: what `interval`, `start` and `end` count: `"steps"`, `"tokens"` or `"epochs"`. See `Schedule`.
        score: importance of a coupling, see `CoupledEstimator`: a name, or a function of a weight and its gradient.
        index_score: which entries of a coupling go first: `"norms"`, the product of the norms of their slices, as the
            paper has it, or any score.
        decay: see `CoupledEstimator`.
        window: see `CoupledEstimator`.
        seed: of `"random"` scores.
        spike: a shrink waits for the next sparsification step, and so do those after it, while the smoothed loss is
            more than this share above what it was before the last shrink. Only if `step` is told the loss.
        min_keep: entries that every coupling keeps.
        round_to: widths come out as multiples of it; see `Constraints`.
        head_dims: `"per_head"`, `"per_layer"` or `"off"`; see `Constraints`.
        equal_head_dims: queries and keys keep as many dims as values; see `Constraints`.
        frozen: name patterns, modules and couplings that stay whole.
        gradients: where they are read: at `"step"`, the call of `step()`; right before each step of the `"optimizer"`;
            or in `"backward"`, for optimizers that step there and free them at once. See `CoupledEstimator`.
        before_shrink: called with the model, what will be kept and the optimizer right before each shrink.
        also: copies of the model that shrink with it, such as averages of its weights; see `ecospa_fx.shrink`.
        absorb: what stays takes over what goes, by least squares on what the weights met in the last training steps
            before a shrink; see docs/absorption.md. By default with `policy="adaptive"` only.
        rotate: couplings between linear maps that are about to shrink first get the basis in which the entries that go
            carry least; see `ecospa_fx.rotate`. What an optimizer cannot follow keeps its basis, and the log says so.
            By default as `absorb`.

    Attributes:
        steps: training steps seen.
        now: what has been seen in the unit of the schedule.
        done: the target is reached; nothing more will be removed.
        history: a dict per shrink: `step`, `size` (parameters left), `removed` (coupling name -> entries, in
            each context), `importance` (coupling name -> what it scored), and of `"adaptive"` also `expected` (coupling
            name -> what the loss was expected to rise by).
        forecast: with `policy="adaptive"`, what each coupling was expected to cost at the last sparsification step.
        postponed: a dict per sparsification step that waited for the loss: `step`, `loss` (smoothed), `before`.
        last_shrink: sizes of every layer before and after the last shrink, once there was one.
        also: a list, to which a copy that is made later may be added.

    Raises:
        TargetError: a setting is out of range, or the target is below what can be reached.
        OptimizerError: the optimizer holds none of the model's parameters, or cannot be carried through a shrink.
        ShrinkError: something in `also` is no copy of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        target: float = 0.5,
        cost: Cost | Latency = "parameters",
        among: Among = "all",
        policy: Policies = "paper",
        preset: Preset = "pretrain",
        top_k: float | None = None,
        theta: float | None = None,
        interval: float = 100,
        start: float = 0,
        end: float | None = None,
        shape: SparsityCurve = "linear",
        shrinks: int | None = None,
        unit: ScheduleUnit = "steps",
        score: str | ScoreFunction | Score = "fisher",
        index_score: str | ScoreFunction | Score = "norms",
        decay: float | None = None,
        window: int | None = None,
        seed: int = 0,
        spike: float = 0.1,
        min_keep: int = 1,
        round_to: int = 1,
        head_dims: HeadDims = "per_head",
        equal_head_dims: bool = False,
        frozen: Sequence[Frozen] = (),
        gradients: Gradients = "step",
        before_shrink: BeforeShrink | None = None,
        also: Any = (),
        absorb: bool | None = None,
        rotate: bool | None = None,
    ) -> None:
        if MODEL not in model.__dict__:
            raise EcoSpaError(f"{type(model).__name__} is not compiled; call ecospa_fx.compile(model) first")
        for name, value, options in (
            ("policy", policy, get_args(Policies)),
            ("preset", preset, PRESETS),
            ("gradients", gradients, get_args(Gradients)),
        ):
            if value not in options:
                raise TargetError(f"{name}={value!r} is none of {', '.join(map(repr, options))}")
        if policy == "adaptive":
            check_adaptive(end, shape, score, index_score, top_k=top_k, theta=theta, decay=decay, window=window)
        top_k = PRESETS[preset]["top_k"] if top_k is None else top_k
        theta = PRESETS[preset]["theta"] if theta is None else theta
        check_settings(target=target, top_k=top_k, theta=theta)
        constraints = Constraints(min_keep, round_to, head_dims, equal_head_dims, frozen)
        self.schedule = Schedule(interval, start, end, shape, shrinks, unit)
        self.optimizers = several(optimizer)
        if not self.optimizers:
            raise OptimizerError("no optimizer is given; pass the one made from model.parameters()")
        for each in self.optimizers:
            check_optimizer(model, each)
            check_can_follow(each)
        copies_of(model, also)
        self.model, self.optimizer, self.also = model, optimizer, list(listed(also))
        self.before_shrink = before_shrink
        self.steps = 0
        self.now: float = 0
        self.done = False
        self.history: list[dict[str, Any]] = []
        self.postponed: list[dict[str, Any]] = []
        self.last_shrink: ModuleDiff | None = None
        self.forecast: Forecast | None = None
        self._spikes = LossSpikes(spike)
        self._waiting: float = 0  # what the schedule has been put off by
        self._in_a_row = 0
        self._from: int | None = None  # the cost when the first sparsification step came
        self._optimizer_steps = StepWatcher(model, self.optimizers) if gradients == "step" else None
        adaptive = policy == "adaptive"
        absorb, rotate = (adaptive if each is None else each for each in (absorb, rotate))
        self._compensation = Compensation(model, absorb, rotate)
        self._owed = False  # a sparsification step for which nothing had been read
        self._settings: dict[str, Any] = {
            "target": target, "cost": cost, "among": among, "top_k": top_k, "theta": theta, "constraints": constraints,
        }  # fmt: skip
        scoring: dict[str, Any] = {"decay": decay, "window": window, "optimizer": optimizer, "seed": seed}
        self.policy: Policy
        if adaptive:
            self.policy = Adaptive(model, self.optimizers, self._settings, self._compensation)
        else:
            self.policy = Paper(model, self.optimizers, self._settings, score, index_score, scoring)
        for estimator in self.policy.estimators:
            if gradients == "optimizer":
                estimator.attach(*self.optimizers)
            elif gradients == "backward":
                estimator.attach_backward()
        self._described: dict[str, Any] = {
            **self.policy.described, "decay": decay, "window": window, "seed": seed,
            "spike": spike, "gradients": gradients, "absorb": absorb, "rotate": rotate,
        }  # fmt: skip
        if is_captured(model):
            self._ready()

    def step(
        self, *, loss: Tensor | float | None = None, tokens: int | None = None, epochs: float | None = None
    ) -> None:
        """Call it after every `optimizer.step()`, while the gradients are still there (or not, see `gradients`).

        Args:
            loss: of this step, to let shrinks wait while it is high. Where it is a tensor it is read at once, which a
                GPU waits for; None watches nothing.
            tokens: in this step's batch, where the schedule counts them.
            epochs: share of an epoch in this step, `1 / len(loader)`, where the schedule counts these.

        Raises:
            OptimizerError: no parameter of a coupling has a gradient.
            TargetError: the schedule counts what it has not been told.
        """
        amount = {"steps": 1, "tokens": tokens, "epochs": epochs}[self.schedule.unit]
        if amount is None:
            raise TargetError(f"the schedule counts {self.schedule.unit}: call trainer.step({self.schedule.unit}=...)")
        self.steps += 1
        before, self.now = self.now, self.now + amount
        if loss is not None:
            self._spikes.see(float(loss.detach()) if isinstance(loss, Tensor) else float(loss))
        if self.done:
            return
        self._ready()
        read = self._read()
        due = self.schedule.due(before - self._waiting, self.now - self._waiting) or self._owed
        # Where a gradient scaler has left out every step so far, the first one that is taken comes first.
        self._owed = due and not read and any(estimator.empty for estimator in self.policy.estimators)
        if due and not self._owed and not self._postpone():
            self.sparsify()
        now = self.now - self._waiting
        self._compensation.gather(not self.done and (self._owed or self.schedule.due(now, now + GATHERING * amount)))

    def _read(self) -> bool:
        """Read the gradients of this step, if nothing else does; whether it was taken at all."""
        if self._optimizer_steps is None:
            return True
        readings = list(self._optimizer_steps.readings())
        for estimator in self.policy.estimators:
            for number, reading in enumerate(readings):
                estimator.accumulate(**reading._asdict(), new_step=number == 0)
        return bool(readings)

    def sparsify(self) -> None:
        """Take a sparsification step now."""
        sparsifier = self._ready()
        for estimator in self.policy.estimators:
            if estimator.empty:
                raise OptimizerError(estimator.reader.if_empty)
        decision = self.policy.decide(self._due(sparsifier))
        self.forecast = decision.forecast
        if decision.keeps:
            keeps = self._compensation.prepared(decision.keeps, self.optimizers, self.also)
            if self.before_shrink is not None:
                self.before_shrink(self.model, keeps, self.optimizer)
            self._spikes.shrunk()
            removed = {coupling.name: coupling.size - keep.shape[-1] for coupling, keep in keeps.items()}
            entry: dict[str, Any] = {
                "step": self.steps,
                "removed": removed,
                "importance": decision.importance,
            }
            if decision.forecast is not None:
                entry["expected"] = decision.forecast.rises(removed)
            self.last_shrink = shrink(
                self.model, keeps, optimizer=self.optimizers, also=self.also, absorb=self._compensation.absorb
            )
            self._compensation.reset()
            self.history.append(entry | {"size": self.size})
        for estimator in self.policy.estimators:
            estimator.reset()
        sparsifier.measure()
        self.done = sparsifier.reached()
        if self.done:
            for estimator in self.policy.estimators:
                estimator.detach()
            if self._optimizer_steps is not None:
                self._optimizer_steps.detach()
            self._compensation.detach()

    @property
    def _latency(self) -> Latency | None:
        cost = self._settings["cost"]
        return cost if isinstance(cost, Latency) else None

    @property
    def hears_the_loss(self) -> bool:
        """`step` has been told a loss, so that shrinks wait while it is high."""
        return self._spikes.level is not None

    @property
    def size(self) -> int:
        """Parameters of the model now."""
        return sum(p.numel() for p in self.model.parameters())

    def _ready(self) -> CoupledSparsifier:
        """The sparsifier, made once the couplings are known."""
        self._compensation.look()
        return self.policy.ready()

    def _due(self, sparsifier: CoupledSparsifier) -> int | None:
        """What the model may cost after this step by the schedule."""
        share = self.schedule.share(self.now - self._waiting)
        sizes = sparsifier.sizes()
        now = sizes.total({})
        if self._from is None:
            self._from = now
        if share is None:
            return None
        return round(self._from - share * (self._from - sparsifier.target_size(sizes)))

    def _postpone(self) -> bool:
        """Put the schedule off by one interval, if the loss has not got over the last shrink."""
        if not self._spikes.spiking or self._in_a_row >= MOST_POSTPONED:
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        self._waiting += self.schedule.step
        level, before = self._spikes.level, self._spikes.before
        self.postponed.append({"step": self.steps, "loss": level, "before": before})
        logger("shrink").warning(
            "step %d: loss %s, %s before the last shrink; the next one waits%s", self.steps, _number(level),
            _number(before), "" if self._in_a_row < MOST_POSTPONED else " for the last time",
        )  # fmt: skip
        return True

    def fit(
        self,
        loader: Iterable[Any],
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        scheduler: Any = None,
        watch: LossListener | None = None,
    ) -> list[float]:
        """Train over a loader.

        Args:
            loader: batches: a mapping of keyword arguments of a model whose output has `.loss`, or an `(inputs,
                targets)` pair with `loss`.
            loss: `loss(outputs, targets)` for pairs.
            scheduler: a learning-rate scheduler, stepped once per batch.
            watch: its `step` is called with the loss of each batch, as that of `ecospa_fx.Watch`.

        Returns:
            The loss of each batch.
        """
        losses = []
        epoch = 1 / len(loader) if isinstance(loader, Sized) and len(loader) else None
        for batch in loader:
            if isinstance(batch, Mapping):
                value = self.model(**batch).loss
            elif loss is not None:
                inputs, targets = batch
                value = loss(self.model(inputs), targets)
            else:
                raise EcoSpaError("batches are no mappings; pass loss=, a function of outputs and targets")
            value.backward()
            for optimizer in self.optimizers:
                optimizer.step()
            self.step(loss=value, tokens=tokens_of(batch), epochs=epoch)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
            losses.append(float(value.detach()))
            if watch is not None:
                watch.step(losses[-1])
        return losses

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state: plain numbers and the accumulated sums."""
        return {
            "steps": self.steps,
            "now": self.now,
            "done": self.done,
            "history": self.history,
            "postponed": self.postponed,
            "waiting": self._waiting,
            "waits_in_a_row": self._in_a_row,
            "owed": self._owed,
            "from": self._from,
            "spikes": self._spikes.state_dict(),
            "latencies": self._latency.points if self._latency is not None else [],
            "settings": {
                **{name: value for name, value in self._settings.items() if name != "constraints"},
                **({"cost": "latency"} if self._latency is not None else {}),
                **self._settings["constraints"].described(),
                **self.schedule.described(),
                **self._described,
            },
            "scores": [estimator.state_dict() for estimator in self.policy.estimators],
            "compensation": self._compensation.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.steps, self.now, self.done = state["steps"], state["now"], state["done"]
        self.history, self.postponed = list(state["history"]), list(state["postponed"])
        self._waiting, self._in_a_row, self._from = state["waiting"], state["waits_in_a_row"], state["from"]
        self._owed = state["owed"]
        self._spikes.load_state_dict(state["spikes"])
        if self._latency is not None:
            self._latency.points = [(int(flops), float(seconds)) for flops, seconds in state["latencies"]]
        for estimator, scores in zip(self.policy.estimators, state["scores"], strict=True):
            estimator.load_state_dict(scores)
            if self.done:
                estimator.detach()
        self._compensation.load_state_dict(state.get("compensation", {}))
        if self.done:
            self._compensation.detach()


def tokens_of(batch: Any) -> int | None:
    """Tokens of a batch: the entries of its first tensor of whole numbers."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    whole = (v for v in values if isinstance(v, Tensor) and not v.is_floating_point())
    return next((tensor.numel() for tensor in whole), None)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
