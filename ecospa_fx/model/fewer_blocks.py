"""Fewer blocks: a compiled model without those blocks of its lists that return what they are given.

    empty_blocks     blocks with no entry left in any coupling that may go, and what each adds: nothing, or a constant
    without_empty    a twin of the model, with the same tensors, in whose lists they are not, and a configuration that
                     makes it: lists are found by structure, numbers in the configuration by value and trial

The model itself stays as it is: its programs run nothing of such a block, and its plan tells the names of all weights.
A constant, such as the biases of both sublayers, goes into a bias of the block before.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ecospa_fx.passes.capture.compare_eager import TOLERANCE, relative_error
from ecospa_fx.passes.follow.attributes import sizes_of_layer
from ecospa_fx.passes.follow.trial import example_calls, in_eval_mode
from ecospa_fx.passes.graph.isolate import forked_rng, isolated, seed
from ecospa_fx.passes.graph.tensors import as_held, join, named_tensors, parameters_of, swapped
from ecospa_fx.plan import Plan

from .class_swap import original_class
from .compiled import MODEL, CompiledModel
from .configured import changed, numbers_of
from .made_values import tensors_in
from .making import unheard

Lists = Mapping[str, tuple[int, ...]]  # path of a list of blocks -> the positions of those that are gone


@dataclass(frozen=True, eq=False)
class FewerBlocks:
    """A twin of a compiled model without some blocks.

    Attributes:
        model: the twin. It holds the tensors of the model, and is there to be described and saved, not to train.
        compiled: its state.
        lists: the lists that blocks are gone from.
        original: the model that it is a twin of.
    """

    model: nn.Module
    compiled: CompiledModel
    lists: Lists
    original: nn.Module

    def originals(self) -> dict[str, str]:
        """Return the name in the model of each coupling of the twin, by its name there."""
        theirs: CompiledModel = self.original.__dict__[MODEL]
        names = {renamed(coupling.name, self.lists): coupling.name for coupling in theirs.couplings()}
        return {new: name for new, name in names.items() if new is not None}


def renamed(name: str, lists: Lists) -> str | None:
    """Return a name of a module or tensor once blocks are gone; None if it is in one of them."""
    for path, gone in lists.items():
        if name.startswith(f"{path}."):
            number, *rest = name.removeprefix(f"{path}.").split(".")
            if not number.isdecimal():
                continue
            if int(number) in gone:
                return None
            name = ".".join([path, str(int(number) - sum(each < int(number) for each in gone)), *rest])
    return name


def without_empty(model: nn.Module, compiled: CompiledModel) -> FewerBlocks | str | None:
    """Return a twin of a model of transformers without its empty blocks, or why there is none; None if none is empty.

    The twin's configuration has the original sizes, and makes its class with as many blocks.
    """
    candidates = _candidates(model, compiled)
    if not candidates:
        return None
    if compiled.state.joints:
        return "blocks of a model that is compiled with regions='joined' stay in their lists"
    if any(p.is_meta for p in model.parameters()):
        return "what its empty blocks add cannot be seen: its weights have no values"
    shifts: dict[str, Tensor] = {}
    for path, gone in candidates.items():
        for number in gone:
            constant = _added(model, compiled, f"{path}.{number}")
            if isinstance(constant, str):
                return f"`{path}.{number}` stays in its list: {constant}"
            if bool(constant.any()):
                why = _into_the_block_before(model, compiled, path, number, gone, constant, shifts)
                if why is not None:
                    return f"`{path}.{number}` stays in its list: {why}"
    config = _with_fewer(model, compiled, candidates)
    if isinstance(config, str):
        return config
    return FewerBlocks(*_twin(model, compiled, candidates, shifts, config), candidates, model)


def _candidates(model: nn.Module, compiled: CompiledModel) -> dict[str, tuple[int, ...]]:
    """Find the blocks of lists of alike blocks that have lost all that they may lose."""
    tensors = named_tensors(model)
    alive: dict[str, bool] = {}  # a coupling that may lose all, by any of its parameters -> whether it has an entry
    for coupling in compiled.couplings():
        if coupling.last_stays is None:
            left = bool(coupling.size) and all(tensors[m.parameter].numel() for m in coupling.members if m.matrix)
            alive |= {m.parameter: alive.get(m.parameter, False) or left for m in coupling.members}
    found: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2 or not path:
            continue
        if len({original_class(block) for block in module}) > 1:
            continue
        gone = []
        for number in range(len(module)):
            inside = [left for name, left in alive.items() if name.startswith(f"{path}.{number}.")]
            if inside and not any(inside):
                gone.append(number)
        within = any(path.startswith(f"{outer}.{number}.") for outer, out in found.items() for number in out)
        if gone and not within:
            found[path] = tuple(gone)
    return found


def _results(compiled: CompiledModel, model: nn.Module, path: str) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Run the program of a block; yield what comes in and what goes out, for each graph of it."""
    module = model.get_submodule(path)
    for each in compiled.regions[path].specializations:
        program = each.program
        for args, kwargs in example_calls(each.axis_facts):
            inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            with torch.no_grad(), isolated(module):
                seed(0)
                try:
                    results = program.run(module, *(t.clone() for t in inputs), *program.constants)
                except Exception:  # values that were made up may be none that it takes
                    continue
            yield inputs, [each for each in results if isinstance(each, Tensor)]
            break


def _added(model: nn.Module, compiled: CompiledModel, path: str) -> Tensor | str:
    """Return the constant that a block adds to its input, `[features]`; or say what else it does."""
    if path not in compiled.regions or not compiled.regions[path].specializations:
        return "it is not captured as a region of its own, so that what it does cannot be seen alone"
    constant: Tensor | None = None
    for inputs, results in _results(compiled, model, path):
        if not results or results[0].ndim < 2:
            return "it returns no stream of features"
        stream = next((t for t in inputs if t.shape == results[0].shape and t.dtype == results[0].dtype), None)
        if stream is None:
            return "what it returns has another shape than what it is given"
        rest = (results[0] - stream).flatten(0, -2)
        if relative_error(stream + rest[0], results[0]) > TOLERANCE.get(stream.dtype, 0.0):
            return "without its sublayers it still does more than to add a constant, such as to normalise"
        constant = rest[0]
    return "it could not be run alone" if constant is None else constant


def _into_the_block_before(
    model: nn.Module, compiled: CompiledModel, path: str, number: int, gone: Sequence[int], constant: Tensor,
    shifts: dict[str, Tensor],
) -> str | None:  # fmt: skip
    """Find a bias of the block before that can take a constant, by trial, and note it; or say why there is none."""
    before = next((n for n in reversed(range(number)) if n not in gone), None)
    if before is None:
        return "it adds a constant, its biases, and no block comes before it that could"
    block = f"{path}.{before}"
    module = model.get_submodule(block)
    biases = [name for name, p in parameters_of(module) if tuple(p.shape) == tuple(constant.shape)]
    plain = list(_results(compiled, model, block))
    for name in reversed(biases):
        shifted = {name: module.get_parameter(name).detach() + constant}
        with swapped(module, as_held(module, shifted)):
            other = list(_results(compiled, model, block))
        if plain and all(
            relative_error(out[0] + constant, moved[0]) <= TOLERANCE.get(constant.dtype, 0.0)
            for (_, out), (_, moved) in zip(plain, other, strict=True)
        ):
            shifts[join(block, name)] = shifts.get(join(block, name), torch.zeros_like(constant)) + constant
            return None
    return f"it adds a constant, its biases, and no bias of `{block}` can take that over"


def _with_fewer(model: nn.Module, compiled: CompiledModel, lists: Lists) -> Any:
    """Return a configuration that makes a model with fewer blocks and else the same, at original sizes; or why none."""
    config: Any = getattr(model, "config")  # noqa: B009
    done: dict[str, tuple[int, ...]] = {}
    for path, gone in lists.items():
        count = len(_blocks(model, path))
        if len(gone) == count:
            return f"all blocks of `{path}` are empty, and no configuration has none"
        done[path] = gone
        wanted = _original_shapes(model, compiled.plan, done)
        proposals = [
            _proposal(config, where, count, gone, drop, move)
            for where, value in numbers_of(config)
            if value == count
            for drop, move in itertools.product((True, False), repeat=2)
        ]
        found = next((each for each in proposals if _fits(model, compiled, each, wanted, path, gone)), None)
        if found is None:
            return (
                f"no number of this {type(config).__name__} makes `{path}` {count - len(gone)} blocks long, which are "
                f"as those that are left of {count}, and all else as it is"
            )
        config = found
    return config


def _original_shapes(model: nn.Module, plan: Plan, lists: Lists) -> dict[str, tuple[int, ...]]:
    """Return the shapes before any shrink of all tensors that are not in blocks that are gone, by their new names."""
    tensors = named_tensors(model)
    names = {id(tensors[name]): name for name in plan.original_shapes}
    found = {}
    for name, tensor in tensors.items():
        new, planned = renamed(name, lists), names.get(id(tensor))
        if new is not None:
            found[new] = tuple(tensor.shape) if planned is None else plan.original_shapes[planned]
    return found


def _blocks(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path)


def _proposal(config: Any, where: Sequence[str | int], count: int, gone: Sequence[int], drop: bool, move: bool) -> Any:
    """Return a copy of a configuration with fewer blocks.

    Args:
        config: the configuration.
        where: the way to the number of blocks.
        count: that number.
        gone: positions of the blocks.
        drop: lists of so many items lose those of the blocks.
        move: lists of positions of blocks, by which some are of another sort, follow.
    """
    other = changed(config, {tuple(where): count - len(gone)})
    owner = other
    for name in where[:-1]:
        owner = owner[name] if isinstance(name, int) else getattr(owner, name)
    for name, value in list(getattr(owner, "__dict__", {}).items()):
        if type(value) not in (list, tuple) or name[:1] == "_":
            continue
        if drop and len(value) == count:
            setattr(owner, name, type(value)(item for i, item in enumerate(value) if i not in gone))
        elif move and value and all(type(item) is int and 0 <= item < count for item in value):
            left = (item - sum(each < item for each in gone) for item in value if item not in gone)
            setattr(owner, name, type(value)(left))
    return other


def _made(model: nn.Module, config: Any) -> nn.Module | None:
    cls: Any = original_class(model)
    try:
        with torch.device("meta"), unheard():
            if hasattr(config, "validate"):
                config.validate()
            made: nn.Module = cls(copy.deepcopy(config))
    except Exception:  # it may refuse its numbers in any way
        return None
    return made


def _fits(
    model: nn.Module, compiled: CompiledModel, config: Any, wanted: Mapping[str, tuple[int, ...]], path: str,
    gone: Sequence[int],
) -> bool:  # fmt: skip
    """Decide whether a configuration makes a list without some blocks, of the sort of those that are left.

    What blocks differ in among themselves (a window of attention, say) must have come along to the new places, but for
    their numbers in the list.
    """
    made = _made(model, config)
    if made is None or {name: tuple(t.shape) for name, t in named_tensors(made).items()} != wanted:
        return False
    blocks, others = _blocks(model, path), _blocks(made, path)
    kept = [number for number in range(len(blocks)) if number not in gone]
    values = [_plain_values(block, compiled, f"{path}.{number}") for number, block in enumerate(blocks)]
    theirs = [_plain_values(block) for block in others]
    for key in {key for each in values for key in each}:
        of_each = [each.get(key) for each in values]
        if all(value == of_each[0] for value in of_each):
            continue
        counts = all(type(value) is int and value - number == of_each[0] for number, value in enumerate(of_each))
        for new, old in enumerate(kept):
            if theirs[new].get(key) != of_each[new if counts else old]:
                return False
    return True


def _plain_values(
    block: nn.Module, compiled: CompiledModel | None = None, where: str = ""
) -> dict[tuple[str, str], Any]:
    """Return the numbers, flags and words that the modules of a block hold, but for sizes of layers.

    Args:
        block: the block.
        compiled: the state of its model, where integers may have followed a shrink: they are as they were before.
        where: its path in the model.
    """
    before = {} if compiled is None else {(a.module, a.name): was for a, (was, _) in compiled.attributes.items()}
    return {
        (path, name): before.get((join(where, path) if path else where, name), value)
        for path, module in block.named_modules()
        for name, value in module.__dict__.items()
        if name[:1] != "_" and name != "training" and (value is None or type(value) in (int, float, bool, str))
        and not isinstance(module, nn.Linear) and name not in sizes_of_layer(module)
    }  # fmt: skip


def _twin(
    model: nn.Module, compiled: CompiledModel, lists: Lists, shifts: Mapping[str, Tensor], config: Any
) -> tuple[nn.Module, CompiledModel]:
    """Copy a model without the blocks, its tensors shared, and its compiled state under the new names."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in named_tensors(model).values()}
    memo[id(getattr(model, "config"))] = config  # noqa: B009
    twin = copy.deepcopy(model, memo)
    for name, constant in shifts.items():
        owner, _, last = name.rpartition(".")
        before = twin.get_parameter(name)
        setattr(twin.get_submodule(owner), last, nn.Parameter(before.detach() + constant, before.requires_grad))
    for path, gone in lists.items():
        blocks: Any = twin.get_submodule(path)
        for number in reversed(gone):
            del blocks[number]
    state = twin.__dict__[MODEL]
    plan = compiled.plan
    names = {name: new for name in plan.original_shapes if (new := renamed(name, lists)) is not None}
    smaller = Plan(
        {(names[name], dim): kept for (name, dim), kept in plan.kept.items() if name in names},
        {new: plan.original_shapes[name] for name, new in names.items()},
    )
    attributes = {
        replace(a, module=new): change
        for a, change in compiled.attributes.items()
        if (new := renamed(a.module, lists)) is not None
    }
    state.state.adopt(smaller, attributes)
    regions = {}
    for name, region in state.regions.items():
        new = renamed(name, lists)
        if new is not None:
            region.name = new
            regions[new] = region
    state.regions = regions
    state.not_captured = {n: why for name, why in state.not_captured.items() if (n := renamed(name, lists)) is not None}
    return twin, state


def difference_as_a_whole(model: nn.Module, compiled: CompiledModel, fewer: FewerBlocks, made: nn.Module) -> str | None:
    """Say how a model that was made, with the weights of a twin, returns something else than the model of that twin.

    Between blocks a model's own Python runs, which may count them.
    """
    call = compiled.state.call
    if call is None:
        return "it has not been called as a whole with tensors and plain values only, so that no call can be compared"
    args, kwargs = call.example()
    theirs = {n: t for n, t in named_tensors(fewer.model).items() if n in named_tensors(made)}
    persistent = made.state_dict(keep_vars=True).keys() | {name for name, _ in parameters_of(made)}
    theirs = {name: tensor for name, tensor in theirs.items() if name in persistent}
    with torch.no_grad(), forked_rng(model), in_eval_mode(model), in_eval_mode(made):
        seed(0)
        expected = tensors_in(model(*args, **kwargs))
        args, kwargs = call.example()
        with swapped(made, as_held(made, theirs)):
            try:
                found = tensors_in(made(*args, **kwargs))
            except Exception as error:  # its own Python, which may raise anything
                return f"with fewer blocks it fails: {str(error).strip().splitlines()[0]:.100}"
    if len(found) != len(expected):
        return f"with fewer blocks it returns {len(found)} tensors and not {len(expected)}"
    for mine, other in zip(expected, found, strict=True):
        difference = relative_error(mine, other)
        if not difference <= TOLERANCE.get(mine.dtype, 0.0):
            return f"with fewer blocks it returns results that differ by {difference:.1e}"
    return None
