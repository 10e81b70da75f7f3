"""EcoSpaTrainer: the schedule. Scores while the model trains, shrinks it step by step, stops at the target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from .api import check_optimizer, shrink
from .compiled import MODEL
from .constraints import Constraints, Frozen, HeadDims
from .coupling import Coupling
from .diff import ModuleDiff
from .errors import EcoSpaError, OptimizerError, TargetError
from .estimator import CoupledEstimator, Score
from .sparsifier import CoupledSparsifier, check_settings

Gradients = Literal["step", "optimizer", "backward"]
BeforeShrink = Callable[[nn.Module, Mapping[Coupling, Tensor], Optimizer], None]


class EcoSpaTrainer:
    """Shrinks a model while it trains (arXiv 2511.11641).

    >>> trainer = EcoSpaTrainer(model, optimizer, target=0.5)
    >>> for batch in loader:
    ...     model(**batch).loss.backward()
    ...     optimizer.step()
    ...     trainer.step()
    ...     optimizer.zero_grad()

    Args:
        model: a compiled model; it may not have been called yet.
        optimizer: holds its parameters; their state is carried through every shrink.
        target: share of the model's original parameters that remains at the end.
        top_k: share of the couplings that shrink at a sparsification step, the least important ones.
        theta: share of a coupling's score that is kept when it shrinks.
        interval: training steps between sparsification steps.
        start: training step of the first one.
        end: training step by which the target is reached. Where the paper's rule is too slow for that, more couplings
            take part, then theta gives way. Without it the rule runs until the target is reached.
        score: see `CoupledEstimator`.
        min_keep: entries that every coupling keeps.
        round_to: widths come out as multiples of it; see `Constraints`.
        head_dims: `"per_head"`, `"per_layer"` or `"off"`; see `Constraints`.
        equal_head_dims: queries and keys keep as many dims as values; see `Constraints`.
        frozen: name patterns, modules and couplings that stay whole.
        gradients: where they are read: at `"step"`, the call of `step()`; right before each step of the `"optimizer"`;
            or in `"backward"`, for optimizers that step there and free them at once. See `CoupledEstimator`.
        before_shrink: called with the model, what will be kept and the optimizer right before each shrink.

    Attributes:
        steps: training steps seen.
        done: the target is reached; nothing more will be removed.
        history: a dict per shrink: `step`, `size` (parameters left), `removed` (coupling name -> entries, in
            each context),
            `importance` (coupling name -> what it scored).
        last_shrink: sizes of every layer before and after the last shrink, once there was one.

    Raises:
        TargetError: a setting is out of range, or the target is below what can be reached.
        OptimizerError: the optimizer holds none of the model's parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        target: float = 0.5,
        top_k: float = 0.3,
        theta: float = 0.9,
        interval: int = 100,
        start: int = 0,
        end: int | None = None,
        score: Score = "fisher",
        min_keep: int = 1,
        round_to: int = 1,
        head_dims: HeadDims = "per_head",
        equal_head_dims: bool = False,
        frozen: Sequence[Frozen] = (),
        gradients: Gradients = "step",
        before_shrink: BeforeShrink | None = None,
    ) -> None:
        if MODEL not in model.__dict__:
            raise EcoSpaError(f"{type(model).__name__} is not compiled; call ecospa_fx.compile(model) first")
        check_settings(target=target, top_k=top_k, theta=theta)
        constraints = Constraints(min_keep, round_to, head_dims, equal_head_dims, frozen)
        for name, value, least in (("interval", interval, 1), ("start", start, 0)):
            if not isinstance(value, int) or value < least:
                raise TargetError(f"{name}={value!r} is out of range; it is a whole number of steps, at least {least}")
        if end is not None and (not isinstance(end, int) or end <= start):
            raise TargetError(f"end={end!r} is not after start={start}")
        if gradients not in get_args(Gradients):
            raise TargetError(f"gradients={gradients!r} is none of {', '.join(map(repr, get_args(Gradients)))}")
        check_optimizer(model, optimizer)
        self.model, self.optimizer = model, optimizer
        self.interval, self.start, self.end = interval, start, end
        self.before_shrink = before_shrink
        self.steps = 0
        self.done = False
        self.history: list[dict[str, Any]] = []
        self.last_shrink: ModuleDiff | None = None
        self._estimator = CoupledEstimator(model, score)
        if gradients == "optimizer":
            self._estimator.attach(optimizer)
        elif gradients == "backward":
            self._estimator.attach_backward()
        self._settings: dict[str, Any] = {
            "target": target, "top_k": top_k, "theta": theta, "constraints": constraints,
        }  # fmt: skip
        self._sparsifier: CoupledSparsifier | None = None
        if model.__dict__[MODEL].captured:
            self._sparsifier = CoupledSparsifier(model, **self._settings)

    def step(self) -> None:
        """Call it after every `optimizer.step()`, while the gradients are still there (or not, see `gradients`).

        Raises:
            OptimizerError: no parameter of a coupling has a gradient.
        """
        self.steps += 1
        if self.done:
            return
        if self._sparsifier is None:
            self._sparsifier = CoupledSparsifier(self.model, **self._settings)
        if not self._estimator.attached:
            self._estimator.accumulate()
        last = self.end is not None and self.steps >= self.end
        if last or (self.steps >= self.start and (self.steps - self.start) % self.interval == 0):
            self.sparsify()

    def sparsify(self) -> None:
        """Take a sparsification step now."""
        if self._sparsifier is None:
            self._sparsifier = CoupledSparsifier(self.model, **self._settings)
        if self._estimator.score == "fisher" and not self._estimator.sums:
            raise OptimizerError(
                "no parameter of a coupling has a gradient: call trainer.step() after backward() and before zero_grad()"
            )
        importance = self._estimator.importance()
        keeps = self._sparsifier.decide(importance, self._due())
        if keeps:
            if self.before_shrink is not None:
                self.before_shrink(self.model, keeps, self.optimizer)
            removed = {coupling.name: coupling.size - keep.shape[-1] for coupling, keep in keeps.items()}
            self.last_shrink = shrink(self.model, keeps, optimizer=self.optimizer)
            scores = {coupling.name: value for coupling, value in importance.items()}
            self.history.append({"step": self.steps, "size": self.size, "removed": removed, "importance": scores})
        self._estimator.reset()
        self.done = self._sparsifier.reached()
        if self.done:
            self._estimator.detach()

    @property
    def size(self) -> int:
        """Parameters of the model now."""
        return sum(p.numel() for p in self.model.parameters())

    def _due(self) -> int | None:
        """Parameters that may be left after this step so that the target is reached by `end` in equal steps."""
        if self.end is None or self._sparsifier is None:
            return None
        to_come = max(0, (self.end - self.steps) // self.interval)
        size = self.size
        return size - (size - self._sparsifier.target_size) // (to_come + 1)

    def fit(
        self,
        loader: Iterable[Any],
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        scheduler: Any = None,
    ) -> list[float]:
        """Train over a loader.

        Args:
            loader: batches: a mapping of keyword arguments of a model whose output has `.loss`, or an `(inputs,
                targets)` pair with `loss`.
            loss: `loss(outputs, targets)` for pairs.
            scheduler: a learning-rate scheduler, stepped once per batch.

        Returns:
            The loss of each batch.
        """
        losses = []
        for batch in loader:
            if isinstance(batch, Mapping):
                value = self.model(**batch).loss
            elif loss is not None:
                inputs, targets = batch
                value = loss(self.model(inputs), targets)
            else:
                raise EcoSpaError("batches are no mappings; pass loss=, a function of outputs and targets")
            value.backward()
            self.optimizer.step()
            self.step()
            self.optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
            losses.append(float(value.detach()))
        return losses

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state: plain numbers and the accumulated sums."""
        return {
            "steps": self.steps,
            "done": self.done,
            "history": self.history,
            "settings": {
                **{name: value for name, value in self._settings.items() if name != "constraints"},
                **self._settings["constraints"].described(),
                "interval": self.interval,
                "start": self.start,
                "end": self.end,
            },
            "score": self._estimator.score,
            "score_steps": self._estimator.steps,
            "sums": {f"{name}[{dim}]": sums for (name, dim), sums in self._estimator.sums.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.steps, self.done, self.history = state["steps"], state["done"], list(state["history"])
        self._estimator.steps = state["score_steps"]
        self._estimator.sums = {
            (key[: key.rindex("[")], int(key[key.rindex("[") + 1 : -1])): sums for key, sums in state["sums"].items()
        }
