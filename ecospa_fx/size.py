"""Size: how many parameters a model has, and would have with less of some couplings. Exact, and without tensors."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch import nn

from .compiled import CompiledModel
from .passes.axes import Atom, Expr, Product, atoms_of
from .passes.names import join
from .passes.selection import entries


class SizeModel:
    """Parameter counts of a compiled model as a function of the sizes of its couplings.

    Attributes:
        sizes: coupling name -> entries now.
        original: parameters of the model before any shrink.
    """

    def __init__(self, model: nn.Module, compiled: CompiledModel) -> None:
        named = dict(model.named_parameters())  # a tied parameter once, under its first name
        # Equal blocks share a graph and so its atoms: an atom is one coupling per region.
        self._atoms: dict[str, tuple[str, Atom]] = {}
        self._now: dict[str, dict[Atom, int]] = {}
        self._shapes: list[tuple[str, tuple[Expr, ...]]] = []
        self._users: dict[tuple[str, Atom], list[int]] = {}
        inferred: set[str] = set()
        for region in compiled.regions.values():
            if not region.programs:
                continue
            program = region.programs[-1]
            self._now[region.name] = {atom: entries(choice) for atom, choice in region.kept(program).items()}
            for found in region.discoveries[-1].couplings:
                self._atoms[join(region.name, found.name)] = region.name, found.atom
            for name, exprs in program.inference.parameters.items():
                if join(region.name, name) in named:
                    inferred.add(join(region.name, name))
                    for atom in {atom for expr in exprs for atom in atoms_of(expr)}:
                        self._users.setdefault((region.name, atom), []).append(len(self._shapes))
                    self._shapes.append((region.name, exprs))
        self._rest = sum(p.numel() for name, p in named.items() if name not in inferred)
        self._numels = [_numel(exprs, self._now[region]) for region, exprs in self._shapes]
        self.sizes = {name: _count(atom, self._now[region]) for name, (region, atom) in self._atoms.items()}
        self.original = self._rest + sum(_numel(exprs, {}) for _, exprs in self._shapes)

    def total(self, sizes: Mapping[str, int]) -> int:
        """Parameters of the whole model with couplings at `sizes`; those not named stay as they are."""
        changed = {self._atoms[name]: size for name, size in sizes.items() if size != self.sizes[name]}
        counts = {region: dict(self._now[region]) for region, _ in changed}
        for (region, atom), size in changed.items():
            counts[region][atom] = size
        total = self._rest + sum(self._numels)
        for i in {i for key in changed for i in self._users.get(key, ())}:
            region, exprs = self._shapes[i]
            total += _numel(exprs, counts[region]) - self._numels[i]
        return total


def _numel(shape: tuple[Expr, ...], counts: Mapping[Atom, int]) -> int:
    return prod(_count(expr, counts) for expr in shape)


def _count(expr: Expr, counts: Mapping[Atom, int]) -> int:
    match expr:
        case Atom():
            return counts.get(expr, expr.size)
        case Product():
            return prod(_count(factor, counts) for factor in expr.factors)
        case _:
            return sum(_count(part, counts) for part in expr.parts)
