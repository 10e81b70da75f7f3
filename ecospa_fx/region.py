"""Region: one captured submodule, with a program per call signature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .coupling import Coupling, Member, Refusal
from .errors import EcoSpaError, PinnedAxisError
from .passes.axes import Atom, Expr, Segments, atoms_of, size_of
from .passes.confirm import experiments
from .passes.discover import Discovery, Found
from .passes.names import join, named_tensors
from .passes.regions import Analysis, analyse_once
from .passes.replay import replay
from .passes.rewrite import Program, rewrite
from .passes.selection import Choice, Kept, Varied, entries, index_of, mask_of, narrowed, whole
from .plan import Plan
from .shrinkable import original_class
from .signature import Signature, call_key, training_flags
from .why import Path, path_between

if TYPE_CHECKING:
    from .compiled import CompiledModel

MOST_ROUTES = 1024  # calls remembered per region, one per combination of sizes
MOST_PROGRAMS = 16  # per region: twice as many graphs as torch.compile allows before it gives up


class Region:
    """One captured submodule: routes each call to the program of its signature."""

    def __init__(self, name: str, compiled: CompiledModel, shared_outside: dict[str, str]) -> None:
        self.name = name
        self.compiled = compiled
        self.shared_outside = shared_outside
        self.programs: list[Program] = []
        self.discoveries: list[Discovery] = []
        self.routes: dict[Any, Signature] = {}  # calls seen before

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of the region."""
        program, inputs = self.program_for(module, args, kwargs)
        return program(module, inputs)

    def program_for(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program, list[Tensor]]:
        """The program that serves a call, captured now if need be, and the tensors it takes."""
        known = call_key(module, args, kwargs)
        if known is None:
            return self._matching(module, args, kwargs)
        key, inputs = known
        signature = self.routes.get(key)
        for program in self.programs:
            if program.captured.signature is signature:
                return program, inputs
        program, inputs = self._matching(module, args, kwargs)
        if len(self.routes) >= MOST_ROUTES:
            self.routes.clear()
        self.routes[key] = program.captured.signature
        return program, inputs

    def _matching(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program, list[Tensor]]:
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
        with experiments(self.compiled.experiments):
            analysis = analyse_once(
                module, self.name, (args, kwargs), self.shared_outside, self.compiled.captures,
                forward=original_class(module).forward, originals=self._originals(module),
            )  # fmt: skip
        kept = replay(analysis.inference, plan, self._difference(module, args, kwargs))
        return self.install(analysis, module, kept)

    def install(self, analysis: Analysis, module: nn.Module, kept: Kept) -> Program:
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
        plan, named = self.compiled.plan, named_tensors(module)
        return {
            name: unshrunk(named[name], plan, join(self.name, name)) for name in plan.under(self.name) if name in named
        }

    def couplings(self) -> list[Coupling]:
        """The couplings that every signature met so far can follow, at their sizes now."""
        if not self.programs:
            return []
        # The first graph is the one names are taken from, so that they never change.
        kept = self.kept(self.programs[-1])
        followed = (found for found in self.discoveries[-1].couplings if self._followed(found, kept))
        return [self._view(found, kept) for found in followed]

    def _followed(self, found: Found, kept: Kept, context: Atom | None = None) -> bool:
        """Whether every graph can follow a coupling of the first one, or (`context`) one that differs by context."""
        for program, discovery in zip(self.programs[:-1], self.discoveries[:-1], strict=True):
            if any(
                found.key == other.key and (context is None or found.context_key == other.context_key)
                for other in discovery.couplings
            ):
                continue
            # It may still: a graph that uses fewer of the weights sees less of the coupling.
            trial = self.compiled.plan.copy()
            choice = kept.get(found.atom, whole(found.atom))
            left = torch.arange(entries(choice))
            if len(left) > 1:
                live = mask_of(context, kept) if context is not None else None
                # Other entries go in the first context than in the rest.
                keep = left[1:] if live is None else torch.stack([left[1:]] + [left[left != 1]] * (int(live.sum()) - 1))
                choice = narrowed(choice, keep, context, live)
            self.write(trial, {**kept, found.atom: choice})
            try:
                replay(program.inference, trial)
            except PinnedAxisError:
                return False
        return True

    def write(self, plan: Plan, kept: Kept) -> None:
        """Write into `plan` what the first graph's parameters keep under a selection of its atoms."""
        for name, exprs in self.programs[-1].inference.parameters.items():
            masks = [mask_of(expr, kept) for expr in exprs]
            if all(bool(mask.all()) for mask in masks):
                continue
            plan.original_shapes[join(self.name, name)] = tuple(len(mask) for mask in masks)
            for dim, mask in enumerate(masks):
                if not mask.all():
                    plan.kept[join(self.name, name), dim] = mask.nonzero().flatten()

    def refusals(self) -> list[Refusal]:
        """The axes that cannot shrink in some signature."""
        by_members = {refusal.members: refusal for discovery in self.discoveries for refusal in discovery.refusals}
        return list(by_members.values())

    def kept(self, program: Program) -> dict[Atom, Choice]:
        """The plan, in atoms of one program's graph."""
        return replay(program.inference, self.compiled.plan)

    def _view(self, found: Found, kept: Kept) -> Coupling:
        program = self.programs[-1]
        inference = program.inference
        context = found.context if found.context is not None and self._followed(found, kept, found.context) else None
        now = _Numbering(found.atom, context, kept)
        matrices = [name for name, _ in found.axes if len(inference.parameters[name]) > 1]
        members = []
        for name, dim in found.axes:
            if not self._is_parameter(program, name):
                continue
            expr = inference.parameters[name][dim]
            matrix = name in matrices
            of = join(self.name, name if matrix else _nearest(name, found.producers or matrices))
            left = mask_of(expr, kept)
            for part, index in _by_part(expr, found.atom):
                label = of if part is None else f"{of} part {part}"
                numbers, contexts = now.read(expr, index, left)
                members.append(Member(join(self.name, name), dim, numbers, matrix, label, part, contexts))

        def why(a: str, b: str) -> Path:
            inside = [name.removeprefix(f"{self.name}.") for name in (a, b)]
            return path_between(inference, found.atom, inside[0], inside[1])

        return Coupling(
            join(self.name, found.name),
            found.kind,
            now.size,
            found.atom.size,
            tuple(members),
            found.linear,
            self.name,
            why,
            None if context is None else self._name_of(context),
            now.contexts,
            None if found.attention is None else f"{self.name}:{found.attention}",
        )

    def _name_of(self, atom: Atom) -> str:
        """What the axis of an atom is called: the coupling on it, if it is one."""
        names = [join(self.name, found.name) for found in self.discoveries[-1].couplings if found.atom is atom]
        return names[0] if names else f"an axis of {atom.size} that stays whole"

    @staticmethod
    def _is_parameter(program: Program, name: str) -> bool:
        captured = program.captured
        return any(captured.tensors[placeholder] == name for placeholder in captured.parameters)


class _Numbering:
    """The entries of a coupling numbered as they are now, and so the contexts that it may differ by."""

    def __init__(self, atom: Atom, context: Atom | None, kept: Kept) -> None:
        choice = kept.get(atom, whole(atom))
        self.size = entries(choice)
        # An atom that differs by context has other numbers in each, also if it may not go on doing so.
        self.context = choice.context if isinstance(choice, Varied) else context
        masks = choice.mask if isinstance(choice, Varied) else choice[None]
        self._numbers = masks.cumsum(1) - 1  # [contexts or 1, atom.size]
        live = mask_of(self.context, kept) if self.context is not None else torch.ones(1, dtype=torch.bool)
        self.contexts = int(live.sum()) if context is not None else 1
        self._contexts = live.cumsum(0) - 1
        self._offered = context is not None

    def read(self, expr: Expr, index: Tensor, left: Tensor) -> tuple[Tensor, Tensor | None]:
        """The entry and the context of each position of `expr` that is left; -1 where `index` has none."""
        owned = index >= 0
        if self.context is None:
            return torch.where(owned, self._numbers[0][index], -1)[left], None
        context = index_of(expr, self.context)
        row = context if len(self._numbers) > 1 else torch.zeros_like(context)
        numbers = torch.where(owned, self._numbers[row, index], -1)[left]
        return numbers, torch.where(owned, self._contexts[context], -1)[left] if self._offered else None


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
