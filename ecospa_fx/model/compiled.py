"""CompiledModel: the object that `compile` attaches to a model, with its regions and the one plan.

    CompiledModel -- ModelState -- plan
      +- Region (per captured submodule) -- the same ModelState
           +- Specialization (per call signature) -- Program: generated code

A call that no program serves is captured from the region at its original sizes, its axes are inferred, and the plan is
replayed on them. Nothing here is an nn.Module, so state_dict and the module tree do not see it.

With execution="module" no program ever runs: the model's own Python does, with the integers that it reads kept up to
date, and only couplings that it can follow are offered. They are checked against the programs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import CaptureError, EcoSpaError, NoCouplingError
from ecospa_fx.logs import logger
from ecospa_fx.passes.capture.options import CaptureOptions
from ecospa_fx.passes.capture.record import record
from ecospa_fx.passes.find.analyse import Analysis
from ecospa_fx.passes.find.joined import choose_regions
from ecospa_fx.passes.follow.attributes import Changes, numbers_in
from ecospa_fx.passes.graph.forward_swap import own_forward, swap_forward
from ecospa_fx.passes.graph.shared_memory import SharedMemory
from ecospa_fx.passes.graph.tensors import is_quantized, named_tensors
from ecospa_fx.plan import Plan
from ecospa_fx.ranks.fsdp2 import check_gathered_at_once
from ecospa_fx.ranks.tensor_parallel import check_sequences, gathered_whole, spread_dims
from ecospa_fx.threads import alone

from .class_swap import CopiesWait, is_waiting, others_wait, own_forward_aside, swap_linears, unswap_forward
from .execution import Execution
from .full_size import in_transform, outside_forward, outside_inference
from .inner import guard_inner
from .joint_offers import joint_offers
from .journal import Journal, all_or_nothing
from .outside import outside_text, uncalled_text
from .own_memory import give_own_memory
from .owners import check_owner, note_owner
from .parametrized import first_removal
from .places import check_places
from .recorded_call import recorded_call
from .region import REGION as REGION
from .region import Region
from .state import ModelState
from .ties import retied

_NOT_JOINED = (
    "regions='joined' needs execution='graph': the Python of a block holds sizes of its own for what comes in and goes "
    "out, and it is tried block by block; with execution='module', regions='root' shrinks what runs through all blocks"
)

MODEL, COPIES = "_ecospa_model", "_ecospa_copies"  # keys in a module's __dict__


class CompiledModel:
    """A compiled model: the state that is attached to it.

    Attributes:
        how: the submodules to capture, as `compile` takes them.
        state: the plan, and whatever else the regions share.
        regions: regions by name; none until the first call, unless inputs were given before.
        not_captured: the submodules that could not be captured, with the reasons.
    """

    def __init__(self, how: str | Sequence[str], experiments: bool = False, execution: Execution = "graph") -> None:
        self.how = how
        self.state = ModelState(experiments, execution)
        if how == "joined" and execution == "module":
            raise EcoSpaError(_NOT_JOINED)
        self.regions: dict[str, Region] = {}
        self.not_captured: dict[str, str] = {}
        self._partial = False  # captured from a call without gradients that has left out blocks

    @property
    def plan(self) -> Plan:
        """The entries that every parameter keeps."""
        return self.state.plan

    @property
    def attributes(self) -> Changes:
        """The integers of modules that follow shrinks: the value before any shrink, and now."""
        return self.state.attributes

    @property
    def execution(self) -> Execution:
        """The code that runs: `"graph"` for generated code, `"module"` for the model's own Python."""
        return self.state.execution

    @property
    def experiments(self) -> bool:
        """True if an op without an axis rule may get one by experiment."""
        return self.state.experiments

    @property
    def captured(self) -> bool:
        """True once some region has been captured, so that the couplings are known."""
        return any(region.specializations for region in self.regions.values())

    def attach(self, model: nn.Module) -> None:
        """Make `model` capture itself at its first call."""
        self._wait(model)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Capture the first call of a model compiled without inputs, and run it.

        Later calls come here from whoever has kept the forward of that time.
        """
        if not self.captured:
            if in_transform() and not (self.regions and self.execution == "graph"):
                raise CaptureError(
                    f"the first call of this {type(model).__name__} is inside a transform of torch.func, where nothing "
                    "can be captured; call it once with the same arguments before, or compile it with "
                    "example_inputs=(x,)"
                )
            if self.state.call is None:
                self.state.call = recorded_call(args, kwargs)
            with own_forward_aside(model):
                if not self.regions:
                    self.capture(model, args, kwargs)
                    return type(model).forward(model, *args, **kwargs)  # as a region, if the model is one itself
                if self.execution == "module":
                    self._capture_again_if_need_be(model, args, kwargs)
                # The regions of a loaded model capture the calls that they get.
        elif self._partial:
            with own_forward_aside(model):
                self._complete(model, args, kwargs)
                return own_forward(model, MODEL)(model, *args, **kwargs)
        elif REGION not in model.__dict__:  # a copy of a model whose own Python runs
            unswap_forward(model)
        return own_forward(model, MODEL)(model, *args, **kwargs)

    def missed(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Capture a call that a forward on the instance has taken past the one of the class, for the calls to come.

        accelerate sets such a forward for mixed precision, and others for a loss of their own.
        """
        if self._partial:
            self._complete(model, args, kwargs)
        elif not self.captured and not self.regions and not in_transform():
            self.capture(model, args, kwargs)

    def _complete(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Choose regions anew from the first call with gradients, if the one that they are from has left out blocks.

        So has a first call that generates, of an encoder that runs before. Not once the model has shrunk, or is read.
        """
        if not torch.is_grad_enabled() or in_transform():
            return
        regions, not_captured = self.regions, self.not_captured
        self._partial = False
        if self.plan.kept or any(region.watcher is not None for region in regions.values()):
            unswap_forward(model)
            return
        for name in regions:
            module = model.get_submodule(name)
            module.__dict__.pop(REGION, None)
            unswap_forward(module)
        self.regions = {}
        try:
            self.capture(model, args, kwargs)
        except BaseException as error:
            unswap_forward(model)
            self.regions, self.not_captured = regions, not_captured
            model.__dict__[MODEL] = self
            self.route(model)
            if not isinstance(error, (CaptureError, NoCouplingError)):
                raise
            logger("capture").warning("%s: the blocks that were left out stay whole: %s", type(model).__name__, error)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def capture(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Choose regions from one call and run them as programs.

        After an error the model is as before, and waits if it did; only where nothing can shrink it waits no longer.
        """
        options = replace(self.state.options, gradients=torch.is_grad_enabled())
        with alone(), outside_forward():
            if not self.captured:  # another thread may have done it while this one waited
                self._capture(model, args, kwargs, options)

    def _capture(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: CaptureOptions
    ) -> None:
        check_sequences(type(model).__name__)
        args, kwargs = outside_inference((args, kwargs))
        waiting = is_waiting(model, MODEL)
        try:
            self._wait_no_longer(model)
            with gathered_whole(model), others_wait(model):
                give_own_memory(model, SharedMemory(named_tensors(model)))
                across = self.execution == "graph"
                chosen = choose_regions(model, args, kwargs, self.how, self.state.captures, options, across)
            analyses, self.not_captured = chosen.analyses, chosen.failed
            if not chosen.joints and not any(analysis.discovery.couplings for analysis in analyses.values()):
                raise NoCouplingError(_nothing_found(model, analyses))
            check_owner(model, analyses, MODEL)
            regions = {}
            for name, analysis in analyses.items():
                check_gathered_at_once(name, model.get_submodule(name), self.execution)
                border = analysis.captured.border
                regions[name] = region = Region(name, self.state, analysis.captured.shared_outside, border)
                for each in (analysis, *analysis.others):
                    region.settle_buffers(model.get_submodule(name), each)
                    region.install(each, model.get_submodule(name), {})
            if self.execution == "module":
                with gathered_whole(model):
                    find_followed(model, regions)
                if not any(region.python_support and region.python_support.couplings for region in regions.values()):
                    raise NoCouplingError(_nothing_followed(model, regions))
        except NoCouplingError:
            raise  # it waits for no other call
        except BaseException:
            if waiting:
                self._wait(model)  # of a wrong call nothing follows for the next
            raise
        self.regions = regions
        self.state.joints, self.state.joint_refusals = chosen.joints, chosen.refusals
        self.state.flow, self.state.numbers = chosen.flow, chosen.numbers
        self.state.call = recorded_call(args, kwargs)
        self.state.forget_couplings()
        outside = outside_text(model, regions)
        if outside:
            logger("capture").info("%s: %s", type(model).__name__, outside)
        uncalled = uncalled_text(self.not_captured)
        self._partial = bool(uncalled) and not options.gradients
        if self._partial:
            logger("capture").info("%s: %s, unless the first call with gradients does", type(model).__name__, uncalled)
        elif uncalled:
            logger("capture").warning("%s: %s", type(model).__name__, uncalled)
        model.__dict__[MODEL] = self
        self.route(model)
        if self._partial:
            self._wait(model)

    def _wait(self, model: nn.Module) -> None:
        """Let the next call of the model come here."""
        model.__dict__[MODEL] = self
        swap_forward(model, MODEL, missed=True)

    def _wait_no_longer(self, model: nn.Module) -> None:
        """Let calls of the model run its own forward, under whatever class others have put on top."""
        model.__dict__.pop(MODEL, None)
        unswap_forward(model)

    def _capture_again_if_need_be(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Capture a call of a loaded model that runs its own Python, unless that need not, or cannot, be."""
        regions = self.regions.values()
        if any(region.uncaptured is not None for region in regions) or not torch.is_grad_enabled():
            return  # to generate, say, needs no capture
        try:
            self.capture_again(model, args, kwargs)
        except CaptureError as error:
            for region in regions:
                region.leave(str(error))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @alone()
    @outside_forward()
    def capture_again(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Capture the regions of a model that was loaded and runs its own Python, so that it can shrink further.

        Raises:
            CaptureError: this call cannot be captured. Without gradients the model can run it nevertheless.
        """
        if self.captured:  # by another thread
            return
        waiting = is_waiting(model, MODEL)
        try:
            self._wait_no_longer(model)
            with gathered_whole(model), others_wait(model):
                calls = record(model, *outside_inference((args, kwargs)), set(self.regions))
                missing = [name for name in self.regions if name not in calls]
                if missing:
                    raise CaptureError(f"`{missing[0]}` is not called in this forward of the model")
                for name, region in self.regions.items():
                    region.add(model.get_submodule(name), *calls[name])
        except BaseException:
            for region in self.regions.values():
                region.specializations = []
            if waiting:
                self._wait(model)
            raise
        finally:
            model.__dict__[MODEL] = self

    def route(self, model: nn.Module) -> None:
        """Swap the classes of the regions, so that their calls run through `Region.__call__`."""
        note_owner(model, self.regions)
        for name, region in self.regions.items():
            module = model.get_submodule(name)
            swap_linears(module)  # first: the region may be one itself
            if self.execution == "graph":
                module.__dict__[REGION] = region
                swap_forward(module, REGION)
        self.guard_inner(model)
        if self.execution == "module":
            model.__dict__[COPIES] = CopiesWait(model, MODEL)

    def couplings(self) -> tuple[Coupling, ...]:
        """Return every coupling of the model at its size now."""
        if self.state.couplings is None:
            couplings = [coupling for region in self.regions.values() for coupling in region.offers.couplings()]
            across = (offer.coupling() for offer in joint_offers(self.state, self.regions))
            couplings += [coupling for coupling in across if coupling is not None]
            here = {coupling.name: coupling for coupling in couplings}
            self.state.couplings = {name: here[name] for name in here if name not in self.state.elsewhere}
        return tuple(self.state.couplings.values())

    def follow(self, model: nn.Module) -> None:
        """Take up what has changed in the model since the last look.

        Raises:
            ShrinkError: modules were wrapped, moved, replaced or removed.
            EcoSpaError: weights were tied that have shrunk apart.
        """
        held = named_tensors(model)
        check_places(model, held, self.regions, self.plan)
        self._follow_ties(model, held)
        self._follow_shards(model)

    def _follow_ties(self, model: nn.Module, held: Mapping[str, Tensor]) -> None:
        """Take up the weights that have been tied or untied since the last look.

        Raises:
            EcoSpaError: weights were tied that have shrunk apart.
        """
        memory = give_own_memory(model, SharedMemory(held))
        found = {name: retied(region, model, memory) for name, region in self.regions.items()}
        changed = {name: made for name, made in found.items() if made is not None}
        if not changed:
            return
        outside = {name: memory.outside(name) for name in changed}

        def take_up(journal: Journal) -> None:
            journal.note_object(self.state)
            for name, specializations in changed.items():
                journal.note_object(self.regions[name])
                self.regions[name].specializations = specializations
                self.regions[name].shared_outside = outside[name]
            self.state.forget_couplings()
            self.state.captures = []

        all_or_nothing(take_up)

    def _follow_shards(self, model: nn.Module) -> None:
        """Take up which dims of weights tensor parallelism shares out: couplings along them have fewer sizes."""
        shared_out = spread_dims(model)
        if shared_out != self.state.shared_out:
            self.state.shared_out = shared_out
            for region in self.regions.values():
                region.share, region.unshared, region.routing = None, None, region.routing.without_routes()
            self.state.forget_couplings()

    def guard_inner(self, model: nn.Module) -> None:
        """Route calls of the modules inside shrunk regions that do not come from the region, without graphs so far."""
        if self.execution == "graph":
            for name in self.regions:
                guard_inner(model.get_submodule(name), self.regions[name])


def find_followed(model: nn.Module, regions: Mapping[str, Region]) -> None:
    """Find the couplings that the Python of each region can follow; equal blocks that share a graph are tried once."""
    numbers = numbers_in(model)
    tried: list[Region] = []
    for name, region in regions.items():
        module = model.get_submodule(name)
        region.add_other_mode(module)
        same = next((other for other in tried if region.follows_as(other, module)), None)
        if same is not None:
            region.python_support = same.python_support
        else:
            region.follow(module, numbers)
            tried.append(region)


def _nothing_followed(model: nn.Module, regions: Mapping[str, Region]) -> str:
    refusals = [region.python_support.refused for region in regions.values() if region.python_support]
    why = next(why for refused in refusals for why in refused.values())
    return (
        f"the Python of {type(model).__name__} can follow none of its couplings, and it is left as it was; with "
        f"execution='graph' they can shrink. First: with one shrunk, its forward {why}"
    )


def _nothing_found(model: nn.Module, analyses: Mapping[str, Analysis]) -> str:
    refusals = [refusal for analysis in analyses.values() for refusal in analysis.discovery.refusals]
    missing = sorted({op for analysis in analyses.values() for op in analysis.axis_facts.missing})
    quantized = {name: type(tensor).__name__ for name, tensor in named_tensors(model).items() if is_quantized(tensor)}
    if quantized:
        name, kind = next(iter(quantized.items()))
        detail = f" `{name}` is quantized ({kind}): compile and shrink before that"
    elif refusals:
        detail = f" Refused: {'; '.join(map(str, refusals[:3]))}"
    elif missing:
        detail = f" No axis rule is known for {', '.join(missing)}; axes that these touch stay full size"
    else:
        axes = [axis for analysis in analyses.values() for axis in analysis.discovery.uncoupled]
        why = f": {'; '.join(map(str, axes[:2]))}" if axes else ""
        detail = f" No axis of a weight leads to another weight{why}"
    detail += first_removal(model)
    return f"{type(model).__name__} has no coupling that can shrink, and is left as it was.{detail}"
