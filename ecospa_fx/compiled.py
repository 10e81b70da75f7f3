"""What `compile` attaches to a model: its regions, each with a program per call signature, and the one plan.

    CompiledModel -- plan
      +- Region (per captured submodule)
           +- Program (per call signature) -- generated code

A call that no program serves is captured from the region at its original sizes, inferred again, and the plan is
replayed on it. Nothing here is an nn.Module, so state_dict and the module tree do not see it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.optim import Optimizer

from .coupling import Coupling, Member, Refusal, Selection
from .errors import EcoSpaError, NoCouplingError, PinnedAxisError, ShrinkError
from .passes.axes import Atom, Expr, Segments, atoms_of, size_of
from .passes.capture import training_flags
from .passes.discover import Discovery, Found
from .passes.regions import Analysis, Captures, analyse_once, choose
from .passes.replay import replay
from .passes.rewrite import Program, rewrite
from .passes.selection import index_of, mask_of
from .passes.shrink import prepare
from .plan import Plan
from .shrinkable import original_class, swap_forward, swap_linears, unswap_forward
from .why import Path, path_between

MODEL, REGION = "_ecospa_model", "_ecospa_region"  # keys in a module's __dict__
MOST_PROGRAMS = 16  # per region, as many as torch.compile would allow graphs before it gives up and twice again


class Region:
    """One captured submodule: routes each call to the program of its signature."""

    def __init__(self, name: str, compiled: CompiledModel, shared_outside: dict[str, str]) -> None:
        self.name = name
        self.compiled = compiled
        self.shared_outside = shared_outside
        self.programs: list[Program] = []
        self.discoveries: list[Discovery] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of the region."""
        program, inputs = self.program_for(module, args, kwargs)
        return program(module, inputs)

    def program_for(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program, list[Tensor]]:
        """The program that serves a call, captured now if need be, and the tensors it takes."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        training = training_flags(module)
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for program in self.programs:
            if program.captured.signature.mismatch(spec, leaves, training) is None:
                return program, inputs
        return self.add(module, args, kwargs), inputs

    def discovery_of(self, program: Program) -> Discovery:
        """What was discovered in the graph of a program."""
        return next(d for p, d in zip(self.programs, self.discoveries, strict=True) if p is program)

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        """Capture a call of a new signature at original sizes and replay the plan on it."""
        if len(self.programs) >= MOST_PROGRAMS:
            raise EcoSpaError(
                f"region `{self.name}` has been called in {MOST_PROGRAMS} different ways, each with its own graph; "
                f"this call differs from the last: {self._difference(module, args, kwargs)}. Call it in fewer ways "
                "(pad to common lengths, pass the same arguments)"
            )
        plan = self.compiled.plan
        analysis = analyse_once(
            module, self.name, (args, kwargs), self.shared_outside, self.compiled.captures,
            forward=original_class(module).forward, originals=self._originals(module),
        )  # fmt: skip
        kept = replay(analysis.inference, plan, self._difference(module, args, kwargs))
        return self.install(analysis, module, kept)

    def install(self, analysis: Analysis, module: nn.Module, kept: Mapping[Atom, Tensor]) -> Program:
        """Add the program of an analysis."""
        program = rewrite(analysis.inference, kept, module)
        self.remember(analysis, program)
        return program

    def remember(self, analysis: Analysis, program: Program | None = None) -> None:
        """Take up what an analysis found; without a program it can be asked but not run."""
        self.programs.insert(0, program or Program(analysis.captured, analysis.inference, None, (), ""))
        self.discoveries.insert(0, analysis.discovery)
        self.compiled.forget_couplings()

    def _difference(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if not self.programs:
            return ""
        return self.programs[0].captured.signature.mismatch(spec, leaves, training_flags(module)) or ""

    def _originals(self, module: nn.Module) -> dict[str, Tensor]:
        """Stand-ins at original sizes for what has shrunk: the kept entries in their places among zeros."""
        plan, prefix = self.compiled.plan, f"{self.name}." if self.name else ""
        named = dict((*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)))
        return {name: unshrunk(named[name], plan, prefix + name) for name in plan.under(self.name) if name in named}

    def couplings(self) -> list[Coupling]:
        """The couplings that every signature met so far can follow, at their sizes now."""
        if not self.programs:
            return []
        # The first graph is the one names are taken from, so that they never change.
        return [self._view(found) for found in self.discoveries[-1].couplings if self._followed(found)]

    def _followed(self, found: Found) -> bool:
        """Whether every graph can follow a coupling of the first one."""
        for program, discovery in zip(self.programs[:-1], self.discoveries[:-1], strict=True):
            if any(found.key == other.key for other in discovery.couplings):
                continue
            # It may still: a graph that uses fewer of the weights sees less of the coupling.
            trial = self.compiled.plan.copy()
            kept = self.kept(self.programs[-1])
            mask = kept.get(found.atom, torch.ones(found.atom.size, dtype=torch.bool)).clone()
            if int(mask.sum()) > 1:
                mask[mask.nonzero()[0]] = False
            self.write(trial, {**kept, found.atom: mask})
            try:
                replay(program.inference, trial)
            except PinnedAxisError:
                return False
        return True

    def write(self, plan: Plan, kept: Mapping[Atom, Tensor]) -> None:
        """Write into `plan` what the first graph's parameters keep under a selection of its atoms."""
        prefix = f"{self.name}." if self.name else ""
        for name, exprs in self.programs[-1].inference.parameters.items():
            masks = [mask_of(expr, kept) for expr in exprs]
            if all(bool(mask.all()) for mask in masks):
                continue
            plan.original_shapes[prefix + name] = tuple(len(mask) for mask in masks)
            for dim, mask in enumerate(masks):
                if not mask.all():
                    plan.kept[prefix + name, dim] = mask.nonzero().flatten()

    def refusals(self) -> list[Refusal]:
        """The axes that cannot shrink in some signature."""
        by_members = {refusal.members: refusal for discovery in self.discoveries for refusal in discovery.refusals}
        return list(by_members.values())

    def kept(self, program: Program) -> dict[Atom, Tensor]:
        """The plan, in atoms of one program's graph."""
        return replay(program.inference, self.compiled.plan)

    def _view(self, found: Found) -> Coupling:
        program = self.programs[-1]
        inference, prefix = program.inference, f"{self.name}." if self.name else ""
        kept = self.kept(program)
        mask = kept.get(found.atom, torch.ones(found.atom.size, dtype=torch.bool))
        now = torch.cat([mask.cumsum(0) - 1, torch.tensor([-1])])  # its last entry answers the index -1
        matrices = [name for name, _ in found.axes if len(inference.parameters[name]) > 1]
        members = []
        for name, dim in found.axes:
            if not self._is_parameter(program, name):
                continue
            expr = inference.parameters[name][dim]
            matrix = name in matrices
            of = prefix + (name if matrix else _nearest(name, found.producers or matrices))
            left = mask_of(expr, kept)
            for part, index in _by_part(expr, found.atom):
                label = of if part is None else f"{of} part {part}"
                members.append(Member(prefix + name, dim, now[index[left]], matrix, label, part))

        def why(a: str, b: str) -> Path:
            return path_between(inference, found.atom, a.removeprefix(prefix), b.removeprefix(prefix))

        return Coupling(
            prefix + found.name,
            found.kind,
            int(mask.sum()),
            found.atom.size,
            tuple(members),
            found.linear,
            self.name,
            why,
        )

    @staticmethod
    def _is_parameter(program: Program, name: str) -> bool:
        captured = program.captured
        return any(captured.tensors[placeholder] == name for placeholder in captured.parameters)


def _by_part(expr: Expr, atom: Atom) -> Iterator[tuple[int | None, Tensor]]:
    """The index of an axis per outermost segment that carries `atom`; the segment's number where there are several."""
    index = index_of(expr, atom)
    if not isinstance(expr, Segments):
        yield None, index
        return
    start, carrying = 0, [i for i, part in enumerate(expr.parts) if atom in atoms_of(part)]
    for i, part in enumerate(expr.parts):
        stop = start + size_of(part)
        if i in carrying:
            here = torch.full_like(index, -1)
            here[start:stop] = index[start:stop]
            yield (i if len(carrying) > 1 else None), here
        start = stop


def shared_prefix(a: str, b: str) -> int:
    """How many letters two names begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _nearest(name: str, matrices: Sequence[str]) -> str:
    """The matrix whose name shares the longest prefix with that of a bias."""
    return max(matrices, key=lambda matrix: shared_prefix(name, matrix))


def unshrunk(tensor: Tensor, plan: Plan, name: str) -> Tensor:
    """`tensor` in its places among zeros at the shape it had before any shrink."""
    whole = torch.zeros(plan.original_shapes[name], dtype=tensor.dtype, device=tensor.device)
    index = [plan.kept.get((name, dim), torch.arange(size)).to(tensor.device) for dim, size in enumerate(whole.shape)]
    whole[torch.meshgrid(*index, indexing="ij")] = tensor.detach()
    return nn.Parameter(whole, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole


class CompiledModel:
    """The state of a compiled model. `regions` is empty until the first call, unless inputs were given before."""

    def __init__(self, how: str | Sequence[str]) -> None:
        self.how = how
        self.plan = Plan()
        self.regions: dict[str, Region] = {}
        self.given_up: dict[str, str] = {}
        self.captures: Captures = []
        self._couplings: dict[str, Coupling] | None = None

    @property
    def captured(self) -> bool:
        """Whether the couplings are known."""
        return any(region.programs for region in self.regions.values())

    def attach(self, model: nn.Module) -> None:
        """Make `model` capture itself at its first call."""
        model.__dict__[MODEL] = self
        swap_forward(model, MODEL)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first call of a model that was compiled without inputs."""
        self.capture(model, args, kwargs)
        return model.forward(*args, **kwargs)

    def capture(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Choose regions from one call and route them through programs. On any error the model is as before."""
        waiting = type(model) is not original_class(model)
        if waiting:
            unswap_forward(model)
        try:
            found, self.given_up = choose(model, args, kwargs, self.how, self.captures)
            if not any(analysis.discovery.couplings for analysis in found.values()):
                raise NoCouplingError(_nothing_found(model, found))
            regions = {}
            for name, analysis in found.items():
                regions[name] = region = Region(name, self, analysis.captured.shared_outside)
                region.install(analysis, model.get_submodule(name), {})
        except BaseException:
            model.__dict__.pop(MODEL, None)
            raise
        self.regions = regions
        model.__dict__[MODEL] = self
        self.route(model)

    def route(self, model: nn.Module) -> None:
        """Swap the classes of the regions, so that calls of them come here."""
        for name, region in self.regions.items():
            module = model.get_submodule(name)
            module.__dict__[REGION] = region
            swap_forward(module, REGION)
            swap_linears(module)

    def couplings(self) -> tuple[Coupling, ...]:
        """Every coupling of the model at its size now."""
        if self._couplings is None:
            found = [coupling for region in self.regions.values() for coupling in region.couplings()]
            self._couplings = {coupling.name: coupling for coupling in found}
        return tuple(self._couplings.values())

    def forget_couplings(self) -> None:
        """The next look at the couplings computes them again."""
        self._couplings = None

    def shrink(self, model: nn.Module, selection: Selection, optimizers: Iterable[Optimizer] = ()) -> None:
        """Keep only the selected entries of each coupling, everywhere; see `ecospa_fx.shrink`."""
        after = self.planned(selection)
        programs = {}
        for name, region in self.regions.items():
            module = model.get_submodule(name)
            programs[name] = [
                rewrite(program.inference, replay(program.inference, after), module) for program in region.programs
            ]
        prepare(model, self.plan, after, optimizers).commit()
        for name, region in self.regions.items():
            region.programs = programs[name]
        self.plan = after
        self.forget_couplings()

    def planned(self, selection: Selection) -> Plan:
        """The plan after keeping only the selected entries of each coupling.

        Raises:
            ShrinkError: a selection is empty, out of range or not increasing.
            NoCouplingError: there is no such coupling.
        """
        known = {coupling.name: coupling for coupling in self.couplings()}
        by_region: dict[str, dict[str, Tensor]] = {}
        for given, keep in selection.items():
            name = given if isinstance(given, str) else given.name
            if name not in known:
                raise NoCouplingError(f"the model has no coupling `{name}`; it has {', '.join(known) or 'none'}")
            _check_keep(known[name], keep)
            by_region.setdefault(known[name].region, {})[name] = keep
        after = self.plan.copy()
        for region_name, keeps in by_region.items():
            self._plan_region(after, self.regions[region_name], keeps)
        return after

    def _plan_region(self, after: Plan, region: Region, keeps: Mapping[str, Tensor]) -> None:
        program, prefix = region.programs[-1], f"{region.name}." if region.name else ""
        kept = region.kept(program)
        for found in region.discoveries[-1].couplings:
            keep = keeps.get(prefix + found.name)
            if keep is not None:
                mask = kept.get(found.atom, torch.ones(found.atom.size, dtype=torch.bool))
                positions = mask.nonzero().flatten()[keep.cpu()]
                kept[found.atom] = torch.zeros(found.atom.size, dtype=torch.bool)
                kept[found.atom][positions] = True
        region.write(after, kept)


def _check_keep(coupling: Coupling, keep: Tensor) -> None:
    where, way = f"`{coupling.name}`", "keep is a sorted LongTensor of positions that stay"
    if not isinstance(keep, Tensor) or keep.dtype != torch.long or keep.ndim != 1:
        shape = f"{keep.dtype} of shape {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
        raise ShrinkError(f"cannot shrink {where}: keep is {shape}; {way}")
    if not len(keep):
        raise ShrinkError(f"cannot shrink {where} to nothing; at least one of its {coupling.size} entries must stay")
    if int(keep.min()) < 0 or int(keep.max()) >= coupling.size:
        raise ShrinkError(
            f"cannot shrink {where}: keep reaches from {int(keep.min())} to {int(keep.max())}, and it has entries 0 to "
            f"{coupling.size - 1} now"
        )
    if bool((keep[1:] <= keep[:-1]).any()):
        raise ShrinkError(f"cannot shrink {where}: keep is not increasing; {way}, sort it and drop repeats")


def _nothing_found(model: nn.Module, found: Mapping[str, Analysis]) -> str:
    refusals = [str(refusal) for analysis in found.values() for refusal in analysis.discovery.refusals]
    detail = f" Refused: {'; '.join(refusals[:3])}" if refusals else " No two of its weights multiply each other"
    return f"{type(model).__name__} has no coupling that can shrink, and is left as it was.{detail}"
