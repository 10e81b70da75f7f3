"""Streams: an orthonormal basis for a coupling that norms stand on, such as the residual stream of a transformer.

stream_of(model, compiled, coupling)   -> Stream: how each weight lies on it, and what each norm does; or a reason
Stream.basis(grams, keep)              -> Q: the principal components of what the norms return, or of the weights
Stream.turned(tensors, Q)              -> the weights in it, where `e` of each norm has moved into what reads it
Stream.turned_like(...)                -> gradients, and state of optimizers
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.model.compiled import CompiledModel
from ecospa_fx.model.journal import Journal
from ecospa_fx.model.optimizer_table import TransformsAs
from ecospa_fx.passes.find.joint import BETWEEN
from ecospa_fx.passes.graph.tensors import join, named_tensors
from ecospa_fx.passes.rewrite.replay import replay
from ecospa_fx.passes.transform.norms import Responses
from ecospa_fx.passes.transform.rotate import Part, change_basis, gram_of
from ecospa_fx.passes.transform.stream import (
    Factors,
    KeepsBasis,
    Kind,
    Standing,
    basis_of,
    near_old_entries,
)
from ecospa_fx.ranks.members import ranks_of
from ecospa_fx.ranks.shards import gathered

from .grams import Grams

Key: TypeAlias = tuple[str, ...]
SMALL = 1e-7
"""Share of the largest entry of a norm's weight below which one counts as zero."""


@dataclass(frozen=True, eq=False)
class FarWeight:
    """A weight that reads the stream: what it reads, and the bias of its own that may take up a constant."""

    part: Part
    kind: Kind
    bias: str | None


@dataclass(frozen=True, eq=False)
class OnStream:
    """A norm on the stream, with its vectors by their names in the model.

    Attributes:
        does: what it does.
        scale: the vector that scales, or None.
        shift: the vector that is added, or None.
        rigid: its result is part of the stream, so that its scale stays.
        standings: its places.
    """

    does: Factors
    scale: str | None
    shift: str | None
    rigid: bool
    standings: tuple[Standing, ...]


@dataclass(frozen=True, eq=False)
class Stream:
    """A coupling whose basis may be any orthonormal one, or any that keeps the mean."""

    model: nn.Module
    compiled: CompiledModel
    coupling: Coupling
    near: tuple[Part, ...]
    far: tuple[FarWeight, ...]
    norms: Mapping[Key, OnStream]

    @property
    def centred(self) -> bool:
        """True if some norm subtracts a mean."""
        return any(norm.does.centred for norm in self.norms.values())

    @property
    def names(self) -> list[str]:
        """The parameters that change."""
        named = [part.parameter for part in self.near] + [read.part.parameter for read in self.far]
        named += [name for norm in self.norms.values() for name in (norm.scale, norm.shift) if name is not None]
        named += [read.bias for read in self.far if read.bias is not None and self._moves(read.kind)]
        return list(dict.fromkeys(named))

    def _moves(self, kind: Kind) -> bool:
        """Decide whether the shift of a norm moves into the biases of what reads it."""
        norm = None if kind is None else self.norms[kind]
        if norm is None or norm.rigid or norm.shift is None:
            return False
        return all(r.bias is not None and r.part.order.shape[1] == 1 for r in self.far if r.kind == kind)

    def _scale(self, kind: Kind, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Return `e` of a norm; None where it does not move."""
        norm = None if kind is None else self.norms[kind]
        if norm is None or norm.rigid or norm.scale is None:
            return None
        return norm.does.offset + self._vector(norm.scale, tensors)

    def _vector(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        own = named_tensors(self.model)
        return gathered(tensors.get(name, own[name])).detach().double().flatten()

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Check that the vectors of norms allow another basis.

        Raises:
            KeepsBasis: they do not.
        """
        for kind, norm in self.norms.items():
            if norm.scale is None:
                continue
            scale = norm.does.offset + self._vector(norm.scale, tensors)
            zero = scale.abs() <= SMALL * scale.abs().max()
            if norm.rigid and bool((scale - scale.mean()).abs().max() > SMALL * scale.abs().max()):
                raise KeepsBasis(f"`{norm.scale}` scales its entries apart, and cannot move")
            if norm.shift is not None and not norm.rigid and not self._moves(kind) and bool(zero.any()):
                shift = self._vector(norm.shift, tensors)
                if bool(shift[zero].any()):
                    raise KeepsBasis(f"`{norm.scale}` has zeros where `{norm.shift}` has none")

    def basis(self, grams: Grams | None, keep: int | None) -> tuple[Tensor, Tensor]:
        """Return the basis, and the energy of its entries."""
        tensors = {part.parameter: gathered(named_tensors(self.model)[part.parameter]) for part in self.near}
        squares = None if grams is None else self._seen(grams)
        if squares is None:
            squares = gram_of(tensors, list(self.near), 1)[0]
        if not bool(squares.isfinite().all()):
            raise KeepsBasis("its weights or activations have an inf or a NaN")
        basis, energy = basis_of(squares.cpu(), self.centred)
        if keep is not None and keep < len(basis) and not self.centred:
            basis = near_old_entries(basis, keep)
        return basis, energy

    def _seen(self, grams: Grams) -> Tensor | None:
        """Return the second moments of what the norms return, as far as it was seen, without their scale and shift."""
        total: Tensor | None = None
        for norm in self.norms.values():
            for number, standing in enumerate(norm.standings):
                region, vectors = region_of(standing), standing.norm.vectors
                rows = grams.norm_rows(join(region, vectors[0]), number) if vectors else None
                if rows is None or norm.scale is None:
                    continue
                kept = replay(standing.axis_facts, self.compiled.plan)
                own = named_tensors(self.model)
                given = {name: gathered(own[join(region, name)]) for name in standing.norm.tensors}
                responses = Responses.of(standing.norm, standing.axis_facts, kept, standing.norm.shaped(rows), given)
                z = responses.each[[join(region, name) for name in vectors].index(norm.scale)]
                squares = z.T @ z / max(1, len(z))
                total = squares if total is None else total + squares.to(total)
        ranks, size = ranks_of(self.model), self.coupling.size
        if ranks:
            mine = torch.zeros(size, size, dtype=torch.float64) if total is None else total.double()
            total = ranks.totals({"squares": mine}, "the principal components of a stream")["squares"]
        return None if total is None or not bool(total.any()) else total

    def turned(self, tensors: Mapping[str, Tensor], basis: Tensor) -> dict[str, Tensor]:
        """Return the weights in the new basis, by name, at full size.

        Args:
            tensors: those of the model, of a copy, or averages of weights.
            basis: `Q`.
        """
        given = {name: gathered(tensors[name]).detach() for name in self.names if name in tensors}
        new = dict(given)
        for read in self.far:  # while weights and shifts are as they were
            if read.bias in new and self._moves(read.kind) and read.part.parameter in given:
                norm = self.norms[read.kind]  # type: ignore[index]
                shift = norm.does.share * self._vector(str(norm.shift), tensors)
                along = given[read.part.parameter].double().movedim(read.part.dim, -1)
                order = read.part.order[:, 0].to(along.device)
                added = (along[..., order] @ shift.to(along.device)).reshape(-1)
                new[read.bias] = (new[read.bias].double() + added).to(new[read.bias])
        for part, by in self._parts(tensors, basis):
            if part.parameter in new:
                new[part.parameter] = change_basis(new[part.parameter], part, by[None])
        for kind, norm in self.norms.items():
            scale = self._scale(kind, tensors)
            if norm.scale in new and scale is not None:
                new[norm.scale] = torch.full_like(given[norm.scale], 1 - norm.does.offset)
            if norm.shift in new:
                new[norm.shift] = self._shifted(kind, given[norm.shift], scale, basis)
        return new

    def _shifted(self, kind: Key, shift: Tensor, scale: Tensor | None, basis: Tensor) -> Tensor:
        if self._moves(kind):
            return torch.zeros_like(shift)
        value = shift.detach().double().flatten()
        if scale is not None:
            value = _over(value, scale.to(value.device))
        return (basis.to(value.device) @ value).reshape(shift.shape).to(shift)

    def _parts(self, tensors: Mapping[str, Tensor], basis: Tensor, gradient: bool = False) -> Iterable[
        tuple[Part, Tensor]
    ]:  # fmt: skip
        """Yield the parts of weights with the matrix that each is multiplied with."""
        for part in self.near:
            yield part, basis
        for read in self.far:
            scale = self._scale(read.kind, tensors)
            if scale is None:
                yield read.part, basis
            else:
                scale = scale.to(basis)
                yield read.part, basis * (_over(torch.ones_like(scale), scale) if gradient else scale)

    def turned_like(
        self,
        values: Mapping[str, Tensor],
        how: TransformsAs,
        new: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        basis: Tensor,
    ) -> dict[str, Tensor]:
        """Return gradients or state of the parameters in the new basis, by name, at full size.

        The gradient of a norm's weight follows from those of what reads it: it is the product of these with the
        weights, summed over all of them.

        Args:
            values: gradients or state, of the shape of the parameters, by name.
            how: how they follow a change of basis.
            new: the parameters after it.
            tensors: the parameters before it.
            basis: `Q`.
        """
        gradient, square = how in ("gradient", "square", "scale"), how not in ("gradient", "update")
        result = {name: gathered(value).detach() for name, value in values.items()}
        if how == "scale":
            result = {name: value.square() for name, value in result.items()}
        if how == "gradient":
            self._without_shifts(result, tensors)
        for part, by in self._parts(tensors, basis, gradient):
            if part.parameter in result:
                by = by.square() if square else by
                result[part.parameter] = change_basis(result[part.parameter], part, by[None])
        for kind, norm in self.norms.items():
            scale = self._scale(kind, tensors)
            if norm.shift in result:
                value, by = result[norm.shift], basis
                if scale is not None:
                    one = scale.to(basis)
                    by = basis * (one if gradient else _over(torch.ones_like(one), one))
                by = (by.square() if square else by).to(value.device)
                result[norm.shift] = (by @ value.double().flatten()).reshape(value.shape).to(value)
            if norm.scale in result:
                result[norm.scale] = self._of_scale(kind, result[norm.scale], result, gradient, square, new)
        return {name: value.sqrt() for name, value in result.items()} if how == "scale" else result

    def _without_shifts(self, gradients: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Take from gradients the part that comes of shifts, which move into the biases of the same rows."""
        for read in self.far:
            if read.kind is None or not self._moves(read.kind) or read.bias not in gradients:
                continue
            norm, name = self.norms[read.kind], read.part.parameter
            if name in gradients:
                shift = norm.does.share * self._vector(str(norm.shift), tensors)
                moved = gradients[name].double().movedim(read.part.dim, -1).clone()
                rows = gradients[read.bias].double().reshape(*moved.shape[:-1], 1)
                order = read.part.order[:, 0].to(moved.device)
                moved[..., order] -= rows * shift.to(moved.device)
                gradients[name] = moved.movedim(-1, read.part.dim).to(gradients[name])

    def _of_scale(
        self, kind: Key, value: Tensor, changed: Mapping[str, Tensor], gradient: bool, square: bool,
        new: Mapping[str, Tensor],
    ) -> Tensor:  # fmt: skip
        if self.norms[kind].rigid or (square and not gradient):
            return torch.full_like(value, float(value.double().mean()))
        total = torch.zeros(value.numel(), dtype=torch.float64, device=value.device)
        for read in self.far if gradient else ():
            name = read.part.parameter
            if read.kind == kind and name in changed:
                weight = new[name].double().square() if square else new[name].double()
                along = (weight * changed[name].double()).movedim(read.part.dim, 0).flatten(1).sum(1)
                total += along[read.part.order.to(along.device)].sum(1).to(total.device)
        shift = self.norms[kind].shift
        if shift is not None and shift in changed and not square:
            total -= (new[shift].double() * changed[shift].double()).flatten().to(total.device)
        return total.reshape(value.shape).to(value)

    def follow(self, grams: Grams, tensors: Mapping[str, Tensor], basis: Tensor, journal: Journal) -> None:
        """Let moments of inputs, read before the change, follow it; `tensors` are as they were."""
        done: set[int] = set()
        for read in self.far:
            norm = None if read.kind is None else self.norms[read.kind]
            scale = self._scale(read.kind, tensors)
            matrix, constant = basis, torch.zeros(len(basis), dtype=basis.dtype)
            if norm is not None and norm.shift is not None and not norm.rigid and read.kind is not None:
                shift = norm.does.share * self._vector(norm.shift, tensors).to(basis)
                if self._moves(read.kind):
                    one = torch.ones_like(shift) if scale is None else scale.to(basis)
                    constant = -basis @ _over(shift, one)
            if scale is not None:
                matrix = basis * _over(torch.ones(len(basis), dtype=basis.dtype), scale.to(basis))
            lost = scale is not None and bool((scale.abs() <= SMALL * scale.abs().max()).any())
            grams.follow_affine(read.part, None if lost else matrix, constant, done, journal)
        for norm in self.norms.values():
            for number, standing in enumerate(norm.standings):
                if standing.norm.vectors:
                    grams.follow_rows(join(region_of(standing), standing.norm.vectors[0]), number, basis, journal)


def region_of(standing: Standing) -> str:
    """Return the name of the region that a norm lies in; between regions, that of the model."""
    return "" if standing.region == BETWEEN else standing.region


def _over(value: Tensor, scale: Tensor) -> Tensor:
    """Divide; nothing comes of entries that are scaled by nothing."""
    zero = scale.abs() <= SMALL * scale.abs().max()
    return torch.where(zero, 0.0, value / torch.where(zero, 1.0, scale))
