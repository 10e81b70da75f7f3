"""Follow: which couplings the model's own Python can follow, and which integers it must hold anew for that.

    follow(module, graphs)
      -> held_integers   what the forward was seen to read, and so may be a size
      -> sizes           what each of them would become, by the axes of the graph that have that many entries
      -> Trial           the forward with smaller weights, against the program at the same sizes, which is proved
      -> Following       per coupling the attributes that change, or why its Python cannot follow

A forward runs on shapes first, which is quick and fails where a size is missing; what runs is compared in values, with
weights drawn at random so that scores are not all alike. Then all couplings are tried together at other sizes. What a
program gathers per call (rotary tables, masks) Python does not, so such couplings fall out by themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ecospa_fx.attributes import Attribute, Values, fitted, held_integers, holding
from ecospa_fx.signature import TENSOR, Signature, below

from .agree import TOLERANCE, Forward, forked_rng, relative_error
from .axes import Atom, Expr, Product, product, segments, size_of
from .capture import Captured
from .discover import Discovery, Found
from .inference import Inference
from .names import named_tensors, swapped
from .rewrite import Program, rewrite
from .selection import Choice, Kept, count, in_first_contexts, mask_of, settled, touched, whole
from .sharing import recorded_reads
from .shrink import sliced

MOST_ATTRIBUTES = 4  # that one coupling may need changed; every set of them is tried
MOST_TRIALS = 400  # per coupling


@dataclass(frozen=True, eq=False)
class Following:
    """What the Python of a region can follow.

    Attributes:
        couplings: key of a coupling -> the attributes that change with it.
        varied: those among them that may keep other entries in each context.
        sizes: attribute -> the axis that it holds the size of.
        refused: key of a coupling -> why its Python cannot follow.
    """

    couplings: Mapping[Any, tuple[Attribute, ...]]
    varied: frozenset[Any]
    sizes: Mapping[Attribute, Expr]
    refused: Mapping[Any, str]

    def __deepcopy__(self, memo: dict[int, Any]) -> Following:
        return self  # its axes are compared by identity

    def values(self, kept: Kept) -> dict[Attribute, int]:
        """What each attribute must hold under a selection."""
        counts = in_first_contexts(kept)
        return {attribute: int(count(expr, counts)) for attribute, expr in self.sizes.items()}


def follow(
    module: nn.Module,
    programs: Sequence[tuple[Inference, Discovery]],
    forward: Forward,
    numbers: Set[tuple[type, str]] = frozenset(),
) -> Following:
    """Find out what the Python of a region can follow, in every one of the calls it was captured in.

    Args:
        module: the region, at its original sizes; left as it is.
        programs: what was inferred and discovered in the graph of each of its calls, the first one first.
        forward: its own forward.
        numbers: attributes that are no sizes, see `ecospa_fx.attributes.numbers_in`.
    """
    trials = [Trial(module, inference, forward, numbers) for inference, _ in programs]
    generator = torch.Generator().manual_seed(0)
    couplings: dict[Any, tuple[Attribute, ...]] = {}
    refused: dict[Any, str] = {}
    varied: set[Any] = set()
    sizes: dict[Attribute, Expr] = {}
    first = trials[0]
    if first.unable is not None:
        return Following({}, frozenset(), {}, {f.key: first.unable for f in programs[0][1].couplings})
    for found in programs[0][1].couplings:
        each = [next((f for f in discovery.couplings if f.key == found.key), None) for _, discovery in programs]
        kept = {found.atom: some(found.atom, None, 0.5, generator)}
        needed, why = _needed(first, found, kept, sizes)
        if needed is None:
            refused[found.key] = why
            continue
        needed |= _described(first, found, kept, needed)
        doubtful = _doubtful(first, found, kept, needed)
        if doubtful is not None:
            refused[found.key] = doubtful
            continue
        for trial, other in zip(trials[1:], each[1:], strict=True):
            if other is not None and why == "":
                theirs: Kept = {other.atom: kept[found.atom]}
                values = {a: int(count(expr, kept)) for a, expr in needed.items()}
                why = trial.difference(theirs, values) or ""
        if why:
            refused[found.key] = why
            continue
        couplings[found.key] = tuple(sorted(needed))
        sizes.update(needed)
        if found.context is not None:
            apart = {found.atom: some(found.atom, found.context, 0.5, generator)}
            if first.difference(apart, {a: int(count(e, in_first_contexts(apart))) for a, e in needed.items()}) is None:
                varied.add(found.key)
    following = Following(couplings, frozenset(varied), sizes, refused)
    return _together(first, programs[0][1], following, generator)


def some(atom: Atom, context: Atom | None, share: float, generator: torch.Generator) -> Choice:
    """A random share of the entries of `atom`, at least one and not all; others in each entry of `context`."""
    keep = min(max(1, round(atom.size * share)), atom.size - 1)
    rows = torch.stack([torch.randperm(atom.size, generator=generator) for _ in range(context.size if context else 1)])
    masks = rows < keep
    return masks[0] if context is None else settled(context, masks, whole(context))


def _needed(
    trial: Trial, found: Found, kept: Kept, sizes: Mapping[Attribute, Expr]
) -> tuple[dict[Attribute, Expr] | None, str]:
    """The attributes that must change for a coupling, as few as will do; or None, and what fails without."""
    candidates = list(_candidates(trial, found.atom, kept, sizes))
    why = ""
    tried = 0
    for number in range(min(len(candidates), MOST_ATTRIBUTES) + 1):
        for chosen in itertools.combinations(candidates, number):
            needed = dict(chosen)
            if len(needed) < number:
                continue  # one attribute in two meanings
            tried += 1
            if tried > MOST_TRIALS:
                return None, why
            difference = trial.difference(kept, {a: int(count(expr, kept)) for a, expr in needed.items()})
            if difference is None:
                return needed, ""
            why = why or difference
    return None, why


def _doubtful(trial: Trial, found: Found, kept: Kept, needed: Mapping[Attribute, Expr]) -> str | None:
    """Why a coupling cannot be followed for certain: an integer may be its size and may be another, and no trial tells.

    The forward reads it and does nothing with it in the calls that were captured; in another it may.
    """
    for attribute, value in trial.held.items():
        meanings = trial.axes_of_size.get(value, [])
        if attribute in needed or type(attribute.inside) is str or not _near(attribute, found):
            continue
        if not any(touched(expr, kept) for expr in meanings):
            continue
        if trial.is_idle(attribute):
            return (
                f"reads `{attribute}`, which is {value} and may be the size of this axis or of another, and which "
                "makes no difference in the call that was captured (capture one in which it does, with a mask say)"
            )
    return None


def _described(trial: Trial, found: Found, kept: Kept, needed: Mapping[Attribute, Expr]) -> dict[Attribute, Expr]:
    """Attributes beside those that must change in this call, and that another call may need: numbers of heads, say.

    Only where every axis of that many entries runs along the coupling, so that there is no other thing it could be,
    and the forward gives the same with it.
    """
    more: dict[Attribute, Expr] = {}
    for attribute, value in (trial.held | trial.unread).items():
        meanings = trial.axes_of_size.get(value, [])
        if attribute in needed or attribute.inside is not None or not _near(attribute, found) or not meanings:
            continue
        sizes = {int(count(expr, kept)) if touched(expr, kept) else None for expr in meanings}
        if len(sizes) > 1 or None in sizes:
            continue
        tried = {**needed, **more, attribute: meanings[0]}
        if trial.difference(kept, {a: int(count(expr, kept)) for a, expr in tried.items()}) is None:
            more[attribute] = meanings[0]
    return more


def _near(attribute: Attribute, found: Found) -> bool:
    """Whether the module that holds it also holds weights of the coupling, itself or further down."""
    return any(not attribute.module or name.startswith(f"{attribute.module}.") for name, _ in found.axes)


def _candidates(
    trial: Trial, atom: Atom, kept: Kept, sizes: Mapping[Attribute, Expr]
) -> Iterator[tuple[Attribute, Expr]]:
    """Attributes whose integer is the size of an axis that runs along `atom`, with that axis."""
    for attribute, value in trial.held.items():
        meanings = [sizes[attribute]] if attribute in sizes else trial.axes_of_size.get(value, [])
        seen = set()
        for expr in meanings:
            if touched(expr, kept) and (size := int(count(expr, kept))) not in seen:
                seen.add(size)
                yield attribute, expr


def _together(trial: Trial, discovery: Discovery, following: Following, generator: torch.Generator) -> Following:
    """Leave out what fails beside others: all at once at other sizes, and where that fails one after another."""
    followed = [found for found in discovery.couplings if found.key in following.couplings]
    kept: dict[Atom, Choice] = {
        found.atom: some(found.atom, found.context if found.key in following.varied else None, 0.7, generator)
        for found in followed
    }
    if trial.difference(kept, following.values(kept)) is None:
        return following
    refused, left = dict(following.refused), dict[Atom, Choice]()
    couplings: dict[Any, tuple[Attribute, ...]] = {}
    for found in followed:
        more = {**left, found.atom: kept[found.atom]}
        needed = {a for key in (*couplings, found.key) for a in following.couplings[key]}
        values = {a: int(count(following.sizes[a], in_first_contexts(more))) for a in needed}
        difference = trial.difference(more, values)
        if difference is None:
            left, couplings[found.key] = more, following.couplings[found.key]
        else:
            refused[found.key] = f"with others beside it, {difference}"
    sizes = {a: following.sizes[a] for needed in couplings.values() for a in needed}
    return Following(couplings, following.varied & couplings.keys(), sizes, refused)


class Trial:
    """One call of a region, to be run by its own Python at other sizes.

    Attributes:
        unable: why nothing can be tried, or None.
        held: the integers that the call read, and that may be sizes.
        unread: those that modules hold beside them.
        axes_of_size: number of entries -> axes, and parts of axes, that have as many.
    """

    def __init__(
        self, module: nn.Module, inference: Inference, forward: Forward, numbers: Set[tuple[type, str]] = frozenset()
    ) -> None:
        self.module, self.inference, self.forward = module, inference, forward
        self.args, self.kwargs = example_call(inference.captured.signature)
        self.unable: str | None = None
        self.held: dict[Attribute, int] = {}
        self.unread: dict[Attribute, int] = {}
        self.axes_of_size = _axes_of_size(inference)
        self._shapes_tell = False
        self._idle: dict[Attribute, bool] = {}
        tensors = named_tensors(module)
        if any(t.is_meta for t in tensors.values()):
            self.unable = "its Python can only be tried with values, and it is on the meta device"
            return
        self.tensors = drawn(tensors)
        program = rewrite(inference, {}, module)
        with recorded_reads(module) as reads:
            try:
                self.unable = self._compare(program, self.tensors, {})
            except Exception:  # sizes that no argument tells apart depend on each other: those of the call, then
                self.args, self.kwargs = example_call(inference.captured.signature, call_sizes(inference.captured))
                try:
                    self.unable = self._compare(program, self.tensors, {})
                except Exception as error:
                    self.unable = f"cannot be tried: its graph does not run on a made-up call ({error})"
        self.held = held_integers(module, reads, numbers)
        every = {path: set(child.__dict__) for path, child in module.named_modules()}
        self.unread = {
            attribute: value
            for attribute, value in held_integers(module, every, numbers).items()
            if attribute not in self.held and attribute.inside is None
        }
        self._shapes_tell = self._fails_on_shapes(self.tensors, {}) is None

    def difference(self, kept: Kept, values: Values) -> str | None:
        """How the forward with the weights that `kept` leaves, and attributes at `values`, differs from the program.

        None where it gives the same.
        """
        parameters = self.inference.parameters
        small = {
            name: sliced(
                t,
                {d: mask_of(e, kept).nonzero().flatten() for d, e in enumerate(parameters[name]) if touched(e, kept)}
                if name in parameters
                else {},
            )
            for name, t in self.tensors.items()
        }
        if self._shapes_tell and (error := self._fails_on_shapes(small, values)) is not None:
            return error
        return self._compare(rewrite(self.inference, kept, self.module), small, values)

    def is_idle(self, attribute: Attribute) -> bool:
        """Whether it makes no difference to the call what an attribute holds."""
        if attribute not in self._idle:
            other = {attribute: self.held[attribute] + 1}
            self._idle[attribute] = self.difference({}, other) is None
        return self._idle[attribute]

    def _fails_on_shapes(self, tensors: Mapping[str, Tensor], values: Values) -> str | None:
        """Why the forward fails on the meta device, which takes no time."""
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (self.args, self.kwargs))
        shapes = {name: t.to("meta") for name, t in tensors.items()}
        try:
            with self._ready(shapes, values):
                own_forward(self.module, self.forward, args, kwargs)
        except Failed as failed:
            return str(failed)
        return None

    def _compare(self, program: Program, tensors: Mapping[str, Tensor], values: Values) -> str | None:
        with self._ready(tensors, values):
            return difference(self.module, program, self.forward, self.args, self.kwargs)

    @contextmanager
    def _ready(self, tensors: Mapping[str, Tensor], values: Values) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(modes(self.module, self.inference.captured.signature.training))
            held = named_tensors(self.module)
            mine = {
                name: nn.Parameter(t, requires_grad=False) if isinstance(held[name], nn.Parameter) else t
                for name, t in tensors.items()
            }
            stack.enter_context(swapped(self.module, mine))
            stack.enter_context(fitted(self.module))
            stack.enter_context(holding(self.module, values))
            yield


class Failed(Exception):
    """A forward fails; what it says is where, and why."""


def difference(module: nn.Module, program: Program, forward: Forward, args: Any, kwargs: Any) -> str | None:
    """How a region's own forward differs from its program, on one call with the weights it has now; None if not at all.

    Raises nothing: where the forward fails, that is the difference.
    """
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    with forked_rng(module):
        torch.manual_seed(0)
        expected = program.run(module, *(t.clone() for t in inputs), *program.constants)
    with forked_rng(module):
        torch.manual_seed(0)
        try:
            found = own_forward(module, forward, args, kwargs)
        except Failed as failed:
            return str(failed)
    tensors = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
    for mine, theirs in zip(tensors, expected[: program.captured.returned], strict=True):
        if mine.shape != theirs.shape:
            return f"runs, but gives a result of {tuple(mine.shape)} and not of {tuple(theirs.shape)}"
        if mine.is_meta:
            continue
        error = relative_error(theirs, mine)
        if not error <= TOLERANCE.get(mine.dtype, 0.0):
            return f"runs, but gives results that differ by {error:.1e}"
    return None


def own_forward(module: nn.Module, forward: Forward, args: Any, kwargs: Any) -> Any:
    """Run a region's own forward.

    Raises:
        Failed: it fails.
    """
    inside: list[tuple[str, nn.Module]] = []
    with _following(module, inside):
        try:
            return forward(module, *args, **kwargs)
        except Exception as error:
            path, failing = inside[-1] if inside else ("", module)
            where = f" in `{path}` ({type(failing).__name__})" if path else ""
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise Failed(f"fails{where}: {lines[0]}") from error


@contextmanager
def _following(module: nn.Module, inside: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """Keep in `inside` the calls of submodules that have begun and not ended, for messages."""
    handles = []
    for path, child in module.named_modules():
        if path:
            entering = lambda _, __, here=(path, child): inside.append(here)  # noqa: E731
            handles.append(child.register_forward_pre_hook(entering))
            handles.append(child.register_forward_hook(lambda *_: inside.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def modes(module: nn.Module, training: Sequence[bool]) -> Iterator[None]:
    """A region in the modes that a graph was captured in."""
    before = [(child, child.training) for child in module.modules()]
    try:
        for child, flag in zip(below(module), training, strict=True):
            child.training = flag
        yield
    finally:
        for child, flag in before:
            child.training = flag


def call_sizes(captured: Captured) -> dict[sympy.Symbol, int]:
    """The dynamic sizes in the call that a graph was captured from."""
    found = {}
    for node in captured.graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        for size in value.shape if isinstance(value, Tensor) else ():
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                found[size.node.expr] = int(size.node.hint)
    return found


def example_call(signature: Signature, known: Mapping[sympy.Symbol, int] | None = None) -> tuple[Any, Any]:
    """A small call of a signature, with random values.

    Args:
        signature: of the call.
        known: dynamic sizes to use, in place of small ones.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = dict(known or {})
    for i, (symbol, (low, high)) in enumerate(sorted(signature.ranges.items(), key=lambda item: str(item[0]))):
        if isinstance(symbol, sympy.Symbol):  # bounds of `4*s0` follow from those of `s0`
            sizes.setdefault(symbol, int(min(max(low, 3 + i), high)))
    leaves: list[Any] = []
    tensors = iter(signature.tensors)
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
        else:  # positions and words: such as any table has
            value = torch.randint(2, size, generator=generator)
        leaves.append(value.to(device, dtype))
    args, kwargs = pytree.tree_unflatten(leaves, signature.spec)
    return args, kwargs


def drawn(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for a trial. Those of a model that has just been made are so small that every score is the same.

    Matrices are drawn such that what goes through them keeps its size; vectors and buffers are moved a little.
    """
    generator = torch.Generator().manual_seed(1)
    made: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) in made:
            continue
        value = tensor.detach()
        if value.is_floating_point() and isinstance(tensor, nn.Parameter):
            noise = torch.randn(value.shape, generator=generator).to(value)
            value = noise / max(1, value.numel() // max(value.shape)) ** 0.5 if value.ndim > 1 else value + noise / 5
        made[id(tensor)] = value.clone()
    return {name: made[id(tensor)] for name, tensor in tensors.items()}


def _axes_of_size(inference: Inference) -> dict[int, list[Expr]]:
    """Axes of a graph, and runs of their factors and parts, by their number of entries."""
    found: dict[Expr, None] = {}
    exprs = [expr for axes in inference.parameters.values() for expr in axes]
    exprs += [expr for outputs in inference.values.values() for axes in outputs for expr in axes]
    for expr in dict.fromkeys(exprs):
        for part in _parts(expr):
            found.setdefault(part)
    by_size: dict[int, list[Expr]] = {}
    for expr in found:
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


__all__ = ["Failed", "Following", "Trial", "difference", "drawn", "example_call", "follow", "modes", "own_forward"]
