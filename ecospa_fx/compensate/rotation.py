"""rotate: another basis for couplings between linear maps, in which a few entries carry most, and the rest little.

rotate(model, couplings) -> passes.rotate.sides, or a reason -> balanced -> weights, gradients and optimizer state
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import NoCouplingError
from ecospa_fx.logs import logger
from ecospa_fx.model.compiled import CompiledModel
from ecospa_fx.model.copies import copies_of
from ecospa_fx.model.lookup import check_optimizer, state_of
from ecospa_fx.model.optimizer_state import check_can_follow, layers, several
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

from .grams import Grams


@dataclass(frozen=True)
class Rotation:
    """What `rotate` did.

    Attributes:
        energy: coupling name -> `[contexts, size]`, what each entry carries now, largest first.
        refused: coupling name -> why its basis is as it was.
    """

    energy: dict[str, Tensor] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name}: rotated" for name in self.energy]
        return "\n".join([*lines, *(f"{name}: as it was, {reason}" for name, reason in self.refused.items())])


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
    """Give couplings between linear maps a basis in which their entries are ordered by what they carry.

    These are values and outputs of an attention, and queries and keys that nothing turns by position; the basis is that
    of the singular vectors of the product, per head. The model computes what it did, to rounding, and the last entries
    are what it loses least by. Values that hooks see along these couplings are in the new basis.

    >>> ecospa_fx.rotate(model, optimizer=optimizer)

    Args:
        model: a compiled model that has been called.
        couplings: which ones, or their names; all by default.
        keep: coupling name -> how many entries will stay. These then come in coordinates near to those there were, not
            ordered, for the sake of what optimizers know of them.
        grams: what was gathered of what flows; the product is then weighted by it, and it turns with the model.
        optimizer: the optimizer, or several, that hold the parameters; what they hold turns with them.
        also: copies of the model that turn with it, see `ecospa_fx.shrink`.

    Returns:
        What each entry carries, and why some couplings stay as they are.

    Raises:
        NoCouplingError: there is no such coupling.
        OptimizerError: the optimizer holds none of the parameters, or is one that nothing can be carried through.
        ShrinkError: something in `also` is no copy of the model.
    """
    compiled, optimizers = state_of(model), several(optimizer)
    for each in optimizers:
        check_optimizer(model, each)
        check_can_follow(each)
    copies = copies_of(model, also)
    known = {coupling.name: coupling for coupling in compiled.couplings()}
    wanted = list(known) if couplings is None else [c if isinstance(c, str) else c.name for c in couplings]
    for name in wanted:
        if name not in known:
            raise NoCouplingError(f"the model has no coupling `{name}`; it has {', '.join(known)}")
    result, log = Rotation(), logger("shrink")
    for name in dict.fromkeys(wanted):
        reason = _rotate(
            model, compiled, known[name], (keep or {}).get(name), grams, optimizers, [c.tensors for c in copies], result
        )
        if reason is not None:
            result.refused[name] = reason
            log.info("%s keeps its basis: %s", name, reason)
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
) -> str | None:
    """Rotate one coupling, all of it or nothing; or say why not."""
    found = free_basis(model, compiled, coupling, grams, optimizers)
    if isinstance(found, str):
        return found
    parts, turn, tensors = found.parts, found.turn, named_tensors(model)
    if keep is not None and keep < coupling.size:
        turn = near_old_basis(turn, keep, found.scale)
    change = Change()
    for held in (tensors, *copies):
        for tensor, mine in _by_tensor(held, parts):
            grad = None if tensor.grad is None else _all(tensor.grad, mine, turn, "gradient")
            change.tensors.append((tensor, _all(tensor, mine, turn, "update"), grad))
    for tensor, mine in _by_tensor(tensors, parts):
        held_states = _held(optimizers, tensor)
        assert not isinstance(held_states, str), held_states  # `free_basis` has looked
        change.states += [(state, entry, _all(value, mine, turn, how)) for state, entry, value, how in held_states]
    change.commit()
    if grams is not None:
        grams.turn(coupling, parts, turn)
    result.energy[coupling.name] = turn.energy.cpu()
    return None


@dataclass(frozen=True, eq=False)
class FreeBasis:
    """The basis that a coupling may be given.

    Attributes:
        parts: where its sides lie.
        turn: the change of basis, and what each entry carries in it.
        alone: `[contexts, d]`, the squares that each entry carries in the basis there is.
        scale: `[contexts, d]`, the roots of the squares of their near side.
    """

    parts: list[Part]
    turn: BasisChange
    alone: Tensor
    scale: Tensor


def free_basis(
    model: nn.Module,
    compiled: CompiledModel,
    coupling: Coupling,
    grams: Grams | None,
    optimizers: Sequence[Optimizer],
) -> FreeBasis | str:
    """The basis in which the entries of a coupling come in order of what they carry, or why it is not free."""
    parts = _parts(compiled, coupling)
    if isinstance(parts, str):
        return parts
    tensors = named_tensors(model)
    for part in parts:
        held = _held(optimizers, tensors[part.parameter])
        if isinstance(held, str):
            return f"`{part.parameter}`: {held}"
    for part in parts:
        weight = tensors[part.parameter]
        if type(weight) not in (Tensor, nn.Parameter) or weight.device.type == "meta":
            return f"`{part.parameter}` is a {type(weight).__name__} on {weight.device}, whose values are not all here"
        if any(storage_key(t) == storage_key(weight) for t in tensors.values() if t is not weight):
            return f"`{part.parameter}` shares its memory with another tensor"
    near, far = (gram_of(tensors, [p for p in parts if p.side == side], coupling.contexts) for side in (NEAR, FAR))
    if grams is not None:
        near, far = grams.of_sides(coupling, parts, near, far)
    if not bool(near.isfinite().all()) or not bool(far.isfinite().all()):
        return "its weights hold an inf or a NaN"
    alone = near.diagonal(dim1=-2, dim2=-1) * far.diagonal(dim1=-2, dim2=-1)
    scale = near.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return FreeBasis(parts, balanced(near, far), alone.cpu(), scale)


def _by_tensor(tensors: Mapping[str, Tensor], parts: Sequence[Part]) -> Iterable[tuple[Tensor, list[Part]]]:
    """Each tensor once, with all the parts that lie on it."""
    for name in dict.fromkeys(part.parameter for part in parts):
        if name in tensors:
            yield tensors[name], [part for part in parts if part.parameter == name]


def _parts(compiled: CompiledModel, coupling: Coupling) -> list[Part] | str:
    """Where the two sides of a coupling lie now, or why its basis is not free."""
    region = compiled.regions[coupling.region]
    if coupling.size < 2:
        return "it has one entry"
    named = region.naming_graph.discovery.couplings
    found = next(f for f in named if join(region.name, f.name) == coupling.name)
    where = _sides_everywhere(region, found)
    if isinstance(where, str):
        return where
    if len({parameter for parameter, _ in where}) < len(where):
        return "a weight has it along two of its dims"
    if {join(region.name, name) for name, _ in where} != {member.parameter for member in coupling.members}:
        return "a buffer lies on it"
    parts: list[Part] = []
    for member in coupling.members:
        own = member.parameter.removeprefix(f"{region.name}.") if region.name else member.parameter
        left = compiled.plan.kept.get((member.parameter, member.dim))
        side = where[own, member.dim] if left is None else where[own, member.dim][left]
        for each in (NEAR, FAR):
            positions = torch.where(side == each, member.index, -1)
            counts = {int((positions == entry).sum()) for entry in range(coupling.size)}
            if counts == {0}:
                continue
            if len(counts) > 1:
                return f"`{member.parameter}` has not as many rows of one entry as of another"
            order = torch.stack([(positions == entry).nonzero().flatten() for entry in range(coupling.size)])
            context = torch.zeros_like(order) if member.context is None else member.context[order]
            if not bool((context == context[0]).all()):
                return f"`{member.parameter}` has its heads in another order from entry to entry"
            parts.append(Part(member.parameter, member.dim, each, order, context[0]))
    return parts


def _sides_everywhere(region: Region, found: RegionCoupling) -> Mapping[tuple[str, int], Tensor] | str:
    """The sides, which every graph of the region must agree on that has any of the weights."""
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
    return "no call of its region has it" if first is None else first


def _all(tensor: Tensor, parts: Sequence[Part], turn: BasisChange, how: TransformsAs) -> Tensor:
    """A tensor of a parameter's shape in the new basis."""
    for part in parts:
        by = turn.of(part.side if how in ("update", "update_square") else 1 - part.side)
        if how == "scale":
            tensor = change_basis(tensor.square(), part, by.square()).sqrt()
        else:
            tensor = change_basis(tensor, part, by.square() if how.endswith("square") else by)
    return tensor


def _held(
    optimizers: Sequence[Optimizer], tensor: Tensor
) -> list[tuple[dict[str, Any], str, Tensor, TransformsAs]] | str:
    """What optimizers hold for a parameter, and how it follows a change of basis; or why some of it cannot."""
    made: list[tuple[dict[str, Any], str, Tensor, TransformsAs]] = []
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
            made.append((state, entry, value, rules[entry]))
    return made
