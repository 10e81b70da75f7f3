"""Rotation: another basis for couplings between linear maps, in which a few entries carry most, and the rest little.

rotate(model, couplings) -> sides, or a reason -> balanced -> weights, gradients and optimizer state
                         -> where norms stand on it: stream_of, or a reason -> an orthonormal basis, see `streams.py`
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.arguments import MODULE, NAMED, SEVERAL, instance, optional, takes
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import NoCouplingError
from ecospa_fx.logs import logger
from ecospa_fx.model.compiled import CompiledModel
from ecospa_fx.model.copies import copies_of
from ecospa_fx.model.journal import Journal, all_or_nothing
from ecospa_fx.model.lookup import check_optimizer, state_of
from ecospa_fx.model.optimizer_state import averages_of, check_can_follow, layers, several
from ecospa_fx.model.optimizer_table import TransformsAs, rules_for
from ecospa_fx.model.region import Region
from ecospa_fx.model.slicing import Change
from ecospa_fx.passes.axes.algebra import atoms_of
from ecospa_fx.passes.find.discover import RegionCoupling
from ecospa_fx.passes.graph.tensors import join, named_tensors, storage_key
from ecospa_fx.passes.transform.rotate import (
    FAR,
    NEAR,
    BasisChange,
    Part,
    balanced,
    change_basis,
    gram_of,
    near_old_basis,
    sides,
)
from ecospa_fx.passes.transform.stream import KeepsBasis
from ecospa_fx.ranks.fsdp2 import owners, reshard
from ecospa_fx.ranks.members import ranks_of
from ecospa_fx.ranks.shards import gathered, is_sharded, split
from ecospa_fx.ranks.wrappers import check_wrappers, looks_inside

from .find_stream import on_norms, stream_of
from .grams import Grams


@dataclass(frozen=True)
class Rotation:
    """The result of `rotate`.

    Attributes:
        energy: coupling name -> `[contexts, size]`, the energy of each entry in the new basis, largest first.
        refused: coupling name -> the reason why it keeps its basis.
    """

    energy: dict[str, Tensor] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name}: rotated" for name in self.energy]
        return "\n".join([*lines, *(f"{name}: as it was, {reason}" for name, reason in self.refused.items())])


@takes(
    model=MODULE,
    couplings=optional(SEVERAL),
    keep=optional(NAMED),
    grams=optional(instance("an ecospa_fx.Grams", Grams)),
)
@looks_inside
@torch.no_grad()
def rotate(
    model: nn.Module,
    couplings: Iterable[Coupling | str] | None = None,
    *,
    keep: Mapping[str, int] | None = None,
    grams: Grams | None = None,
    optimizer: Optimizer | Iterable[Optimizer] = (),
    also: Any = (),
) -> Rotation:
    """Give couplings between linear maps a basis in which their entries are ordered by the energy that they carry.

    These are values and outputs of an attention, and queries and keys without rotary embedding; the basis is that of
    the singular vectors of the product, per head. A coupling that norms stand on, such as the residual stream of a
    transformer, gets one orthonormal basis: the principal components of what its norms return, with the norms' weights
    moved into what reads them (SliceGPT, arXiv 2401.15024). The model computes the same as before, to rounding, and
    loses least by its last entries. Values that hooks see along these couplings are in the new basis.

    >>> ecospa_fx.rotate(model, optimizer=optimizer)

    Args:
        model: a compiled model that has been called.
        couplings: couplings or their names; all by default.
        keep: coupling name -> number of entries that will stay. These are then given coordinates close to the old ones,
            not ordered, so that the state of optimizers stays meaningful.
        grams: moments of the activations; the product is then weighted by them, and they follow the change of basis.
        optimizer: the optimizer, or several, that hold the parameters; their state follows the change of basis.
        also: copies of the model that follow it, see `ecospa_fx.shrink`.

    Returns:
        The energy of each entry, and why some couplings keep their basis.

    Raises:
        NoCouplingError: the coupling does not exist.
        OptimizerError: the optimizer holds none of the parameters, or its state cannot be carried through a change.
        ShrinkError: something in `also` is not a copy of the model.
    """

    def change(journal: Journal) -> Rotation:
        check_wrappers(model)
        return rotate_within(journal, model, couplings, keep=keep, grams=grams, optimizer=optimizer, also=also)

    return all_or_nothing(change, ranks_of(model), "rotate")


@torch.no_grad()
def rotate_within(
    journal: Journal,
    model: nn.Module,
    couplings: Iterable[Coupling | str] | None = None,
    *,
    keep: Mapping[str, int] | None = None,
    grams: Grams | None = None,
    optimizer: Optimizer | Iterable[Optimizer] = (),
    also: Any = (),
) -> Rotation:
    """Rotate as `rotate` does, as a part of a larger change."""
    reshard(model)
    compiled, optimizers = state_of(model), several(optimizer)
    for each in optimizers:
        check_optimizer(model, each)
        check_can_follow(each)
    copies = copies_of(model, also)
    known = {coupling.name: coupling for coupling in compiled.couplings()}
    wanted = list(known) if couplings is None else [c.name if isinstance(c, Coupling) else c for c in couplings]
    for name in wanted:
        if not isinstance(name, str) or name not in known:
            raise NoCouplingError(f"the model has no coupling `{name}`; it has {', '.join(known)}")
    result, log = Rotation(), logger("shrink")
    of_copies = [copy.tensors for copy in copies]
    for name in dict.fromkeys(wanted):
        size = (keep or {}).get(name)
        reason = _rotate(model, compiled, known[name], size, grams, optimizers, of_copies, result, journal)
        if reason is not None:
            result.refused[name] = reason
            log.info("%s keeps its basis: %s", name, reason)
    ranks_of(model).agree("rotate", {"the couplings with a new basis": sorted(result.energy)})
    return result


def _rotate(
    model: nn.Module,
    compiled: CompiledModel,
    coupling: Coupling,
    keep: int | None,
    grams: Grams | None,
    optimizers: Sequence[Optimizer],
    copies: Sequence[Mapping[str, Tensor]],
    result: Rotation,
    journal: Journal,
) -> str | None:
    """Rotate one coupling as a whole, or return the reason why it keeps its basis."""
    if not coupling.linear and on_norms(compiled, coupling):
        return _rotate_stream(model, compiled, coupling, keep, grams, optimizers, copies, result, journal)
    basis = free_basis(model, compiled, coupling, grams, optimizers)
    if isinstance(basis, str):
        return basis
    parts, change, tensors = basis.parts, basis.change, named_tensors(model)
    if keep is not None and keep < coupling.size:
        change = near_old_basis(change, keep, basis.scale)
    pending = Change(owners=owners(model))
    for each in (tensors, *copies):
        for tensor, own in _by_tensor(each, parts):
            grad = None if tensor.grad is None else _changed(tensor.grad, own, change, "gradient")
            pending.tensors.append((tensor, _changed(tensor, own, change, "update"), grad))
    for tensor, own in _by_tensor(tensors, parts):
        states = _states_of(optimizers, tensor)
        assert not isinstance(states, str), states  # `free_basis` has refused these
        pending.states += [(state, entry, _changed(value, own, change, how)) for state, entry, value, how in states]
    pending.commit(journal)
    if grams is not None:
        grams.follow(coupling, parts, change, journal)
    result.energy[coupling.name] = change.energy.cpu()
    return None


def _rotate_stream(
    model: nn.Module,
    compiled: CompiledModel,
    coupling: Coupling,
    keep: int | None,
    grams: Grams | None,
    optimizers: Sequence[Optimizer],
    copies: Sequence[Mapping[str, Tensor]],
    result: Rotation,
    journal: Journal,
) -> str | None:
    """Rotate a coupling that norms stand on."""
    tensors, pending = named_tensors(model), Change(owners=owners(model))
    try:
        stream = stream_of(model, compiled, coupling)
        averages = averages_of(tensors, optimizers)
        for each in (*copies, *averages):
            stream.check(each)
        basis, energy = stream.basis(grams, keep)
    except KeepsBasis as error:
        return str(error)
    states: dict[tuple[str, TransformsAs], dict[str, tuple[dict[str, Any], Tensor]]] = {}
    for name in stream.names:
        found = _states_of(optimizers, tensors[name])
        if isinstance(found, str):
            return f"`{name}`: {found}"
        averaged = {id(each[name]) for each in averages if name in each}
        for state, entry, value, how in found:
            if id(value) not in averaged:
                states.setdefault((entry, how), {})[name] = state, value
    new = stream.turned(tensors, basis)
    for each in (tensors, *copies):
        turned = new if each is tensors else stream.turned(each, basis)
        given = {name: each[name].grad for name in turned}
        present = {name: grad for name, grad in given.items() if grad is not None}
        grads = stream.turned_like(present, "gradient", turned, each, basis)
        for name, value in turned.items():
            grad = _placed_as(grads[name], given[name]) if name in grads else None
            pending.tensors.append((each[name], _placed_as(value, each[name]), grad))
    for average in averages:
        for name, value in stream.turned(average, basis).items():
            for state, entry in _places_of(average[name], optimizers, tensors[name]):
                pending.states.append((state, entry, _placed_as(value, average[name])))
    for (entry, how), held in states.items():
        values = stream.turned_like({name: value for name, (_, value) in held.items()}, how, new, tensors, basis)
        pending.states += [(held[name][0], entry, _placed_as(values[name], held[name][1])) for name in held]
    if grams is not None:
        stream.follow(grams, tensors, basis, journal)
    pending.commit(journal)
    result.energy[coupling.name] = energy.cpu()[None]
    return None


def _places_of(
    value: Tensor, optimizers: Sequence[Optimizer], parameter: Tensor
) -> Iterable[tuple[dict[str, Any], str]]:  # fmt: skip
    """Yield the entries of optimizer state that hold a tensor."""
    for each in [layer for optimizer in optimizers for layer in layers(optimizer)]:
        state = getattr(each, "state", {}).get(parameter) or {}
        yield from ((state, entry) for entry, held in state.items() if held is value)


def _placed_as(value: Tensor, like: Any) -> Tensor:
    """Return a whole tensor placed, and laid out, as another one is."""
    placed: Tensor = split(value, like) if is_sharded(like) else value
    return placed


@dataclass(frozen=True, eq=False)
class FreeBasis:
    """The new basis of a coupling, in which its entries are ordered by energy.

    Attributes:
        parts: the parts of weights that its sides lie on.
        change: the change of basis, with the energy of each entry in it.
        alone: `[contexts, d]`, the squares that each entry carries in the old basis.
        scale: `[contexts, d]`, the roots of the squares of their near side.
    """

    parts: list[Part]
    change: BasisChange
    alone: Tensor
    scale: Tensor


def free_basis(
    model: nn.Module,
    compiled: CompiledModel,
    coupling: Coupling,
    grams: Grams | None,
    optimizers: Sequence[Optimizer],
) -> FreeBasis | str:
    """Return the basis in which a coupling's entries are ordered by energy, or the reason why it is not free."""
    parts = _parts(compiled, coupling)
    if isinstance(parts, str):
        return parts
    tensors = named_tensors(model)
    for part in parts:
        states = _states_of(optimizers, tensors[part.parameter])
        if isinstance(states, str):
            return f"`{part.parameter}`: {states}"
    for part in parts:
        weight = tensors[part.parameter]
        plain = type(weight) in (Tensor, nn.Parameter) or is_sharded(weight)
        if not plain or weight.device.type == "meta":
            kind = type(weight).__name__
            return f"`{part.parameter}` is a {kind} on {weight.device}, whose values are not all in this process"
        if any(storage_key(t) == storage_key(weight) for t in tensors.values() if t is not weight):
            return f"`{part.parameter}` shares its memory with another tensor"
    tensors = {part.parameter: gathered(tensors[part.parameter]) for part in parts}
    near, far = (gram_of(tensors, [p for p in parts if p.side == side], coupling.contexts) for side in (NEAR, FAR))
    if grams is not None:
        near, far = grams.of_sides(coupling, parts, near, far)
    if not bool(near.isfinite().all()) or not bool(far.isfinite().all()):
        return "its weights or activations have an inf or a NaN"
    alone = near.diagonal(dim1=-2, dim2=-1) * far.diagonal(dim1=-2, dim2=-1)
    scale = near.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return FreeBasis(parts, balanced(near, far), alone.cpu(), scale)


def _by_tensor(tensors: Mapping[str, Tensor], parts: Sequence[Part]) -> Iterable[tuple[Tensor, list[Part]]]:
    """Return each tensor once, with all the parts that lie on it."""
    for name in dict.fromkeys(part.parameter for part in parts):
        if name in tensors:
            yield tensors[name], [part for part in parts if part.parameter == name]


def _parts(compiled: CompiledModel, coupling: Coupling) -> list[Part] | str:
    """Return the parts of weights that the two sides of a coupling lie on, or the reason why its basis is not free."""
    region = compiled.regions.get(coupling.region)
    if region is None:
        return "it lies in several regions"
    if coupling.size < 2:
        return "it has one entry"
    named = region.naming_graph.discovery.couplings
    where = _sides_everywhere(region, next(c for c in named if join(region.name, c.name) == coupling.name))
    if isinstance(where, str):
        return where
    if len({parameter for parameter, _ in where}) < len(where):
        return "a weight has the coupling along two of its dims"
    if {join(region.name, name) for name, _ in where} != {member.parameter for member in coupling.members}:
        return "a buffer lies on it"
    parts: list[Part] = []
    for member in coupling.members:
        name = member.parameter.removeprefix(f"{region.name}.") if region.name else member.parameter
        kept = compiled.plan.kept.get((member.parameter, member.dim))
        side = where[name, member.dim] if kept is None else where[name, member.dim][kept]
        for each in (NEAR, FAR):
            positions = torch.where(side == each, member.index, -1)
            counts = {int((positions == entry).sum()) for entry in range(coupling.size)}
            if counts == {0}:
                continue
            if len(counts) > 1:
                return f"`{member.parameter}` has more rows of one entry than of another"
            order = torch.stack([(positions == entry).nonzero().flatten() for entry in range(coupling.size)])
            context = torch.zeros_like(order) if member.context is None else member.context[order]
            if not bool((context == context[0]).all()):
                return f"`{member.parameter}` has its heads in an order that differs from entry to entry"
            parts.append(Part(member.parameter, member.dim, each, order, context[0]))
    return parts


def _sides_everywhere(region: Region, found: RegionCoupling) -> Mapping[tuple[str, int], Tensor] | str:
    """Return the sides, or a reason; all graphs of the region that use any of the weights must agree on them."""
    first: Mapping[tuple[str, int], Tensor] | None = None
    names = {name for name, _ in found.axes}
    for each in region.specializations:
        same = next((other for other in each.discovery.couplings if other.key == found.key), None)
        if same is None:
            exprs = [expr for name in names for expr in each.axis_facts.parameters.get(name, ())]
            if any(True for expr in exprs for _ in atoms_of(expr)):
                return "another call of its region uses its weights in another way"
            continue
        where = sides(each.axis_facts, same)
        if isinstance(where, str):
            return where
        if first is not None and any(not torch.equal(where[key], first[key]) for key in first):
            return "another call of its region uses its weights in another way"
        first = where
    return "no graph of its region has the coupling" if first is None else first


def _changed(tensor: Tensor, parts: Sequence[Part], change: BasisChange, how: TransformsAs) -> Tensor:
    """Compute a tensor of a parameter's shape in the new basis; if it is sharded, on all ranks, from all of it."""
    if is_sharded(tensor):
        placed: Tensor = split(_changed(gathered(tensor), parts, change, how), tensor)
        return placed
    for part in parts:
        by = change.of(part.side if how in ("update", "update_square") else 1 - part.side)
        if how == "scale":
            tensor = change_basis(tensor.square(), part, by.square()).sqrt()
        else:
            tensor = change_basis(tensor, part, by.square() if how.endswith("square") else by)
    return tensor


def _states_of(
    optimizers: Sequence[Optimizer], tensor: Tensor
) -> list[tuple[dict[str, Any], str, Tensor, TransformsAs]] | str:
    """Return the optimizers' state of a parameter and how each entry follows a change of basis, or why one cannot."""
    states: list[tuple[dict[str, Any], str, Tensor, TransformsAs]] = []
    seen: set[int] = set()
    for each in [layer for optimizer in optimizers for layer in reversed(list(layers(optimizer)))]:
        state = getattr(each, "state", {}).get(tensor)
        if not state or id(state) in seen:
            continue
        seen.add(id(state))
        rules = rules_for(type(each)).transforms or {}
        for entry, value in state.items():
            if all(not isinstance(leaf, Tensor) or leaf.numel() < 2 for leaf in pytree.tree_leaves(value)):
                continue
            if entry not in rules or not isinstance(value, Tensor) or value.shape != tensor.shape:
                return f"how `{entry}` of {type(each).__name__} follows a change of basis is not known"
            states.append((state, entry, value, rules[entry]))
    return states
