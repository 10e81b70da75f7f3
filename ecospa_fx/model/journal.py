"""Journal: what a change of a model has replaced so far, so that an error or Ctrl-C at any line takes all of it back.

all_or_nothing(change) -> change(journal): note what is there, then assign
                          an exception of any kind -> everything noted is put back, the latest first
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ecospa_fx.errors import ArgumentError, EcoSpaError
from ecospa_fx.ranks.agreement import Ranks
from ecospa_fx.ranks.ddp import make_again
from ecospa_fx.ranks.shards import data_of, is_sharded, other_dtype, put
from ecospa_fx.ranks.wrappers import reducers_of
from ecospa_fx.threads import alone

Result = TypeVar("Result")
_MISSING = object()


class Journal:
    """A list of what a change has replaced, and of what is left to do once it is complete."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._replaced: list[Tensor] = []
        self._later: list[Callable[[], None]] = []

    def note(self, undo: Callable[[], None], *replaced: Tensor) -> None:
        """Note a function that takes a change back, and the tensors that the change gives other data.

        It may be called twice, and before the change was made.
        """
        self._replaced += replaced
        self._undo.append(undo)

    def note_later(self, finish: Callable[[], None]) -> None:
        """Note a function to call once nothing can be taken back any more. It must not fail."""
        self._later.append(finish)

    def note_object(self, held: object) -> None:
        """Note the attributes of an object."""
        before = dict(vars(held))

        def undo() -> None:
            for name in [name for name in vars(held) if name not in before]:
                vars(held).pop(name, None)
            vars(held).update(before)

        self.note(undo)

    def note_list(self, held: list[Any]) -> None:
        """Note the items of a list."""
        before = list(held)
        self.note(lambda: held.__setitem__(slice(None), before))

    def note_item(self, held: MutableMapping[Any, Any], key: Any) -> None:
        """Note the value of a key, which may be missing."""
        value = held.get(key, _MISSING)
        self.note(lambda: held.pop(key, None) if value is _MISSING else held.__setitem__(key, value))

    def note_attribute(self, held: object, name: str) -> None:
        """Note one attribute, or the class of an object."""
        value = getattr(held, name)
        self.note(lambda: setattr(held, name, value))

    def note_modules(self, root: nn.Module) -> None:
        """Note the class of every module, the attributes by which it is compiled or knows a size, and its buffers."""
        for module in root.modules():
            self.note_attribute(module, "__class__")
            self.note_object(module)
            for name in module._buffers:
                self.note_item(module._buffers, name)

    def note_tensor(self, tensor: Tensor) -> None:
        """Note the data of a tensor, its gradient, and whether it has one."""
        data, grad, trains = tensor.data, tensor.grad, tensor.requires_grad

        def undo() -> None:
            tensor.requires_grad_(False)  # for now: the dtype between may not allow gradients
            assign(tensor, data, None)
            tensor.requires_grad_(trains)
            assign(tensor, data, grad)

        self.note(undo, tensor)

    def set_tensor(self, tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
        """Give a tensor other data and another gradient."""
        data_before, grad_before = (data_of(tensor) if is_sharded(tensor) else tensor.data), tensor.grad
        self.note(lambda: assign(tensor, data_before, grad_before), tensor)
        assign(tensor, data, grad)

    def set_attributes(self, held: object, attributes: Mapping[str, Any]) -> None:
        """Give an object other attributes, and none besides."""
        self.note_object(held)
        vars(held).clear()
        vars(held).update(attributes)

    def set_item(self, held: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Give a key another value."""
        self.note_item(held, key)
        held[key] = value

    def follow(self) -> None:
        """Let what reduces the gradients of parameters over ranks know those that have other data."""
        for each in reducers_of(self._replaced):
            make_again(each)

    def undo(self) -> None:
        """Put back everything noted. Ctrl-C waits for it."""
        with _Held():
            for undo in reversed(self._undo):
                undo()
            if self._undo:
                self.follow()

    def close(self) -> None:
        """Keep everything as it is now."""
        self._undo = []

    def finish(self) -> None:
        """Do what is left, after `close`."""
        later, self._later = self._later, []
        for finish in later:
            finish()


@alone()
def all_or_nothing(change: Callable[[Journal], Result], ranks: Ranks | None = None, doing: str = "shrink") -> Result:
    """Make a change as a whole: whatever is raised inside, Ctrl-C included, leaves everything as it was before.

    Args:
        change: makes the change, and notes in the journal how to take it back.
        ranks: the processes that all make the change, or none of them.
        doing: the change, for a message on the other ranks.

    Raises:
        RanksError: another rank cannot make the change.
    """
    journal = Journal()
    together = Ranks() if ranks is None else ranks

    def whole() -> Result:
        result = change(journal)
        journal.follow()
        return result

    try:
        try:
            # Once another rank may know that all are ready, this one cannot give up.
            result = together.together(doing, whole, commit=journal.close, held=_Held())
        except BaseException:
            journal.undo()
            raise
    except BaseException:
        journal.undo()  # an exception may have come at any line of the first attempt
        raise
    finally:
        torch.clear_autocast_cache()  # of casts by parameter, whose sizes were others
    journal.finish()
    return result


def reduced_anew(tensors: Iterable[Tensor]) -> None:
    """Let what reduces gradients over ranks follow tensors whose data has been replaced outside of a journal."""
    replaced = list(tensors)
    for each in reducers_of(replaced):
        for tensor in replaced:
            grad = tensor.grad
            assign(tensor, tensor.data, grad if grad is not None and grad.shape == tensor.shape else None)
        make_again(each)


def take_state(where: str, held: Iterable[object], take: Callable[[], None]) -> None:
    """Let objects take a state that `state_dict` returned: as a whole, or not at all.

    Args:
        where: the object that takes it, for the message.
        held: the objects whose attributes change.
        take: changes them.

    Raises:
        ArgumentError: the state is none that `state_dict` returned.
    """

    def change(journal: Journal) -> None:
        for each in held:
            journal.note_object(each)
        take()

    try:
        all_or_nothing(change)
    except EcoSpaError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise ArgumentError(
            f"{where}: `state` cannot be read ({type(error).__name__}: {error}); it must be what state_dict() returned"
        ) from error


def assign(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    """Give a tensor other data and another gradient."""
    if is_sharded(tensor):
        put(tensor, data, grad)
        return
    # A gradient must have its parameter's shape at every moment.
    tensor.grad = None
    if tensor.requires_grad:
        tensor.data = data.new_empty(0, dtype=other_dtype(data.dtype))
    tensor.data = data
    tensor.grad = grad


class _Held:
    """A context in which Ctrl-C waits until its end. Outside of the main thread no signals arrive."""

    def __init__(self) -> None:
        self.inside = False
        self.before: Any = None
        self.came: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> None:
        """Hold signals back."""
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
            self.before, self.inside = signal.getsignal(signal.SIGINT), True
            signal.signal(signal.SIGINT, self._arrive)

    def __exit__(self, *_: object) -> None:
        """Hand on the signal that came, if one did."""
        self.inside = False
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
            if self.came is not None:
                self.before(*self.came)

    def _arrive(self, number: int, frame: FrameType | None) -> None:
        if self.inside:
            self.came = (number, frame)
        else:  # an exception in `__exit__` has left this in place
            signal.signal(number, self.before)
            self.before(number, frame)
