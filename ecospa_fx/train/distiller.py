"""Distillation: a smaller student that learns to answer as its teacher does, in any training loop.

a training call of the student  -> hooks keep its arguments, its result, results of some modules
the same call of the teacher    -> its result, and the same modules' at the positions that the student has left
both                            -> divergence of logits + error of hidden states + the loss of the task
"""

from __future__ import annotations

import fnmatch
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from ecospa_fx.arguments import FLAG, MODULE, NAMED, NUMBER, optional, takes
from ecospa_fx.errors import ArgumentError, EcoSpaError
from ecospa_fx.model.lookup import is_captured, regions_of, state_of
from ecospa_fx.ranks.wrappers import unwrapped

from .objective import logits_of, loss_in, outputs_of

IGNORED = -100
"""The label of positions that a loss does not count."""


@dataclass
class _Seen:
    """One call of a model in training."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    hidden: dict[str, Tensor] = field(default_factory=dict)
    done: bool = False


class Distiller:
    """The loss of a student beside its teacher, which may be larger and is never trained.

    >>> teacher = copy.deepcopy(model)
    >>> ecospa_fx.compress(model, batches, target=0.7)
    >>> distiller = ecospa_fx.Distiller(model, teacher)
    >>> for batch in loader:
    ...     outputs = model(**batch)
    ...     loss = distiller.loss(outputs.loss)
    ...     loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()

    `loss` calls the teacher as the student was called last in training mode; the teacher runs in evaluation mode and
    without gradients. For a loop that takes the loss from the model's own result, as the Trainer of transformers does,
    pass `in_result=True`: in training mode the student's `loss` is then this one; in evaluation mode all is as before.

    The loss is `task` x the loss of the task + `logits` x temperature^2 x KL(teacher || student) of softened
    distributions (Hinton et al., arXiv 1503.02531), the mean over positions, + the sum over hidden states of weight x
    mean squared error over mean square of the teacher's. Of results without `logits` the second term is such an error
    too. Positions that `attention_mask=` leaves out do not count.

    Args:
        student: the model in training; wrappers (`DistributedDataParallel`, `torch.compile`) may lie around it.
        teacher: a module that takes the same calls, as the model before it shrank, best trained on the same data.
        temperature: by which logits are divided, over 0.
        task: weight of the loss that the loop or the student's result has.
        logits: weight of the divergence of results.
        hidden: pattern of module names -> weight: their first results are compared, of modules that are called more
            than once those of the last call. Results that have shrunk are compared at the entries left, which are known
            of regions (`regions="joined"`).
        in_result: put the loss into the student's own results in training mode.

    Raises:
        ArgumentError: a setting is out of range, or `hidden` names nothing that both have.
    """

    @takes(
        student=MODULE, teacher=MODULE, temperature=NUMBER, task=NUMBER, logits=NUMBER, hidden=optional(NAMED),
        in_result=FLAG,
    )  # fmt: skip
    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float = 1.0,
        task: float = 1.0,
        logits: float = 1.0,
        hidden: Mapping[str, float] | None = None,
        in_result: bool = False,
    ) -> None:
        if not 0 < temperature < math.inf:
            raise ArgumentError(f"Distiller: temperature={temperature} is out of range; it is a number over 0")
        for name, weight in (("task", task), ("logits", logits), *(hidden or {}).items()):
            if not weight >= 0:
                raise ArgumentError(f"Distiller: the weight of `{name}` is {weight}; weights are 0 or more")
        self.student, self.teacher = unwrapped(student), unwrapped(teacher)
        if self.student is self.teacher:
            raise ArgumentError("Distiller: student and teacher are one module; copy.deepcopy(model) makes a teacher")
        self.temperature, self.task, self.logits, self.in_result = temperature, task, logits, in_result
        self._weights = self._named(hidden or {})
        self._seen = _Seen()
        self._handles = [self.student.register_forward_pre_hook(_Before(self), with_kwargs=True)]
        for name in self._weights:
            self._handles.append(self.student.get_submodule(name).register_forward_hook(_Within(self, name)))
        self._handles.append(self.student.register_forward_hook(_After(self), with_kwargs=True))

    def __enter__(self) -> Distiller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Leave the student as it was."""
        while self._handles:
            self._handles.pop().remove()
        self._seen = _Seen()

    def loss(self, task: Tensor | None = None) -> Tensor:
        """Compute the loss of the student's last call; it may be asked for once.

        Args:
            task: the loss of the task, a scalar; None counts as zero.

        Returns:
            A scalar with a gradient.

        Raises:
            EcoSpaError: the student has not been called since, in training mode and with gradients; or results of the
                two cannot be set beside each other.
        """
        seen, self._seen = self._seen, _Seen()
        if not seen.done:
            raise EcoSpaError(
                f"the student {type(self.student).__name__} has not been called in training mode and with gradients "
                "since the last loss: call it, then `loss` once"
            )
        return self._value(seen, task)

    def share_frozen(self) -> int:
        """Let the teacher use the student's memory where both hold the same frozen values; return the bytes saved.

        That is of use where the student's own weights stay and adapters learn (LoRA). A later shrink of the student
        leaves the teacher as it is.
        """
        saved, frozen = 0, defaultdict(list)
        for mine in self.student.parameters():
            if not mine.requires_grad and type(mine.data) is Tensor and not mine.is_meta:
                frozen[_look(mine)].append(mine)
        for held in self.teacher.parameters():
            equal = [mine for mine in frozen.get(_look(held), ()) if torch.equal(mine, held)]
            if equal and all(mine.data_ptr() != held.data_ptr() for mine in equal):
                held.requires_grad_(False)
                held.data = equal[0].data
                saved += held.numel() * held.element_size()
        return saved

    def _named(self, hidden: Mapping[str, float]) -> dict[str, float]:
        mine = [name for name, _ in self.student.named_modules() if name]
        found: dict[str, float] = {}
        for pattern, weight in hidden.items():
            names = fnmatch.filter(mine, pattern)
            if not names:
                raise ArgumentError(
                    f"Distiller: hidden={{{pattern!r}: ...}} matches no module of the student; the first are "
                    f"{', '.join(mine[:5])}"
                )
            found |= dict.fromkeys(names, weight)
        theirs = {name for name, _ in self.teacher.named_modules()}
        if missing := [name for name in found if name not in theirs]:
            raise ArgumentError(f"Distiller: the teacher has no module `{missing[0]}`, which `hidden` names")
        return found

    def _value(self, seen: _Seen, task: Tensor | None) -> Tensor:
        logits = logits_of(seen.result)
        mine = outputs_of(seen.result) if logits is None else logits
        with ExitStack() as stack:
            taught = self._taught(seen, mine.device, stack)
        theirs = outputs_of(taught.result) if logits is None else logits_of(taught.result)
        total = torch.zeros((), device=mine.device) if task is None else self.task * task
        if self.logits:
            if theirs is None or mine.shape != theirs.shape:
                shape = "without logits" if theirs is None else tuple(theirs.shape)
                raise EcoSpaError(
                    f"the student's result is {tuple(mine.shape)} and the teacher's {shape}; they must have one "
                    "vocabulary, or as many classes"
                )
            differ = _error if logits is None else self._divergence
            apart = differ(mine, theirs, _rows(mine, seen.kwargs))
            total = total + self.logits * _share(seen.kwargs) * apart
        for name, weight in self._weights.items():
            for model, at in (("student", seen), ("teacher", taught)):
                if name not in at.hidden:
                    raise EcoSpaError(
                        f"the {model} has not called `{name}` as a module, so its result cannot be compared: leave it "
                        "out of `hidden`"
                    )
            part = self._left(name, at.hidden[name], seen.hidden[name].shape)
            apart = _error(seen.hidden[name], part, _rows(part, seen.kwargs))
            total = total + weight * _share(seen.kwargs) * apart
        return total

    def _taught(self, seen: _Seen, device: torch.device, stack: ExitStack) -> _Seen:
        """Call the teacher as the student was called."""
        taught = _Seen()
        where = next(self.teacher.parameters(), None)
        if where is not None and where.device != device:
            self.teacher.to(device)
        for name in self._weights:
            handle = self.teacher.get_submodule(name).register_forward_hook(_keep_in(taught.hidden, name))
            stack.callback(handle.remove)
        modes = {module: module.training for module in self.teacher.modules()}
        stack.callback(_set_modes, modes)
        self.teacher.eval()
        with torch.no_grad():
            taught.result = self.teacher(*seen.args, **seen.kwargs)
        return taught

    def _divergence(self, mine: Tensor, theirs: Tensor, rows: Tensor | None) -> Tensor:
        student, teacher = (_at(values, rows) / self.temperature for values in (mine, theirs))
        sum_ = kl_div(log_softmax(student, -1), log_softmax(teacher, -1), reduction="sum", log_target=True)
        return self.temperature**2 * sum_ / max(1, len(student))

    def _left(self, name: str, theirs: Tensor, shape: torch.Size) -> Tensor:
        """Take of a hidden state of the teacher the entries that the student has left."""
        if theirs.shape == shape:
            return theirs
        regions = regions_of(self.student) if is_captured(self.student) else {}
        if name in regions:
            kept = state_of(self.student).plan.kept
            for (number, dim), of in regions[name].border.results.items():
                if number == 0 and of in kept:
                    theirs = theirs.index_select(dim, kept[of].to(theirs.device))
        if theirs.shape != shape:
            raise EcoSpaError(
                f"the result of `{name}` is {tuple(shape)} in the student and {tuple(theirs.shape)} in the teacher, "
                "and it is not known which entries are left; they are of regions, with regions='joined'"
            )
        return theirs

    def _watches(self) -> bool:
        return self.student.training and torch.is_grad_enabled()


class _Hook:
    """A hook that does nothing on copies of the student, which have no distiller."""

    def __init__(self, distiller: Distiller) -> None:
        self.distiller = distiller

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()

    def of(self, module: nn.Module) -> Distiller | None:
        """Return the distiller, if a module is its student in training."""
        found = self.distiller
        return found if found.student is module and found._watches() else None


def _no_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*given: Any) -> None:
    pass


class _Before(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (distiller := self.of(module)) is not None:
            distiller._seen = _Seen(args, dict(kwargs))


class _Within(_Hook):
    def __init__(self, distiller: Distiller, name: str) -> None:
        super().__init__(distiller)
        self.name = name

    def __call__(self, module: nn.Module, args: Any, result: Any) -> None:
        distiller = self.distiller
        # Activation checkpointing calls a module again in the backward, when its student's call is over.
        if distiller._seen.done or not distiller._watches():
            return
        if distiller.student.get_submodule(self.name) is module:
            distiller._seen.hidden[self.name] = outputs_of(result)


class _After(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        if (distiller := self.of(module)) is None:
            return None
        distiller._seen.result, distiller._seen.done = result, True
        if not distiller.in_result:
            return None
        own = loss_in(result)
        if own is None or not isinstance(result, Mapping):
            raise EcoSpaError(
                f"in_result=True needs a `loss` in the student's result, and {type(result).__name__} has none: pass "
                "labels to it, or call distiller.loss(loss) in the loop"
            )
        changed = type(result)(**{**result, "loss": distiller.loss(own)})
        distiller._seen = _Seen()
        return changed


def _keep_in(found: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, result: Any) -> None:
        found[name] = outputs_of(result)

    return keep


def _set_modes(modes: Mapping[nn.Module, bool]) -> None:
    for module, mode in modes.items():
        module.training = mode


def _rows(values: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Find the rows `[*lead]` of values `[*lead, n]` that are no padding; None: all of them."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == values.shape[:-1]:
        return mask.bool().to(values.device)
    return None


def _share(kwargs: Mapping[str, Any]) -> Any:
    """Find the part that a call has of the batches whose gradients a Trainer of transformers adds up."""
    whole, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if whole is None or not isinstance(labels, Tensor):
        return 1.0
    return labels.ne(IGNORED).sum() / whole


def _at(values: Tensor, rows: Tensor | None) -> Tensor:
    return values.float().flatten(0, -2) if rows is None else values.float()[rows]


def _look(tensor: Tensor) -> tuple[Any, ...]:
    """Return what equal tensors have in common; their names may differ, as adapters change them."""
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride(), float(tensor.detach().double().sum())


def _error(mine: Tensor, theirs: Tensor, rows: Tensor | None) -> Tensor:
    """Mean squared error over the mean square of the teacher's."""
    student, teacher = _at(mine, rows), _at(theirs, rows)
    return (student - teacher).square().mean() / teacher.square().mean().clamp(min=1e-12)
