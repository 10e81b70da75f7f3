"""Places: the dims of a model's tensors along which its tokens lie, found by what a change does, not by size or name.

other tokens in a call     -> the tables whose rows are looked up by them
another row of a tensor    -> nothing moves that belongs to other tokens: it is read for its own token alone
                           -> an output moves there and nowhere else: its rows leave the model as scores of tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ecospa_fx.errors import CaptureError, ShrinkError
from ecospa_fx.passes.capture.compare_eager import TOLERANCE, relative_error
from ecospa_fx.passes.graph.isolate import isolated, seed
from ecospa_fx.passes.graph.tensors import named_tensors, storage_key

aten = torch.ops.aten
Place = tuple[str, int]  # the name of a tensor, and a dim of it
Lookup = tuple[tuple[Place, ...], Tensor]  # the dim of a tensor that is looked up in, by all its names, and the indices


@dataclass
class TokenCall:
    """A call of a model, in which some integers are tokens.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        tokens: positions of the tensors of tokens among the leaves of both.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tokens: tuple[int, ...] = ()

    def leaves(self) -> list[Any]:
        """Return the leaves of both."""
        return pytree.tree_leaves((self.args, self.kwargs))

    def holding(self, new: Mapping[int, Tensor]) -> TokenCall:
        """Return the call with other tensors at some positions."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        args, kwargs = pytree.tree_unflatten([new.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
        return TokenCall(args, kwargs, self.tokens)

    def renumbered(self, new: Tensor) -> TokenCall:
        """Return the call with each token renumbered."""
        leaves = self.leaves()
        return self.holding({i: new.to(leaves[i].device)[leaves[i]].to(leaves[i].dtype) for i in self.tokens})


def without_others(call: TokenCall) -> TokenCall:
    """Return a call without the tensors that it names beside its ids: masks, targets of a loss."""
    integers = [name for name, value in call.kwargs.items() if isinstance(value, Tensor)]
    first = integers[:1] if not any(isinstance(each, Tensor) for each in call.args) else []
    return TokenCall(call.args, {name: v for name, v in call.kwargs.items() if name in first or name not in integers})


@dataclass
class Vocabulary:
    """The places of a model's tokens.

    Attributes:
        rows: number of tokens that the model has rows for.
        tables: the tables whose rows are looked up by tokens.
        places: these, and all other dims along which tokens lie.
        call: a call in which tokens that stay come up.
        outputs: its results, from the model as it is.
        unexplained: (result, dim) with as many entries, which no place moves one by one.
    """

    rows: int
    tables: list[Place]
    places: list[Place]
    call: TokenCall
    outputs: list[Tensor] = field(default_factory=list)
    unexplained: list[tuple[int, int]] = field(default_factory=list)


def run(model: nn.Module, call: TokenCall) -> list[Tensor]:
    """Return the tensors of floating-point numbers that a call of a model returns; nothing else of it is left."""
    with isolated(model), torch.no_grad():
        seed(0)
        result = model(*call.args, **call.kwargs)
    tensors = [leaf.detach() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


class _Lookups(TorchDispatchMode):
    """A mode that notes the tensors that are looked up in, with the indices."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[Any, Tensor]] = []  # memory, stride and size of the dim; indices

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.embedding.default, aten._embedding_bag.default, aten._embedding_bag_forward_only.default):
            self._note(args[0], 0, args[1])
        elif func is aten.index_select.default:
            self._note(args[0], args[1], args[2])
        elif func is aten.index.Tensor:
            for dim, index in enumerate(args[1]):
                if index is not None and index.dtype != torch.bool:
                    self._note(args[0], dim, index)
        return func(*args, **(kwargs or {}))

    def _note(self, source: Tensor, dim: int, index: Tensor) -> None:
        if source.layout is torch.strided and source.ndim:
            self.found.append(((storage_key(source), source.stride(dim), source.shape[dim]), index.detach().clone()))


def lookups(model: nn.Module, call: TokenCall) -> list[Lookup]:
    """Return the look-ups that a call makes."""
    mode = _Lookups()
    with isolated(model), torch.no_grad(), mode:
        seed(0)
        model(*call.args, **call.kwargs)
        places: dict[Any, list[Place]] = {}  # in here, where buffers are copies
        for name, tensor in named_tensors(model).items():
            for dim in range(tensor.ndim if tensor.layout is torch.strided else 0):
                places.setdefault((storage_key(tensor), tensor.stride(dim), tensor.shape[dim]), []).append((name, dim))
    return [(tuple(places[key]), index) for key, index in mode.found if key in places]


def find(model: nn.Module, call: TokenCall, kept: Sequence[int]) -> Vocabulary:
    """Find the places of a model's tokens.

    Args:
        model: the model.
        call: a call of it.
        kept: the tokens that stay.

    Raises:
        CaptureError: it cannot be called so, or nothing is looked up by tokens.
        ShrinkError: rows are read for other tokens than their own.
    """
    kind = type(model).__name__
    generator = torch.Generator().manual_seed(0)
    few = torch.tensor(kept)[torch.randperm(len(kept), generator=generator)[:64]]
    inside, outside = few[: max(1, len(few) // 2)], few[len(few) // 2 :]
    try:
        call = with_tokens(model, call, inside, generator)
        before = lookups(model, call)
        others = {i: drawn(call.leaves()[i], outside, generator) for i in call.tokens}
        moved = moved_tables(before, lookups(model, call.holding(others)), tokens_in(call), outside)
    except (ShrinkError, CaptureError):
        raise
    except IndexError as error:
        raise ShrinkError(
            f"tokens up to {max(kept):,} are to stay, and {kind} has no rows for some of them ({error}): they are of "
            "another model, or of its tokenizer"
        ) from error
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise CaptureError(
            f"{kind} cannot be called with tokens to look at, it fails with {type(error).__name__}: {line:.200}. Pass "
            "a call that it takes, example_inputs= or example_kwargs="
        ) from error
    held = named_tensors(model)
    tables = sorted(moved)
    if not tables:
        raise CaptureError(f"no weight of {kind} is looked up by the integers of the call; there is nothing to trim")
    sizes = sorted({held[name].shape[dim] for name, dim in tables})
    if len(sizes) > 1:
        named = ", ".join(f"`{name}` {tuple(held[name].shape)}" for name, _ in tables)
        raise ShrinkError(f"{kind} looks the same tokens up in tables of different sizes, {named}, which share no ids")
    found = Vocabulary(sizes[0], tables, list(tables), call, run(model, call))
    if not found.outputs:
        raise CaptureError(
            f"{kind} returns no tensor of numbers to compare with those of the smaller model; let it return "
            "tensors, in tuples, lists, dicts or dataclasses that torch.utils._pytree knows"
        )
    _follow(model, found, int(outside[-1]))
    return found


def with_tokens(model: nn.Module, call: TokenCall, among: Tensor, generator: torch.Generator) -> TokenCall:
    """Find which integers of a call are tokens, and put some of those that stay in their place."""
    leaves = call.leaves()
    integers = [
        i for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.dtype in (torch.int64, torch.int32) and leaf.numel()
    ]  # fmt: skip
    if len(integers) == 1:
        tokens = integers
    else:
        tokens, before = [], lookups(model, call)
        for i in integers:
            trial = call.holding({i: drawn(leaves[i], among, generator)})
            try:
                if moved_tables(before, lookups(model, trial), leaves[i], among):
                    tokens.append(i)
            except (IndexError, RuntimeError, ValueError):  # integers of another meaning, out of their range now
                continue
    call = TokenCall(call.args, call.kwargs, tuple(tokens))
    return call.holding({i: drawn(leaves[i], among, generator) for i in tokens})


def tokens_in(call: TokenCall) -> Tensor:
    """Return the tokens of a call, in one row."""
    leaves = call.leaves()
    return torch.cat([leaves[i].flatten() for i in call.tokens]) if call.tokens else torch.zeros(0, dtype=torch.long)


def drawn(like: Tensor, among: Tensor, generator: torch.Generator) -> Tensor:
    """Draw tokens in the place of others."""
    return among[torch.randint(len(among), like.shape, generator=generator)].to(like)


def moved_tables(before: Sequence[Lookup], after: Sequence[Lookup], old: Tensor, new: Tensor) -> set[Place]:
    """Return the dims of tensors that are looked up in by tokens.

    Args:
        before: the look-ups of a call.
        after: those of a call with other tokens.
        old: the tokens of the first; indices that are none, such as classes of tokens, are of another table.
        new: the tokens of the second.
    """
    found: set[Place] = set()
    for (places, first), (others, second) in zip(before, after, strict=False):
        if places != others or first.shape != second.shape:
            continue
        moved = first != second
        if bool(moved.any()) and bool(torch.isin(first[moved], old).all() & torch.isin(second[moved], new).all()):
            found.update(places)
    return found


@contextmanager
def changed_entry(tensor: Tensor, dim: int, at: int) -> Iterator[None]:
    """Change one entry along a dim of a tensor, for the time inside."""
    with torch.no_grad():
        entry = tensor.detach().select(dim, at)
        before = entry.clone()
        try:
            entry.add_(1 + 4 * tensor.detach().abs().amax())
            yield
        finally:
            entry.copy_(before)


def _follow(model: nn.Module, found: Vocabulary, absent: int) -> None:
    """Add the dims whose entries leave the model as scores of tokens.

    Args:
        model: the model.
        found: what is known so far.
        absent: a token that does not come up in the call.

    Raises:
        ShrinkError: rows are read for other tokens than their own, or scores depend on each other.
    """
    scores: set[tuple[int, int]] = set()  # (output, dim)
    done: set[Any] = set()
    for name, tensor in named_tensors(model).items():
        for dim in [d for d in range(tensor.ndim) if tensor.shape[d] == found.rows and tensor.is_floating_point()]:
            key = (storage_key(tensor), tensor.storage_offset(), tensor.stride(dim))
            if tensor.layout is not torch.strided or key in done:
                if key in done and (name, dim) not in found.places and _tied(model, name, dim, found.places):
                    found.places.append((name, dim))
                continue
            done.add(key)
            with changed_entry(tensor, dim, absent):
                after = run(model, found.call)
            moved = _moved(found.outputs, after, absent, found.rows)
            if moved is None and (name, dim) in found.tables:
                raise ShrinkError(
                    f"`{name}` of {type(model).__name__} is read for other tokens than those of a call: its results "
                    f"change with row {absent}, of a token that is not in it, and not as the score of that token "
                    "alone (a softmax over all scores inside the model, a sum over rows). It cannot lose rows"
                )
            if moved and (name, dim) not in found.places:
                found.places.append((name, dim))
            scores |= moved or set()
    left = [
        (i, dim)
        for i, output in enumerate(found.outputs)
        for dim in range(output.ndim)
        if output.shape[dim] == found.rows and (i, dim) not in scores
    ]
    found.unexplained = left


def _tied(model: nn.Module, name: str, dim: int, places: Sequence[Place]) -> bool:
    held = named_tensors(model)
    mine = (storage_key(held[name]), held[name].stride(dim), held[name].storage_offset())
    return any((storage_key(held[n]), held[n].stride(d), held[n].storage_offset()) == mine for n, d in places)


def _moved(before: Sequence[Tensor], after: Sequence[Tensor], at: int, rows: int) -> set[tuple[int, int]] | None:
    """Return (output, dim) where outputs moved at entry `at` alone; None where one moved elsewhere."""
    found = set()
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        if a.shape != b.shape:
            return None
        moved = (a != b) & ~((a != a) & (b != b))
        if not bool(moved.any()):
            continue
        dims = [d for d in range(a.ndim) if a.shape[d] == rows and _only(moved, d, at)]
        if not dims:
            return None
        found |= {(i, dim) for dim in dims}
    return found


def _only(moved: Tensor, dim: int, at: int) -> bool:
    others = [d for d in range(moved.ndim) if d != dim]
    where = moved.any(dim=others).nonzero().flatten() if others else moved.nonzero().flatten()
    return where.tolist() == [at]


def difference(before: Sequence[Tensor], after: Sequence[Tensor], kept: Tensor, rows: int) -> str | None:
    """Say how outputs differ from those before, in the entries that are left; None where they are equal."""
    if len(before) != len(after):
        return f"it returns {len(after)} tensors and returned {len(before)}"
    for a, b in zip(before, after, strict=True):
        expected = a
        for dim in range(min(a.ndim, b.ndim)):
            if a.shape[dim] == rows and b.shape[dim] == len(kept):
                expected = expected.index_select(dim, kept.to(a.device))
        error = relative_error(expected, b)
        if not error <= TOLERANCE.get(a.dtype, 0.0):
            return (
                f"of {tuple(b.shape)}, a result differs by {error:.1e} from the entries of {tuple(a.shape)} that stay"
            )
    return None
