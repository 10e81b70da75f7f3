"""CoupledEstimator: how important each coupling is, accumulated over training steps."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .api import couplings, plan
from .coupling import Coupling
from .errors import TargetError
from .kernels import slice_sums
from .slices import Key, SliceSums

Score = Literal["fisher", "taylor", "magnitude"]


class CoupledEstimator:
    """Scores couplings together, matrix by matrix (arXiv 2511.11641, coupled estimation).

    The importance of a coupling is the mean over its matrices of `sum(grad²) / numel`, accumulated since the last
    reset. This is the square of the mini-batch gradient, not the per-sample Fisher information, which it is named
    after (see Kunstner et al. 2019 on the difference). Sums are kept per row and column; that costs nothing more, and
    the matrix score is their sum.

    Gradients are read where you say: at every call of `accumulate`; right before an optimizer's steps (`attach`); or
    as backward makes them (`attach_backward`). A NaN or inf in a gradient makes the importance of its couplings NaN or
    inf until the next reset; with a `torch.amp.GradScaler`, `attach` leaves such steps out.

    Args:
        model: a compiled model that has been called.
        score: `"fisher"` as above; `"taylor"` takes `(weight * grad)²` in place of `grad²`; `"magnitude"` uses the
            weights in place of the gradients and accumulates nothing.
        decay: None to add all steps up equally; otherwise each step's share of what is forgotten is `1 - decay`, as in
            the second moment of Adam.

    Attributes:
        steps: steps accumulated since the last reset. Replays of a CUDA graph are not counted; they leave the order of
            importances as it is.
        sums: (parameter, dim) -> sums of each slice; only what has had a gradient. Where parameters are sharded, the
            share of this rank.

    Raises:
        TargetError: there is no such score, or `decay` is not between 0 and 1.
    """

    def __init__(self, model: nn.Module, score: Score = "fisher", *, decay: float | None = None) -> None:
        if score not in get_args(Score):
            raise TargetError(f"score={score!r} is none of {', '.join(map(repr, get_args(Score)))}")
        if decay is not None and not 0.0 < decay < 1.0:
            raise TargetError(f"decay={decay!r} is not between 0 and 1; None adds all steps up")
        self.model, self.score, self.decay = model, score, decay
        self.steps = 0
        self.sums: dict[Key, Tensor] = {}
        self._slices: SliceSums | None = None
        self._last: tuple[Any, ...] = (None, None)  # the couplings and the sums that _slices was made for
        self._positions: dict[Key, Tensor] = {}  # original positions of what _slices scores, where not all
        self._skipped: Tensor | None = None
        self._handles: list[Any] = []
        self._fired: dict[str, int] = {}

    def accumulate(self, *, scale: Tensor | float | None = None, found_inf: Tensor | None = None) -> None:
        """Add the gradients as they are now: call it after `backward`, before they are zeroed.

        On a GPU this is one launch and a tiny one, without synchronisation; once it has run it may be captured in a
        CUDA graph.

        Args:
            scale: what the loss was multiplied by and gradients are still multiplied by, if so.
            found_inf: unless it is 0, the step is left out; read on the device.
        """
        self.steps += 1
        if self.score == "magnitude":
            return
        if found_inf is not None:
            one = found_inf.detach().clamp(max=1)
            self._skipped = one if self._skipped is None else self._skipped.add_(one)
        factor = torch.as_tensor(scale, dtype=torch.float32) if isinstance(scale, (int, float)) else scale
        parameters = dict(self.model.named_parameters())
        self._add({n: p.grad for n, p in parameters.items() if p.grad is not None}, parameters, factor, found_inf)

    def attach(self, optimizer: Optimizer) -> None:
        """Read gradients right before every step of `optimizer`, instead of at calls of `accumulate`.

        These are the final gradients: summed over micro-batches, and clipped if you clip before the step, as one does.
        A `GradScaler`'s scale is divided out, and steps that it skips are left out.
        """
        self._handles.append(
            optimizer.register_step_pre_hook(
                lambda held, *_: self.accumulate(
                    scale=getattr(held, "grad_scale", None), found_inf=getattr(held, "found_inf", None)
                )
            )
        )

    def attach_backward(self, every: int = 1) -> None:
        """Read each gradient as soon as backward has made it, for optimizers that step in backward and free it at once.

        Attach before the hooks that step. These are gradients before clipping. With a `GradScaler` use `attach`: here
        they are still multiplied by its scale.

        Args:
            every: micro-batches per step. Gradients sum up over them, so only the last one's are read.

        Raises:
            TargetError: `every` is not a whole number from 1.
        """
        if not isinstance(every, int) or every < 1:
            raise TargetError(f"every={every!r} is out of range; it is a whole number of micro-batches, at least 1")

        def ready(name: str, parameter: nn.Parameter) -> None:
            self._fired[name] = self._fired.get(name, 0) + 1
            if self._fired[name] % every == 0 and parameter.grad is not None and self.score != "magnitude":
                self._add({name: parameter.grad}, {name: parameter})
                self.steps = max(self._fired.values()) // every

        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                hook = lambda held, name=name: ready(name, held)  # noqa: E731
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def detach(self) -> None:
        """Take off what `attach` and `attach_backward` put on."""
        while self._handles:
            self._handles.pop().remove()

    @property
    def attached(self) -> bool:
        """Gradients are read by hooks."""
        return bool(self._handles)

    def reset(self) -> None:
        """Forget what was accumulated."""
        self.steps = 0
        self._fired.clear()
        self.sums.clear()
        if self._slices is not None:
            self._slices.zero()
        if self._skipped is not None:
            self._skipped.zero_()

    def importance(self) -> dict[Coupling, float]:
        """Importance of every coupling; 0 for one that had no gradient.

        Where parameters are sharded, every rank must call it: one all-reduce adds their shares up.
        """
        if self.score == "magnitude":
            self.sums.clear()
            parameters: dict[str, Any] = dict(self.model.named_parameters())
            self._add(parameters, parameters, decay=0.0)
        self._ready()
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        whole = self._slices.reduced() if self._slices is not None else {}
        steps = self._weight()
        result = {}
        for coupling in couplings(self.model):
            scores = []
            for member in coupling.members:
                key = (member.parameter, member.dim)
                if member.matrix and key in self.sums:
                    rows = (member.index >= 0).cpu()
                    entries = int(rows.sum()) * parameters[member.parameter].numel() // len(rows)
                    scores.append(float(whole[key][rows].sum()) / entries)
            result[coupling] = sum(scores) / len(scores) / steps if scores else 0.0
        return result

    def _weight(self) -> float:
        """What the sums are divided by: the steps, or what an average that began at 0 lacks."""
        steps = max(self.steps - (0 if self._skipped is None else int(self._skipped)), 1)
        if self.decay is not None and self.score != "magnitude":
            return 1.0 - self.decay**steps
        return steps

    def _add(
        self,
        tensors: dict[str, Tensor],
        parameters: dict[str, Any],
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        decay: float | None = None,
    ) -> None:
        slices = self._ready()
        decay = (1.0 if self.decay is None else self.decay) if decay is None else decay
        gain = 1.0 if self.decay is None or self.score == "magnitude" else 1.0 - self.decay
        weights = parameters if slices.weighted else None
        slices.add(tensors, weights, decay=decay, gain=gain, scale=scale, found_inf=found_inf)
        for name in tensors:
            for dim in slices.dims.get(name, ()):
                if (name, dim) not in self.sums:
                    self.sums[name, dim] = slices.views[name, dim]

    def _ready(self) -> SliceSums:
        """The sums of the model as it is now; what is there is carried over, without what a shrink removed."""
        found = couplings(self.model)
        known, sums = self._last
        if self._slices is not None and sums is self.sums and known is found[0]:
            return self._slices
        dims: dict[str, set[int]] = {}
        for coupling in found:
            for member in coupling.members:
                if member.matrix:
                    dims.setdefault(member.parameter, set()).add(member.dim)
        before, kept = self._positions, plan(self.model).kept
        parameters = dict(self.model.named_parameters())
        scored = {name: along for name, along in dims.items() if name in parameters}
        slices = SliceSums(parameters, scored, weighted=self.score == "taylor")
        carried = {key: old for key, old in self.sums.items() if key in slices.views}
        for key, old in carried.items():
            new = slices.views[key]
            if old.shape != new.shape:
                now = kept[key]
                then = before[key] if key in before else torch.arange(len(old))
                old = old[torch.isin(then, now).to(old.device)]
            new.copy_(old)
        self.sums = {key: slices.views[key] for key in carried}
        self._slices, self._last, self._positions = slices, (found[0], self.sums), kept
        return slices


@torch.no_grad()
def index_scores(model: nn.Module, coupling: Coupling, *, by_context: bool = False) -> Tensor:
    """Score of each entry of a coupling: the product over its matrices of the norms of that entry's slices.

    A bias counts in the row of the matrix it belongs to. (arXiv 2511.11641, coupled sparsification.)

    Args:
        model: a compiled model.
        coupling: one of its couplings.
        by_context: score the entries of each context (the dims of each head) on their own.

    Returns:
        float64 `[coupling.size]`, or `[coupling.contexts, coupling.size]`.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rows = coupling.contexts if by_context else 1
    squares: dict[str, Tensor] = {}
    weights: list[Tensor] = [parameters[member.parameter] for member in coupling.members]
    sums_of = slice_sums(weights, [member.dim for member in coupling.members])
    for member, sums in zip(coupling.members, sums_of, strict=True):
        owned = member.index >= 0
        place = member.index[owned]
        if by_context and member.context is not None:
            place = member.context[owned] * coupling.size + place
        score = squares.setdefault(member.of, torch.zeros(rows * coupling.size, dtype=torch.float64))
        score.index_add_(0, place, sums.double().cpu()[owned])
    product = torch.stack([score.sqrt() for score in squares.values()]).prod(0)
    return product.view(rows, -1) if by_context else product
