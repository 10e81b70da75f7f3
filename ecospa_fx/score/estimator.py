"""CoupledEstimator: the importance of each coupling and of its entries, accumulated over training steps.

when to read    accumulate, attach, attach_backward    here
reading         one class per kind of input            `readers.py`
summing         rules, and sums that follow shrinks    `sums.py`
judging         sums of slices -> couplings, entries   `judging.py`
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.arguments import (
    FLAG,
    MODULE,
    NAMED,
    NAMES,
    ONE_NUMBER,
    WHOLE,
    check_state,
    instance,
    optional,
    shown,
    takes,
)
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import TargetError, WrapperError
from ecospa_fx.model.journal import take_state
from ecospa_fx.model.lookup import check_values, couplings
from ecospa_fx.model.optimizer_state import innermost, several
from ecospa_fx.passes.graph.tensors import parameters_of
from ecospa_fx.ranks.fsdp2 import reshard
from ecospa_fx.ranks.members import is_replicated, sharing_ranks
from ecospa_fx.ranks.wrappers import unwrapped

from .gates import GateReader
from .judging import frozen_names
from .positions import PositionReader
from .reader import GradientStep, Reader, ReaderOptions
from .readers import READERS
from .scores import Score, ScoreFunction, score_named
from .slices import SliceKey
from .step_watcher import names_of
from .sums import StepCount, accumulation


def _hooked_first(parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> Any:
    """Register a hook that runs once backward has a gradient, before all others of its kind; return its handle."""
    handle = parameter.register_post_accumulate_grad_hook(hook)
    hooks = parameter._post_accumulate_grad_hooks
    before = {key: each for key, each in hooks.items() if each is not hook}
    for key in before:  # they run in the order in which they were put there
        del hooks[key]
    hooks.update(before)
    return handle


class CoupledEstimator:
    """Scores couplings together, matrix by matrix (arXiv 2511.11641, coupled estimation).

    The importance of a coupling is the mean over its matrices of `sum(score) / numel`, accumulated since the last
    reset; with `"fisher"` the score is the squared gradient. This is the square of the mini-batch gradient, not the
    per-sample Fisher information that it is named after (see Kunstner et al. 2019 on the difference). Sums are kept
    per row and column; that costs nothing more, and the matrix score is their sum.

    You choose when gradients are read: at every call of `accumulate`; right before an optimizer's steps (`attach`); or
    as backward computes them (`attach_backward`). A NaN or inf in a gradient makes the importance of its couplings NaN
    or inf until the next reset; with a `torch.amp.GradScaler`, `attach` leaves such steps out.

    Args:
        model: a compiled model that has been called.
        score: the worth of a weight: a name in `ecospa_fx.scores.SCORES`, or a function of a weight and its gradient
            that returns a worth for each of its entries.
        decay: None: all steps count equally; otherwise the share of an exponential moving average that stays at each
            step, as in the second moment of Adam.
        window: add up only the last so many steps. Their sums per row and column are kept, so memory grows with it.
        optimizer: one or several; `"adam"` reads their second moments.
        seed: of `"random"`.

    Attributes:
        steps: steps accumulated since the last reset. Replays of a CUDA graph are not counted; they leave the order of
            importances as it is.
        sums: (parameter, dim) -> sums of each slice; only of parameters that have had a gradient. Where parameters are
            sharded, the share of this rank.
        reader: reads, sums up and judges the score's kind of input.

    Raises:
        TargetError: the score does not exist, `decay` is not between 0 and 1, `window` is not a whole number from 1, or
            both are given.
    """

    @takes(model=MODULE, seed=WHOLE)
    def __init__(
        self,
        model: nn.Module,
        score: str | ScoreFunction | Score = "fisher",
        *,
        decay: float | None = None,
        window: int | None = None,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        seed: int = 0,
    ) -> None:
        model = unwrapped(model)
        self.score = score_named(score)
        self.model, self.decay, self.window, self.seed = model, decay, window, seed
        optimizers = None if optimizer is None else several(optimizer)
        rule = accumulation(decay, window)
        self._count = StepCount()
        self._handles: list[Any] = []
        self._backwards: dict[str, int] = {}
        self._in_backward = False
        options = ReaderOptions(model, self.score, rule, self._count, optimizers, seed)
        self.reader: Reader = READERS[self.score.reads](options)
        self.reader.observe()

    @property
    def steps(self) -> int:
        """Steps accumulated since the last reset."""
        return self._count.seen

    @property
    def sums(self) -> Mapping[SliceKey, Tensor]:
        """Sums over steps by (parameter, dim)."""
        return self.reader.sums

    @takes(scale=optional(ONE_NUMBER), found_inf=optional(ONE_NUMBER), names=optional(NAMES), new_step=FLAG)
    def accumulate(
        self,
        *,
        scale: Tensor | float | None = None,
        found_inf: Tensor | None = None,
        names: Collection[str] | None = None,
        new_step: bool = True,
    ) -> None:
        """Add the gradients that are there now: call it after `backward`, before they are zeroed.

        On a GPU this is one launch and a tiny one, without synchronisation; once it has run it may be captured in a
        CUDA graph.

        Args:
            scale: the factor that gradients are still multiplied by, if they are (a gradient scaler's scale).
            found_inf: unless it is 0, the step is left out; read on the device.
            names: read the gradients of these parameters only.
            new_step: whether this is another training step, or a part of the last one that was not read yet.
        """
        reshard(self.model)
        self._count.seen += new_step
        given: Any = scale, found_inf
        factor, skip = (x if x is None or isinstance(x, Tensor) else torch.tensor(float(x)) for x in given)
        named = ((name, p) for name, p in parameters_of(self.model) if names is None or name in names)
        self.reader.add(GradientStep(named, factor, skip, new_step))

    def attach(self, *optimizers: Optimizer) -> None:
        """Read gradients right before every step of an optimizer, instead of at calls of `accumulate`.

        Of several optimizers, which take a step each in a training step, each reads the gradients of its own
        parameters. These are the final gradients: summed over micro-batches, and clipped if you clip before the step,
        as usual. A `GradScaler`'s scale is divided out, and steps that it skips are left out.
        """
        read_by: set[int] = set()  # in this training step

        def read(number: int, optimizer: Optimizer) -> None:
            another = not read_by or number in read_by
            if another:
                read_by.clear()
            read_by.add(number)
            self.accumulate(
                scale=getattr(optimizer, "grad_scale", None),
                found_inf=getattr(optimizer, "found_inf", None),
                names=names_of(self.model, optimizers, number),
                new_step=another,
            )

        optimizers = tuple(each for optimizer in several(optimizers) for each in innermost(optimizer))
        for number, optimizer in enumerate(optimizers):
            hook = lambda held, *_, number=number: read(number, held)  # noqa: E731
            self._handles.append(optimizer.register_step_pre_hook(hook))

    def attach_backward(self, every: int = 1) -> None:
        """Read each gradient as soon as backward has it, for optimizers that step in backward and free it at once.

        It reads before other hooks of the same kind run, which may step. These are gradients before clipping. With a
        `GradScaler` use `attach`: here they are still multiplied by its scale.

        Args:
            every: micro-batches per step. Gradients sum up over them, so they are read at the last one only.

        Raises:
            TargetError: `every` is not a whole number from 1.
            WrapperError: the model is in `DistributedDataParallel`, which reduces gradients later than that.
        """
        self._check_whole()
        if not isinstance(every, int) or every < 1:
            raise TargetError(f"every={every!r} is out of range; it is a whole number of micro-batches, at least 1")

        def ready(name: str, parameter: nn.Parameter) -> None:
            self._backwards[name] = self._backwards.get(name, 0) + 1
            if self._backwards[name] % every == 0:
                before, self._count.seen = self._count.seen, max(self._backwards.values()) // every
                if parameter.grad is not None:
                    self.reader.add(GradientStep([(name, parameter)], new_step=self._count.seen != before))

        self._in_backward = True
        for name, parameter in parameters_of(self.model):
            if parameter.requires_grad:
                hook = lambda held, name=name: ready(name, held)  # noqa: E731
                self._handles.append(_hooked_first(parameter, hook))

    def _check_whole(self) -> None:
        """Refuse to judge by gradients that were read before they were reduced over ranks."""
        if is_replicated(self.model):
            raise WrapperError(
                'gradients="backward" reads each gradient as soon as backward has it, and DistributedDataParallel '
                "reduces it over ranks only then, so that each rank would decide by its own; read them at the steps of "
                'the optimizers, gradients="optimizer"'
            )
        if isinstance(self.reader, (GateReader, PositionReader)) and sharing_ranks(self.model):
            raise WrapperError(
                'gradients="backward" reads each gradient as soon as backward has it, and where parameters are sharded '
                f"ranks add up {self.score.name} once a step has all gradients; read them at the steps of the "
                'optimizers, gradients="optimizer"'
            )

    def detach(self) -> None:
        """Remove the hooks of `attach` and `attach_backward`, and stop observing the model."""
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()
        self._in_backward = False
        self.reader.detach()

    @property
    def attached(self) -> bool:
        """True if gradients are read by hooks."""
        return bool(self._handles)

    @property
    def all_skipped(self) -> bool:
        """True if a gradient scaler has left out every step so far."""
        skipped = self._count.skipped
        return skipped is not None and self.steps > 0 and int(skipped) >= self.steps

    @property
    def empty(self) -> bool:
        """True if nothing has been accumulated yet that a decision could be made from."""
        return self.reader.empty

    def reset(self) -> None:
        """Drop the sums, and count steps from 0."""
        self._count.reset()
        self._backwards.clear()
        self.reader.reset()

    def importance(self) -> dict[Coupling, float]:
        """Return the importance of every coupling that the score can judge; 0 for one that had no gradient.

        `"attention_entropy"` judges heads and groups of heads, `"activation"` couplings that a product was seen of.
        Scores of gradients and of optimizer state judge those of which some weight trains, by such weights alone; the
        others judge all. Where parameters are sharded, every rank must call it: one all-reduce adds their shares up.

        Raises:
            OptimizerError: the optimizer holds no second moments to read.
        """
        check_values(self.model, "score")
        if self._in_backward:
            self._check_whole()  # it may have been wrapped since
        with self.reader.at_once():
            frozen = frozen_names(self.model) if self.reader.learns else set()
            judged = {
                coupling: self.reader.importance(coupling)
                for coupling in couplings(self.model)
                if not all(member.parameter in frozen for member in coupling.members if member.matrix)
            }
        return {coupling: value for coupling, value in judged.items() if value is not None}

    @takes(coupling=instance("an ecospa_fx.Coupling", Coupling), by_context=FLAG)
    def entries(self, coupling: Coupling, *, by_context: bool = False) -> Tensor:
        """Return the importance of each entry of a coupling: the mean over its matrices of that of the entry's slices.

        Where this score cannot judge the coupling all its entries are worth the same.

        Args:
            coupling: one of the model's couplings.
            by_context: the entries of each context (the dims of each head) on their own.

        Returns:
            float64 `[coupling.size]`, or `[coupling.contexts, coupling.size]`.
        """
        check_values(self.model, "score")
        entries = self.reader.entries(coupling, by_context=by_context)
        if entries is not None:
            return entries
        shape = (coupling.contexts, coupling.size) if by_context else (coupling.size,)
        return torch.full(shape, self.reader.unjudged, dtype=torch.float64)

    def at_once(self) -> AbstractContextManager[None]:
        """Return a context in which `entries` of all couplings come from sums that are read, and reduced, once."""
        return self.reader.at_once()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of `steps` and the sums: `tensors` by name."""
        tensors = self.reader.tensors()
        if self._count.skipped is not None:
            tensors["skipped"] = self._count.skipped
        return {"steps": self.steps, "fired": dict(self._backwards), "tensors": tensors}

    @takes(state=NAMED)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ArgumentError: the state is none that `state_dict` returned.
        """
        check_state(state, {"steps": 0, "tensors": {}}, "CoupledEstimator")
        take_state("CoupledEstimator", self.holding_state(), lambda: self._take(state))

    def holding_state(self) -> list[object]:
        """Return the objects whose attributes `load_state_dict` changes."""
        totals = getattr(self.reader, "totals", None)
        return [self, self._count, self.reader, *([] if totals is None else [totals])]

    def _take(self, state: Mapping[str, Any]) -> None:
        tensors = {name: _checked(tensor) for name, tensor in state["tensors"].items()}
        self._backwards = dict(state.get("fired", {}))
        self._count.seen, self._count.skipped = state["steps"], tensors.pop("skipped", None)
        self.reader.load_tensors(tensors)


def _checked(tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{shown(tensor)} is not a tensor")
    return tensor
