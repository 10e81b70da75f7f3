"""Known: a still picture of what was found in a model. What is asked of an `Explanation` is answered from it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import sympy
from torch import nn

from ecospa_fx.errors import NoCouplingError
from ecospa_fx.model.compiled import CompiledModel
from ecospa_fx.passes.axes.algebra import Atom, Expr, Product, as_size, atoms_of
from ecospa_fx.passes.axes.selection import PerContext, Selected
from ecospa_fx.passes.find.discover import Discovery
from ecospa_fx.passes.graph.nodes import reason_text
from ecospa_fx.passes.graph.tensors import join, named_tensors
from ecospa_fx.passes.infer.sizes import symbols_of
from ecospa_fx.passes.ir.axis_facts import AxisFacts, Fact


@dataclass(frozen=True, eq=False)
class RegionSnapshot:
    """One captured submodule.

    Attributes:
        name: of the region in the model.
        axis_facts: axes of its first graph, which names are taken from.
        discovery: what was found in that graph.
        sizes: atom -> entries now, for those that have shrunk.
        symbols: dynamic size -> what it was in the call that was captured.
    """

    name: str
    axis_facts: AxisFacts
    discovery: Discovery
    sizes: Mapping[Atom, int]
    symbols: Mapping[sympy.Symbol, int]

    def couplings(self) -> Iterator[tuple[str, Atom]]:
        """Names of the couplings in the model, with their atoms."""
        for found in self.discovery.couplings:
            yield join(self.name, found.name), found.atom

    def count(self, expr: Expr, sizes: Mapping[Atom, int] | None = None) -> int:
        """Entries along `expr` with atoms at `sizes`, by default those now."""
        sizes = self.sizes if sizes is None else sizes
        match expr:
            case Atom():
                size = sizes.get(expr, expr.size)
                return size if type(size) is int else int(as_size(sympy.sympify(size).subs(self.symbols)))
            case Product():
                total = 1
                for factor in expr.factors:
                    total *= self.count(factor, sizes)
                return total
            case _:
                return sum(self.count(part, sizes) for part in expr.parts)

    def pins(self, atom: Atom) -> list[Fact]:
        """What needs `atom` whole."""
        return [fact for fact in self.axis_facts.facts if fact.role == "pinned" and atom in atoms_of(fact.expr)]

    def reasons(self, atom: Atom) -> list[str]:
        """What needs `atom` whole, in words, each reason once."""
        captured = self.axis_facts.captured
        return list(dict.fromkeys(reason_text(fact.reason, fact.node, captured.region) for fact in self.pins(atom)))

    def axes_along(self, atom: Atom) -> list[tuple[str, int]]:
        """The parameter dims, by name in the model, that `atom` lies on."""
        parameters = self.axis_facts.parameters.items()
        return [
            (join(self.name, name), dim)
            for name, exprs in parameters for dim, expr in enumerate(exprs) if atom in atoms_of(expr)
        ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What was found in a model: the regions, and what the model holds.

    Attributes:
        regions: by name.
        tensors: parameter -> (shape now, bytes per entry); tied ones under each of their names.
        ties: name of a parameter -> first name of the same one.
        modules: name of a submodule -> name of its class.
        buffers: shapes of the buffers.
    """

    regions: dict[str, RegionSnapshot]
    tensors: dict[str, tuple[tuple[int, ...], int]]
    ties: dict[str, str]
    modules: dict[str, str]
    buffers: dict[str, tuple[int, ...]]

    @property
    def parameters(self) -> int:
        """Parameters of the model now, tied ones once."""
        total = 0
        for name, (shape, _) in self.tensors.items():
            if name not in self.ties:
                total += _prod(shape)
        return total

    def region_of(self, parameter: str) -> RegionSnapshot | None:
        """The region that a parameter lies in, if any."""
        inside = [r for name, r in self.regions.items() if not name or parameter.startswith(f"{name}.")]
        return max(inside, key=lambda region: len(region.name), default=None)

    def resolve(self, name: str) -> str:
        """The full name of a parameter or module that is given by its full name or by an end of it that is unique.

        Raises:
            NoCouplingError: there is none, or there are several.
        """
        names = [*self.tensors, *(module for module in self.modules if module)]
        if name in names:
            return name
        ends = [full for full in names if full.endswith(f".{name}")]
        if len(ends) == 1:
            return ends[0]
        if ends:
            raise NoCouplingError(f"`{name}` is the end of {len(ends)} names: {', '.join(ends[:3])}; write one in full")
        close = difflib.get_close_matches(name, names, n=3)
        hint = f"; close to it are {', '.join(close)}" if close else ""
        raise NoCouplingError(f"the model has no parameter or module `{name}`{hint}")

    def parameters_of(self, name: str) -> list[str]:
        """The parameters that a name stands for: itself, or those that a module holds directly.

        Raises:
            NoCouplingError: there is nothing of that name, or it holds no parameters itself.
        """
        full = self.resolve(name)
        if full in self.tensors:
            return [full]
        own = [parameter for parameter in self.tensors if parameter.rpartition(".")[0] == full]
        if not own:
            below = [module for module in self.modules if re.fullmatch(rf"{re.escape(full)}\.[^.]+", module)]
            raise NoCouplingError(
                f"`{full}` holds no parameters itself; ask for a part of it: {', '.join(below) or 'there is none'}"
            )
        return own

    def matrix_of(self, name: str) -> str:
        """The one parameter that a name stands for in a question about two weights: of several the matrix."""
        own = self.parameters_of(name)
        matrices = [parameter for parameter in own if len(self.tensors[parameter][0]) > 1]
        if len(own) > 1 and len(matrices) != 1:
            raise NoCouplingError(f"`{name}` holds several parameters; name one of {', '.join(own)}")
        return (matrices or own)[0]


def snapshot_of(model: nn.Module, compiled: CompiledModel) -> Snapshot:
    """Take the picture.

    Args:
        model: the model.
        compiled: its state, or a state made for the purpose.
    """
    regions = {}
    for name, region in compiled.regions.items():
        if region.specializations:
            program = region.naming_graph.program
            sizes = {atom: entries_left(choice) for atom, choice in region.kept(program).items()}
            symbols = symbols_of(program.axis_facts)
            regions[name] = RegionSnapshot(name, program.axis_facts, region.naming_graph.discovery, sizes, symbols)
    named = dict(model.named_parameters(remove_duplicate=False))
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
    )


def entries_left(choice: Selected) -> int:
    """Entries that a selection keeps, in each context where it differs by one."""
    return int((choice.mask[0] if isinstance(choice, PerContext) else choice).sum())


def _prod(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
