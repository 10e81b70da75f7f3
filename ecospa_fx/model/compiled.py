"""What `compile` attaches to a model: its regions, each with a program per call signature, and the one plan.

    CompiledModel -- plan
      +- Region (per captured submodule)
           +- Program (per call signature) -- generated code

A call that no program serves is captured from the region at its original sizes, inferred again, and the plan is
replayed on it. Nothing here is an nn.Module, so state_dict and the module tree do not see it.

With execution="module" no program ever runs: the model's own Python does, with the integers that it reads kept up to
date, and only what it can follow is offered. Programs are what that is checked against.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.couple.coupling import Coupling, CouplingSelection
from ecospa_fx.errors import CaptureError, EcoSpaError, NoCouplingError, ShrinkError
from ecospa_fx.passes.axes.selection import mask_of, narrow, whole
from ecospa_fx.passes.capture.dry_run import carrying
from ecospa_fx.passes.capture.record import record
from ecospa_fx.passes.find.analyse import Analysis, Captures, shared_outside
from ecospa_fx.passes.find.confirm import experiments
from ecospa_fx.passes.find.regions import choose
from ecospa_fx.passes.follow.attributes import Changes, assigned, numbers_in, sync_layer_sizes
from ecospa_fx.passes.graph.tensors import join, named_tensors
from ecospa_fx.passes.rewrite.program import Program
from ecospa_fx.passes.rewrite.replay import replay
from ecospa_fx.passes.rewrite.rewrite import rewrite
from ecospa_fx.passes.rewrite.stored import check_state_layouts
from ecospa_fx.plan import Plan

from .class_swap import original_class, own_forward_aside, swap_forward, swap_linears, unswap_forward
from .copies import Copy, check_plan
from .full_size import outside_forward, outside_inference
from .optimizer_state import averages_of
from .region import Region
from .slicing import prepare_tensors

if TYPE_CHECKING:
    from ecospa_fx.compensate.grams import Grams

Execution: TypeAlias = Literal["graph", "module"]
EXECUTIONS = get_args(Execution)

MODEL, REGION = "_ecospa_model", "_ecospa_region"  # keys in a module's __dict__


class CompiledModel:
    """The state of a compiled model. `regions` is empty until the first call, unless inputs were given before."""

    def __init__(self, how: str | Sequence[str], experiments: bool = False, execution: Execution = "graph") -> None:
        if execution not in EXECUTIONS:
            raise EcoSpaError(f"execution={execution!r} is none of {', '.join(map(repr, EXECUTIONS))}")
        self.how, self.experiments, self.execution = how, experiments, execution
        self.plan = Plan()
        self.attributes: Changes = {}
        self.regions: dict[str, Region] = {}
        self.given_up: dict[str, str] = {}
        self.captures: Captures = []
        self.save: str | None = None  # hash of the weights that were last loaded or saved
        self._couplings: dict[str, Coupling] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: see `Region.__getstate__`."""
        return {**self.__dict__, "captures": [], "_couplings": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        """For copies of the model; what was captured never changes and is shared."""
        memo[id(self)] = twin = object.__new__(type(self))
        shared = {"captures": list(self.captures), "_couplings": None}
        twin.__dict__ |= {key: copy.deepcopy(value, memo) for key, value in (self.__dict__ | shared).items()
                          if key != "captures"} | {"captures": shared["captures"]}  # fmt: skip
        return twin

    @property
    def captured(self) -> bool:
        """Whether the couplings are known."""
        return any(region.programs for region in self.regions.values())

    def attach(self, model: nn.Module) -> None:
        """Make `model` capture itself at its first call.

        Raises:
            CaptureError: its calls go to a forward on the instance and would not come here.
        """
        if "forward" in model.__dict__:
            raise CaptureError(
                f"the forward of this {type(model).__name__} has been replaced on the instance, as accelerate does "
                "for mixed precision, and does not lead here: compile the model before that (before prepare), or "
                "with example_inputs"
            )
        model.__dict__[MODEL] = self
        swap_forward(model, MODEL)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first call of a model that was compiled without inputs; and later ones of whoever kept its forward."""
        if not self.captured:
            with own_forward_aside(model):
                if self.regions and self.execution == "module":
                    if not torch.is_grad_enabled():  # to generate, say, which needs none
                        return original_class(model).forward(model, *args, **kwargs)
                    self.capture_again(model, args, kwargs)
                else:
                    self.capture(model, args, kwargs)
        return type(model).forward(model, *args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @outside_forward()
    def capture(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Choose regions from one call and route them through programs. On any error the model is as before."""
        args, kwargs = outside_inference((args, kwargs))
        waiting = type(model) is not original_class(model)
        if waiting:
            unswap_forward(model)
        try:
            with experiments(self.experiments), carrying(self.execution == "graph"):
                found, self.given_up = choose(model, args, kwargs, self.how, self.captures)
            if not any(analysis.discovery.couplings for analysis in found.values()):
                raise NoCouplingError(_nothing_found(model, found))
            regions = {}
            for name, analysis in found.items():
                regions[name] = region = Region(name, self, analysis.captured.shared_outside)
                for each in (analysis, *analysis.others):
                    region.install(each, model.get_submodule(name), {})
            if self.execution == "module":
                find_followed(model, regions)
                if not any(region.following and region.following.couplings for region in regions.values()):
                    raise NoCouplingError(_nothing_followed(model, regions))
        except BaseException:
            model.__dict__.pop(MODEL, None)
            raise
        self.regions = regions
        model.__dict__[MODEL] = self
        self.route(model)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @outside_forward()
    def capture_again(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Capture the regions of a model that was loaded and runs its own Python, for what can shrink further.

        Raises:
            CaptureError: this call cannot be captured. Without gradients the model runs it nevertheless.
        """
        waiting = type(model) is not original_class(model)
        unswap_forward(model)
        try:
            calls = record(model, *outside_inference((args, kwargs)), set(self.regions))
            missing = [name for name in self.regions if name not in calls]
            if missing:
                raise CaptureError(f"`{missing[0]}` is not called in this forward of the model")
            for name, region in self.regions.items():
                region.add(model.get_submodule(name), *calls[name])
        except BaseException:
            for region in self.regions.values():
                region.programs, region.discoveries = [], []
            if waiting:
                swap_forward(model, MODEL)
            raise

    def route(self, model: nn.Module) -> None:
        """Swap the classes of the regions, so that calls of them come here."""
        for name, region in self.regions.items():
            module = model.get_submodule(name)
            if self.execution == "graph":
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

    def follow_ties(self, model: nn.Module) -> None:
        """Take up what has been tied or untied since the last look.

        Raises:
            EcoSpaError: weights were tied that have shrunk apart.
        """
        changed = {name: region.tied_anew(model) for name, region in self.regions.items()}
        for name, anew in changed.items():
            if anew is not None:
                region = self.regions[name]
                region.programs, region.discoveries = anew
                region.shared_outside = shared_outside(model, name)
                self.forget_couplings()
        if any(anew is not None for anew in changed.values()):
            self.captures.clear()

    def _check_shapes(self, model: nn.Module) -> None:
        for name, tensor in named_tensors(model).items():
            for region in self.regions.values():
                own = name.removeprefix(f"{region.name}." if region.name else "")
                if not region.programs or join(region.name, own) != name:
                    continue
                expected = self.plan.shape(name) if name in self.plan.original_shapes else None
                expected = expected or region.programs[-1].captured.sizes.get(own)
                if expected is not None and tuple(tensor.shape) != tuple(expected):
                    raise ShrinkError(
                        f"`{name}` is {tuple(tensor.shape)} and was {tuple(expected)} when the model was captured: it "
                        "has been replaced since. Compile the model after such changes"
                    )

    @torch.inference_mode(False)
    def shrink(
        self,
        model: nn.Module,
        selection: CouplingSelection,
        optimizers: Iterable[Optimizer] = (),
        copies: Sequence[Copy] = (),
        absorb: Grams | None = None,
    ) -> None:
        """Keep only the selected entries of each coupling, everywhere; see `ecospa_fx.shrink`."""
        self.follow_ties(model)
        self._check_shapes(model)
        after = self.planned(selection)
        # Everything is made beside what is there; then come assignments only.
        made: dict[Program, Program] = {}
        programs = self._rewritten(model, after, made)
        twins = [(copy.module, self._of_copy(copy)) for copy in copies if copy.module is not None]
        twin_programs = [twin._rewritten(module, after, made) for module, twin in twins]
        names = {id(tensor): name for name, tensor in named_tensors(model).items() if name in after.original_shapes}
        mine = named_tensors(model)
        tensors = [(name, t) for held in (mine, *(copy.tensors for copy in copies)) for name, t in held.items()]
        named = [(names.get(id(mine[name]), name), tensor) for name, tensor in tensors]
        replaced: dict[int, Tensor] = {}
        if absorb is not None:
            held = [mine, *(copy.tensors for copy in copies), *averages_of(mine, optimizers)]
            replaced = absorb.absorbed(self.plan, after, held)
        change = prepare_tensors(named, self.plan, after, optimizers, replaced)
        attributes = self._attributes_under(after)
        values = {attribute: now for attribute, (_, now) in attributes.items()}
        modules = [model, *(module for module, _ in twins)]
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(assigned(module, values))
            change.commit()
        if self.execution == "module":
            for module in modules:
                sync_layer_sizes(module)
        self._follow(after, programs, attributes)
        for (module, twin), theirs in zip(twins, twin_programs, strict=True):
            twin._follow(after.copy(), theirs, dict(attributes))
            if module.__dict__.get(MODEL) is not twin:
                unswap_forward(module)  # it may have been waiting for its first call
                module.__dict__[MODEL] = twin
                twin.route(module)

    def _rewritten(self, model: nn.Module, plan: Plan, made: dict[Program, Program]) -> dict[str, list[Program]]:
        """The programs of each region under a plan; `made` are those that copies of the model have in common."""
        for name, region in self.regions.items():
            for program in region.programs:
                if program not in made:
                    kept = replay(program.axis_facts, plan)
                    made[program] = rewrite(program.axis_facts, kept, model.get_submodule(name))
            check_state_layouts(
                (program.axis_facts, replay(program.axis_facts, plan))
                for program in region.programs
                if program.captured.carried.types
            )
        return {name: [made[program] for program in region.programs] for name, region in self.regions.items()}

    def _attributes_under(self, plan: Plan) -> Changes:
        """What the attributes that follow held before any shrink, and must hold under a plan."""
        attributes = dict(self.attributes)
        for region in self.regions.values():
            if region.following is not None:
                program = region.programs[-1]
                before, now = (region.following.values(kept) for kept in ({}, replay(program.axis_facts, plan)))
                attributes |= {a.within(region.name): (before[a], now[a]) for a in before if before[a] != now[a]}
        return attributes

    def _follow(self, plan: Plan, programs: Mapping[str, list[Program]], attributes: Changes) -> None:
        for name, region in self.regions.items():
            region.programs = programs[name]
        self.plan, self.attributes = plan, attributes
        self.forget_couplings()

    def _of_copy(self, copied: Copy) -> CompiledModel:
        """The state that a copy of the model has, or will have if it was made before this one was captured."""
        theirs: CompiledModel | None = None if copied.module is None else copied.module.__dict__.get(MODEL)
        if theirs is not None:
            check_plan(copied, theirs.plan, self.plan)
            if theirs.regions:
                return theirs
        return copy.deepcopy(self)

    def planned(self, selection: CouplingSelection) -> Plan:
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
        kept = region.kept(region.programs[-1])
        # Contexts are counted as they are before this shrink, which may take some of them too.
        now = dict(kept)
        for found in region.discoveries[-1].couplings:
            keep = keeps.get(join(region.name, found.name))
            if keep is not None:
                choice = now.get(found.atom, whole(found.atom))
                live = mask_of(found.context, now) if found.context is not None else None
                kept[found.atom] = narrow(choice, keep.cpu(), found.context, live)
        region.write(after, kept)


def _check_keep(coupling: Coupling, keep: Tensor) -> None:
    where, way = f"`{coupling.name}`", "keep is a sorted LongTensor of positions that stay"
    if coupling.context is not None:
        way += f", or one row of them for each of its {coupling.contexts} contexts"
    if not isinstance(keep, Tensor) or keep.dtype != torch.long or keep.ndim not in (1, 2):
        shape = f"{keep.dtype} of shape {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
        raise ShrinkError(f"cannot shrink {where}: keep is {shape}; {way}")
    if keep.ndim == 2 and coupling.context is None:
        raise ShrinkError(
            f"cannot shrink {where}: keep has {len(keep)} rows, but what this coupling keeps cannot differ by context; "
            f"{way}"
        )
    if keep.ndim == 2 and len(keep) != coupling.contexts:
        raise ShrinkError(f"cannot shrink {where}: keep has {len(keep)} rows; it has {coupling.contexts} contexts now")
    if not keep.numel():
        raise ShrinkError(f"cannot shrink {where} to nothing; at least one of its {coupling.size} entries must stay")
    if int(keep.min()) < 0 or int(keep.max()) >= coupling.size:
        raise ShrinkError(
            f"cannot shrink {where}: keep reaches from {int(keep.min())} to {int(keep.max())}, and it has entries 0 to "
            f"{coupling.size - 1} now"
        )
    if bool((keep.diff(dim=-1) <= 0).any()):
        raise ShrinkError(f"cannot shrink {where}: keep is not increasing; {way}, sort it and drop repeats")


def find_followed(model: nn.Module, regions: Mapping[str, Region]) -> None:
    """Find out what the Python of each region can follow; equal blocks that share a graph are tried once."""
    numbers = numbers_in(model)
    known: list[Region] = []
    for name, region in regions.items():
        module = model.get_submodule(name)
        same = next((other for other in known if region.follows_as(other, module)), None)
        if same is not None:
            region.following = same.following
        else:
            region.follow(module, numbers)
            known.append(region)


def _nothing_followed(model: nn.Module, regions: Mapping[str, Region]) -> str:
    why = next(why for region in regions.values() if region.following for why in region.following.refused.values())
    return (
        f"the Python of {type(model).__name__} can follow none of its couplings, and it is left as it was; with "
        f"execution='graph' they can shrink. First: with one shrunk, its forward {why}"
    )


def _nothing_found(model: nn.Module, found: Mapping[str, Analysis]) -> str:
    refusals = [str(refusal) for analysis in found.values() for refusal in analysis.discovery.refusals]
    missing = sorted({op for analysis in found.values() for op in analysis.axis_facts.missing})
    if refusals:
        detail = f" Refused: {'; '.join(refusals[:3])}"
    elif missing:
        detail = f" No axis rule is known for {', '.join(missing)}; what these touch stays whole"
    else:
        detail = " No two of its weights multiply each other"
    return f"{type(model).__name__} has no coupling that can shrink, and is left as it was.{detail}"
