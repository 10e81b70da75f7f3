"""Save and load a shrunk model: safetensors and JSON in one directory, no pickle.

model.safetensors      parameters and buffers at the sizes they have now
plan.json              what is left of the original model, readable
optimizer.safetensors  optimizer state by parameter name
trainer.safetensors    accumulated scores
checkpoint.json        format version, model class, regions, schedule, hash of every other file
config.json            where the model has a Hugging Face config
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from .api import check_optimizer
from .compiled import MODEL, CompiledModel
from .errors import CheckpointError, EcoSpaError
from .passes.names import named_tensors
from .passes.regions import shared_outside
from .passes.shrink import prepare
from .plan import FORMAT, Plan
from .region import Region
from .trainer import EcoSpaTrainer

MANIFEST = "checkpoint.json"


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    optimizer: Optimizer | None = None,
    trainer: EcoSpaTrainer | None = None,
) -> None:
    """Write a compiled model, and what it takes to go on training it, to a directory.

    The directory is written beside and renamed into place, so that it is whole or not there.

    Args:
        model: a compiled model.
        directory: where; what is there is replaced once the new one is complete.
        optimizer: its state goes along, by parameter name.
        trainer: its schedule and scores go along.

    Raises:
        EcoSpaError: the model is not compiled.
        OptimizerError: the optimizer holds none of its parameters.
    """
    compiled = model.__dict__.get(MODEL)
    if compiled is None:
        raise EcoSpaError(f"{type(model).__name__} is not compiled; call ecospa_fx.compile(model) first")
    if optimizer is not None:
        check_optimizer(model, optimizer)
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write(draft, model, compiled, optimizer, trainer)
        draft.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.rename(old / target.name)
            draft.rename(target)
            shutil.rmtree(old)
        else:
            draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(directory: str | os.PathLike[str], factory: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Rebuild a saved model, compiled and at the sizes it was saved at.

    Args:
        directory: what `save` wrote.
        factory: makes the original, unshrunk model; its weights are replaced. A Hugging Face model needs none: it is
            rebuilt from `config.json`.

    Raises:
        CheckpointError: the directory is incomplete, altered, of another format version, or of another model.
    """
    source = Path(directory)
    manifest = _read_manifest(source)
    plan = Plan.from_json((source / "plan.json").read_text())
    tensors = _read_tensors(source / "model.safetensors")
    model = factory() if factory is not None else _from_config(source, manifest)
    aliases: dict[str, str] = manifest["aliases"]
    _check_fits(model, plan, tensors, aliases)
    for name in manifest["regions"]:
        try:
            model.get_submodule(name)
        except AttributeError:
            raise CheckpointError(
                f"the saved model has a region `{name}`, this {type(model).__name__} has none"
            ) from None
    prepare(model, Plan(), plan).commit()
    held = named_tensors(model)
    for name in model.state_dict():
        held[name].data = tensors[aliases.get(name, name)].to(held[name].device)
    compiled = CompiledModel(manifest["how"], manifest.get("experiments", False))
    compiled.plan = plan
    for name in manifest["regions"]:
        compiled.regions[name] = Region(name, compiled, shared_outside(model, name))
    model.__dict__[MODEL] = compiled
    compiled.route(model)
    model.train(manifest["training"])
    return model


def resume(
    directory: str | os.PathLike[str],
    model: nn.Module,
    *,
    optimizer: Optimizer | None = None,
    trainer: EcoSpaTrainer | None = None,
) -> None:
    """Give an optimizer and a trainer made for a loaded model the state they were saved with.

    Raises:
        CheckpointError: the directory holds no such state, or state of other shapes.
    """
    source = Path(directory)
    manifest = _read_manifest(source)
    if optimizer is not None:
        check_optimizer(model, optimizer)
        _resume_optimizer(source, manifest, model, optimizer)
    if trainer is not None:
        if manifest.get("trainer") is None:
            raise CheckpointError(f"{source} holds no trainer state; it was saved without trainer=")
        trainer.load_state_dict({**manifest["trainer"], "sums": _read_tensors(source / "trainer.safetensors")})


def _write(
    draft: Path, model: nn.Module, compiled: CompiledModel, optimizer: Optimizer | None, trainer: EcoSpaTrainer | None
) -> None:
    tensors, aliases = _untied(model.state_dict())
    save_file(tensors, draft / "model.safetensors")
    (draft / "plan.json").write_text(compiled.plan.to_json())
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "torch": str(torch.__version__),
        "model": type(model).__name__,
        "training": model.training,
        "how": compiled.how,
        "experiments": compiled.experiments,
        "regions": list(compiled.regions),
        "aliases": aliases,
        "optimizer": None,
        "trainer": None,
    }
    if optimizer is not None:
        manifest["optimizer"], state = _optimizer_state(model, optimizer)
        save_file(state, draft / "optimizer.safetensors")
    if trainer is not None:
        schedule = trainer.state_dict()
        save_file({key: t.contiguous() for key, t in schedule.pop("sums").items()}, draft / "trainer.safetensors")
        manifest["trainer"] = schedule
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_json_file"):
        config.to_json_file(draft / "config.json", use_diff=False)
    manifest["sha256"] = {path.name: _hash(path) for path in sorted(draft.iterdir())}
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _untied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a state dict once each, and which names repeat which."""
    first: dict[Any, str] = {}
    tensors, aliases = {}, {}
    for name, tensor in state.items():
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        if key in first and tensor.numel():
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor.detach().contiguous().clone()
    return tensors, aliases


def _optimizer_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups, scalars, tensors = [], {}, {}
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key != "params" and _plain(value)}
        groups.append({"parameters": [names.get(id(p)) for p in group["params"]], "options": options})
    for parameter, state in optimizer.state.items():
        name = names.get(id(parameter))
        for key, value in state.items() if name is not None else ():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value.detach().contiguous().clone()
            elif _plain(value):
                scalars[f"{name}/{key}"] = value
    return {"class": type(optimizer).__name__, "groups": groups, "scalars": scalars}, tensors


def _resume_optimizer(source: Path, manifest: Mapping[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
    saved = manifest.get("optimizer")
    if saved is None:
        raise CheckpointError(f"{source} holds no optimizer state; it was saved without optimizer=")
    if saved["class"] != type(optimizer).__name__:
        raise CheckpointError(f"{source} holds state of {saved['class']}, not of {type(optimizer).__name__}")
    names = {id(p): name for name, p in model.named_parameters()}
    here = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    if here != [group["parameters"] for group in saved["groups"]]:
        raise CheckpointError(
            f"the optimizer groups parameters in another way than the saved one: {len(here)} groups of "
            f"{[len(g) for g in here]} parameters, saved {[len(g['parameters']) for g in saved['groups']]}"
        )
    parameters = dict(model.named_parameters())
    states: dict[str, dict[str, Any]] = {}
    everything = {**saved["scalars"], **_read_tensors(source / "optimizer.safetensors")}
    for key, value in everything.items():
        name, _, entry = key.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"{source} holds optimizer state of `{name}`, which this model does not have")
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameters[name].shape:
            raise CheckpointError(
                f"the saved `{entry}` of `{name}` has shape {tuple(value.shape)}, the parameter "
                f"{tuple(parameters[name].shape)}"
            )
        states.setdefault(name, {})[entry] = value
    for group, old in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update({key: tuple(v) if isinstance(v, list) else v for key, v in old["options"].items()})
    for name, state in states.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            # Step counts stay on the CPU, as torch keeps them, unless the optimizer is capturable.
            key: value.to(parameter.device) if isinstance(value, Tensor) and value.ndim else value
            for key, value in state.items()
        }


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _read_manifest(source: Path) -> dict[str, Any]:
    path = source / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{source} is no saved model: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text())
        version, hashes = manifest["format"], dict(manifest["sha256"])
        missing = {"regions", "aliases", "how", "training", "model"} - set(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version!r}; this version of ecospa_fx reads {FORMAT}")
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}")
    for name, expected in hashes.items():
        if Path(name).name != name:
            raise CheckpointError(f"{path} names a file outside its directory: {name}")
        if not (source / name).is_file():
            raise CheckpointError(f"{source} is incomplete: {name} is missing")
        if _hash(source / name) != expected:
            raise CheckpointError(f"{source / name} is not the file that was saved: truncated or changed since")
    for name in ("model.safetensors", "plan.json"):
        if name not in hashes:
            raise CheckpointError(f"{path} does not list {name}")
    result: dict[str, Any] = manifest
    return result


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return tensors


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_config(source: Path, manifest: Mapping[str, Any]) -> nn.Module:
    if not (source / "config.json").is_file():
        raise CheckpointError(
            f"{source} has no config.json to rebuild a {manifest['model']} from; pass a factory, a function that makes "
            "the original model: load(directory, lambda: MyModel())"
        )
    import transformers

    cls = getattr(transformers, str(manifest["model"]), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise CheckpointError(f"transformers has no model class {manifest['model']}; pass a factory")
    model: nn.Module = cls(transformers.AutoConfig.from_pretrained(source))
    return model


def _check_fits(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    state = model.state_dict()
    saved = {*tensors, *aliases}
    if saved != set(state):
        odd = sorted(saved ^ set(state))
        raise CheckpointError(
            f"the saved model is not a {type(model).__name__} like this one: {len(odd)} names are in one of them only, "
            f"{', '.join(odd[:3])}"
        )
    for name, tensor in state.items():
        if aliases.get(name, name) not in tensors:
            raise CheckpointError(f"`{name}` is saved as `{aliases[name]}`, which is not there")
        given = tuple(tensors[aliases.get(name, name)].shape)
        original = plan.original_shapes.get(name, given)
        if tuple(tensor.shape) != original:
            raise CheckpointError(f"`{name}` was {original} when saved and is {tuple(tensor.shape)} in this model")
        if name in plan.original_shapes and plan.shape(name) != given:
            raise CheckpointError(f"`{name}` is saved as {given}, but the plan leaves {plan.shape(name)} of it")
