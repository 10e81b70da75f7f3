"""Rehearsal: a region's own forward, run twice in a row, to see what it does beside computing its results.

    rehearsed(module, call, ...)
      -> code       the functions that run, whose globals a graph depends on
      -> refuse     a draw from Python's or numpy's generators, which a graph would make once; state that it assigns;
                    other data that it gives to a tensor
      -> (with)     capture goes on in the state in which further calls change nothing: caches are filled

Everything is put back in the end, but for what the forward's own next call would do again.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.errors import CaptureError, FirstCallError, NotNowError
from ecospa_fx.passes.graph.isolate import Draws, isolated
from ecospa_fx.passes.graph.iterators import is_iterator
from ecospa_fx.passes.graph.namespaces import ABSENT, WHOLE, Code, code_of, foreign_code
from ecospa_fx.passes.graph.python_state import (
    TENSORS,
    LeafState,
    PythonState,
    StateChange,
    contents,
    item_of,
    path_of,
    same,
)
from ecospa_fx.passes.graph.stores import watched_stores
from ecospa_fx.passes.graph.tensors import at_original_sizes, storage_key
from ecospa_fx.passes.ir.region_graph import Assigned, Forward, Originals, described
from ecospa_fx.passes.ir.state_access import copied_call, flattened

from .data_uses import DataUses, memory_of, other_memory
from .first_call import after_first_call, first_only
from .hooks import without_hooks
from .reads import executed, recorded_reads


@dataclass(frozen=True)
class Rehearsal:
    """The side effects of a forward.

    Attributes:
        code: the functions that it runs.
        assigned: the places to which every call assigns a tensor.
        filled: the changes that only its first call makes, to caches and hooks.
        first_only: what its first call does beside these, in words; None if nothing.
        reads_data: the line at which it reads the data of a tensor; None if it does not.
        cleared: the attributes, as (path, name), that are None before each call and None after it, and written between.
    """

    code: Code = field(default_factory=dict)
    assigned: tuple[Assigned, ...] = ()
    filled: tuple[StateChange, ...] = ()
    first_only: str | None = None
    reads_data: str | None = None
    cleared: frozenset[tuple[str, str]] = frozenset()

    @property
    def hooking(self) -> bool:
        """True if the forward registers hooks in its first call."""
        return any(change.is_hook for change in self.filled)


class _ForwardFails(Exception):
    """An error of the forward itself."""


@contextmanager
def rehearsed(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    region: str,
    forward: Forward,
    originals: Originals | None,
) -> Iterator[Rehearsal]:
    """Run a forward twice, and stay in the state after that for the time inside.

    Args:
        module: the region.
        args: positional arguments of the call.
        kwargs: keyword arguments of it.
        region: its name, for messages.
        forward: its own forward.
        originals: see `capture`.

    Raises:
        CaptureError: it draws from Python's or numpy's generators, changes state that a graph would not change, or
            gives a tensor other data. What is raised inside says so if the forward reads such data.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        raise NotNowError(
            f"{described(region)} is called in a way it has not been called in before while the model is being "
            "exported; call the model once with the same arguments before exporting it"
        )
    if any(t.is_meta for t in (*flattened((args, kwargs))[0], *module.parameters()) if isinstance(t, Tensor)):
        yield Rehearsal()
        return

    def called() -> Any:
        try:
            call_args, call_kwargs = copied_call(args, kwargs)
            return forward(module, *call_args, **call_kwargs)
        except CaptureError:
            raise
        except Exception as error:
            raise _ForwardFails from error

    def run() -> Any:
        with without_hooks(module):  # which are captured, or called beside the graph
            return called()

    @contextmanager
    def eager() -> Iterator[None]:
        with (
            at_original_sizes(module, originals.values() if originals else None),
            isolated(module),
            torch.enable_grad(),
            _no_garbage_collection(),
        ):
            yield

    rehearsal = Rehearsal()
    with contextlib.suppress(_ForwardFails):  # torch.export says so in words of its own
        with eager():
            rehearsal = _effects(module, region, run, called)
        for change in rehearsal.filled:
            registers = isinstance(change.key, tuple) and change.key[0] in TENSORS
            if registers or is_iterator(change.owner) or isinstance(change.owner, bytearray):
                raise FirstCallError(
                    f"{described(region)} ({type(module).__name__}) {'registers' if registers else 'changes'} "
                    f"`{change.where}` in its first call; call the model once before it is compiled"
                )
        if rehearsal.filled:
            # Hooks that the first call installs take part in the later ones.
            again = called if rehearsal.hooking else run
            rehearsal = replace(rehearsal, first_only=first_only(module, rehearsal.filled, again, eager))
    with after_first_call(module, rehearsal.filled):
        try:
            yield rehearsal
        except NotNowError:
            raise
        except CaptureError as error:
            if rehearsal.reads_data is None:
                raise
            raise CaptureError(
                f"{str(error).rstrip('.')}. It reads the data of a tensor{rehearsal.reads_data} (`.data`), which "
                "torch.export does not follow: use `.detach()`, which shares its memory too"
            ) from error


def _place(module: nn.Module, change: StateChange) -> tuple[str, str] | None:
    """Return the path of the submodule of which a change is in an attribute or a buffer, and its name; else None."""
    path = path_of(module, change.owner)
    name = change.key
    if isinstance(name, tuple):
        kind, name = name
        if kind != "_buffers":
            return None
    return None if path is None else (path, name)


def _cleared(module: nn.Module, change: StateChange) -> tuple[str, str] | None:
    """Return the path and name of an attribute that was None and is None again; None of any other change."""
    if change.before is not None or change.after is not None or not isinstance(change.key, str):
        return None
    return _place(module, change)


def _assigned(
    module: nn.Module, region: str, changes: Sequence[StateChange], run: Callable[[], Any]
) -> Iterator[Assigned]:
    """Yield the places to which a forward assigns tensors, which its graph can do too.

    Raises:
        CaptureError: it changes something else.
    """
    for change in changes:
        place = _place(module, change)
        if place is None or type(change.after) is not Tensor:
            raise CaptureError(_assigns(module, region, change, run))
        buffer = isinstance(change.key, tuple)
        if buffer and not (
            isinstance(change.before, Tensor)
            and (change.before.shape, change.before.dtype) == (change.after.shape, change.after.dtype)
        ):
            raise CaptureError(_assigns(module, region, change, run))
        yield Assigned(*place, buffer)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep callbacks of the collector, and finalizers, out of a forward: what they do is not a part of it.

    A forward that compiles itself (`torch.cond`) turns the collector on again, so that callbacks are taken off, too.
    """
    enabled, callbacks = gc.isenabled(), [*gc.callbacks]
    gc.disable()
    gc.callbacks.clear()
    try:
        yield
    finally:
        gc.callbacks[:0] = callbacks
        if enabled:
            gc.enable()


def _effects(module: nn.Module, region: str, run: Callable[[], Any], called: Callable[[], Any]) -> Rehearsal:
    """Run a forward twice, to see what only its first call changes and what each does.

    Args:
        module: the module.
        region: its name.
        run: runs the forward, without hooks of modules.
        called: runs it with them: hooks that the first call installs take part in the later ones.

    Raises:
        CaptureError: it draws from Python's or numpy's generators, changes state that a graph would not change, or
            gives a tensor other data.
    """
    world = PythonState(module)
    with executed() as seen:
        run()
    # Cells of closures are known from functions, which a frame does not name.
    code = seen | {key: function for key, function in code_of(module).items() if key in seen}
    first = tuple(world.changes())
    if any(change.is_hook for change in first):
        run = called
    again, draws, memory = PythonState(module, code), Draws(), memory_of(module)
    try:
        with recorded_reads(module, code) as reads, watched_stores(again) as stores, DataUses(module) as data:
            try:
                run()
            except _ForwardFails as error:  # without knowing what it reads, no graph of it could be trusted
                cause = error.__cause__
                raise CaptureError(
                    f"{described(region)} ({type(module).__name__}) runs once, and a second call, in which its reads "
                    f"and writes are watched, ends with {type(cause).__name__}: {cause}. Let it run twice in a row, or "
                    "let smaller submodules be captured (regions='auto' finds them)"
                ) from cause
        generator = draws.moved(among=("Python", "numpy"))
        if generator:
            raise CaptureError(
                f"{described(region)} ({type(module).__name__}) draws from the random generator of {generator}"
                f"{_line(run, draws.state)}, and a graph would hold that one outcome for ever. Draw with torch, or let "
                "smaller submodules be captured, which do not draw (regions='auto' finds them)"
            )
        name = other_memory(memory)
        if name is not None and data.replaced is None:  # by `set_`, of which no mode hears
            tensor, _ = memory[name]
            data.replaced = f"`{name}`", _line(run, lambda: storage_key(tensor))
        if data.replaced is not None:
            what, line = data.replaced
            raise CaptureError(
                f"{described(region)} ({type(module).__name__}) gives {what} other data{line} at every call, which its "
                "graph would not follow. Write into it instead, in torch.no_grad(): `.copy_(...)`, or let smaller "
                "submodules be captured (regions='auto' finds them)"
            )
        anew = stores.anew(reads.writes)
        # A number may follow from the sizes of a call. None only follows from the way that the forward has taken, and
        # what a layer keeps for itself between two of its methods leaves nothing behind.
        cleared = {id(change): found for change in anew if (found := _cleared(module, change)) is not None}
        kept = [change for change in anew if id(change) not in cleared]
        assigned = tuple(_assigned(module, region, [*again.changes(), *kept], run))
        for place in assigned:
            if not place.buffer and reads.read_before(place.path, place.name):
                raise CaptureError(
                    f"{described(region)} ({type(module).__name__}) reads and replaces the tensor `{place.full_name}` "
                    "at every call, which its graph would not follow. Register it as a buffer"
                )
        _refuse_other_effects(module, region, code, assigned, run)
    finally:
        again.restore()
    places = {(place.path, place.name) for place in assigned}
    filled = tuple(change for change in first if _place(module, change) not in places)
    return Rehearsal(code, assigned, filled, reads_data=data.read, cleared=frozenset(cleared.values()))


def _refuse_other_effects(
    module: nn.Module, region: str, code: Code, assigned: Sequence[Assigned], run: Callable[[], Any]
) -> None:
    """Refuse a forward that leaves other state without gradients than with them: one graph serves both calls.

    Raises:
        CaptureError: it does.
    """
    before = PythonState(module, code)
    with contextlib.suppress(_ForwardFails), torch.no_grad():
        run()
    changes = [*before.changes()]
    places = {(place.path, place.name) for place in assigned}
    other = next((change for change in changes if _place(module, change) not in places), None)
    kept = places - {_place(module, change) for change in changes}
    if other is not None or kept:
        where = other.where if other is not None else ".".join(filter(None, min(kept, key=str)))
        raise CaptureError(
            f"{described(region)} ({type(module).__name__}) leaves `{where}` in another state without gradients than "
            "with them, while one graph serves both. Write it in the same way in both, or let smaller submodules be "
            "captured (regions='auto' finds them)"
        )


def _assigns(module: nn.Module, region: str, change: StateChange, run: Callable[[], Any]) -> str:
    def now() -> Any:
        return contents(change.owner) if change.key is WHOLE else item_of(change.owner, change.key)

    line = _line(run, now)
    does = "changes" if change.key is WHOLE or change.before is not ABSENT else "sets"
    return (
        f"{described(region)} ({type(module).__name__}) {does} `{change.where}`{line} at every call, which its graph "
        "would not do. Keep such values in registered buffers, return them, or let smaller submodules be captured "
        "(regions='auto' finds them)"
    )


def _line(run: Callable[[], Any], state: Callable[[], Any]) -> str:
    """Say at which line of a forward a state changes: `at model.py:41`. It runs the forward once more."""
    last: tuple[str, int] | None = None
    found: tuple[str, int] | None = None
    before = state()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal last, found
        if found is not None or foreign_code(frame.f_globals.get("__name__")):
            return None
        if last is not None and not _equal(before, state()):
            found = last
            return None
        if event == "line":
            last = frame.f_code.co_filename, frame.f_lineno
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(outer)
    found = found or last
    return f" at {Path(found[0]).name}:{found[1]}" if found else ""


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, LeafState) and isinstance(b, LeafState):
        return a.equal(b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b if isinstance(a, dict) else same(a, b)
