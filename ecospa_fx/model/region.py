"""Region: one captured submodule, with a program per call signature."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeAlias

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from ecospa_fx.collectives import is_distributed
from ecospa_fx.errors import CaptureError, EcoSpaError, FirstCallError, NotNowError, TooManyCallsError, WrapperError
from ecospa_fx.logs import logger
from ecospa_fx.passes.axes.algebra import Atom, atoms_of
from ecospa_fx.passes.axes.selection import Selected, Selection
from ecospa_fx.passes.capture.first_call import after_first_call, make
from ecospa_fx.passes.capture.hooks import backward_hooked, calls_itself, inner_hooks
from ecospa_fx.passes.capture.options import CaptureOptions
from ecospa_fx.passes.find.analyse import Analysis, analyse_once
from ecospa_fx.passes.find.discover import Discovery
from ecospa_fx.passes.find.numbers import with_numbers
from ecospa_fx.passes.follow.attributes import numbers_in
from ecospa_fx.passes.follow.follow import PythonSupport, follow
from ecospa_fx.passes.follow.other_mode import other_mode
from ecospa_fx.passes.graph.forward_swap import own_forward
from ecospa_fx.passes.graph.python_state import StateChange
from ecospa_fx.passes.graph.tensors import join, parameters_of, swapped
from ecospa_fx.passes.infer.sizes import called_sizes
from ecospa_fx.passes.ir.border import NO_BORDER, Border
from ecospa_fx.passes.ir.region_graph import Call
from ecospa_fx.passes.ir.signature import call_key, training_flags
from ecospa_fx.passes.ir.state_access import flattened, parted, resolve_object
from ecospa_fx.passes.rewrite.program import Program
from ecospa_fx.passes.rewrite.replay import replay
from ecospa_fx.passes.rewrite.rewrite import rewrite
from ecospa_fx.passes.rewrite.stored import check_state_layouts, keys_of, whole_objects
from ecospa_fx.ranks.fsdp2 import check_gathered_at_once, fsdp_modules
from ecospa_fx.ranks.tensor_parallel import check_sequences, gathered_here
from ecospa_fx.threads import alone, in_call

from .compiled_code import check_not_recomputed
from .full_size import (
    FullSizeTensors,
    full_size_call,
    in_transform,
    original_numbers,
    outside_forward,
    outside_inference,
)
from .journal import Journal, all_or_nothing
from .moving import moving_buffers, settled
from .nested_calls import by_samples
from .offers import Offers
from .routing import Routing
from .share import Share, check_served, share_of
from .specialization import Specialization
from .state import ModelState

# Runs a program in place of the region, to read values inside it.
Watcher: TypeAlias = "Callable[[Region, Program, nn.Module, Sequence[Tensor]], Any]"


REGION = "_ecospa_region"  # key in a module's __dict__
_FOR_TOOLS = (
    ". If a tool has put hooks into its modules, give it a plain model, ecospa_fx.restore(copy.deepcopy(model)), or "
    "one compiled with execution='module'"
)
MOST_PROGRAMS = 16  # per region: twice as many graphs as torch.compile allows before it gives up


class Region:
    """One captured submodule: each call runs the program of its signature.

    Attributes:
        name: name of the submodule in the model.
        state: the state of the model, shared by its regions.
        shared_outside: tensors of the region that modules outside of it hold too, and where.
        specializations: the captured calls, the first one first.
        routing: the routes from calls to programs.
        watcher: runs a program in place of the region, to read values inside it; None as a rule.
        called: sizes of the tensors of the first call, where that was before a save.
        unsupported_marks: marks of couplings that some call before a save could not follow.
        python_support: where the region's own Python runs, the couplings that it can follow.
        border: the dims of its arguments, results and tied weights that shrink with the model around it.
        uncaptured: why a call could not be captured that its own Python serves while it is whole; else None.
        unshared: why no graph can run where tensor parallelism has changed the region's modules.
        share: the part that this rank computes where tensor parallelism spreads the weights; else None.
    """

    def __init__(
        self, name: str, state: ModelState, shared_outside: Mapping[str, str], border: Border = NO_BORDER
    ) -> None:
        self.name = name
        self.state = state
        self.shared_outside = shared_outside
        self.border = border
        self.specializations: list[Specialization] = []
        self.routing = Routing()
        self.watcher: Watcher | None = None
        self.called: list[list[int]] | None = None
        self.unsupported_marks: frozenset[str] = frozenset()
        self.python_support: PythonSupport | None = None
        self.uncaptured: str | None = None
        self.share: Share | None = None
        self.unshared: str | None = None
        self._warned = False
        self._not_inputs: set[str] = set()  # numbers that a graph cannot take as inputs
        self._fills: tuple[StateChange, ...] = ()  # the changes that the last captured call makes to caches

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle writes: without programs, which the next call captures and generates again."""
        fresh = {
            "specializations": [], "routing": Routing(), "watcher": None, "python_support": None, "_fills": (),
            "share": None, "unshared": None,
        }  # fmt: skip
        known = {"called": self.first_sizes, "unsupported_marks": frozenset(self.offers.marks())}
        return {**self.__dict__, **fresh, **known}

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        """Copy the region for a copy of the model, which can run at once: programs hold no module and are shared."""
        memo[id(self)] = twin = object.__new__(type(self))
        fresh: dict[str, Any] = {"routing": Routing(), "watcher": None, "_fills": (), "share": None, "unshared": None}
        twin.__dict__ |= {key: copy.deepcopy(value, memo) for key, value in (self.__dict__ | fresh).items()}
        return twin

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of the region."""
        if torch.compiler.is_dynamo_compiling():
            return self._run(module, args, kwargs)
        with in_call():
            return self._run(module, args, kwargs)

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key, inputs, objects = call_key(args, kwargs) or (None, [], [])
        program = self.routing.remembered(self.specializations, key, inputs, objects)
        if program is None:
            if self.routing.leaves(key) and not self.shrunk:
                return own_forward(module, REGION)(module, *args, **kwargs)
            check_gathered_at_once(self.name, module, "graph")
            if is_distributed():
                check_sequences(self._named())
            if self.share is None:
                try:
                    self.share = share_of(self.name, module)
                except WrapperError as error:
                    if self.shrunk:
                        raise
                    self.unshared = str(error)
                    return own_forward(module, REGION)(module, *args, **kwargs)
            leaves, objects = parted(flattened((args, kwargs))[0])
            inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if any(tensor.is_nested for tensor in inputs):
                if not self.shrunk:
                    return own_forward(module, REGION)(module, *args, **kwargs)
                return by_samples(lambda *args, **kwargs: self(module, args, kwargs), args, kwargs, self._named())
            hooks = inner_hooks(module)
            program = self.routing.search(self.specializations, module, (args, kwargs), hooks)
            behind = [path for path in backward_hooked(module) if not calls_itself(module.get_submodule(path))]
            before = [path for path in hooks if not calls_itself(module.get_submodule(path))]
            if (behind or (before and program is None)) and not self.shrunk:
                # Its own Python calls every hook, and at original sizes it can run.
                return own_forward(module, REGION)(module, *args, **kwargs)
            if behind:
                raise EcoSpaError(
                    f"`{join(self.name, behind[0])}` has a backward hook, but `{self.name or 'the model'}` has shrunk "
                    "and runs as one graph, in which it would not be called. Remove it, put it on an nn.Linear, on a "
                    "parameter or on the region, or compile with execution='module', whose own Python calls it"
                )
            if program is not None:
                self.routing.remember(key, module, program)
            else:
                program, why = self._captured(module, args, kwargs, key, torch.compiler.is_compiling())
                if program is None:
                    result = own_forward(module, REGION)(module, *args, **kwargs)
                    if why is not None:
                        self.leave(why)
                        self.routing.leave(key)
                    return result
        if objects:
            inputs = [*inputs, *(program.captured.carried.read(objects) or ()), *objects]
        if self.watcher is not None:
            return self.watcher(self, program, module, inputs)
        return self.program_here(program, module)(module, inputs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _captured(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], key: Any, compiling: bool
    ) -> tuple[Program | None, str | None]:
        """Capture a call that no program serves; torch.compile breaks off once for it, and reads nothing of this.

        Returns:
            The program, or None where the region's own Python serves the call; and why no call is captured from then on
            that none serves, once this one has run.
        """
        with alone() as waited:
            if waited:  # for another thread, which may have captured such a call
                program = self.routing.search(self.specializations, module, (args, kwargs), inner_hooks(module))
                if program is not None:
                    self.routing.remember(key, module, program)
                    return program, None
            return self._captured_alone(module, args, kwargs, key, compiling)

    def _captured_alone(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], key: Any, compiling: bool
    ) -> tuple[Program | None, str | None]:
        if self.shared_out is not None:
            self._check_numbers(module, self.shared_out.ranks)
        if compiling:
            check_not_recomputed(self._named())
        if self.shrunk:
            shrunk = self._add_shrunk(module, args, kwargs)
            for change in self._fills:
                make(change)
            self.routing.remember(key, module, shrunk)
            return shrunk, None
        program, why = self._add_or_none(module, args, kwargs)
        if program is None:
            if why is None and self.uncaptured is not None:
                self.routing.leave(key)
            return None, why
        if self.routing.changed_constant(self.specializations, module, program) is not None:
            return None, None  # it fills a cache, say, which its own Python does
        self.routing.remember(key, module, program)
        return program, None

    @property
    def shared_out(self) -> Share | None:
        """The part that this rank computes, unless it computes all now."""
        return self.share if self.share is not None and self.share.holds() else None

    def check_shared(self, module: nn.Module, model: nn.Module) -> None:
        """Refuse to shrink a region in which tensor parallelism has changed modules so that no graph can run.

        Args:
            module: the region.
            model: the model that it is a part of. Every rank must be here.

        Raises:
            WrapperError: it has.
        """
        check_served(self.name, module, model)
        if self.unshared is not None:
            raise WrapperError(self.unshared)
        if self.share is None and not fsdp_modules(model):  # FSDP2 gathers weights for a forward only
            self.share = share_of(self.name, module)

    def program_here(self, program: Program, module: nn.Module) -> Program:
        """Return the program of what this rank computes, for a program of the whole region."""
        share = self.shared_out
        if share is None:
            return program
        return share.program(program, self.state.plan, module, (each.program for each in self.specializations))

    def kept_here(self, program: Program, module: nn.Module) -> dict[Atom, Selected]:
        """Return what this rank computes of the plan, in atoms of one program's graph."""
        share = self.shared_out
        return self.kept(program) if share is None else share.kept(program, self.state.plan, module)

    @property
    def naming_graph(self) -> Specialization:
        """The first captured specialization, from which the names of couplings are taken."""
        return self.specializations[0]

    @property
    def offers(self) -> Offers:
        """The couplings that the region offers under the plan as it is now."""
        return Offers(
            self.name,
            self.state.plan,
            self.specializations,
            self.python_support,
            self.unsupported_marks,
            self.uncaptured,
            self._across(),
            self.state.shared_out,
        )

    def _across(self) -> dict[Atom, str]:
        """Return the atoms of the naming graph that are a coupling across regions, with its name."""
        if not self.border or not self.specializations:
            return {}
        joints, crossing = {joint.members[0]: joint.name for joint in self.state.joints}, {}
        for edge, of in self.border.along().items():
            expr = self.naming_graph.axis_facts.crossing.get(edge)
            if of in joints and expr is not None:
                crossing.update(dict.fromkeys(atoms_of(expr), joints[of]))
        return crossing

    @property
    def first_sizes(self) -> list[list[int]] | None:
        """The sizes of the tensors of the first call; None before it."""
        if self.called is None and self.specializations:
            return called_sizes(self.naming_graph.axis_facts)
        return self.called

    @property
    def shrunk(self) -> bool:
        """True if some weight in the region has lost entries, or a tensor that passes through it."""
        plan = self.state.plan
        return any(True for _ in plan.under(self.name)) or any(
            of in plan.kept for of in self.border.along().values() if of is not None
        )

    def kept(self, program: Program) -> dict[Atom, Selected]:
        """Return the plan, in atoms of one program's graph."""
        return replay(program.axis_facts, self.state.plan)

    def discovery_of(self, program: Program) -> Discovery:
        """Return the couplings and refusals of a program's graph."""
        return next(each.discovery for each in self.specializations if each.program is program)

    def program_for(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program, list[Tensor]]:
        """Return the program that serves a call, captured now if need be, and the tensors it takes."""
        program = self.routing.search(self.specializations, module, (args, kwargs), inner_hooks(module))
        program = program or self.add(module, args, kwargs)
        leaves, objects = parted(flattened(self._full_size(module, (args, kwargs)))[0])
        full_size = self._full_size_objects(objects)
        state = [place.find(full_size) for place in program.captured.carried.state]
        return program, [*(leaf for leaf in leaves if isinstance(leaf, Tensor)), *state]

    def _full_size(self, module: nn.Module, call: Call) -> Call:
        return full_size_call(call, own_forward(module, REGION), self.border, self.state.plan, self._named())

    def _full_size_objects(self, objects: Sequence[Any]) -> list[Any]:
        """Copy the objects of a call, with the tensors that programs have put there at their original sizes."""
        programs = [each.program for each in reversed(self.specializations)] if objects else []
        graphs = [(program.axis_facts, self.kept(program)) for program in programs]
        return whole_objects(objects, graphs, self.name or "the model")

    def _check_numbers(self, module: nn.Module, ranks: int) -> None:
        """Refuse integers that have been divided by a number of ranks: generated code follows shards by itself.

        Raises:
            WrapperError: there are such.
        """
        for each in self.specializations:
            divided = self.routing.divided_number(module, each.program, ranks)
            if divided is not None:
                raise WrapperError(
                    f"{self._named()} runs as generated code, which computes this rank's part by itself, and "
                    f"{divided}: leave such numbers as they were when the model was compiled, or use "
                    "execution='module'"
                )

    def _add_or_none(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program | None, str | None]:
        """Capture a call of a new signature; None for one that only the region's own Python can serve, and why.

        The region has not shrunk, so that its own Python is right.
        """
        if self.uncaptured is not None:  # another attempt would take long, and change nothing
            return None, None
        try:
            return self.add(module, args, kwargs), None
        except TooManyCallsError as error:  # it may be called in fewer ways by the time that it shrinks
            self._warn(str(error))
        except NotNowError:
            if not in_transform():
                raise
        except CaptureError as error:
            if not self.specializations and self.called is None:
                raise
            if not isinstance(error, FirstCallError):  # the next one may be captured
                return None, str(error)
        return None, None

    def _add_shrunk(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        try:
            program: Program = self.add(module, args, kwargs)
        except (NotNowError, TooManyCallsError):
            raise
        except CaptureError as error:
            named = self._named()
            if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
                raise CaptureError(self._opaque("torch.fx.symbolic_trace")) from error
            held = {name for name, _ in parameters_of(module)} | {name for name, _ in module.named_buffers()}
            if moved := [name for name in self.state.plan.under(self.name) if name not in held]:
                raise CaptureError(
                    f"{named} has shrunk, and its `{moved[0]}` is not there any more, as where a module was wrapped "
                    "(an adapter, a quantized layer). Wrap modules before `ecospa_fx.compile`, so that all shrinks "
                    "together, or compile with execution='module', whose modules have the sizes that are left; or wrap "
                    "those of ecospa_fx.restore(model), where its own Python can run with what is left"
                ) from error
            then = "if such a call is right, make it before the first shrink"
            then += "" if isinstance(error, FirstCallError) else ", which then leaves the region whole"
            raise CaptureError(
                f"{str(error).rstrip('.')}. {named[:1].upper()}{named[1:]} has shrunk, and its own Python is of the "
                f"original sizes: {then}{_FOR_TOOLS if inner_hooks(module) else ''}"
            ) from error
        return program

    def leave(self, why: str) -> None:
        """Leave the calls that no program serves to the region's own Python, from now on."""
        self._warn(why)
        self.uncaptured = why
        self.state.forget_couplings()

    def refuse_script(self) -> None:
        """Refuse torch.jit.script, which would compile the region's own Python.

        Raises:
            CaptureError: always.
        """
        raise CaptureError(self._opaque("torch.jit.script"))

    def _opaque(self, tracer: str) -> str:
        named = self._named()
        return (
            f"{named[:1].upper()}{named[1:]} runs as generated code, into which {tracer} does not look: use "
            "ecospa_fx.export, torch.export or torch.jit.trace, or compile with execution='module'"
        )

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            logger("recaptures").warning("%s runs its own Python from now on: %s", self._named(), why)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @alone()
    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        """Capture a call of a new signature at original sizes and replay the plan on it.

        Where tensor parallelism spreads the weights, each rank holds all of the region's meanwhile.
        """
        options = replace(self.state.options, gradients=torch.is_grad_enabled())
        with outside_forward(), gathered_here(module):
            return self._added(module, args, kwargs, options)

    def _added(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: CaptureOptions
    ) -> Program:
        if len(self.specializations) >= MOST_PROGRAMS:
            raise TooManyCallsError(
                f"{self._named()} has been called in {MOST_PROGRAMS} different ways, each with its own graph; "
                f"this call differs from the last: {self._difference(module, args, kwargs)}. Call it in fewer ways "
                "(pad to common lengths, pass the same arguments; put a number that changes from call to call into a "
                "tensor, an argument or a buffer, whose values are not part of a graph)"
            )
        if in_transform():
            raise NotNowError(
                f"{self._named()} is called in a new way inside a transform of torch.func, where nothing can be "
                "captured; call the model once with the same arguments before"
            )
        leaves, spec = flattened(outside_inference((args, kwargs)))
        leaves, objects = parted(leaves)
        if objects:
            full_size = self._full_size_objects(objects)
            args, kwargs = pytree.tree_unflatten([resolve_object(leaf, full_size) for leaf in leaves], spec)
        else:
            args, kwargs = pytree.tree_unflatten(leaves, spec)
        difference = self._difference(module, args, kwargs)
        args, kwargs = self._full_size(module, (args, kwargs))
        state = self.state
        filled = {key for each in self.specializations for key in keys_of(each.axis_facts, stored=True)}
        originals = FullSizeTensors(module, self.name, state.plan)
        moving = moving_buffers(module, set(state.plan.under(self.name)), self.specializations)
        how: dict[str, Any] = {
            "forward": own_forward(module, REGION), "originals": originals if originals.named else None,
            "filled": frozenset(filled), "moving": moving, "border": self.border, "options": options,
        }  # fmt: skip
        own_python = state.execution == "module"
        with original_numbers(module, self.name, state.attributes, originals) if own_python else nullcontext():
            numbered = self._with_numbers(module, (args, kwargs), how)
            if numbered is not None:
                return numbered
            analysis = analyse_once(module, self.name, (args, kwargs), self.shared_outside, state.captures, **how)
            if own_python and self.python_support is None:
                self.remember(analysis)
                with swapped(module, originals.values()):
                    self.add_other_mode(module)
                    self.follow(module, numbers_in(module))
                self.specializations = []
        if analysis.first_only is not None and self.shrunk:
            named = self._named()
            raise NotNowError(
                f"{named} sets `{analysis.filled[0].where}` in its first call of this kind, and {analysis.first_only}, "
                f"which its graph of later calls would not; {named} has shrunk, and its own Python is of the "
                "original sizes. Make such a call before the first shrink"
            )
        self._fills = analysis.filled
        number = len(self.specializations) + 1
        if number > 1:
            logger("recaptures").info("%s, graph %d: %s", self.name or "the model", number, difference)
        after = settled(self.name, module, self.specializations, state, [analysis])
        kept = replay(analysis.axis_facts, after.plan, difference)
        graphs = [(each.axis_facts, replay(each.axis_facts, after.plan)) for each in reversed(after.specializations)]
        check_state_layouts([*graphs, (analysis.axis_facts, kept)], difference)

        def take_up(journal: Journal) -> Program:
            journal.note_object(self)
            after.commit(state, journal)
            self.specializations = after.specializations
            return self.install(analysis, module, kept)

        return all_or_nothing(take_up)

    def _with_numbers(self, module: nn.Module, call: Call, settled: dict[str, Any]) -> Program | None:
        """Make inputs of the numbers by which alone a call differs from a captured one; None where that is not so."""
        hooks, training = inner_hooks(module), training_flags(module)
        for position, each in enumerate(self.specializations):
            if (
                not each.captured.serves(hooks, each.program.called)
                or each.captured.difference(call, module, training) is not None
            ):
                continue
            reads = self.routing.changed_numbers(module, each.program)
            if not reads or self._not_inputs & {read.where for read in reads}:
                continue
            captured = with_numbers(each.captured, module, call, reads, self.name, self.shared_outside, settled)
            if captured is None:
                self._not_inputs |= {read.where for read in reads}
                continue
            axis_facts = replace(each.axis_facts, captured=captured)
            program = rewrite(axis_facts, replay(axis_facts, self.state.plan), module)
            self.specializations[position] = Specialization(program, each.discovery)
            self.state.forget_couplings()
            logger("recaptures").info(
                "%s: %s is an input of the graph from now on", self._named(), ", ".join(read.where for read in reads)
            )
            return program
        return None

    def add_other_mode(self, module: nn.Module) -> None:
        """Capture the region in the other mode too, where its own Python, which runs in both, runs other ops."""
        facts, state = self.naming_graph.axis_facts, self.state
        moving = moving_buffers(module, set(state.plan.under(self.name)), self.specializations)
        with after_first_call(module, self._fills), outside_forward():
            found = other_mode(
                module, facts, own_forward(module, REGION), self.name, self.shared_outside, state.captures,
                state.options, moving,
            )  # fmt: skip
        if found is not None:
            self.settle_buffers(module, found)
            self.install(found, module, {})

    def follow(self, module: nn.Module, numbers: Set[tuple[type, str]]) -> None:
        """Find the couplings that its own Python can follow; `module` must have its original sizes."""
        graphs = [(each.axis_facts, each.discovery) for each in self.specializations]
        with after_first_call(module, self._fills):
            self.python_support = follow(module, graphs, own_forward(module, REGION), numbers)

    def follows_as(self, other: Region, module: nn.Module) -> bool:
        """Decide whether the Python support of `other` is that of this region too: same graphs, same integers."""
        graphs = [[each.captured.graph for each in region.specializations] for region in (self, other)]
        if len(graphs[0]) != len(graphs[1]) or any(a is not b for a, b in zip(*graphs, strict=True)):
            return False
        assert other.python_support is not None
        try:
            return all(a.read(module) == value for a, value in other.python_support.values({}).items())
        except AttributeError:
            return False

    def install(self, analysis: Analysis, module: nn.Module, kept: Selection) -> Program:
        """Add the program of an analysis."""
        program = rewrite(analysis.axis_facts, kept, module)
        self.remember(analysis, program)
        # Looks up the constants of the graph now: torch.compile would trace that look-up.
        self.routing.changed_constant(self.specializations, module, program)
        return program

    def settle_buffers(self, module: nn.Module, *more: Analysis) -> None:
        """Let buffers that one graph computes from parameters shrink with these in the graphs that only read them."""
        self.specializations = settled(self.name, module, self.specializations, self.state, more).specializations
        self.state.forget_couplings()

    def remember(self, analysis: Analysis, program: Program | None = None) -> None:
        """Add the specialization of an analysis; without a program it can be asked but not run."""
        program = program or Program(analysis.captured, analysis.axis_facts, None, (), "")
        self.specializations.append(Specialization(program, analysis.discovery))
        self._fills = analysis.filled
        self.state.forget_couplings()

    def _named(self) -> str:
        return f"region `{self.name}`" if self.name else "the model"

    def _difference(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Say how a call differs from the latest captured one."""
        if not self.specializations:
            return ""
        latest = self.specializations[-1].program
        changed = self.routing.changed_constant(self.specializations, module, latest)
        return changed or latest.captured.difference((args, kwargs), module, training_flags(module)) or ""
