"""Trial: a call of a region, run by its own Python with smaller weights, against the program at the same sizes.

The weights are drawn at random, and the call is made up: small, of the signature that was captured. A large region
runs on the meta device first, which multiplies nothing, and is compared in values if it succeeds there. In a small one
values take less time than the Python in which torch finds shapes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ecospa_fx.passes.axes.algebra import Atom, Expr, Product, Size, product, segments, size_of
from ecospa_fx.passes.axes.selection import Selection, mask_of, touched
from ecospa_fx.passes.capture.compare_eager import TOLERANCE, relative_error
from ecospa_fx.passes.capture.reads import recorded_reads
from ecospa_fx.passes.graph.isolate import isolated, seed
from ecospa_fx.passes.graph.nodes import may_draw
from ecospa_fx.passes.graph.python_state import PythonState
from ecospa_fx.passes.graph.tensors import as_held, named_tensors, sliced, swapped
from ecospa_fx.passes.infer.sizes import symbols_of
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.region_graph import Forward
from ecospa_fx.passes.ir.results import flattened_results
from ecospa_fx.passes.ir.signature import Signature, below
from ecospa_fx.passes.ir.state_access import TENSOR
from ecospa_fx.passes.rewrite.program import Program
from ecospa_fx.passes.rewrite.rewrite import rewrite

from .attributes import Attribute, Values, fitted, held_integers, holding
from .course import Course, Failed, own_forward
from .even_draws import even_draws
from .given import Places, noted_arguments

FEW = 4_000_000  # entries of weights, with which a forward takes less time in values than on the meta device
MOST_AVOIDED = 12  # sizes, before one is made up that means something else too


class Trial:
    """One call of a region, to be run by its own Python at other sizes.

    Attributes:
        unable: why nothing can be tried, or None.
        held: integers of modules that the call read, and that may be sizes.
        unread: the other integers of the modules.
        axes_of_size: number of entries -> axes, and parts of axes, with as many.
        given: the tensors that modules were given.
        course: how far the forward came in the latest comparison.
        other_mode_tells: whether the other mode, which this graph is not of, is tried for errors too.
    """

    def __init__(
        self, module: nn.Module, axis_facts: AxisFacts, forward: Forward, numbers: Set[tuple[type, str]] = frozenset()
    ) -> None:
        self.module, self.axis_facts, self.forward = module, axis_facts, forward
        self.unable: str | None = None
        self.held: dict[Attribute, int] = {}
        self.unread: dict[Attribute, int] = {}
        self.given: Places = {}
        self.axes_of_size = _axes_of_size(axis_facts)
        self.other_mode_tells = False
        self.course = Course()
        self._state: PythonState | None = None
        self._draws = any(may_draw(node.target) for node in axis_facts.captured.graph.nodes)
        self._under: tuple[Selection, dict[str, Tensor], list[Tensor] | str] | None = None  # the latest selection
        self._shapes_tell = False
        self._device: str | None = None  # on which it only has to run: its own, or the meta device
        self._idle: dict[Attribute, bool] = {}
        try:
            with modes(module, self._training):
                tensors = named_tensors(module)
        except NotTried as error:
            self.unable = f"cannot be tried: {error}"
            return
        if any(t.is_meta for t in tensors.values()):
            self.unable = "its Python can only be tried with values, and it is on the meta device"
            return
        self.tensors = drawn(tensors)
        self._state = PythonState(module)  # no trial leaves another
        program, sizes = rewrite(axis_facts, {}, module), self.axes_of_size.keys()
        with recorded_reads(module) as reads, noted_arguments(module) as self.given:
            for self.args, self.kwargs in example_calls(axis_facts, avoid=sizes):
                self.unable = self._compare(program, self.tensors, {})
                if self.unable is None:
                    break
        self.held = held_integers(module, reads.attributes, numbers)
        every = {path: set(child.__dict__) for path, child in module.named_modules()}
        self.unread = {
            attribute: value
            for attribute, value in held_integers(module, every, numbers).items()
            if attribute not in self.held and attribute.inside is None
        }
        if sum(tensor.numel() for tensor in self.tensors.values()) > FEW:
            self._device = "meta"
        runs = self.unable is None and self._fails(self.tensors, {}) is None
        self._shapes_tell = runs and self._device == "meta"
        self.other_mode_tells = runs and self._fails(self.tensors, {}, other_mode=True) is None

    def difference(self, kept: Selection, values: Values) -> str | None:
        """Say how the forward under a selection, with attributes at `values`, differs from the program.

        None where the results are the same.
        """
        small, expected = self._at(kept)
        if isinstance(expected, str):
            return expected
        if self._shapes_tell and (error := self._fails(small, values)) is not None:
            return error
        self.course = Course()
        with self._ready(small, values):
            error = _difference(self.module, expected, self.forward, self.args, self.kwargs, self.course, self._alone())
        if error is not None or not self.other_mode_tells:
            return error
        # No graph has to be there for the other mode, and this Python runs in it all the same.
        error = self._fails(small, values, other_mode=True)
        return error and f"{error}, in {'eval' if self.training else 'training'} mode"

    def _at(self, kept: Selection) -> tuple[dict[str, Tensor], list[Tensor] | str]:
        """Return the weights under a selection, and what its program gives, or why it does not run; made once."""
        if self._under is not None and self._under[0] is kept:
            return self._under[1:]
        parameters = self.axis_facts.parameters
        small = {
            name: sliced(
                t,
                {d: mask_of(e, kept).nonzero().flatten() for d, e in enumerate(parameters[name]) if touched(e, kept)}
                if name in parameters
                else {},
            )
            for name, t in self.tensors.items()
        }
        program = rewrite(self.axis_facts, kept, self.module)
        expected: list[Tensor] | str
        with self._ready(small, {}):
            try:
                expected = _expected(self.module, program, self.args, self.kwargs, self._alone())
            except NotTried as error:
                expected = f"cannot be tried: {error}"
        self._under = (kept, small, expected)
        return small, expected

    def is_idle(self, attribute: Attribute) -> bool:
        """Return whether the value of an attribute makes no difference to the call."""
        if attribute not in self._idle:
            other = {attribute: self.held[attribute] + 1}
            self._idle[attribute] = self.difference({}, other) is None
        return self._idle[attribute]

    @property
    def training(self) -> bool:
        """Whether the call was captured in training mode."""
        return self._training[0]

    @property
    def _training(self) -> Sequence[bool]:
        return self.axis_facts.captured.signature.training

    def _fails(self, tensors: Mapping[str, Tensor], values: Values, other_mode: bool = False) -> str | None:
        """Say why the forward fails, whatever it computes; None where it runs.

        Args:
            tensors: its weights and buffers.
            values: attributes at values of their own.
            other_mode: in eval mode for a graph of training mode, and the other way round.
        """
        args, kwargs = self.args, self.kwargs
        if self._device is not None:
            args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(self._device), (args, kwargs))
            tensors = {name: t.to(self._device) for name, t in tensors.items()}
        self.course = Course()
        try:
            with self._ready(tensors, values, other_mode), self._alone():
                own_forward(self.module, self.forward, args, kwargs, self.course)
        except Failed as failed:
            return str(failed)
        return None

    def _alone(self) -> AbstractContextManager[None]:
        return _alone(self.module, self._state, self._draws)

    def _compare(self, program: Program, tensors: Mapping[str, Tensor], values: Values) -> str | None:
        with self._ready(tensors, values):
            try:
                return difference(self.module, program, self.forward, self.args, self.kwargs)
            except NotTried as error:
                return f"cannot be tried: {error}"

    @contextmanager
    def _ready(self, tensors: Mapping[str, Tensor], values: Values, other_mode: bool = False) -> Iterator[None]:
        training = [not self._training[0]] * len(self._training) if other_mode else self._training
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(modes(self.module, training))
            stack.enter_context(swapped(self.module, as_held(self.module, tensors)))
            stack.enter_context(fitted(self.module))
            stack.enter_context(holding(self.module, values))
            yield


class NotTried(Exception):
    """The graph itself does not run on a made-up call."""


def difference(module: nn.Module, program: Program, forward: Forward, args: Any, kwargs: Any) -> str | None:
    """Say how a region's own forward differs from its program on one call with its weights of now; None if it does not.

    An error of the forward is a difference too.

    Raises:
        NotTried: the program fails: values that were made up (lengths, positions) may be none that it takes.
    """
    expected = _expected(module, program, args, kwargs, _alone(module))
    return _difference(module, expected, forward, args, kwargs, Course(), _alone(module))


@contextmanager
def _alone(module: nn.Module, state: PythonState | None = None, draws: bool = True) -> Iterator[None]:
    """Leave no trace of what runs inside, and start from the same seed; random tensors are even where there are any.

    Args:
        module: the region.
        state: see `isolated`.
        draws: its graph draws.
    """
    with isolated(module, state), even_draws() if draws else nullcontext():
        seed(0)
        yield


def _expected(
    module: nn.Module, program: Program, args: Any, kwargs: Any, alone: AbstractContextManager[None]
) -> list[Tensor]:
    """Return the tensors that a program returns."""
    if program.captured.carried.types:
        objects = " and ".join(sorted({f"a {cls.__name__}" for cls in program.captured.carried.types}))
        raise NotTried(f"it has been called with {objects}, which cannot be made up")
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    with alone:
        try:
            tensors = program.run(module, *(t.clone() for t in inputs), *program.constants)
        except Exception as failure:
            line = str(failure).strip().split("\n")[0]
            raise NotTried(f"its graph does not run on a made-up call ({line})") from failure
    return [*tensors[: program.captured.returned]]


def _difference(
    module: nn.Module,
    expected: Sequence[Tensor],
    forward: Forward,
    args: Any,
    kwargs: Any,
    course: Course,
    alone: AbstractContextManager[None],
) -> str | None:
    with alone:
        try:
            result = own_forward(module, forward, args, kwargs, course)
        except Failed as failed:
            return str(failed)
    tensors = [leaf for leaf in flattened_results(result)[0] if isinstance(leaf, Tensor)]
    if len(tensors) != len(expected):
        return f"runs, but gives {len(tensors)} tensors and not {len(expected)}"
    for mine, theirs in zip(tensors, expected, strict=True):
        if mine.shape != theirs.shape:
            return f"runs, but gives a result of {tuple(mine.shape)} and not of {tuple(theirs.shape)}"
        if mine.is_meta:
            continue
        error = relative_error(theirs, mine)
        if not error <= TOLERANCE.get(mine.dtype, 0.0):
            return f"runs, but gives results that differ by {error:.1e}"
    return None


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Let a model evaluate inside; afterwards each of its modules has the mode that it had, frozen ones too."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def modes(module: nn.Module, training: Sequence[bool]) -> Iterator[None]:
    """Set the training flags that a graph was captured with, for the time inside.

    Raises:
        NotTried: the module has other submodules than it had then, such as those that a forward registers.
    """
    if len(training) != len(below(module)):
        raise NotTried(f"it has {len(below(module))} modules, and had {len(training)} in the call that was captured")
    before = [(child, child.training) for child in module.modules()]
    try:
        for child, flag in zip(below(module), training, strict=True):
            child.training = flag
        yield
    finally:
        for child, flag in before:
            child.training = flag


def example_calls(
    axis_facts: AxisFacts, now: Sequence[tuple[Size, ...]] = (), avoid: Container[int] = ()
) -> Iterator[tuple[Any, Any]]:
    """Make up calls that a graph serves, with random values: a small one if its sizes may be so, and one as captured.

    Sizes may depend on each other, and on what the forward asks of them: the call that was captured answers to that.

    Args:
        axis_facts: axes of the graph.
        now: the sizes of its inputs, where some have shrunk since.
        avoid: sizes that mean something else, and are not made up where that can be.
    """
    signature, decided = axis_facts.captured.signature, axis_facts.captured.data_sizes
    called = {symbol: size for symbol, size in symbols_of(axis_facts).items() if symbol not in decided}
    # Sizes that the graph does not use are not known from it.
    shapes = [size for _, _, shape in signature.tensors for size in shape if isinstance(size, sympy.Expr)]
    symbols = {*called, *(symbol for size in shapes for symbol in size.free_symbols)}
    small: dict[sympy.Symbol, int] = {}
    for i, symbol in enumerate(sorted(symbols, key=str)):
        low, high = signature.ranges.get(symbol, (0, math.inf))
        size = int(min(max(low, 3 + i), high))
        free = (n for n in range(size, size + MOST_AVOIDED) if n <= high and n not in avoid and n not in small.values())
        small[symbol] = next(free, size)
    if small != called and signature.admits(small):
        yield _call(signature, small, now)
    yield _call(signature, {**small, **called}, now)


def _call(signature: Signature, sizes: Mapping[sympy.Symbol, int], now: Sequence[tuple[Size, ...]]) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    leaves: list[Any] = []
    tensors = iter(signature.now(now))
    for leaf in signature.leaves:
        if leaf is not TENSOR:
            leaves.append(leaf)
            continue
        dtype, device, shape = next(tensors)
        size = [int(n.subs(sizes)) if isinstance(n, sympy.Expr) else int(n) for n in shape]
        if dtype.is_floating_point or dtype.is_complex:
            value = torch.randn(size, generator=generator)
        elif dtype == torch.bool:
            value = torch.ones(size)
        else:  # positions and token ids: 0 and 1 are in any table
            value = torch.randint(2, size, generator=generator)
        leaves.append(value.to(device, dtype))
    args, kwargs = pytree.tree_unflatten(leaves, signature.spec)
    return args, kwargs


def drawn(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Draw weights for a trial, because in a freshly initialised model they are so small that all scores are alike.

    Matrices keep the scale of their inputs; vectors get some noise, and buffers stay.
    """
    generator = torch.Generator().manual_seed(1)
    values: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) in values:
            continue
        value = tensor.detach()
        if value.is_floating_point() and isinstance(tensor, nn.Parameter):
            noise = torch.randn(value.shape, generator=generator).to(value)
            value = noise / max(1, value.numel() // max(value.shape)) ** 0.5 if value.ndim > 1 else value + noise / 5
        values[id(tensor)] = value.clone()
    return {name: values[id(tensor)] for name, tensor in tensors.items()}


def _axes_of_size(axis_facts: AxisFacts) -> dict[int, list[Expr]]:
    """Group the axes of a graph, and runs of their factors and parts, by their number of entries."""
    distinct: dict[Expr, None] = {}
    exprs = [expr for axes in axis_facts.parameters.values() for expr in axes]
    exprs += [expr for outputs in axis_facts.values.values() for axes in outputs for expr in axes]
    for expr in dict.fromkeys(exprs):
        for part in _parts(expr):
            distinct.setdefault(part)
    by_size: dict[int, list[Expr]] = {}
    for expr in distinct:
        size = size_of(expr)
        if type(size) is int and size > 1:
            by_size.setdefault(size, []).append(expr)
    return by_size


def _parts(expr: Expr) -> Iterator[Expr]:
    yield expr
    if isinstance(expr, Atom):
        return
    items = expr.factors if isinstance(expr, Product) else expr.parts
    join = product if isinstance(expr, Product) else segments
    for start, stop in itertools.combinations(range(len(items) + 1), 2):
        if stop - start == 1:
            yield from _parts(items[start])
        elif stop - start < len(items) <= 16:
            yield join(*items[start:stop])
