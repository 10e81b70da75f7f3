"""CoupledEstimator: how important each coupling is, accumulated over training steps."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import TargetError
from ecospa_fx.model.lookup import couplings, is_captured, plan, regions_of
from ecospa_fx.model.optimizer_state import innermost, second_moments, several

from .activations import ActivationScores
from .scores import Score, ScoreFunction, score_named
from .slices import SliceKey, SliceSums, Window
from .step_watcher import names_of


class CoupledEstimator:
    """Scores couplings together, matrix by matrix (arXiv 2511.11641, coupled estimation).

    The importance of a coupling is the mean over its matrices of `sum(score) / numel`, accumulated since the last
    reset; with `"fisher"` the score is the squared gradient. This is the square of the mini-batch gradient, not the
    per-sample Fisher information, which it is named after (see Kunstner et al. 2019 on the difference). Sums are kept
    per row and column; that costs nothing more, and the matrix score is their sum.

    Gradients are read where you say: at every call of `accumulate`; right before an optimizer's steps (`attach`); or
    as backward makes them (`attach_backward`). A NaN or inf in a gradient makes the importance of its couplings NaN or
    inf until the next reset; with a `torch.amp.GradScaler`, `attach` leaves such steps out.

    Args:
        model: a compiled model that has been called.
        score: what a weight is worth: a name of `ecospa_fx.scores.SCORES`, or a function of a weight and its gradient
            that returns a worth for each of its entries.
        decay: None to add all steps up equally; otherwise each step's share of what is forgotten is `1 - decay`, as in
            the second moment of Adam.
        window: add up the last so many steps only. It keeps their sums per row and column, so memory grows with it.
        optimizer: one or several, of which `"adam"` reads the second moments.
        seed: of `"random"`.

    Attributes:
        steps: steps accumulated since the last reset. Replays of a CUDA graph are not counted; they leave the order of
            importances as it is.
        sums: (parameter, dim) -> sums of each slice; only what has had a gradient. Where parameters are sharded, the
            share of this rank.

    Raises:
        TargetError: there is no such score, `decay` is not between 0 and 1, `window` is no whole number from 1, or
            both are given.
    """

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
        self.score = score_named(score)
        if decay is not None and not 0.0 < decay < 1.0:
            raise TargetError(f"decay={decay!r} is not between 0 and 1; None adds all steps up")
        if window is not None and (not isinstance(window, int) or window < 1):
            raise TargetError(f"window={window!r} is out of range; it is a whole number of steps, at least 1")
        if window is not None and decay is not None:
            raise TargetError(f"decay={decay!r} and window={window!r}: one of them forgets, not both; leave one out")
        if self.score.reads == "optimizer" and optimizer is None:
            raise TargetError(f"score={self.score.name!r} reads the optimizer's state; pass optimizer=")
        self.model, self.decay, self.window, self.seed = model, decay, window, seed
        self.optimizers = [] if optimizer is None else several(optimizer)
        self.steps = 0
        self.sums: dict[SliceKey, Tensor] = {}
        self._slices: SliceSums | None = None
        self._last: tuple[Any, ...] = (None, None)  # the couplings and the sums that _slices was made for
        self._positions: dict[SliceKey, Tensor] = {}  # original positions of what _slices scores, where not all
        self._window = None if window is None else Window(window)
        self._skipped: Tensor | None = None
        self._handles: list[Any] = []
        self._fired: dict[str, int] = {}
        self._held: dict[SliceKey, Tensor] | None = None
        self._flows: ActivationScores | None = None
        self._look()

    def accumulate(
        self,
        *,
        scale: Tensor | float | None = None,
        found_inf: Tensor | None = None,
        names: Collection[str] | None = None,
        new_step: bool = True,
    ) -> None:
        """Add the gradients as they are now: call it after `backward`, before they are zeroed.

        On a GPU this is one launch and a tiny one, without synchronisation; once it has run it may be captured in a
        CUDA graph.

        Args:
            scale: what the loss was multiplied by and gradients are still multiplied by, if so.
            found_inf: unless it is 0, the step is left out; read on the device.
            names: read the gradients of these parameters only.
            new_step: whether this is another training step, or a part of the last one that was not read yet.
        """
        self.steps += new_step
        if self.score.reads != "gradients":
            self._look()
            return
        if found_inf is not None and new_step:
            one = found_inf.detach().clamp(max=1)
            self._skipped = one if self._skipped is None else self._skipped.add_(one)
        factor = torch.as_tensor(scale, dtype=torch.float32) if isinstance(scale, (int, float)) else scale
        parameters = dict(self.model.named_parameters())
        read = parameters if names is None else {name: parameters[name] for name in parameters if name in names}
        gradients = {name: p.grad for name, p in read.items() if p.grad is not None}
        self._add(gradients, parameters, factor, found_inf, new_step=new_step)

    def attach(self, *optimizers: Optimizer) -> None:
        """Read gradients right before every step of an optimizer, instead of at calls of `accumulate`.

        Of several, which take a step each in a training step, each reads those of its own parameters. These are the
        final gradients: summed over micro-batches, and clipped if you clip before the step, as one does. A
        `GradScaler`'s scale is divided out, and steps that it skips are left out.
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

        optimizers = tuple(each for optimizer in optimizers for each in innermost(optimizer))
        for number, optimizer in enumerate(optimizers):
            hook = lambda held, *_, number=number: read(number, held)  # noqa: E731
            self._handles.append(optimizer.register_step_pre_hook(hook))

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
            if self._fired[name] % every == 0:
                begun, self.steps = self.steps, max(self._fired.values()) // every
                if parameter.grad is not None and self.score.reads == "gradients":
                    self._add({name: parameter.grad}, {name: parameter}, new_step=self.steps != begun)

        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                hook = lambda held, name=name: ready(name, held)  # noqa: E731
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def detach(self) -> None:
        """Take off what `attach` and `attach_backward` put on."""
        while self._handles:
            self._handles.pop().remove()
        if self._flows is not None:
            self._flows.detach()

    def _look(self) -> None:
        """Watch what flows through the model, once its regions are known and if the score is made of that.

        Those of a loaded model are known before its first call, which must not be missed.
        """
        if self.score.reads in ("activations", "attention") and self._flows is None and regions_of(self.model):
            self._flows = ActivationScores(self.model, attention=self.score.reads == "attention")

    @property
    def attached(self) -> bool:
        """Gradients are read by hooks."""
        return bool(self._handles)

    def reset(self) -> None:
        """Forget what was accumulated."""
        self.steps = 0
        self._fired.clear()
        self.sums.clear()
        if self._window is not None:
            self._window.steps.clear()
        if self._slices is not None:
            self._slices.zero()
        if self._flows is not None:
            self._flows.reset()
        if self._skipped is not None:
            self._skipped.zero_()

    def importance(self) -> dict[Coupling, float]:
        """Importance of every coupling that the score can judge; 0 for one that had no gradient.

        `"attention_entropy"` judges heads and groups of heads, `"activation"` what a product was seen of; the others
        judge all. Where parameters are sharded, every rank must call it: one all-reduce adds their shares up.

        Raises:
            OptimizerError: the optimizer holds no second moments to read.
        """
        found = couplings(self.model)
        if self.score.reads == "nothing":
            return {coupling: float(self._drawn(coupling, ()).item()) for coupling in found}
        if self.score.reads in ("activations", "attention"):
            seen = {coupling: self._seen_of(coupling) for coupling in found}
            return {coupling: float(entries.mean()) for coupling, entries in seen.items() if entries is not None}
        means = self._means()
        result = {}
        for coupling in found:
            scores = []
            for member in coupling.members:
                if member.matrix and (member.parameter, member.dim) in means:
                    rows = member.index >= 0
                    scores.append(float(means[member.parameter, member.dim][rows].sum()) / int(rows.sum()))
            result[coupling] = sum(scores) / len(scores) if scores else 0.0
        return result

    def entries(self, coupling: Coupling, *, by_context: bool = False) -> Tensor:
        """Importance of each entry of a coupling: the mean over its matrices of that of the entry's rows or columns.

        Where this score cannot judge the coupling all its entries are worth the same.

        Args:
            coupling: one of the model's couplings.
            by_context: the entries of each context (the dims of each head) on their own.

        Returns:
            float64 `[coupling.size]`, or `[coupling.contexts, coupling.size]`.
        """
        rows = coupling.contexts if by_context else 1
        shape = (rows, coupling.size) if by_context else (coupling.size,)
        if self.score.reads == "nothing":
            return self._drawn(coupling, shape)
        if self.score.reads in ("activations", "attention"):
            seen = self._seen_of(coupling, by_context)
            return torch.ones(shape, dtype=torch.float64) if seen is None else seen
        means, matrices = self._means() if self._held is None else self._held, []
        for member in coupling.members:
            if member.matrix and (member.parameter, member.dim) in means:
                owned = member.index >= 0
                place = member.index[owned]
                if by_context and member.context is not None:
                    place = member.context[owned] * coupling.size + place
                worth = means[member.parameter, member.dim][owned]
                matrices.append(torch.zeros(rows * coupling.size, dtype=torch.float64).index_add_(0, place, worth))
        total = torch.stack(matrices).mean(0) if matrices else torch.ones(rows * coupling.size, dtype=torch.float64)
        return total.view(shape)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """`entries` of all couplings from sums that are read, and added up over ranks, once."""
        self._held = self._means() if self.score.reads in ("gradients", "weights", "optimizer") else None
        try:
            yield
        finally:
            self._held = None

    def _seen_of(self, coupling: Coupling, by_context: bool = False) -> Tensor | None:
        return None if self._flows is None else self._flows.entries(coupling, by_context=by_context)

    @property
    def empty(self) -> bool:
        """Nothing has been accumulated that a decision could be made from."""
        if self.score.reads == "gradients":
            return not self.sums
        return self.score.accumulates and not (self._flows is not None and self._flows.sums)

    def state_dict(self) -> dict[str, Any]:
        """What was accumulated: `steps`, and `tensors` by name."""
        if self.sums and is_captured(self.model):
            self._ready()  # without what a shrink since then has removed
        tensors = {f"{name}[{dim}]": sums for (name, dim), sums in self.sums.items()}
        for i, step in enumerate(self._window.steps if self._window is not None else ()):
            tensors |= {f"step {i}: {name}[{dim}]": sums for (name, dim), sums in step.items()}
        if self._skipped is not None:
            tensors["skipped"] = self._skipped
        if self._flows is not None:
            tensors |= self._flows.state_dict()
        return {"steps": self.steps, "fired": dict(self._fired), "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.steps, self._fired = state["steps"], dict(state.get("fired", {}))
        self.sums, self._skipped = {}, state["tensors"].get("skipped")
        steps: dict[int, dict[SliceKey, Tensor]] = {}
        flows = {name: tensor for name, tensor in state["tensors"].items() if name.startswith("flow ")}
        for name, tensor in state["tensors"].items():
            if name not in flows and name != "skipped":
                step, _, label = name.rpartition(": ")
                parameter, _, dim = label.removesuffix("]").rpartition("[")
                held = steps.setdefault(int(step.split()[1]), {}) if step else self.sums
                held[parameter, int(dim)] = tensor
        if self._window is not None:
            self._window.steps.clear()
            self._window.steps.extend(steps[i] for i in sorted(steps))
        self._look()
        if flows and self._flows is not None:
            self._flows.load_state_dict(flows)

    def _drawn(self, coupling: Coupling, shape: tuple[int, ...]) -> Tensor:
        """Random numbers that are the same for the same seed, step and coupling: on every rank, and after a resume."""
        label = f"{self.seed} {self.steps} {coupling.name} {'entries' if shape else ''}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(label).digest()[:7]))
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def _means(self) -> dict[SliceKey, Tensor]:
        """For each scored slice the mean of its entries' scores per step: float64 on the CPU."""
        parameters: dict[str, Any] = dict(self.model.named_parameters())
        if self.score.reads == "weights":
            self.sums.clear()
            self._add(parameters, parameters, decay=0.0)
        elif self.score.reads == "optimizer":
            self.sums.clear()
            scored = {member.parameter for c in couplings(self.model) for member in c.members if member.matrix}
            self._add(second_moments(self.model, self.optimizers, scored), parameters, decay=0.0)
        elif self._window is not None:
            for key, view in self.sums.items():
                view.copy_(self._window.sum(key, view))
        self._ready()
        whole = self._slices.reduced() if self._slices is not None else {}
        steps = self._weight()
        numels = {name: parameters[name].numel() for name in {name for name, _ in self.sums}}
        return {
            (name, dim): whole[name, dim].double() / (numels[name] // len(whole[name, dim])) / steps
            for name, dim in self.sums
        }

    def _weight(self) -> float:
        """What the sums are divided by: the steps, or what an average that began at 0 lacks."""
        if self.score.reads != "gradients":
            return 1.0
        if self._window is not None:
            return max(1, len(self._window.steps))
        steps = max(self.steps - (0 if self._skipped is None else int(self._skipped)), 1)
        return steps if self.decay is None else 1.0 - self.decay**steps

    def _add(
        self,
        tensors: dict[str, Tensor],
        parameters: dict[str, Any],
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        decay: float | None = None,
        new_step: bool = True,
    ) -> None:
        slices = self._ready()
        if decay is None:
            decay = 1.0 if self.decay is None else self.decay
            decay = 0.0 if self._window is not None else decay  # each step on its own, see `Window`
        gain = 1.0 if self.decay is None or self.score.reads != "gradients" else 1.0 - self.decay
        if self._by_function:
            # The kernel sums squares: of the roots of what the function says.
            tensors = {name: self._roots(name, tensors[name], parameters[name], scale) for name in tensors
                       if name in slices.dims}  # fmt: skip
            scale = None
        slices.add(
            tensors, parameters if slices.weighted else None, decay=decay, gain=gain, scale=scale, found_inf=found_inf
        )
        for name in tensors:
            for dim in slices.dims.get(name, ()):
                if (name, dim) not in self.sums:
                    self.sums[name, dim] = slices.views[name, dim]
        if self._window is not None and self.score.reads == "gradients":
            added = {key: view for key, view in self.sums.items() if key[0] in tensors}
            self._window.add(added, new_step, found_inf)

    @property
    def _by_function(self) -> bool:
        """The kernel that sums squares has no form of its own for the score."""
        return self.score.reads == "gradients" and self.score.name not in ("fisher", "taylor_squared")

    def _roots(self, name: str, gradient: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
        assert self.score.of is not None
        gradient = gradient.detach() if scale is None else gradient.detach() / scale.to(gradient.device)
        worth = self.score.of(weight.detach(), gradient)
        if not isinstance(worth, Tensor) or worth.shape != weight.shape:
            given = f"a {type(worth).__name__}" if not isinstance(worth, Tensor) else f"{tuple(worth.shape)}"
            raise TargetError(
                f"score={self.score.name} returned {given} for `{name}` of shape {tuple(weight.shape)}; it returns "
                "what each entry of the weight is worth, in the weight's shape"
            )
        return worth.to(torch.promote_types(worth.dtype, torch.float32)).sqrt()

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
        slices = SliceSums(parameters, scored, weighted=self.score.name == "taylor_squared")
        carried = {key: old for key, old in self.sums.items() if key in slices.views}

        def left(key: SliceKey, old: Tensor) -> Tensor:
            if old.shape == slices.views[key].shape:
                return old
            then = before[key] if key in before else torch.arange(len(old))
            return old[torch.isin(then, kept[key]).to(old.device)]

        for key, old in carried.items():
            slices.views[key].copy_(left(key, old))
        for step in self._window.steps if self._window is not None else ():
            for key in list(step):
                old = step.pop(key)
                if key in slices.views:
                    step[key] = left(key, old)
        self.sums = {key: slices.views[key] for key in carried}
        self._slices, self._last, self._positions = slices, (found[0], self.sums), kept
        return slices
