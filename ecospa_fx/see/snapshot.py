"""Snapshot: axes, sizes and names of a model at one moment, from which an `Explanation` answers questions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import sympy
from torch import nn

from ecospa_fx.errors import NoCouplingError
from ecospa_fx.model.compiled import CompiledModel
from ecospa_fx.model.outside import share_outside
from ecospa_fx.passes.axes.algebra import Atom, Expr, Product, atoms_of
from ecospa_fx.passes.axes.selection import PerContext, Selected
from ecospa_fx.passes.find.discover import Discovery
from ecospa_fx.passes.graph.nodes import reason_text
from ecospa_fx.passes.graph.tensors import join, named_tensors, parameters_of
from ecospa_fx.passes.infer.sizes import size_in_call, symbols_of
from ecospa_fx.passes.ir.axis_facts import AxisFacts, Fact


@dataclass(frozen=True, eq=False)
class RegionSnapshot:
    """One captured submodule.

    Attributes:
        name: name of the region in the model.
        axis_facts: axes of its first graph, which couplings are named after.
        discovery: couplings and refusals of that graph.
        sizes: atom -> entries now, for atoms that have shrunk.
        symbols: dynamic size -> its value in the captured call.
        across: atoms that are a coupling across regions -> its name.
    """

    name: str
    axis_facts: AxisFacts
    discovery: Discovery
    sizes: Mapping[Atom, int]
    symbols: Mapping[sympy.Symbol, int]
    across: Mapping[Atom, str] = field(default_factory=dict)

    def couplings(self) -> Iterator[tuple[str, Atom]]:
        """Iterate over the couplings: the name in the model, and the atom."""
        for coupling in self.discovery.couplings:
            yield join(self.name, coupling.name), coupling.atom
        for atom, name in self.across.items():
            yield name, atom

    def count(self, expr: Expr, sizes: Mapping[Atom, int] | None = None) -> int:
        """Count the entries along `expr` with atoms at `sizes`, by default at their sizes now."""
        sizes = self.sizes if sizes is None else sizes
        match expr:
            case Atom():
                size = sizes.get(expr, expr.size)
                return size if type(size) is int else size_in_call(size, self.symbols)
            case Product():
                total = 1
                for factor in expr.factors:
                    total *= self.count(factor, sizes)
                return total
            case _:
                return sum(self.count(part, sizes) for part in expr.parts)

    def pins(self, atom: Atom) -> list[Fact]:
        """List the facts that pin `atom`."""
        return [fact for fact in self.axis_facts.facts if fact.role == "pinned" and atom in atoms_of(fact.expr)]

    def reasons(self, atom: Atom) -> list[str]:
        """List the reasons that pin `atom`, in words, each once."""
        captured = self.axis_facts.captured
        return list(dict.fromkeys(reason_text(fact.reason, fact.node, captured.region) for fact in self.pins(atom)))

    def axes_along(self, atom: Atom) -> list[tuple[str, int]]:
        """List the parameter dims that `atom` lies on, by name in the model."""
        parameters = self.axis_facts.parameters.items()
        return [
            (join(self.name, name), dim)
            for name, exprs in parameters for dim, expr in enumerate(exprs) if atom in atoms_of(expr)
        ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The regions, tensors and modules of a model at one moment.

    Attributes:
        regions: regions by name.
        tensors: parameter -> (shape now, bytes per entry); tied ones under each of their names.
        ties: name of a tied parameter -> its first name.
        modules: name of a submodule -> name of its class.
        buffers: buffer -> shape.
        share_outside: share of the parameters that lie outside of the regions.
    """

    regions: dict[str, RegionSnapshot]
    tensors: dict[str, tuple[tuple[int, ...], int]]
    ties: dict[str, str]
    modules: dict[str, str]
    buffers: dict[str, tuple[int, ...]]
    share_outside: float

    @property
    def parameters(self) -> int:
        """Number of parameters of the model now, tied ones counted once."""
        total = 0
        for name, (shape, _) in self.tensors.items():
            if name not in self.ties:
                total += _prod(shape)
        return total

    def region_of(self, parameter: str) -> RegionSnapshot | None:
        """Return the region that a parameter lies in, or None."""
        inside = [r for name, r in self.regions.items() if not name or parameter.startswith(f"{name}.")]
        return max(inside, key=lambda region: len(region.name), default=None)

    def resolve(self, name: str) -> str:
        """Return the full name of a parameter or module, given in full or by an end of it that is unique.

        Raises:
            NoCouplingError: no name, or more than one, ends like that.
        """
        names = [*self.tensors, *(module for module in self.modules if module)]
        if name in names:
            return name
        ends = [full for full in names if full.endswith(f".{name}")]
        if len(ends) == 1:
            return ends[0]
        if ends:
            raise NoCouplingError(f"{len(ends)} names end with `{name}`: {', '.join(ends[:3])}; write one in full")
        similar = difflib.get_close_matches(name, names, n=3)
        hint = f"; similar names: {', '.join(similar)}" if similar else ""
        raise NoCouplingError(f"the model has no parameter or module `{name}`{hint}")

    def parameters_of(self, name: str) -> list[str]:
        """List the parameters that a name stands for: itself, or those that a module holds directly.

        Raises:
            NoCouplingError: the model has nothing of that name, or it is a module without parameters of its own.
        """
        full = self.resolve(name)
        if full in self.tensors:
            return [full]
        parameters = [parameter for parameter in self.tensors if parameter.rpartition(".")[0] == full]
        if not parameters:
            below = [module for module in self.modules if re.fullmatch(rf"{re.escape(full)}\.[^.]+", module)]
            raise NoCouplingError(
                f"`{full}` holds no parameters itself; name one of its submodules: {', '.join(below) or 'it has none'}"
            )
        return parameters

    def matrix_of(self, name: str) -> str:
        """Return the one parameter that a name stands for in `why`: the matrix, if a module holds several."""
        parameters = self.parameters_of(name)
        matrices = [parameter for parameter in parameters if len(self.tensors[parameter][0]) > 1]
        if len(parameters) > 1 and len(matrices) != 1:
            raise NoCouplingError(f"`{name}` holds several parameters; name one of {', '.join(parameters)}")
        return (matrices or parameters)[0]


def snapshot_of(model: nn.Module, compiled: CompiledModel) -> Snapshot:
    """Take a snapshot of a model.

    Args:
        model: the model.
        compiled: its compiled state, or a temporary one for a model that is not compiled.
    """
    regions = {}
    for name, region in compiled.regions.items():
        if region.specializations:
            program = region.naming_graph.program
            sizes = {atom: entries_left(choice) for atom, choice in region.kept(program).items()}
            symbols = symbols_of(program.axis_facts)
            regions[name] = RegionSnapshot(
                name, program.axis_facts, region.naming_graph.discovery, sizes, symbols, region.offers.across
            )
    named = dict(parameters_of(model, remove_duplicate=False))
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, parameter in named.items():
        if first.setdefault(id(parameter), name) != name:
            ties[name] = first[id(parameter)]
    return Snapshot(
        regions=regions,
        tensors={name: (tuple(p.shape), p.element_size()) for name, p in named.items()},
        ties=ties,
        modules={name: type(module).__name__ for name, module in model.named_modules()},
        buffers={name: tuple(t.shape) for name, t in named_tensors(model).items() if name not in named},
        share_outside=share_outside(model, regions) if regions else 0.0,
    )


def entries_left(choice: Selected) -> int:
    """Count the entries that a selection keeps, per context if it differs between contexts."""
    return int((choice.mask[0] if isinstance(choice, PerContext) else choice).sum())


def _prod(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
