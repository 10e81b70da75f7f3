"""Region: one captured submodule, with a program per call signature."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ecospa_fx.couple.coupling import Coupling, Member
from ecospa_fx.couple.coupling_index import Numbering, by_part
from ecospa_fx.couple.why import Path, path_between
from ecospa_fx.errors import CaptureError, EcoSpaError, PinnedAxisError
from ecospa_fx.logs import logger
from ecospa_fx.passes.axes.algebra import Atom, size_of
from ecospa_fx.passes.axes.selection import Selected, Selection, entries, mask_of, narrow, whole
from ecospa_fx.passes.capture.dry_run import carrying
from ecospa_fx.passes.capture.hooks import backward_hooked, calls_itself, inner_hooks
from ecospa_fx.passes.find.analyse import Analysis, analyse_once, shared_outside
from ecospa_fx.passes.find.confirm import experiments
from ecospa_fx.passes.find.discover import Discovery, Refusal, RegionCoupling, discover
from ecospa_fx.passes.find.fingerprint import ABSENT
from ecospa_fx.passes.follow.attributes import Attribute, holding, numbers_in, restore_layer_sizes, sync_layer_sizes
from ecospa_fx.passes.follow.follow import PythonSupport, follow
from ecospa_fx.passes.graph.tensors import join, same_storage, swapped
from ecospa_fx.passes.infer.infer import infer_axes
from ecospa_fx.passes.ir.captured import RegionGraph
from ecospa_fx.passes.ir.signature import Signature, call_key, training_flags
from ecospa_fx.passes.ir.state_access import flattened, parted, resolve_object
from ecospa_fx.passes.rewrite.program import Program
from ecospa_fx.passes.rewrite.replay import replay
from ecospa_fx.passes.rewrite.rewrite import rewrite
from ecospa_fx.passes.rewrite.stored import check_state_layouts, keys_of, whole_objects
from ecospa_fx.plan import Plan

from .class_swap import original_class
from .full_size import FullSizeTensors, outside_forward, outside_inference
from .offers import _mark, _nearest
from .routing import MOST_ROUTES

if TYPE_CHECKING:
    from .compiled import CompiledModel


# Runs a program in place of the region, to look at values inside it.
Watcher: TypeAlias = "Callable[[Region, Program, nn.Module, Sequence[Tensor]], Any]"


MOST_PROGRAMS = 16  # per region: twice as many graphs as torch.compile allows before it gives up


class Region:
    """One captured submodule: routes each call to the program of its signature."""

    def __init__(self, name: str, compiled: CompiledModel, shared_outside: dict[str, str]) -> None:
        self.name = name
        self.compiled = compiled
        self.shared_outside = shared_outside
        self.programs: list[Program] = []
        self.discoveries: list[Discovery] = []
        self.routes: dict[Any, tuple[Signature, ...]] = {}  # calls seen before; several differ by what objects hold
        # Per graph the attributes that it depends on, where the live region holds them.
        self.settings: dict[int, tuple[RegionGraph, list[tuple[dict[str, Any], str, Any, Any]]]] = {}
        self.watcher: Watcher | None = None
        self.called: list[list[int]] | None = None  # sizes of the first call, where that was before a save
        self.withheld: frozenset[str] = frozenset()  # what calls met before a save could not follow
        self.following: PythonSupport | None = None  # where its own Python runs: what that can follow

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: generated code is made anew from the plan, at the next call."""
        none: dict[str, Any] = {"programs": [], "discoveries": [], "routes": {}, "settings": {}, "watcher": None}
        none |= {"following": None}
        return {**self.__dict__, **none}

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        """For copies of the model, which run at once: programs hold no module and are shared."""
        memo[id(self)] = twin = object.__new__(type(self))
        fresh: dict[str, Any] = {"routes": {}, "settings": {}, "watcher": None}
        twin.__dict__ |= {key: copy.deepcopy(value, memo) for key, value in (self.__dict__ | fresh).items()}
        return twin

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of the region."""
        key, inputs, objects = call_key(module, args, kwargs) or (None, [], [])
        program = self._routed(module, key, inputs, objects)
        if program is None:
            leaves, objects = parted(flattened((args, kwargs))[0])
            inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            hooks = inner_hooks(module)
            program = self._serving(module, (args, kwargs), hooks)
            behind = [path for path in backward_hooked(module) if not calls_itself(module.get_submodule(path))]
            before = [path for path in hooks if not calls_itself(module.get_submodule(path))]
            if (behind or (before and program is None)) and not self.shrunk:
                # Its own Python calls every hook; nothing keeps it from running.
                return original_class(module).forward(module, *args, **kwargs)
            if behind:
                raise EcoSpaError(
                    f"`{join(self.name, behind[0])}` has a backward hook, but `{self.name or 'the model'}` has shrunk "
                    "and runs as one graph, in which it would not be called. Remove it, or put it on an nn.Linear, on "
                    "a parameter or on the region"
                )
            program = program or self.add(module, args, kwargs)
            self._remember_route(key, program)
        if objects:
            inputs = [*inputs, *(program.captured.carried.read(objects) or ()), *objects]
        return program(module, inputs) if self.watcher is None else self.watcher(self, program, module, inputs)

    def program_for(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program, list[Tensor]]:
        """The program that serves a call, captured now if need be, and the tensors it takes."""
        program = self._serving(module, (args, kwargs), inner_hooks(module)) or self.add(module, args, kwargs)
        leaves, objects = parted(flattened((args, kwargs))[0])
        whole = self._whole_objects(objects)
        state = [place.find(whole) for place in program.captured.carried.state]
        return program, [*(leaf for leaf in leaves if isinstance(leaf, Tensor)), *state]

    def _routed(self, module: nn.Module, key: Any, tensors: Sequence[Tensor], objects: Sequence[Any]) -> Program | None:
        """The program that served a call of the same key before."""
        for signature in self.routes.get(key, ()) if key is not None else ():
            for program in self.programs:
                if program.captured.signature is signature and self._unset(module, program) is None:
                    if not objects:
                        return program
                    # The key says nothing of sizes, nor of what is in the objects.
                    state = program.captured.carried.read(objects)
                    if state is not None and program.fits([*tensors, *state]):
                        return program
        return None

    def _remember_route(self, key: Any, program: Program) -> None:
        if key is not None:
            if len(self.routes) >= MOST_ROUTES:
                self.routes.clear()
            signature = program.captured.signature
            known = self.routes.setdefault(key, ())
            if not any(other is signature for other in known):
                self.routes[key] = (signature, *known)

    def _serving(self, module: nn.Module, call: Any, hooks: Mapping[str, int]) -> Program | None:
        training = training_flags(module)
        for program in self.programs:
            if not program.captured.serves(hooks, program.called):
                continue
            if (
                self._unset(module, program) is None
                and program.captured.mismatch(call, training, program.state) is None
            ):
                return program
        return None

    def _unset(self, module: nn.Module, program: Program) -> str | None:
        """Which constant that the graph was captured with is another now; None where none is."""
        if len(self.programs) == 1 and torch.compiler.is_compiling():
            return None  # what is looked up in a traced forward is traced, and made again for it
        captured = program.captured
        held = self.settings.get(id(captured))
        if held is None or held[0] is not captured:
            named = dict(module.named_modules(remove_duplicate=False))
            places = [
                (named[path].__dict__, name, getattr(type(named[path]), name, ABSENT), value)
                for (path, name), value in captured.settings.items()
            ]
            self.settings[id(captured)] = held = (captured, places)
        for (attributes, name, other, value), where in zip(held[1], captured.settings, strict=True):
            now = attributes.get(name, other)
            if now is not value and (type(now) is not type(value) or now != value):
                return f"`{'.'.join(part for part in where if part)}` is {now!r} and was {value!r}"
        return None

    def _whole_objects(self, objects: Sequence[Any]) -> list[Any]:
        """Copies of the objects of a call that hold what programs have put there as it would be had nothing shrunk."""
        graphs = [(program.axis_facts, self.kept(program)) for program in self.programs] if objects else []
        return whole_objects(objects, graphs, self.name or "the model")

    @property
    def shrunk(self) -> bool:
        """Whether anything in the region has lost entries."""
        return any(True for _ in self.compiled.plan.under(self.name))

    def discovery_of(self, program: Program) -> Discovery:
        """What was discovered in the graph of a program."""
        return next(d for p, d in zip(self.programs, self.discoveries, strict=True) if p is program)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @outside_forward()
    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        """Capture a call of a new signature at original sizes and replay the plan on it."""
        if len(self.programs) >= MOST_PROGRAMS:
            raise EcoSpaError(
                f"region `{self.name}` has been called in {MOST_PROGRAMS} different ways, each with its own graph; "
                f"this call differs from the last: {self._difference(module, args, kwargs)}. Call it in fewer ways "
                "(pad to common lengths, pass the same arguments; a number that changes from call to call goes into a "
                "tensor, an argument or a buffer, whose values are no part of a graph)"
            )
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise CaptureError(
                f"{f'region `{self.name}`' if self.name else 'the model'} is called in a way it has not been called in "
                "before inside a transform of torch.func, where nothing can be captured; call the model once with the "
                "same arguments before"
            )
        leaves, spec = flattened(outside_inference((args, kwargs)))
        leaves, objects = parted(leaves)
        if objects:
            whole = self._whole_objects(objects)
            args, kwargs = pytree.tree_unflatten([resolve_object(leaf, whole) for leaf in leaves], spec)
        else:
            args, kwargs = pytree.tree_unflatten(leaves, spec)
        difference = self._difference(module, args, kwargs)
        plan = self.compiled.plan
        filled = {key for program in self.programs for key in keys_of(program.axis_facts, stored=True)}
        stand_ins = FullSizeTensors(module, self.name, plan)
        graph = self.compiled.execution == "graph"
        with experiments(self.compiled.experiments), carrying(graph), self._original_attributes(module, stand_ins):
            analysis = analyse_once(
                module, self.name, (args, kwargs), self.shared_outside, self.compiled.captures,
                forward=original_class(module).forward, originals=stand_ins if stand_ins.named else None,
                filled=frozenset(filled),
            )  # fmt: skip
            if self.compiled.execution == "module" and self.following is None:
                self.remember(analysis)
                with swapped(module, stand_ins.values()):
                    self.follow(module, numbers_in(module))
                self.programs, self.discoveries = [], []
        if self.programs:
            logger("recaptures").info("%s, graph %d: %s", self.name or "the model", len(self.programs) + 1, difference)
        kept = replay(analysis.axis_facts, plan, difference)
        check_state_layouts(
            [*((p.axis_facts, self.kept(p)) for p in self.programs), (analysis.axis_facts, kept)], difference
        )
        return self.install(analysis, module, kept)

    @contextmanager
    def _original_attributes(self, module: nn.Module, stand_ins: FullSizeTensors) -> Iterator[None]:
        """A region whose own Python runs, with the integers that it held before any shrink."""
        if self.compiled.execution == "graph":
            yield
            return
        inside = {a: original for a, (original, _) in self.compiled.attributes.items()}
        prefix = f"{self.name}." if self.name else ""
        inside = {
            Attribute(f"{a.module}."[len(prefix) :].removesuffix("."), a.name, a.inside): value
            for a, value in inside.items()
            if f"{a.module}.".startswith(prefix)
        }
        with holding(module, inside):
            with swapped(module, stand_ins.shapes()):
                before = sync_layer_sizes(module)
            try:
                yield
            finally:
                restore_layer_sizes(before)

    def follow(self, module: nn.Module, numbers: Set[tuple[type, str]]) -> None:
        """Find out what its own Python can follow; `module` must have its original sizes."""
        graphs = [(p.axis_facts, d) for p, d in zip(self.programs[::-1], self.discoveries[::-1], strict=True)]
        self.following = follow(module, graphs, original_class(module).forward, numbers)

    def follows_as(self, other: Region, module: nn.Module) -> bool:
        """Whether what was found out for `other` holds for this region too: one graph, and the same integers."""
        graphs = [[program.captured.graph for program in region.programs] for region in (self, other)]
        if len(graphs[0]) != len(graphs[1]) or any(a is not b for a, b in zip(*graphs, strict=True)):
            return False
        assert other.following is not None
        try:
            return all(a.read(module) == size_of(expr) for a, expr in other.following.sizes.items())
        except AttributeError:
            return False

    def install(self, analysis: Analysis, module: nn.Module, kept: Selection) -> Program:
        """Add the program of an analysis."""
        program = rewrite(analysis.axis_facts, kept, module)
        self.remember(analysis, program)
        self._unset(module, program)  # what it looks at is found out now: torch.compile would trace that
        return program

    def tied_anew(self, model: nn.Module) -> tuple[list[Program], list[Discovery]] | None:
        """The programs as they must be after weights were tied or untied; None where none were.

        Raises:
            EcoSpaError: weights were tied that have shrunk apart.
        """
        module, outside = model.get_submodule(self.name), shared_outside(model, self.name)
        ties = [same_storage(module, program.captured.tensors.values()) for program in self.programs]
        if outside == self.shared_outside and all(
            same == program.captured.same_storage for same, program in zip(ties, self.programs, strict=True)
        ):
            return None
        programs, discoveries = [], []
        for program, same in zip(self.programs, ties, strict=True):
            captured = replace(program.captured, same_storage=same, shared_outside=outside)
            axis_facts = infer_axes(captured)
            try:
                kept = replay(axis_facts, self.compiled.plan)
            except PinnedAxisError as error:
                was = program.captured
                new = [f"`{join(self.name, a)}` as `{join(self.name, b)}`" for a, b in same.items()
                       if was.same_storage.get(a) != b]  # fmt: skip
                new += [f"`{join(self.name, a)}` {b}" for a, b in outside.items() if was.shared_outside.get(a) != b]
                raise EcoSpaError(
                    f"weights have been tied since they shrank, {', '.join(new[:3])}, which cannot be followed: "
                    f"{error}. Untie them, or tie them before the first shrink"
                ) from error
            programs.append(rewrite(axis_facts, kept, module))
            discoveries.append(discover(axis_facts))
        return programs, discoveries

    def remember(self, analysis: Analysis, program: Program | None = None) -> None:
        """Take up what an analysis found; without a program it can be asked but not run."""
        self.programs.insert(0, program or Program(analysis.captured, analysis.axis_facts, None, (), ""))
        self.discoveries.insert(0, analysis.discovery)
        self.compiled.forget_couplings()

    def _difference(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        if not self.programs:
            return ""
        unset = self._unset(module, self.programs[0])
        if unset is not None:
            return unset
        return self.programs[0].captured.mismatch((args, kwargs), training_flags(module)) or ""

    def couplings(self) -> list[Coupling]:
        """The couplings that every signature met so far can follow, at their sizes now."""
        if not self.programs:
            return []
        # The first graph is the one names are taken from, so that they never change.
        kept = self.kept(self.programs[-1])
        return [self._view(found, kept) for found in self.offered()]

    def offered(self) -> list[RegionCoupling]:
        """The couplings of the first graph that every signature met so far can follow, and that `couplings` shows."""
        kept = self.kept(self.programs[-1])
        return [found for found in self.discoveries[-1].couplings if self._followed(found, kept)]

    def _followed(self, found: RegionCoupling, kept: Selection, context: Atom | None = None) -> bool:
        """Whether every graph can follow a coupling of the first one, or (`context`) one that differs by context."""
        if self.withheld and _mark(found, context) in self.withheld:
            return False
        if self.following is not None and found.key not in (
            self.following.couplings if context is None else self.following.varied
        ):
            return False
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
                choice = narrow(choice, keep, context, live)
            self.write(trial, {**kept, found.atom: choice})
            try:
                theirs = replay(program.axis_facts, trial)
                check_state_layouts(
                    [(self.programs[-1].axis_facts, {**kept, found.atom: choice}), (program.axis_facts, theirs)]
                )
            except PinnedAxisError:
                return False
        return True

    def marks(self) -> list[str]:
        """What some call cannot follow, so that it is known also before such a call is met again."""
        marks = set(self.withheld)
        if len(self.programs) > 1:
            kept = self.kept(self.programs[-1])
            for found in self.discoveries[-1].couplings:
                for context in (None, found.context):
                    if not self._followed(found, kept, context):
                        marks.add(_mark(found, context))
        return sorted(marks)

    def write(self, plan: Plan, kept: Selection) -> None:
        """Write into `plan` what the first graph's parameters keep under a selection of its atoms."""
        for name, exprs in self.programs[-1].axis_facts.parameters.items():
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
        return [*by_members.values(), *self._not_followed()]

    def _not_followed(self) -> Iterator[Refusal]:
        """The couplings that only execution='graph' can use."""
        for found in self.discoveries[-1].couplings if self.following and self.discoveries else ():
            why = self.following.refused.get(found.key) if self.following else None
            if why is not None:
                members = tuple(f"{join(self.name, name)}[{dim}]" for name, dim in found.axes)
                reason = f"its own Python {why}; execution='graph' can shrink it"
                yield Refusal(members, found.atom.size, (reason,), self.name)

    def kept(self, program: Program) -> dict[Atom, Selected]:
        """The plan, in atoms of one program's graph."""
        return replay(program.axis_facts, self.compiled.plan)

    def _view(self, found: RegionCoupling, kept: Selection) -> Coupling:
        program = self.programs[-1]
        axis_facts = program.axis_facts
        context = found.context if found.context is not None and self._followed(found, kept, found.context) else None
        now = Numbering(found.atom, context, kept)
        matrices = [name for name, _ in found.axes if len(axis_facts.parameters[name]) > 1]
        members = []
        for name, dim in found.axes:
            if not self._is_parameter(program, name):
                continue
            expr = axis_facts.parameters[name][dim]
            matrix = name in matrices
            of = join(self.name, name if matrix else _nearest(name, found.producers or matrices))
            left = mask_of(expr, kept)
            for part, index in by_part(expr, found.atom):
                label = of if part is None else f"{of} part {part}"
                numbers, contexts = now.read(expr, index, left)
                members.append(Member(join(self.name, name), dim, numbers, matrix, label, part, contexts))

        def why(a: str, b: str) -> Path:
            inside = [name.removeprefix(f"{self.name}.") for name in (a, b)]
            return path_between(axis_facts, found.atom, inside[0], inside[1])

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
            () if self.following is None else tuple(
                str(attribute.within(self.name)) for attribute in self.following.couplings[found.key]
            ),
        )  # fmt: skip

    def _name_of(self, atom: Atom) -> str:
        """What the axis of an atom is called: the coupling on it, if it is one."""
        names = [join(self.name, found.name) for found in self.discoveries[-1].couplings if found.atom is atom]
        return names[0] if names else f"an axis of {atom.size} that stays whole"

    @staticmethod
    def _is_parameter(program: Program, name: str) -> bool:
        captured = program.captured
        return any(captured.tensors[placeholder] == name for placeholder in captured.parameters)
