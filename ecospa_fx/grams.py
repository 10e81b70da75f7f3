"""Grams: what weights meet, as second moments gathered while the model runs, so that a shrink can be absorbed.

    Grams(model) -> an observer per region -> X.T @ X per weight that sums over a coupling -> shrink(..., absorb=grams)

`X` is what the weight is multiplied with, one row per position. Its Gram matrix has a fixed size whatever is trained
on, and is a sum, so that ranks add theirs up. No activation is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from .api import regions_of
from .errors import TargetError
from .logs import logger
from .observers import ignore, observe
from .passes.absorb import Absorption, Moments, absorb
from .passes.capture import Captured, storage_key
from .passes.consumers import Consumer, Input, Key, consumers
from .passes.inference import Inference
from .passes.rewrite import Program
from .passes.shrink import steps_of
from .plan import Plan
from .region import Region

ROWS = 2048
"""Positions read of one call at most: with that a matrix of 512 costs about as much as the product it belongs to."""

RIDGE = 1e-3
"""Share of the mean second moment; see docs/absorption.md for what others do."""


@dataclass
class _Gram:
    """Moments of what some weights meet, and which positions of their dim these are of; None for all."""

    moments: Moments
    positions: Tensor | None
    window: int
    calls: int = 0

    def follow(self, positions: Tensor | None) -> bool:
        """Drop what has gone since; False where something is missing."""
        if positions is None or (self.positions is not None and torch.equal(positions, self.positions)):
            return positions is self.positions or positions is not None
        then = torch.arange(len(self.moments.sums) // self.window) if self.positions is None else self.positions
        left = torch.isin(then, positions)
        if int(left.sum()) != len(positions):
            return False
        self.moments = self.moments.at(_columns(left.nonzero().flatten(), self.window))
        self.positions = positions
        return True


@dataclass(frozen=True, eq=False)
class _Known:
    """A weight that may absorb: how it is used, and under whose name lies the Gram matrix of what it meets."""

    consumer: Consumer
    gram: Key


@dataclass(frozen=True, eq=False)
class _Place:
    """What is added to one Gram matrix at a call: the inputs of a weight, at the sizes they have there."""

    gram: Key
    inputs: tuple[Input, ...]
    window: int
    positions: Tensor | None


class Grams:
    """Gathers what a shrink needs to be absorbed: `X.T @ X` for each weight that sums over what a coupling selects.

    >>> with ecospa_fx.Grams(model) as grams, torch.no_grad():
    ...     for batch in some_batches:
    ...         model(batch)
    >>> ecospa_fx.shrink(model, {coupling: keep}, absorb=grams)

    `EcoSpaTrainer(..., absorb=True)` does this by itself, with its training batches.

    Args:
        model: a compiled model that has been called.
        rows: positions (tokens, pixels) that are read of one call at most, evenly spaced.
        ridge: how much the regression distrusts what it has seen: what is added to the diagonal of `X.T @ X`, as a
            share of its mean.
        training: look at forwards in training mode with gradients on only, not at every one.

    Attributes:
        refused: (parameter, dim) of weights that sum over a coupling in a way that nothing takes over -> why.
        left: (parameter, dim) -> share of the squares of what went at the last shrink that nothing took over.

    Raises:
        TargetError: `rows` or `ridge` is out of range.
    """

    def __init__(self, model: nn.Module, *, rows: int = ROWS, ridge: float = RIDGE, training: bool = False) -> None:
        if not isinstance(rows, int) or rows < 1:
            raise TargetError(f"rows={rows!r} is out of range; it is a whole number of positions, at least 1")
        if not isinstance(ridge, (int, float)) or not ridge >= 0:
            raise TargetError(f"ridge={ridge!r} is out of range; it is a share of the mean second moment, at least 0")
        self.model, self.rows, self.ridge, self.training = model, rows, ridge, training
        self.active = True
        self.refused: dict[Key, str] = {}
        self.left: dict[Key, float] = {}
        self._grams: dict[Key, _Gram] = {}
        self._graphs: dict[int, tuple[Inference, Mapping[Key, Consumer | str]]] = {}
        self._known: dict[Key, _Known] = {}
        self._regions = list(regions_of(model).values())
        for region in self._regions:
            observe(region, self)

    def __enter__(self) -> Grams:
        """Gather until the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop gathering; what was gathered stays."""
        self.detach()

    def detach(self) -> None:
        """Stop gathering; what was gathered stays."""
        for region in self._regions:
            ignore(region, self)

    def reset(self) -> None:
        """Forget what was gathered."""
        self._grams.clear()

    @property
    def absorbing(self) -> tuple[Key, ...]:
        """(parameter, dim) of the weights that can take over, of those whose region has been called."""
        return tuple(self._known)

    @property
    def empty(self) -> bool:
        """Nothing has been gathered."""
        return not self._grams

    def state_dict(self) -> dict[str, Tensor]:
        """What was gathered, by name."""
        found: dict[str, Tensor] = {}
        for (name, dim), gram in self._grams.items():
            label = f"{name}[{dim}]"
            found |= {f"squares {label}": gram.moments.squares, f"sums {label}": gram.moments.sums}
            found[f"counts {label}"] = torch.tensor([gram.moments.count, gram.window, gram.calls])
            if gram.positions is not None:
                found[f"positions {label}"] = gram.positions
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken."""
        self._grams = {}
        for label in [name.removeprefix("squares ") for name in state if name.startswith("squares ")]:
            name, _, dim = label.removesuffix("]").rpartition("[")
            count, window, calls = state[f"counts {label}"].tolist()
            moments = Moments(state[f"squares {label}"], state[f"sums {label}"], count)
            self._grams[name, int(dim)] = _Gram(moments, state.get(f"positions {label}"), window, calls)

    # What an observer of regions does, see `ecospa_fx.observers`.

    def looks(self, module: nn.Module) -> bool:
        """At every forward, or those that train."""
        return self.active and (not self.training or (torch.is_grad_enabled() and module.training))

    def places(self, region: Region, program: Program) -> tuple[list[fx.Node], list[_Place]]:
        """What the weights of a region meet."""
        self._read(region)
        here = self._consumers(program.inference)
        found: list[_Place] = []
        for key in dict.fromkeys(self._known[key].gram for key in self._offered(region) if key in self._known):
            consumer = here.get(_inside(region, key))
            if isinstance(consumer, Consumer):
                found.append(_Place(key, consumer.inputs, consumer.window, region.compiled.plan.kept.get(key)))
        return [each.node for place in found for each in place.inputs], found

    def see(self, known: list[_Place], values: Sequence[Tensor]) -> None:
        """Add up what one call shows."""
        given = iter(values)
        with torch.inference_mode(False), torch.no_grad():
            for place in known:
                self._add(place, [next(given) for _ in place.inputs])

    def _add(self, place: _Place, values: Sequence[Tensor]) -> None:
        gram = self._grams.get(place.gram)
        most, skip = -(-self.rows // len(values)), gram.calls if gram is not None else 0
        with torch.autocast(values[0].device.type, enabled=False):
            rows = torch.cat([each.rows(v, most, skip) for each, v in zip(place.inputs, values, strict=True)])
            rows = rows if rows.dtype == torch.float64 else rows.float()
            moments = Moments(rows.T @ rows, rows.sum(0), len(rows))
        if gram is None or not gram.follow(place.positions):
            self._grams[place.gram] = _Gram(moments, place.positions, place.window, 1)
            return
        held = gram.moments
        held.squares.add_(moments.squares)
        held.sums.add_(moments.sums)
        gram.moments = Moments(held.squares, held.sums, held.count + moments.count)
        gram.calls += 1

    def _consumers(self, inference: Inference) -> Mapping[Key, Consumer | str]:
        known = self._graphs.get(id(inference))
        if known is None or known[0] is not inference:
            self._graphs[id(inference)] = known = (inference, consumers(inference))
        return known[1]

    def _offered(self, region: Region) -> list[Key]:
        """The dims of matrices that couplings of a region lie on."""
        return sorted({(m.parameter, m.dim) for c in region.couplings() for m in c.members if m.matrix})

    def _read(self, region: Region) -> None:
        """Find out which weights of a region may absorb: every graph of it must sum over the dim in the same way."""
        groups: dict[Any, Key] = {}
        for key in self._offered(region):
            self._known.pop(key, None)
            self.refused.pop(key, None)
            inside = _inside(region, key)
            graphs = [p.inference for p in region.programs if _uses(p.captured, inside[0])]
            found = [self._consumers(inference).get(inside) for inference in graphs]
            if not any(found):
                continue  # it makes what others sum over
            reasons = [each for each in found if isinstance(each, str)]
            same = [each for each in found if isinstance(each, Consumer)]
            if reasons or len(same) < len(found) or len({each.window for each in same}) > 1:
                self.refused[key] = reasons[0] if reasons else "not every call of its region sums over it"
                continue
            bias = same[0].bias if len({each.bias for each in same}) == 1 else None
            meets = tuple(tuple((i.node, i.dim, i.window) for i in each.inputs) for each in same)
            self._known[key] = _Known(replace(same[0], bias=bias), groups.setdefault(meets, key))

    def absorbed(self, before: Plan, after: Plan, held: Sequence[Mapping[str, Tensor]]) -> dict[int, Tensor]:
        """What the weights that take over become, at their sizes before the shrink.

        Where the model runs in several processes, each of them must call it: what they saw is added up.

        Args:
            before: the plan now.
            after: the plan that the shrink leads to.
            held: tensors by name in the model: its own, those of copies, and averages of weights in optimizers. Each
                of these maps is linear in the weights, so that all of them take over alike.

        Returns:
            `id` of a tensor in `held` -> its new value, for those that change.
        """
        made: dict[int, Tensor] = {}
        solved: dict[tuple[Key, bool], Absorption | None] = {}
        self.left = {}
        for (name, dim), known in sorted(self._known.items()):
            steps = steps_of(name, before, after).get(dim) if (name, dim) in after.kept else None
            if steps is None:
                continue
            consumer, constant = known.consumer, known.consumer.bias is not None
            if (known.gram, constant) not in solved:
                solved[known.gram, constant] = self._solved(known, before.kept.get((name, dim)), steps)
            absorption = solved[known.gram, constant]
            if absorption is None:
                continue
            self.left[name, dim] = absorption.left
            bias = None if consumer.bias is None else name.removesuffix(consumer.parameter) + consumer.bias
            for tensors in held:
                weight = tensors.get(name)
                if weight is None or not _plain(weight):
                    continue
                matrix = consumer.columns(weight.detach())
                _set(made, tensors, weight, consumer.as_weight(absorption.columns(matrix), weight))
                if bias is not None and _plain(tensors.get(bias)):
                    _set(made, tensors, tensors[bias], absorption.bias(tensors[bias].detach(), matrix))
        self._tell(before, after)
        return made

    def _solved(self, known: _Known, positions: Tensor | None, steps: Tensor) -> Absorption | None:
        gram = self._grams.get(known.gram)
        if gram is None or not gram.follow(positions):
            return None
        return absorb(
            _reduced(gram.moments), _columns(steps, gram.window),
            constant=known.consumer.bias is not None, ridge=self.ridge,
        )  # fmt: skip

    def _tell(self, before: Plan, after: Plan) -> None:
        log = logger("shrink")
        for key, share in self.left.items():
            log.debug("%s[%d] takes over what goes, but %.1f%% of it", *key, 100 * share)
        for key in [*self.refused, *(key for key in self._known if key not in self.left)]:
            if key in after.kept and not torch.equal(after.kept[key], before.kept.get(key, after.kept[key][:0])):
                reason = self.refused.get(key, "nothing was gathered of what it meets, or an inf or a NaN was")
                log.info("nothing takes over in %s[%d]: %s", *key, reason)


def _inside(region: Region, key: Key) -> Key:
    return (key[0].removeprefix(f"{region.name}.") if region.name else key[0]), key[1]


def _uses(captured: Captured, name: str) -> bool:
    """Whether a graph does anything with a parameter."""
    return any(
        captured.same_storage.get(held, held) == name
        for node in captured.graph.nodes
        if node.op == "placeholder" and node.users and (held := captured.tensors.get(node.name)) is not None
    )


def _columns(entries: Tensor, window: int) -> Tensor:
    """The columns of some entries, of which each has `window`."""
    return (entries[:, None] * window + torch.arange(window)).flatten()


def _plain(tensor: Tensor | None) -> bool:
    """Whether the values of a tensor are here, and all of them."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor is not None and tensor.device.type != "meta"


def _set(made: dict[int, Tensor], tensors: Mapping[str, Tensor], tensor: Tensor, value: Tensor) -> None:
    """A new value of a tensor, and of those that share its memory."""
    for each in tensors.values():
        if each is tensor or (storage_key(each) == storage_key(tensor) and each.shape == tensor.shape):
            made[id(each)] = value


def _reduced(moments: Moments) -> Moments:
    """The moments of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return moments
    count = moments.sums.new_tensor([moments.count], dtype=torch.float64)
    squares, sums = moments.squares.clone(), moments.sums.clone()
    for tensor in (squares, sums, count):
        torch.distributed.all_reduce(tensor)
    return Moments(squares, sums, int(count))
