"""Export: one region through torch.export, behind a signature of tensors only, with as many dynamic dims as possible.

Objects that may hold tensors, or change, are refused among the arguments and results of a region.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, suppress
from pathlib import Path
from threading import active_count, get_ident
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo
import torch.export._trace
import torch.fx._symbolic_trace
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._export.utils import _compiling_state_context
from torch.distributions import Distribution
from torch.fx.experimental import _config as symbolic_shapes
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ecospa_fx.errors import CaptureError
from ecospa_fx.passes.graph.isolate import uncached_autocast
from ecospa_fx.passes.graph.tensors import held_alike, held_twice
from ecospa_fx.passes.ir.region_graph import Assigned, Forward, Point, described
from ecospa_fx.passes.ir.results import flattened_results, kept_elsewhere
from ecospa_fx.passes.ir.signature import autocast_now, with_autocast
from ecospa_fx.passes.ir.state_access import PLAIN, TENSOR, ObjectLeaf, ObjectPath, flattened
from ecospa_fx.passes.objects.proxies import Proxy
from ecospa_fx.passes.objects.tracker import Tracker

from .cumulative import cumulative_averages
from .hooks import points

# Questions about a dynamic dim (is it even? larger than 3?) that torch.export may settle by a guard; at one more it
# specialises the dim. Most models ask fewer than 5 of any dim, strided convolutions over audio up to 30, and windows
# cut from padded images hundreds, each about sizes in longer expressions than the last: that took hours.
GUARDS = 32

# Repeats of equal modules from which the results that torch.export remembers of fake ops pay: with sizes that are
# symbols, remembering one takes as long as computing it.
REPEATS = 3

_EXPORTING = ("_is_compiling_flag", "_is_exporting_flag")  # of torch.compiler


class Flat(nn.Module):
    """A region behind tensor arguments only, so that any call structure can be exported with dynamic shapes.

    Attributes:
        tracker: watched the last forward use the objects of the call. (Not set before one has run: torch.export resets
            attributes that change.)
        carried: the state access that it saw.
        kept: class of a result that the forward keeps, `NoneType` without one.
        state: paths in the objects of the tensors that come after those of the call.
    """

    def __init__(
        self,
        region: nn.Module,
        forward: Forward,
        leaves: list[Any],
        spec: pytree.TreeSpec,
        observe: Iterable[str],
        objects: list[Any],
        assigned: Sequence[Assigned] = (),
    ) -> None:
        super().__init__()
        self.region = region
        self.training = region.training
        self.own_forward, self.leaves, self.spec, self.observe = forward, leaves, spec, observe
        self.objects, self.assigned = objects, tuple(assigned)
        self.state: tuple[ObjectPath, ...] = ()
        self.places = held_twice(region)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the region's result tensors, those for hooks, those assigned, and those that objects hold afterwards.

        The other leaves of results are kept in attributes.
        """
        remaining = iter(tensors)
        leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        self.tracker = Tracker(tracing := bool(torch.compiler.is_exporting()))
        proxies = self.tracker.proxies(self.objects, dict(zip(self.state, remaining, strict=True)))
        leaves = [proxies[leaf.number] if isinstance(leaf, ObjectLeaf) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        before = [(place, place.value(self.region)) for place in self.assigned]
        with (
            points(self.region, self.observe) as seen,
            held_alike(self.region, self.places),  # torch.export swaps parameters, too
            cumulative_averages(self.region) if tracing else nullcontext(),
        ):
            results = self.own_forward(self.region, *args, **kwargs)
            self.kept = type(kept_elsewhere(results, lambda each: isinstance(each, Proxy))).__name__
            out_leaves, self.out_spec = self._numbered(*flattened_results(results))
        self.out_leaves = [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in out_leaves]
        results = [leaf for leaf in out_leaves if isinstance(leaf, Tensor)]
        self.points = []
        for path, call in seen:
            call_leaves, call_spec = self._numbered(*flattened(call))
            stands_in = tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in call_leaves)
            self.points.append(Point(path, stands_in, call_spec))
            results += [leaf for leaf in call_leaves if isinstance(leaf, Tensor)]
        results += [place.value(self.region) for place in self.assigned]
        for place, value in before:
            place.put(self.region, value)
        stored = self.tracker.stored()
        self.carried = self.tracker.carried([place for place, _ in stored])
        return (*results, *(tensor for _, tensor in stored))

    def _numbered(self, leaves: list[Any], spec: pytree.TreeSpec) -> tuple[list[Any], pytree.TreeSpec]:
        numbers = [self.tracker.number_of(leaf) for leaf in leaves]
        return [leaf if n is None else ObjectLeaf(n) for leaf, n in zip(leaves, numbers, strict=True)], spec


def export(
    flat: Flat, tensors: list[Tensor], region: str, static: Set[tuple[int, int]], under_autocast: bool = False
) -> torch.export.ExportedProgram:
    """Run torch.export on a region.

    Args:
        flat: the region.
        tensors: its arguments.
        region: its name, for messages.
        static: dims to specialise, as (tensor, dim).
        under_autocast: see `RegionGraph.under_autocast`; else without it, whatever there is around.

    Raises:
        CaptureError: torch.export fails.
    """
    dims = {(i, dim) for i, t in enumerate(tensors) for dim, size in enumerate(t.shape) if size > 1}
    # Arithmetic on dynamic sizes may be more than torch.export can solve: then all but the first dims are specialised.
    # It may also take hours to solve (padding to windows, stage after stage); see `GUARDS`.
    attempts = [dims - static, {(i, dim) for i, dim in dims - static if dim == 0}, set()]
    attempts = [each for n, each in enumerate(attempts) if each not in attempts[:n]]
    reason: Exception | None = None
    settled = False
    while attempts:
        dynamic = attempts[0]
        shapes = tuple(
            {dim: torch.export.Dim.AUTO for dim in range(t.ndim) if (i, dim) in dynamic} for i, t in enumerate(tensors)
        )
        options: dict[str, Any] = {"dynamic_shapes": (shapes,) if tensors else None, "strict": False}
        try:
            with (
                _unvalidated_distributions(),
                _quiet(),
                symbolic_shapes.patch(symbol_guard_limit_before_specialize=GUARDS),  # type: ignore[attr-defined]
                torch._dynamo.config.patch(fake_tensor_cache_enabled=_repeats(flat.region) >= REPEATS),
                uncached_autocast() if under_autocast else with_autocast(),
                _settled_comparisons() if settled else nullcontext(),
                _same_attributes(flat.region),
                _this_thread_alone(),
            ):
                return torch.export.export(flat, tuple(t.detach() for t in tensors), **options)
        except Exception as error:
            # An op took a comparison of sizes for a flag, `is_causal=x.shape[1] > 1`.
            if not settled and isinstance(error, TypeError) and "SymBool" in str(error):
                settled = True
                continue
            # The data may be a size that went through a tensor, `torch.div(x.size(1), 8)`: a number once specialised.
            # If the error stays, it is not about sizes.
            about_data = _is_about_data(error)
            if about_data and reason is not None:
                break
            # With fewer symbols fewer errors are about symbols: the last one is about the region.
            reason = error
            attempts.pop(0)
    # Autocast has cast an argument that meets wider weights here, and this is traced without it.
    wide = [t.float() if t.dtype in autocast_now() else t for t in tensors]
    if any(a is not b for a, b in zip(wide, tensors, strict=True)):
        with suppress(CaptureError):
            return export(flat, wide, region, static, under_autocast)
    words = str(reason).strip().split("\n")[0] or type(reason).__name__
    if reason is not None and _is_about_data(reason):
        words = (
            f"what its forward does next depends on the values of a tensor{_line_of(reason)}, and a graph is the same "
            "for all values. Use torch.where, or numbers that are known before the call"
        )
    raise CaptureError(
        f"torch.export cannot capture {described(region)} ({type(flat.region).__name__}): {words}"
    ) from reason


def _of_bool(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(bool(self), name)(*others)


class _InThread:
    """A flag of torch that is true in one thread."""

    def __init__(self) -> None:
        self._thread = get_ident()

    def __bool__(self) -> bool:
        return get_ident() == self._thread

    __or__, __ror__, __and__, __rand__ = map(_of_bool, ("__or__", "__ror__", "__and__", "__rand__"))
    __xor__, __rxor__, __int__, __index__ = map(_of_bool, ("__xor__", "__rxor__", "__int__", "__index__"))
    __eq__, __ne__, __hash__, __repr__ = map(_of_bool, ("__eq__", "__ne__", "__hash__", "__repr__"))


def _told_by_thread(module: Any, *flags: str) -> None:
    """Let other threads go on as they were: an optimizer, say, computes otherwise where it is being compiled."""
    for flag in flags if active_count() > 1 else ():
        if getattr(module, flag, None) is True:  # until the export puts back what was there before
            setattr(module, flag, _InThread())


@contextmanager
def _this_thread_alone() -> Iterator[None]:
    """Let modules that other threads call meanwhile go past the tracer: torch.fx asks it for those of all threads."""
    tracers, me = (proxy_tensor.PythonKeyTracer, proxy_tensor._ModuleStackTracer), get_ident()

    @contextmanager
    def exporting() -> Iterator[None]:
        with _compiling_state_context():
            _told_by_thread(torch.compiler, *_EXPORTING)
            yield

    def getting(get: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, name, value, cache: get(self, name, value, cache) if get_ident() == me else value

    def calling(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(self: Any, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            return call(self, module, forward, args, kwargs) if get_ident() == me else forward(*args, **kwargs)

        return called

    begin, trace = torch.fx.Tracer.create_args_for_root, torch.fx.Tracer.trace

    def tracing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if get_ident() == me:  # compiled code of other threads minds a tracer, but not in an export
            for flag in _EXPORTING:
                if isinstance(getattr(torch.compiler, flag, None), _InThread):
                    setattr(torch.compiler, flag, True)
        return trace(self, *args, **kwargs)

    def beginning(self: Any, *args: Any, **kwargs: Any) -> Any:
        if get_ident() == me:
            _told_by_thread(torch.fx._symbolic_trace, "_is_fx_tracing_flag")
            _told_by_thread(torch.compiler, *_EXPORTING)
        return begin(self, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.fx.Tracer, "create_args_for_root", beginning))
        stack.enter_context(patch.object(torch.fx.Tracer, "trace", tracing))
        for cls in tracers:
            stack.enter_context(patch.object(cls, "getattr", getting(cls.getattr)))
            stack.enter_context(patch.object(cls, "call_module", calling(cls.call_module)))
        stack.enter_context(patch.object(torch.export._trace, "_compiling_state_context", exporting))
        yield


def _is_about_data(error: Exception) -> bool:
    """Return whether torch.export failed because Python asked for the values of a tensor."""
    return isinstance(error, GuardOnDataDependentSymNode) or "data-dependent" in str(error)


def _line_of(error: Exception) -> str:
    """Return the line of the model's own code that torch.export names in an error, if it names one."""
    named = re.search(r'The following call raised this error:\n\s*File "(.+)", line (\d+).*\n\s*(.+)', str(error))
    if named is None:
        return ""
    file, line, code = named.groups()
    return f" at {Path(file).name}:{line} (`{code.strip()}`)"


def program_without_writes(
    program: torch.export.ExportedProgram, module: nn.Module, region: str
) -> torch.export.ExportedProgram:
    """Return a program that makes new values where `program` writes into its own.

    A `torch.autograd.Function` may write into what its forward has computed with, because its backward needs none of
    it. A graph has the ops of the forward only, and their own backward, which needs the values before.

    Raises:
        CaptureError: it writes into what is not its own, an argument or a buffer.
    """
    with _quiet():
        plain: torch.export.ExportedProgram = program.run_decompositions({})
    if plain.graph_signature.buffers_to_mutate or plain.graph_signature.user_inputs_to_mutate:
        raise CaptureError(f"{described(region)} ({type(module).__name__}) writes into arguments or buffers")
    return plain


_COMPARISONS = ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__")


@contextmanager
def _settled_comparisons() -> Iterator[None]:
    """Let comparisons of sizes that are symbols give plain booleans, which torch.export guards, for the time inside.

    A comparison gives a symbol by itself, and ops that are written in C++ refuse one for a flag.
    """
    own = {name: getattr(torch.SymInt, name) for name in _COMPARISONS}

    def settled(name: str) -> Callable[[Any, Any], Any]:
        def compare(size: Any, other: Any) -> Any:
            answer = own[name](size, other)
            return bool(answer) if isinstance(answer, torch.SymBool) else answer

        return compare

    try:
        for name in own:
            setattr(torch.SymInt, name, settled(name))
        yield
    finally:
        for name, compare in own.items():
            setattr(torch.SymInt, name, compare)


@contextmanager
def _same_attributes(region: nn.Module) -> Iterator[None]:
    """Put the attributes of a module back at the end: torch.export leaves copies in place of dicts and lists there."""
    before = [(vars(child), dict(vars(child))) for child in region.modules()]
    try:
        yield
    finally:
        for attributes, values in before:
            attributes.update(values)


def _repeats(region: nn.Module) -> float:
    """Return how often modules of one class and equal weights occur in a region, on average."""
    modules = [*region.modules()]
    return len(modules) / len({(type(m), *(p.shape for p in m._parameters.values() if p is not None)) for m in modules})


def refuse_foreign(module: nn.Module, region: str, leaves: Iterable[Any], does: str, way_out: str) -> None:
    """Refuse objects that may hold tensors, or change: a graph would hold them as constants."""
    odd = sorted(
        {type(leaf).__name__ for leaf in leaves if leaf is not None and not isinstance(leaf, (*PLAIN, ObjectLeaf))}
    )
    if odd:
        raise CaptureError(
            f"{described(region)} ({type(module).__name__}) {does} a {', a '.join(odd)}, which cannot go in or out "
            f"of a graph: {way_out}, or turn off the option that makes it (for a cache, usually `use_cache=False`)"
        )


_CHATTY = ("torch._export.non_strict_utils", "torch.export", "torch.fx", "torch._subclasses.fake_tensor")


@contextmanager
def _unvalidated_distributions() -> Iterator[None]:
    """Let torch.distributions trust their arguments for the time inside.

    By default they branch on whether all values are valid, and raise where not, which no graph holds. Nothing else
    depends on it. Like the asserts of a graph, the check is left out of it; calls in plain Python still make it.
    """
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch.export: the signature says which dims it specialised, and exceptions say what failed.

    At failures it also prints the graph so far, whatever the log level.
    """
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
