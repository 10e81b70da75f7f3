"""Pretrained directories: a shrunk transformers model in the layout of transformers.

config.json, model.safetensors or its shards, ...   as transformers writes them
ecospa_fx.json                                      the plan, and the rest of the compiled state

If a configuration can express the sizes now (a smaller number for all layers alike, or `per_layer_config` if the
model's classes read it), config.json has it, and plain `AutoModel.from_pretrained` loads the model as well.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ecospa_fx.arguments import MODULE, PATH, takes
from ecospa_fx.checkpoint.directory import write_text
from ecospa_fx.checkpoint.metadata import check_execution, describe_execution
from ecospa_fx.checkpoint.rebuild import attach_compiled
from ecospa_fx.errors import CheckpointError, EcoSpaError
from ecospa_fx.json_text import format_json, parse_json
from ecospa_fx.model.class_swap import original_class
from ecospa_fx.model.compiled import CompiledModel
from ecospa_fx.model.configured import configuration_at
from ecospa_fx.model.fewer_blocks import difference_as_a_whole, without_empty
from ecospa_fx.model.lookup import check_whole, compiled_state
from ecospa_fx.model.made_values import difference_of_made
from ecospa_fx.model.making import unheard
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.plan import Plan
from ecospa_fx.ranks.wrappers import looks_inside

FILE, FORMAT = "ecospa_fx.json", 1

NamedShapes = dict[str, tuple[int, ...]]


@takes(model=MODULE, directory=PATH)
@looks_inside
def save_pretrained(model: nn.Module, directory: str | os.PathLike[str], **options: Any) -> str | None:
    """Write a compiled transformers model as `model.save_pretrained` does, and its plan beside it.

    Args:
        model: a compiled model of transformers.
        directory: the directory.
        options: options of `model.save_pretrained`.

    Returns:
        None if plain `from_pretrained` of transformers loads it too; else why only `ecospa_fx.from_pretrained` does.

    Raises:
        EcoSpaError: the model is not compiled, or not of transformers.
    """
    compiled = compiled_state(model)
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise EcoSpaError(
            f"{type(model).__name__} is not a model of transformers: it has no save_pretrained; use ecospa_fx.save"
        )
    if "state_dict" not in options:
        check_whole(model, "save_pretrained without state_dict=")
    config = configuration_for(model, compiled)
    if isinstance(config, str) and "state_dict" not in options:
        fewer = _without_empty_blocks(model, compiled)
        if isinstance(fewer, str):
            config = f"{fewer}; {config}"
        elif fewer is not None:
            model, compiled, config = fewer
    writable: Any = model
    original = writable.config
    try:
        writable.config = original if isinstance(config, str) else config
        writable.save_pretrained(directory, **options)
    finally:
        writable.config = original
    about = {
        "format": FORMAT,
        "class": original_class(model).__name__,
        "plan": json.loads(compiled.plan.to_json()),
        **describe_execution(compiled),
    }
    if compiled.execution == "graph" and config is not original and not isinstance(config, str):
        about["config"] = json.loads(original.to_json_string(use_diff=False))  # graphs are captured at original sizes
    write_text(Path(directory) / FILE, format_json(about))
    return config if isinstance(config, str) else None


@takes(directory=PATH)
def from_pretrained(directory: str | os.PathLike[str], **options: Any) -> Any:
    """Load a model that `save_pretrained` wrote, compiled and at the sizes at which it was saved.

    Args:
        directory: the directory.
        options: options of `from_pretrained` of the model's class: `dtype`, `device_map`, `attn_implementation`, ...

    Raises:
        CheckpointError: the directory holds no such model, or its files contradict each other.
    """
    import transformers

    source = Path(directory)
    path = source / FILE
    if not path.is_file():
        raise CheckpointError(f"{source} has no {FILE}: it was not written by ecospa_fx.save_pretrained")
    about = parse_json(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        version = about.get("format") if isinstance(about, dict) else None
        raise CheckpointError(f"{path} has format {version!r}; this version of ecospa_fx reads {FORMAT}")
    name = about.get("class")
    cls: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise CheckpointError(f"{path} names a class {name!s:.60} that transformers does not have")
    kind: Any = cls
    plan = Plan.from_json(json.dumps(about.get("plan")))
    attributes = check_execution(about, str(path))

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super(resized, self).__init__(config, *args, **kwargs)
        _resize(self, plan, str(path))

    if isinstance(about.get("config"), dict):
        options.setdefault("config", kind.config_class.from_dict(about["config"]))
    # transformers loads weights into the tensors that the constructor makes, so these must have the small sizes.
    body = {"__init__": init, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    resized: Any = type(cls.__name__, (cls,), body)
    model = resized.from_pretrained(source, **options)
    model.__class__ = cls
    attach_compiled(model, about, plan, attributes)
    return model


def _resize(model: nn.Module, plan: Plan, where: str) -> None:
    tensors, done = named_tensors(model), set[int]()
    for name, original in plan.original_shapes.items():
        if name not in tensors:
            raise CheckpointError(f"{where} shrinks `{name}`, which a {type(model).__name__} does not have")
        tensor, shape = tensors[name], plan.shape(name)
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
    """Return a configuration from which transformers makes the model at the sizes it has now, or why there is none."""
    config: Any = getattr(model, "config")  # noqa: B009
    if not compiled.plan.original_shapes:
        return config
    if compiled.execution == "graph" and (why := _untried(model, compiled)) is not None:
        return why
    found = configuration_at(model, compiled, compiled.plan)
    if not isinstance(found, str):
        return found
    by_layer = _by_layer(model, compiled)
    if not isinstance(by_layer, str):
        return by_layer
    return f"{found}; {by_layer}. ecospa_fx.from_pretrained loads it, plain from_pretrained of transformers does not"


def _without_empty_blocks(
    model: nn.Module, compiled: CompiledModel
) -> tuple[nn.Module, CompiledModel, Any] | str | None:
    """Return a twin without the blocks whose sublayers are all gone, its state, and a configuration that makes it.

    Returns:
        Why there is none, if there are such blocks; None if there are not.
    """
    fewer = without_empty(model, compiled)
    if fewer is None or isinstance(fewer, str):
        return fewer
    config = configuration_for(fewer.model, fewer.compiled)
    if isinstance(config, str):
        return f"without its empty blocks, {config}"
    cls: Any = original_class(model)
    difference = difference_as_a_whole(model, compiled, fewer, cls(copy.deepcopy(config)))
    return (fewer.model, fewer.compiled, config) if difference is None else difference


def _untried(model: nn.Module, compiled: CompiledModel) -> str | None:
    """Say why a model of the same class cannot be tried beside graphs; None where each region can."""
    for name, region in compiled.regions.items():
        if any(True for _ in compiled.plan.under(name)) and not region.specializations:
            kind = type(model).__name__
            return f"`{name}` has not been called since this {kind} was loaded; call the model once, then save it"
    return None


def _by_layer(model: nn.Module, compiled: CompiledModel) -> Any:
    """Return a configuration with numbers for single layers that gives the sizes of now; or why there is none."""
    import transformers

    config, plan = getattr(model, "config"), compiled.plan  # noqa: B009
    wanted = {name: tuple(t.shape) for name, t in named_tensors(model).items()}
    fields = {name: v for name, v in vars(config).items() if type(v) is int and v > 1 and not name.startswith("_")}
    best = copy.deepcopy(config)
    wrong = shape_differences(model, best, wanted)
    read: list[str] = []
    for change in itertools.chain(_for_all(fields, plan), _per_layer(model, fields, wanted, read)):
        trial = copy.deepcopy(best)
        try:
            change(trial)
        except Exception:  # a part, as that of images, may count no layers and take no numbers for single ones
            continue
        now = shape_differences(model, trial, wanted)
        if len(now) < len(wrong):
            best, wrong = trial, now
        if not wrong:
            break
    kind = f"{type(model).__name__} of transformers {transformers.__version__}"
    if wrong:
        fields_read = f"only {', '.join(read)}" if read else "no such number"
        return f"layer by layer (`per_layer_config`) {kind} reads {fields_read}"
    cls: Any = type(model)
    difference = difference_of_made(model, compiled, plan, cls(copy.deepcopy(best)))
    return best if difference is None else f"layer by layer the shapes can be given, but then {difference}"


def _for_all(fields: Mapping[str, int], plan: Plan) -> Iterator[Any]:
    """Propose changes of one number for all layers."""
    for field, value in fields.items():
        for new in sorted(_proportional(value, plan, plan.original_shapes)):

            def change(config: Any, field: str = field, new: int = new) -> None:
                setattr(config, field, new)

            yield change


def _per_layer(model: nn.Module, fields: Mapping[str, int], wanted: NamedShapes, read: list[str]) -> Iterator[Any]:
    """Propose changes of one number for each layer: those by which the axes that follow it get the sizes wanted.

    Args:
        model: the model.
        fields: the numbers, with their values for all layers.
        wanted: the shapes.
        read: gets the names of the numbers that its class reads layer by layer.
    """
    layers = {int(n[1]) for name in wanted if (n := re.search(r"\.(\d+)\.", name))}
    for field in fields:

        def change(config: Any, field: str = field) -> None:
            value = vars(config)[field]  # reading it as an attribute is refused where layers differ
            probe = copy.deepcopy(config)
            _override(probe, field, dict.fromkeys(layers, 2 * value))
            before, after = shapes_in(model, config), shapes_in(model, probe)
            shares: dict[int, set[Fraction]] = {}
            for name in before.keys() & after.keys() & wanted.keys():
                number = re.search(r"\.(\d+)\.", name)
                for a, b, w in zip(before[name], after[name], wanted[name], strict=False):
                    if number and a and b == 2 * a:
                        shares.setdefault(int(number[1]), set()).add(Fraction(w, a))
            if shares:
                read.append(field)
            news = {layer: value * share.pop() for layer, share in shares.items() if len(share) == 1}
            _override(config, field, {layer: int(new) for layer, new in news.items() if new.denominator == 1})

        yield change


def _override(config: Any, field: str, values: Mapping[int, int]) -> None:
    """Set a number for single layers, beside what is set for them already."""
    spec = getattr(config, "_heterogeneity_spec", None)
    overrides = {k: dict(v) for k, v in (spec.per_layer_overrides if spec else {}).items()}
    for layer, new in values.items():
        overrides.setdefault(layer, {})[field] = new
    if values:
        config.per_layer_config = overrides


def _proportional(value: int, plan: Plan, names: Any) -> set[int]:
    """Return the possible new values of a number that is proportional to a dim which has shrunk."""
    values = set()
    for name in names:
        for before, after in zip(plan.original_shapes[name], plan.shape(name), strict=True):
            if before != after and value * after % before == 0:
                values.add(value * after // before)
    return values


def shape_differences(model: nn.Module, config: Any, wanted: NamedShapes) -> set[str]:
    """Return the names whose shapes differ in a model made from a configuration; all of them if none can be made."""
    shapes = shapes_in(model, config)
    return {name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name)}


def shapes_in(model: nn.Module, config: Any) -> NamedShapes:
    """Return the shapes in a model of the same class made from a configuration; none if it refuses its numbers."""
    cls: Any = type(model)
    try:
        with torch.device("meta"), unheard():
            made = cls(copy.deepcopy(config))
    except Exception:  # it may do so in any way
        return {}
    return {name: tuple(t.shape) for name, t in named_tensors(made).items()}
