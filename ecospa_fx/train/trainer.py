"""EcoSpaTrainer: scores a model while it trains, shrinks it step by step, and stops at the target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.arguments import (
    FLAG,
    FUNCTION,
    MODULE,
    NAMED,
    NUMBER,
    SEVERAL,
    WHOLE,
    check,
    check_state,
    having,
    optional,
    takes,
)
from ecospa_fx.compensate.compensation import GATHERING, Compensation, CompensationSettings
from ecospa_fx.compensate.forecast import EntryOrder, Forecast
from ecospa_fx.couple.constraints import Constraints, Frozen, HeadDims, Uniform
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import OptimizerError
from ecospa_fx.logs import logger
from ecospa_fx.model.copies import copies_of, listed
from ecospa_fx.model.cost import Cost
from ecospa_fx.model.diff import ModuleDiff
from ecospa_fx.model.journal import Journal, all_or_nothing, take_state
from ecospa_fx.model.lookup import check_optimizer, check_values, compiled_state, is_captured
from ecospa_fx.model.optimizer_state import check_can_follow, is_partitioned, several
from ecospa_fx.model.shrinking import shrink_within
from ecospa_fx.ranks.agreement import Ranks
from ecospa_fx.ranks.members import ranks_of
from ecospa_fx.ranks.tensor_parallel import parallel_count
from ecospa_fx.ranks.wrappers import check_wrappers, unwrapped

from .batches import LISTENER, LossListener, loss_of, tokens_of
from .clock import Clock
from .deployable import Deployable, Deployment, check_deployable, deployment
from .flow import Flow, warn_of_flow
from .latency import Latency
from .left_out import LeftOut, say_if_short
from .loss_spikes import LossSpikes, number_of
from .nested import NestedSizes, nested
from .offered import offered_everywhere
from .policies import Adaptive, Decision, Paper, Policy
from .readings import Readings
from .schedule import Schedule, ScheduleUnit, SparsityCurve
from .settings import (
    PRESETS,
    Among,
    AnyScore,
    DecisionSettings,
    Gradients,
    PolicyName,
    Preset,
    ScoreSettings,
    check_adaptive,
    check_options,
    chosen_policy,
)
from .sparsifier import CoupledSparsifier, reachable
from .targets import Target

BeforeShrink = Callable[[nn.Module, Mapping[Coupling, Tensor], Any], None]


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
        optimizer: the optimizer that holds its parameters, or several that hold some each; their state is carried
            through every shrink.
        target: share of the model's original cost that remains at the end. Or a share for each kind of coupling, of the
            entries of all couplings of that kind together, `{"ffn": 0.5, "heads": 0.75}`; others stay whole. Keys may
            be patterns of names of couplings too, of which the first that fits counts, and before kinds.
        cost: the cost that this is a share of: `"parameters"`, `"flops"` of a forward, `"bytes"` of training (weights,
            gradients and optimizer state), or a `Latency`, the measured time of a forward.
        among: `"all"` of it, or the `"prunable"` part, which lies on some coupling.
        policy: `"paper"`, or `"adaptive"`: entries go by the expected rise of the loss, and those that stay take over;
            `top_k`, `theta` and scores must be left out then. See docs/absorption.md. By default `"paper"`; with
            `preset="finetune"` and an `end` `"adaptive"`, unless one of these settings is given.
        preset: the defaults of the other settings: `"pretrain"`, the paper's rule with its scores, `top_k` 30% and
            `theta` 90%; or `"finetune"`, for a model that is already trained: 10% and 95%, both scores
            `"taylor_positions"`, and with the adaptive policy an order of entries by these alone.
        top_k: share of the couplings that shrink at a sparsification step, the least important ones.
        theta: share of a coupling's score that is kept when it shrinks.
        interval: training steps between sparsification steps; or tokens or epochs, see `unit`. If there is an end it is
            stretched or squeezed a little, so that the last one falls on it.
        start: training step of the first one.
        end: training step by which the target is reached, as much at a time as is due by then. If the paper's rule is
            too slow for that, more couplings take part, then theta is lowered; if it is too fast, theta is raised.
            None: the rule runs until the target is reached.
        shape: how the size goes down to the target by `end`: `"linear"`, `"cubic"`, `"cosine"` or `"one_shot"`.
        shrinks: number of sparsification steps between `start` and `end`, in place of `interval`.
        unit: the unit of `interval`, `start` and `end`: `"steps"`, `"tokens"` or `"epochs"`. See `Schedule`.
        score: importance of a coupling, see `CoupledEstimator`: a name, or a function of a weight and its gradient; by
            default `"fisher"`, see `preset`.
        index_score: the order in which the entries of a coupling go: `"norms"`, the product of the norms of their
            slices, as in the paper, or any score; by default `"norms"`, see `preset`. `{"experts": "reap"}`: of that
            kind by that score, of all others by `"norms"`.
        decay: see `CoupledEstimator`.
        window: see `CoupledEstimator`.
        seed: of `"random"` scores.
        spike: a shrink, and with it all later ones, waits for the next sparsification step while the smoothed loss is
            more than this share above its level before the last shrink. Only if `step` is told the loss.
        min_keep: entries that every coupling keeps; with 0 whole sublayers may go, see `Constraints`.
        round_to: widths come out as multiples of it; see `Constraints`.
        head_dims: `"per_head"`, `"per_layer"` or `"off"`; see `Constraints`.
        equal_head_dims: queries and keys keep as many dims as values; see `Constraints`.
        frozen: name patterns, modules and couplings that keep their size.
        uniform: `"layers"`: repeated blocks keep the same sizes; see `Constraints`.
        multiple_of: kind of couplings -> a number that their widths are multiples of; see `Constraints`.
        deployable: `"transformers"`: only such sizes that `save_pretrained` writes a model which plain transformers
            loads. It sets `uniform`, ties couplings that one number of the configuration stands for, and keeps whole
            what no number can express, see `deployment`. The model must be compiled with `execution="module"`. Or a
            function that makes the original model, `functools.partial(timm.create_model, name, **arguments)`: only such
            sizes that it can make too, see `ecospa_fx.constructor_arguments`.
        gradients: when they are read: at `"step"`, the call of `step()`; right before each step of the `"optimizer"`;
            or in `"backward"`, for optimizers that step there and free them at once. See `CoupledEstimator`.
        before_shrink: called with the model, the entries to keep and the optimizer right before each shrink.
        also: copies of the model that shrink with it, such as averages of its weights; see `ecospa_fx.shrink`.
        absorb: entries that stay take over from those that go, by least squares on the inputs of weights in the last
            training steps before a shrink; see docs/absorption.md. By default only with `policy="adaptive"`.
        rotate: couplings between linear maps, and streams with norms on them (`residual`), that are about to shrink
            first get the basis in which the entries that go
            carry least; see `ecospa_fx.rotate`. A coupling that an optimizer cannot follow keeps its basis, and the log
            says so. The default is as for `absorb`.

    Attributes:
        steps: training steps seen.
        done: the target is reached; nothing more will be removed.
        history: a dict per shrink: `step`, `size` (parameters left), `removed` (coupling name -> entries, in each
            context), `importance` (coupling name -> its score), `flow` (coupling name -> share of what flows along it
            that the entries carried, where a graph ran that it could be read from) and of `"adaptive"` also `expected`
            (coupling name -> expected rise of the loss).
        forecast: with `policy="adaptive"`, the expected cost of each coupling at the last sparsification step.
        left_out: name of each coupling that the last sparsification step could not judge -> the reason, such as weights
            that are frozen (`requires_grad=False`) where the score reads gradients. The log says so too, once.
        deployment: with `deployable`, what that forbids and which targets it leaves; known once the model was called.
        last_shrink: sizes of every layer before and after the last shrink, once there was one.
        also: a list, to which a copy that is made later may be added.

    Raises:
        TargetError: a setting is out of range, or the target is below what can be reached.
        OptimizerError: the optimizer holds none of the model's parameters, or cannot be carried through a shrink.
        ShrinkError: something in `also` is not a copy of the model.
        WrapperError: the model is spread over devices, in a wrapper that cannot follow a shrink.
    """

    @takes(model=MODULE, seed=WHOLE, before_shrink=optional(FUNCTION), absorb=optional(FLAG), rotate=optional(FLAG))
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        target: Target = 0.5,
        cost: Cost | Latency = "parameters",
        among: Among = "all",
        policy: PolicyName | None = None,
        preset: Preset = "pretrain",
        top_k: float | None = None,
        theta: float | None = None,
        interval: float = 100,
        start: float = 0,
        end: float | None = None,
        shape: SparsityCurve = "linear",
        shrinks: int | None = None,
        unit: ScheduleUnit = "steps",
        score: AnyScore | None = None,
        index_score: AnyScore | Mapping[str, AnyScore] | None = None,
        decay: float | None = None,
        window: int | None = None,
        seed: int = 0,
        spike: float = 0.1,
        min_keep: int = 1,
        round_to: int = 1,
        head_dims: HeadDims = "per_head",
        equal_head_dims: bool = False,
        frozen: Sequence[Frozen] = (),
        uniform: Uniform | None = None,
        multiple_of: Mapping[str, int] | None = None,
        deployable: Deployable | None = None,
        gradients: Gradients = "step",
        before_shrink: BeforeShrink | None = None,
        also: Any = (),
        absorb: bool | None = None,
        rotate: bool | None = None,
    ) -> None:
        check_wrappers(model)
        self._called, model = model, unwrapped(model)
        compiled_state(model)
        check_options(policy, preset, gradients)
        self.schedule = Schedule(interval, start, end, shape, shrinks, unit)
        given: dict[str, object] = {"top_k": top_k, "theta": theta, "decay": decay, "window": window}
        given |= {"score": score, "index_score": index_score}
        adaptive = chosen_policy(policy, preset, self.schedule, given) == "adaptive"
        if adaptive:
            check_adaptive(self.schedule, given)
        defaults = PRESETS[preset]
        scores = ScoreSettings(
            defaults.score if score is None else score,
            defaults.index_score if index_score is None else index_score,
            decay, window, seed,
        )  # fmt: skip
        self._decisions = DecisionSettings(
            target, cost, among, defaults.top_k if top_k is None else top_k, defaults.theta if theta is None else theta
        )
        self._constraints = Constraints(
            min_keep, round_to, head_dims, equal_head_dims, frozen, uniform, dict(multiple_of or {})
        )
        check_deployable(model, deployable)
        self._deployable: Deployable | None = deployable
        self.deployment: Deployment | None = None
        self.optimizers = several(optimizer)
        if not self.optimizers:
            raise OptimizerError("no optimizer is given; pass the one made from model.parameters()")
        for each in self.optimizers:
            check_optimizer(model, each)
            check_can_follow(each)
            if isinstance(cost, str) and cost == "bytes" and is_partitioned(each):
                raise OptimizerError(
                    f'cost="bytes" counts the state of optimizers, of which this {type(each).__name__} holds another '
                    'part on each rank; use cost="parameters"'
                )
        copies_of(model, also)
        self.model, self.optimizer, self.also = model, optimizer, list(listed(also))
        self.before_shrink = before_shrink
        self.steps = 0
        self.done = False
        self.history: list[dict[str, Any]] = []
        self.last_shrink: ModuleDiff | None = None
        self.forecast: Forecast | None = None
        self._spikes = LossSpikes(spike)
        self._clock = Clock(self.schedule, self._spikes)
        self._initial_cost: int | None = None  # when the first sparsification step came
        self._gradients: Gradients = gradients
        # A policy that was asked for says what it cannot do; one by default does without.
        compensates = adaptive and (policy is not None or compiled_state(model).execution != "module")
        compensates &= parallel_count(model) == 1
        self._compensation = Compensation(
            model,
            CompensationSettings(compensates if absorb is None else absorb, compensates if rotate is None else rotate),
        )
        self._flow = Flow(model)
        self._left_out = LeftOut()
        self._owed = False  # a sparsification step that came before anything was read
        self._unfinished: tuple[Readings | Compensation, ...] = ()  # what still has to begin anew
        self._scores = scores
        self.policy: Policy
        if adaptive:
            order: EntryOrder = "saliency" if preset == "finetune" else "elimination"
            self.policy = Adaptive(
                model, self.optimizers, self._decisions, self._constraints, self._compensation, order
            )
        else:
            self.policy = Paper(model, self.optimizers, self._decisions, self._constraints, scores)
        self._readings = Readings(model, self.optimizers, self.policy.estimators, gradients)
        if is_captured(model):
            self._ready()

    @property
    def now(self) -> float:
        """Training seen, in the unit of the schedule."""
        return self._clock.now

    @property
    def postponed(self) -> list[dict[str, Any]]:
        """A dict per sparsification step that waited for the loss: `step`, `loss` (smoothed), `before`."""
        return self._clock.postponed

    @property
    def left_out(self) -> dict[str, str]:
        """The couplings that could not be judged."""
        return dict(self._left_out.reasons)

    @property
    def hears_the_loss(self) -> bool:
        """True if `step` has been told a loss, so that shrinks wait while it is high."""
        return self._spikes.level is not None

    @property
    def size(self) -> int:
        """Parameters of the model now."""
        return sum(p.numel() for p in self.model.parameters())

    def step(
        self, *, loss: Tensor | float | None = None, tokens: int | None = None, epochs: float | None = None
    ) -> None:
        """Take a training step; call it after every `optimizer.step()`, before gradients are zeroed (see `gradients`).

        Args:
            loss: of this step, to let shrinks wait while it is high. A tensor is read at once, which a GPU waits for.
                None: shrinks never wait. Of several ranks the mean counts.
            tokens: in this step's batch, if the schedule counts them; those of all ranks are added up.
            epochs: share of an epoch in this step, `1 / len(loader)`, if the schedule counts these.

        Raises:
            EcoSpaError: the loss is not one number.
            OptimizerError: no parameter of a coupling has a gradient, or all are zero; or another optimizer steps.
            NoCouplingError: calls of the model since have withdrawn every coupling.
            TargetError: the schedule counts tokens or epochs, and they are not given.
            RanksError: another rank cannot take the step, or decides otherwise; all ranks stay as they are.
        """
        self._finish()
        ranks = ranks_of(self.model) if self._meets else Ranks()
        amount, shrinks = ranks.together(
            "trainer.step", lambda: self._take_step(loss, tokens, epochs, ranks), lambda _: self._common_facts
        )
        if shrinks:
            self._sparsify(ahead=False)
        self._prepare(amount)

    def warn_if_beyond(self, steps: float) -> None:
        """Log a warning if a run that takes so many more steps is over before the schedule is."""
        last = self._clock.now + steps
        said = None if self.done or self.schedule.unit != "steps" else self.schedule.beyond(last)
        if said is not None:
            logger("shrink").warning(
                "this run ends at step %d of the schedule, and %s: the model does not reach its target in this run. "
                "start=, interval= and end= count steps of the optimizer; choose them by the length of the run",
                last, said,
            )  # fmt: skip

    def _prepare(self, amount: float) -> None:
        """Collect what the decisions of the next steps need, where each is so much training."""
        self._compensation.gather(not self.done and (self._owed or self._clock.due_within(GATHERING * amount)))
        self._flow.watch(not self.done and (self._owed or self._clock.due_within(amount)))

    @property
    def _meets(self) -> bool:
        """True if ranks meet in the coming step: if a sparsification step may fall on it."""
        return not self.done and (self._owed or self.schedule.unit != "steps" or self._clock.due_within(1))

    @property
    def _common_facts(self) -> dict[str, object]:
        return {"the steps taken": self.steps} | {f"the setting {name}": v for name, v in self._described().items()}

    def _take_step(
        self, loss: Tensor | float | None, tokens: int | None, epochs: float | None, ranks: Ranks
    ) -> tuple[float, bool]:
        """Count a step and read its gradients; return its amount in the unit of the schedule, and whether to shrink."""
        if next(self.model.parameters()).is_meta:
            check_values(self.model, "train")
        value = None if loss is None else number_of(loss)
        amount = self._clock.advance(self._clock.amount(tokens, epochs), ranks)
        self.steps += 1
        if value is not None:
            self._spikes.update(value)
        if self.done:
            return amount, False
        self._ready()
        read = self._readings.read()
        due = self._clock.due or self._owed
        self._owed = due and ranks.any(self._readings.must_wait(read), "wait for gradients")
        if self._owed and self._readings.all_frozen:
            self._left_out.note(self.model, {}, self._ready().whole)
        if due and not self._owed:
            self._spikes.level = ranks.mean(self._spikes.level, "the mean loss")
        return amount, due and not self._owed and not self._clock.postpone(self.steps)

    def sparsify(self) -> None:
        """Take a sparsification step now: as a whole, or not at all, whatever interrupts it; on all ranks, or none.

        It is the next one of the schedule, and as much goes as is due with that.
        """
        self._sparsify(ahead=True)

    def _sparsify(self, ahead: bool) -> None:
        self._finish()
        ranks = ranks_of(self.model)
        all_or_nothing(lambda journal: self._decide_and_shrink(journal, ranks, ahead), ranks, "sparsify")
        self._finish()

    def _decide_and_shrink(self, journal: Journal, ranks: Ranks, ahead: bool) -> None:
        """Shrink by a decision of the policy, and write it into the history."""
        check_wrappers(self._called)
        offered_everywhere(self.model, ranks, journal)
        sparsifier = self._ready()
        self._readings.check()
        for each in (self, self._spikes, *([] if self._decisions.latency is None else [self._decisions.latency])):
            journal.note_object(each)
        journal.note_list(self.history)
        decision = self.policy.decide(self._cost_due(sparsifier, ahead))
        self._left_out.note(self.model, decision.importance, sparsifier.whole)
        self.forecast = decision.forecast
        self._unfinished = (self._readings,)
        if decision.keeps:
            self._shrink(decision, journal)
        sparsifier.measure()

    def _shrink(self, decision: Decision, journal: Journal) -> None:
        flow = self._flow.shares(decision.keeps)
        warn_of_flow(flow, decision.keeps, self.steps, self.policy.described)
        keeps = self._compensation.rotated(decision.keeps, self.optimizers, self.also, journal)
        if self.before_shrink is not None:
            self.before_shrink(self.model, keeps, self.optimizer)
        self._spikes.mark_shrink()
        removed = {coupling.name: coupling.size - keep.shape[-1] for coupling, keep in keeps.items()}
        entry: dict[str, Any] = {"step": self.steps, "removed": removed, "importance": decision.importance}
        if flow:
            entry["flow"] = flow
        if decision.forecast is not None:
            entry["expected"] = decision.forecast.rises(removed)
        self.last_shrink = shrink_within(
            journal, self.model, keeps, optimizer=self.optimizers, also=self.also, absorb=self._compensation.absorb
        )
        self._unfinished = (*self._unfinished, self._compensation)
        self.history.append(entry | {"size": self.size})

    def _finish(self) -> None:
        """Begin anew after a sparsification step; a part that Ctrl-C leaves undone, the next call does."""
        if not self._unfinished:
            return
        for each in self._unfinished:
            each.reset()
        sparsifier = self.policy.ready()
        self.done = sparsifier.reached()
        if self.done:
            say_if_short(sparsifier)
            self.detach()
        self._unfinished = ()

    def detach(self) -> None:
        """Remove all hooks from the model and its optimizers, for a trainer that takes no further step."""
        self._readings.detach()
        self._compensation.detach()
        self._flow.detach()

    def _ready(self) -> CoupledSparsifier:
        """Return the sparsifier, made once the couplings are known."""
        self._compensation.observe()
        if self._deployable is not None and self.deployment is None:
            self.deployment = self._deploy(self._deployable)
        return self.policy.ready()

    def _deploy(self, deployable: Deployable) -> Deployment:
        """Find out what `deployable` forbids, and say it."""
        found = deployment(self.model, deployable, self._constraints)
        shares = [
            reachable(self.model, self._decisions, constraints, self.optimizers)
            for constraints in (found.constraints, self._constraints)
        ]
        found = replace(found, reachable=(shares[0], shares[1]))
        logger("shrink").warning("%s", found)
        self._constraints = self.policy.constraints = found.constraints
        return found

    def _cost_due(self, sparsifier: CoupledSparsifier, ahead: bool) -> int | None:
        """Compute the cost that the model may have after this step by the schedule; None if it does not say."""
        share = self._clock.share(ahead)
        sizes = sparsifier.sizes()
        if self._initial_cost is None:
            self._initial_cost = sizes.total({})
        if share is None:
            return None
        return round(self._initial_cost - share * (self._initial_cost - sparsifier.target_size(sizes)))

    @takes(
        loader=SEVERAL, loss=optional(FUNCTION), scheduler=optional(having("a scheduler with step()", "step")),
        watch=optional(LISTENER),
    )  # fmt: skip
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
        check_values(self.model, "train")
        losses = []
        epoch = 1 / len(loader) if isinstance(loader, Sized) and len(loader) else None
        for batch in loader:
            value = loss_of(self._called, batch, loss)
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

    @takes(batches=SEVERAL, targets=SEVERAL, loss=optional(FUNCTION))
    def nested(
        self,
        batches: Iterable[Any],
        targets: Sequence[Target],
        *,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> NestedSizes:
        """Shrink the model to the largest of several targets, and find the others as parts of it.

        The batches say which entries each size keeps, as they do in `compress`; the same weights serve all sizes. Train
        on with the `backward` of the result, which adds up the gradients of all sizes, and save it with
        `ecospa_fx.save(model, directory, nested=sizes)`. Nothing takes over from entries that go.

        Args:
            batches: calls of the model, as `compress` takes them.
            targets: one for each size, as the trainer's own.
            loss: as of `compress`.

        Raises:
            TargetError: there are no targets or batches, or one of the targets is out of reach.
        """
        self._finish()
        sizes = nested(
            self.model, batches, targets, optimizers=self.optimizers, also=self.also, constraints=self._constraints,
            cost=self._decisions.cost, among=self._decisions.among, loss=loss,
        )  # fmt: skip
        self._unfinished = (self._readings, self._compensation)
        self._finish()
        return sizes

    def state_dict(self) -> dict[str, Any]:
        """Return the schedule's state: plain numbers and the accumulated sums."""
        self._finish()
        latency = self._decisions.latency
        return {
            "steps": self.steps,
            "now": self.now,
            "done": self.done,
            "history": self.history,
            "postponed": self.postponed,
            "waiting": self._clock.waited,
            "waits_in_a_row": self._clock.in_a_row,
            "owed": self._owed,
            "from": self._initial_cost,
            "spikes": self._spikes.state_dict(),
            "latency": latency.readings() if latency is not None else {},
            "settings": self._described(),
            "scores": [estimator.state_dict() for estimator in self.policy.estimators],
            "compensation": self._compensation.state_dict(),
            "flow": self._flow.watching,
        }

    def _described(self) -> dict[str, Any]:
        return {
            **self._decisions.described(),
            **self._constraints.described(),
            **self.schedule.described(),
            **self.policy.described,
            "decay": self._scores.decay,
            "window": self._scores.window,
            "seed": self._scores.seed,
            "spike": self._spikes.allowed,
            "gradients": self._gradients,
            "deployable": self._deployable if isinstance(self._deployable, str | None) else "a function",
            "absorb": self._compensation.settings.absorb,
            "rotate": self._compensation.settings.rotate,
        }

    @takes(state=NAMED)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ArgumentError: the state is none that `state_dict` returned.
        """
        check_state(state, {**self.state_dict(), "from": None}, "EcoSpaTrainer")
        if state["from"] is not None:
            check(state["from"], NUMBER, "state['from']", "EcoSpaTrainer.load_state_dict")
        held = [part for estimator in self.policy.estimators for part in estimator.holding_state()]
        held += [] if self._compensation.grams is None else [self._compensation.grams]
        held += [] if self._decisions.latency is None else [self._decisions.latency]
        parts = [self, self._clock, self._spikes, self._compensation, *held]
        take_state("EcoSpaTrainer", parts, lambda: self._take(state))
        if self.done:
            self.detach()
        else:
            self._readings.attach()  # of a trainer that was done, gone back

    def _take(self, state: Mapping[str, Any]) -> None:
        self.steps, self.done, self.history = state["steps"], state["done"], list(state["history"])
        clock, latency = self._clock, self._decisions.latency
        clock.now, clock.postponed = state["now"], list(state["postponed"])
        clock.waited, clock.in_a_row = state["waiting"], state["waits_in_a_row"]
        self._initial_cost, self._owed = state["from"], state["owed"]
        self._spikes.load_state_dict(state["spikes"])
        if latency is not None:
            latency.take(state["latency"])
        for estimator, scores in zip(self.policy.estimators, state["scores"], strict=True):
            estimator.load_state_dict(scores)
        self._compensation.load_state_dict(state.get("compensation", {}))
        self._flow.watch(state["flow"])
