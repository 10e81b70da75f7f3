"""save_pretrained, from_pretrained: a shrunk transformers model in the layout of transformers.

config.json, model.safetensors or its shards, ...   as transformers writes them
ecospa_fx.json                                      the plan, and what else it takes to go on

Where a configuration can say what is left (a smaller number for every layer alike, or `per_layer_config` where a
model's classes read it), config.json says it, and plain `AutoModel.from_pretrained` loads the model as well.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ecospa_fx.checkpoint.directory import write_text
from ecospa_fx.checkpoint.metadata import about_execution, check_about
from ecospa_fx.checkpoint.rebuild import attached
from ecospa_fx.errors import CheckpointError, EcoSpaError
from ecospa_fx.json_text import parse_json, format_json
from ecospa_fx.model.compiled import MODEL, CompiledModel
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.plan import Plan

FILE, FORMAT = "ecospa_fx.json", 1

NamedShapes = dict[str, tuple[int, ...]]


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str], **options: Any) -> str | None:
    """Write a compiled transformers model as `model.save_pretrained` does, and beside it what is left of it.

    Args:
        model: a compiled model of transformers.
        directory: where.
        options: of `model.save_pretrained`.

    Returns:
        None where plain `from_pretrained` of transformers loads it too; else why only `ecospa_fx.from_pretrained` does.

    Raises:
        EcoSpaError: it is not compiled, or not of transformers.
    """
    compiled: CompiledModel | None = model.__dict__.get(MODEL)
    if compiled is None:
        raise EcoSpaError(f"{type(model).__name__} is not compiled; call ecospa_fx.compile(model) first")
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise EcoSpaError(
            f"{type(model).__name__} is no model of transformers: it has no save_pretrained; use ecospa_fx.save"
        )
    writable: Any = model
    found = configuration_for(model, compiled)
    own = writable.config
    try:
        writable.config = own if isinstance(found, str) else found
        writable.save_pretrained(directory, **options)
    finally:
        writable.config = own
    about = {
        "format": FORMAT,
        "class": type(model).__name__,
        "plan": json.loads(compiled.plan.to_json()),
        **about_execution(compiled),
    }
    write_text(Path(directory) / FILE, format_json(about))
    return found if isinstance(found, str) else None


def from_pretrained(directory: str | os.PathLike[str], **options: Any) -> Any:
    """The model that `save_pretrained` wrote, compiled and at the sizes it was saved at.

    Args:
        directory: where.
        options: of `from_pretrained` of the model's class: `dtype`, `device_map`, `attn_implementation`, ...

    Raises:
        CheckpointError: the directory holds none, or what it says contradicts itself.
    """
    import transformers

    source = Path(directory)
    path = source / FILE
    if not path.is_file():
        raise CheckpointError(f"{source} holds no {FILE}: it was not written by ecospa_fx.save_pretrained")
    about = parse_json(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        given = about.get("format") if isinstance(about, dict) else None
        raise CheckpointError(f"{path} has format {given!r}; this version of ecospa_fx reads {FORMAT}")
    name = about.get("class")
    cls: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise CheckpointError(f"{path} names a class {name!s:.60} that transformers does not have")
    plan = Plan.from_json(json.dumps(about.get("plan")))
    attributes = check_about(about, str(path))

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super(made, self).__init__(config, *args, **kwargs)
        _resize(self, plan, str(path))

    # Weights are loaded into what the constructor makes, so that is where sizes must be those that are left.
    body = {"__init__": init, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    made: Any = type(cls.__name__, (cls,), body)
    model = made.from_pretrained(source, **options)
    model.__class__ = cls
    attached(model, about, plan, attributes)
    return model


def _resize(model: nn.Module, plan: Plan, where: str) -> None:
    held, done = named_tensors(model), set[int]()
    for name, original in plan.original_shapes.items():
        if name not in held:
            raise CheckpointError(f"{where} shrinks `{name}`, which a {type(model).__name__} does not have")
        tensor, shape = held[name], plan.shape(name)
        if id(tensor) in done or tuple(tensor.shape) == shape:
            continue
        done.add(id(tensor))
        if tuple(tensor.shape) != original:
            raise CheckpointError(
                f"`{name}` was {original} when saved and is {tuple(tensor.shape)} in a model of this config.json"
            )
        value = tensor.data
        for dim in range(value.ndim):
            if (name, dim) in plan.kept:
                value = value.index_select(dim, plan.kept[name, dim].to(value.device))
        tensor.data = value


def configuration_for(model: nn.Module, compiled: CompiledModel) -> Any:
    """A configuration from which transformers makes the model at the sizes it has now; or why there is none."""
    config: Any = getattr(model, "config")  # noqa: B009
    if not compiled.plan.original_shapes:
        return config
    kind = type(model).__name__
    if compiled.execution == "graph":
        return (
            f"this {kind} runs as graphs, and what has shrunk may be what its own Python cannot run; compile it with "
            "execution='module' to keep to what it can"
        )
    wanted = {name: tuple(t.shape) for name, t in named_tensors(model).items()}
    fields = {name: v for name, v in vars(config).items() if type(v) is int and v > 1 and not name.startswith("_")}
    best = copy.deepcopy(config)
    wrong = differing(model, best, wanted)
    for proposals in (_for_all(fields, compiled.plan), _per_layer(fields, compiled.plan)):
        for change in proposals:
            if not wrong:
                return best
            trial = copy.deepcopy(best)
            change(trial)
            now = differing(model, trial, wanted)
            if len(now) < len(wrong):
                best, wrong = trial, now
    if not wrong:
        return best
    first = sorted(wrong)[0]
    return (
        f"a {type(config).__name__} cannot say what is left of this {kind}: `{first}` is {wanted[first]}, and no "
        "number in it, for all layers or for one, makes it so; plain from_pretrained of transformers cannot load it, "
        "ecospa_fx.from_pretrained can"
    )


def _for_all(fields: Mapping[str, int], plan: Plan) -> Iterator[Any]:
    """Changes of one number for all layers."""
    for field, value in fields.items():
        for new in sorted(_proportional(value, plan, plan.original_shapes)):

            def change(config: Any, field: str = field, new: int = new) -> None:
                setattr(config, field, new)

            yield change


def _per_layer(fields: Mapping[str, int], plan: Plan) -> Iterator[Any]:
    """Changes of one number for every layer its own."""
    layers: dict[int, list[str]] = {}
    for name in plan.original_shapes:
        number = re.search(r"\.(\d+)\.", name)
        if number:
            layers.setdefault(int(number.group(1)), []).append(name)
    for field, value in fields.items():
        choices = {layer: _proportional(value, plan, names) for layer, names in layers.items()}
        # One entry of an axis is what the others of a layer are counted against: the smallest and the largest share.
        for pick in (min, max):
            values = {layer: pick(found) for layer, found in choices.items() if found}

            def change(config: Any, field: str = field, values: Mapping[int, int] = values) -> None:
                held = getattr(config, "_heterogeneity_spec", None)
                overrides = {k: dict(v) for k, v in (held.per_layer_overrides if held else {}).items()}
                for layer, new in values.items():
                    overrides.setdefault(layer, {})[field] = new
                config.per_layer_config = overrides

            yield change


def _proportional(value: int, plan: Plan, names: Any) -> set[int]:
    """What a number may have become, if it is proportional to a dim that has shrunk."""
    found = set()
    for name in names:
        for before, after in zip(plan.original_shapes[name], plan.shape(name), strict=True):
            if before != after and value * after % before == 0:
                found.add(value * after // before)
    return found


def differing(model: nn.Module, config: Any, wanted: NamedShapes) -> set[str]:
    """The names whose shapes differ in a model that is made from a configuration; all where none can be made."""
    cls: Any = type(model)
    try:
        with torch.device("meta"):
            made = cls(copy.deepcopy(config))
    except Exception:  # a configuration may refuse its numbers in any way
        return set(wanted)
    shapes = {name: tuple(t.shape) for name, t in named_tensors(made).items()}
    return {name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name)}
