"""Training state: the state of optimizers, schedules, scalers and generators, saved and restored.

optimizer.json   state by parameter name      scheduler.json   scaler.json   trainer.json   random.json   also.json

Each has its tensors beside it, in a safetensors file of the same name. packing.py defines the format of values.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.arguments import SEVERAL, STATEFUL
from ecospa_fx.errors import CheckpointError, EcoSpaError
from ecospa_fx.logs import logger
from ecospa_fx.model.lookup import check_optimizer
from ecospa_fx.passes.graph.tensors import parameters_of
from ecospa_fx.ranks.shards import is_sharded, split

from .directory import Draft, Save
from .packing import Packer, Unpacker
from .rng_state import random_state, set_random_state
from .sharded import own_random, read_shards

PARTS = ("optimizer", "scheduler", "scaler", "trainer", "also", "random")


@dataclass(frozen=True)
class Training:
    """The objects of a training loop beside the model.

    Attributes:
        optimizer: the optimizers.
        scheduler: the learning-rate schedulers.
        scaler: a gradient scaler, or None.
        trainer: an `EcoSpaTrainer`, or None.
        also: other objects by name, with `state_dict` and `load_state_dict`, and random number generators.
    """

    optimizer: Sequence[Optimizer] = ()
    scheduler: Sequence[Any] = ()
    scaler: Any = None
    trainer: Any = None
    also: Mapping[str, Any] = field(default_factory=dict)

    def stateful(self, part: str) -> dict[str, Any]:
        """Return the objects of one part by their names in errors."""
        objects = getattr(self, part)
        if isinstance(objects, Mapping):
            return {f"{part}[{name!r}]": each for name, each in objects.items()}
        if part in ("scaler", "trainer"):
            return {} if objects is None else {part: objects}
        return {part if len(objects) == 1 else f"{part}[{i}]": each for i, each in enumerate(objects)}


def as_tuple(objects: Any) -> tuple[Any, ...]:
    """Convert one object, several, or None to a tuple."""
    if objects is None:
        return ()
    several = SEVERAL.fits(objects) and not hasattr(objects, "state_dict")
    return tuple(objects) if several else (objects,)


def by_name(objects: Any) -> Mapping[str, Any]:
    """Name objects by their keys, or by their positions in a list."""
    return objects if isinstance(objects, Mapping) else {str(i): each for i, each in enumerate(as_tuple(objects))}


def write_training(draft: Draft, model: nn.Module, training: Training) -> None:
    """Write the state of a training loop.

    Raises:
        CheckpointError: some state has a type that only pickle could save.
        OptimizerError: an optimizer holds none of the model's parameters.
    """
    for part in PARTS:
        packer = Packer(draft.shards)
        if part == "random":
            document = {"random": packer.pack(random_state(), "random")}
        elif part == "optimizer":
            document = {n: _optimizer_state(model, o, n, packer) for n, o in training.stateful(part).items()}
        else:
            document = {
                name: {"class": type(owner).__name__, "state": packer.pack(_state_of(owner, name), name)}
                for name, owner in training.stateful(part).items()
            }
        if document:
            draft.document(f"{part}.json", document)
            if packer.tensors:
                draft.tensors(f"{part}.safetensors", packer.tensors)


def read_training(save: Save, training: Training, rng: bool, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Read the state of a training loop: part -> name of the object -> class and state.

    Args:
        save: the save.
        training: the objects whose state is wanted.
        rng: read the state of the global generators too.
        model: its parameters say how state is to be sharded that was.

    Raises:
        CheckpointError: the save lacks the state of an object, or has that of more optimizers or schedulers.
    """
    states = {}
    for part in PARTS:
        wanted = [part] if part == "random" else list(training.stateful(part))
        if not wanted or (part == "random" and not rng):
            continue
        file = own_random(save.files) if part == "random" else f"{part}.json"
        if file is None:
            logger("shrink").info("%s has no random numbers of this rank, which keeps its own", save.directory.parent)
            continue
        if file not in save.files:
            raise CheckpointError(f"{save.directory.parent} holds no {part} state: it was saved without {part}=")
        document = save.document(file)
        if part != "also" and wanted != list(document):
            raise CheckpointError(
                f"{save.directory.parent} holds the state of {_count(part, len(document))}, and resume was "
                f"given {len(wanted)}; pass as many as were saved, in the same order"
            )
        for name in wanted:
            if name not in document:
                raise CheckpointError(
                    f"{save.directory.parent} holds no state of {name}, only of {', '.join(document)}"
                )
        beside = f"{file.removesuffix('.json')}.safetensors"
        tensors = save.tensors(beside) if beside in save.files else {}
        shards = read_shards(save, _sharded_state(document, model)) if part == "optimizer" and save.sharded else {}
        unpacker = Unpacker(tensors, str(save.directory / file), shards)
        states[part] = {name: unpacker.unpack(document[name]) for name in wanted}
    for each in states.get("optimizer", {}).values():
        _split_state(each["state"], model)
    return states


def _split_state(state: dict[str, Any], model: nn.Module) -> None:
    """Shard state that one process wrote like its parameter, where it has its shape and this model is sharded."""
    parameters = dict(parameters_of(model, remove_duplicate=False))
    for name, entries in state.items():
        like = parameters.get(name)
        if like is None or not is_sharded(like) or not isinstance(entries, dict):
            continue
        for key, value in entries.items():
            if isinstance(value, Tensor) and not is_sharded(value) and value.shape == like.shape:
                entries[key] = split(value.to(like.device), like)


def _sharded_state(document: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return the names of the sharded tensors of optimizers -> the parameter of each."""
    parameters = dict(parameters_of(model, remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for optimizer in document.values():
        for name, entries in optimizer["state"].items():
            inside = [entries] if name in parameters else []
            while inside:
                each = inside.pop()
                inside += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
                if isinstance(each, dict) and isinstance(each.get("$shards"), str):
                    found[each["$shards"]] = parameters[name]
    return found


def resume_training(model: nn.Module, training: Training, saved: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Restore the state of all objects, or, if one of them does not take its state, of none.

    Raises:
        CheckpointError: the state is that of other objects.
        OptimizerError: an optimizer holds none of the model's parameters.
    """
    undos: list[Callable[[], None]] = []
    for name, apply, undo in _steps(model, training, saved, where):
        undos.append(undo)
        try:
            apply()
        except BaseException as error:
            for back in reversed(undos):
                with suppress(Exception):  # an object that takes no state at all has not changed either
                    back()
            if isinstance(error, CheckpointError) or not isinstance(error, Exception):
                raise
            problem = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{name} does not take the state in {where}: {problem}") from error


def _steps(
    model: nn.Module, training: Training, saved: Mapping[str, Mapping[str, Any]], where: str
) -> list[tuple[str, Callable[[], None], Callable[[], None]]]:
    """List the steps of a resume: name of the object, function that restores it, function that undoes that."""
    steps: list[tuple[str, Callable[[], None], Callable[[], None]]] = []
    for part in PARTS[:-1]:
        for name, owner in training.stateful(part).items():
            state = saved[part][name]
            _check_class(owner, state, name, where)
            try:
                if part == "optimizer":
                    steps.append((name, *_into_optimizer(model, owner, state, where)))
                    continue
                if part == "trainer":
                    _check_settings(owner, state["state"])
                before = copy.deepcopy(_state_of(owner, name))
                steps.append((name, partial(_set, owner, state["state"]), partial(_set, owner, before)))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                if isinstance(error, EcoSpaError):
                    raise
                problem = f"{type(error).__name__}: {error}"
                raise CheckpointError(f"{where} holds a malformed state for {name}: {problem}") from error
    if "random" in saved:
        now, then = random_state(), saved["random"]["random"]
        steps.append(("random", partial(set_random_state, then), partial(set_random_state, now)))
    return steps


def _count(part: str, number: int) -> str:
    return f"{number} {part}{'' if number == 1 else 's'}"


def _state_of(owner: Any, name: str) -> Any:
    if isinstance(owner, torch.Generator):
        return owner.get_state()
    if isinstance(owner, np.random.Generator):
        return owner.bit_generator.state
    if isinstance(owner, random.Random):
        return owner.getstate()
    if not STATEFUL.fits(owner):
        raise CheckpointError(f"{name} is a {type(owner).__name__}, which has no state_dict and load_state_dict")
    state = owner.state_dict()
    return dict(state) if isinstance(owner, nn.Module) else state


def _set(owner: Any, state: Any) -> None:
    if isinstance(owner, torch.Generator):
        owner.set_state(state)
    elif isinstance(owner, np.random.Generator):
        owner.bit_generator.state = state
    elif isinstance(owner, random.Random):
        owner.setstate(state)
    else:
        owner.load_state_dict(state)


def _check_class(owner: Any, state: Any, name: str, where: str) -> None:
    if not isinstance(state, dict) or "class" not in state:
        raise CheckpointError(f"{where} does not name the class of {name}")
    if state["class"] != type(owner).__name__:
        raise CheckpointError(f"{where} holds state of {state['class']}, not of {type(owner).__name__}")


def _check_settings(trainer: Any, state: Mapping[str, Any]) -> None:
    """Check that a trainer has the saved settings: with others it has another schedule.

    Raises:
        CheckpointError: a setting differs.
    """
    mine, saved = trainer.state_dict().get("settings", {}), state.get("settings", {})
    for key in sorted({*mine, *saved}):
        a, b = mine.get(key), saved.get(key)
        if (list(a) if isinstance(a, tuple) else a) != (list(b) if isinstance(b, tuple) else b):
            raise CheckpointError(
                f"the trainer has {key}={a!r} and the saved one {key}={b!r}; make it with the same settings, or omit "
                "trainer= to begin a new schedule"
            )


def _optimizer_state(model: nn.Module, optimizer: Optimizer, where: str, packer: Packer) -> dict[str, Any]:
    """Return the state_dict of an optimizer, by parameter name."""
    check_optimizer(model, optimizer)
    state = optimizer.state_dict()
    names = _names(model, optimizer)
    of = dict(zip((i for group in state["param_groups"] for i in group["params"]), names, strict=True))
    shapes = {n: list(p.shape) for n, p in zip(names, _parameters(optimizer), strict=True)}
    return {
        "class": type(optimizer).__name__,
        "shapes": shapes,
        "groups": [
            {
                "parameters": [of[i] for i in group["params"]],
                "options": packer.pack({k: v for k, v in group.items() if k != "params"}, f"{where}/groups/{n}"),
            }
            for n, group in enumerate(state["param_groups"])
        ],
        "state": {of[i]: packer.pack(entries, f"{where}/{of[i]}") for i, entries in state["state"].items() if i in of},
        "more": packer.pack({k: v for k, v in state["state"].items() if k not in of}, f"{where}/more"),
        "rest": packer.pack({k: v for k, v in state.items() if k not in ("state", "param_groups")}, f"{where}/rest"),
    }


def _into_optimizer(
    model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any], where: str
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Check the state of an optimizer, and return the function that restores it and the one that undoes that."""
    check_optimizer(model, optimizer)
    names, parameters = _names(model, optimizer), _parameters(optimizer)
    groups = [group["parameters"] for group in saved["groups"]]
    each = iter(names)
    here = [[next(each) for _ in group["params"]] for group in optimizer.param_groups]
    if here != groups:
        sizes = [len(group) for group in here], [len(group) for group in groups]
        raise CheckpointError(
            f"the optimizer groups parameters differently from the saved one: {len(here)} groups of {sizes[0]} "
            f"parameters, saved {sizes[1]}{_first_difference(here, groups) if sizes[0] == sizes[1] else ''}"
        )
    for name, parameter in zip(names, parameters, strict=True):
        if list(parameter.shape) != saved["shapes"].get(name):
            raise CheckpointError(
                f"{where} holds optimizer state of `{name}` at {tuple(saved['shapes'].get(name) or ())}, and it is "
                f"{tuple(parameter.shape)} here; load the model from the same save"
            )
    index = {name: i for i, name in enumerate(names)}
    for name in saved["state"]:
        if name not in index:
            raise CheckpointError(f"{where} holds optimizer state of `{name}`, which this optimizer does not have")
    numbers = [[index[name] for name in group] for group in groups]
    exact = {index[name]: entries for name, entries in saved["state"].items()}
    state = {
        **saved["rest"],
        "state": {**exact, **saved["more"]},
        "param_groups": [
            {**{k: _like(v, mine.get(k)) for k, v in group["options"].items()}, "params": params}
            for group, mine, params in zip(saved["groups"], optimizer.param_groups, numbers, strict=True)
        ],
    }
    before = {"state": optimizer.state, "param_groups": optimizer.param_groups}

    def apply() -> None:
        optimizer.load_state_dict(state)
        if type(optimizer).load_state_dict is Optimizer.load_state_dict:
            # It casts state to the dtype of the parameter, whatever dtype the state had.
            for i, entries in exact.items():
                placed = optimizer.state[parameters[i]]
                for key, value in entries.items():
                    placed[key] = _like(value, placed.get(key))

    return apply, lambda: optimizer.__dict__.update(before)


def _like(value: Any, placed: Any) -> Any:
    """Return a value bit for bit, its tensors on the devices of those in `placed`."""
    if isinstance(value, Tensor):
        return value.to(placed.device) if isinstance(placed, Tensor) else value
    if isinstance(value, dict) and isinstance(placed, dict):
        return {key: _like(entry, placed.get(key)) for key, entry in value.items()}
    if isinstance(value, (list, tuple)) and isinstance(placed, (list, tuple)) and len(value) == len(placed):
        return type(value)(_like(a, b) for a, b in zip(value, placed, strict=True))
    return value


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Return the names of an optimizer's parameters; one that is not in the model is named by its position."""
    names = {id(p): name for name, p in parameters_of(model)}
    return [
        names.get(id(p), f"[{i}][{j}]")
        for i, group in enumerate(optimizer.param_groups)
        for j, p in enumerate(group["params"])
    ]


def _first_difference(here: list[list[str]], saved: list[list[str]]) -> str:
    pairs = ((a, b) for mine, theirs in zip(here, saved, strict=True) for a, b in zip(mine, theirs, strict=True))
    a, b = next((a, b) for a, b in pairs if a != b)
    return f"; the first that differs is `{a}`, saved `{b}`"
