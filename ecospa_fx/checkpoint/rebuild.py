"""Rebuild of models: a model written file by file, and made again from its factory and these files.

model.safetensors    parameters and buffers, as in its state_dict
buffers.safetensors  buffers that state_dict leaves out
plan.json            the entries left of the original model
model.json           the rest: regions, modes, ties, frozen parameters, memory layouts
config.json          the config of a Hugging Face model
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.errors import CheckpointError
from ecospa_fx.model.compiled import MODEL, CompiledModel
from ecospa_fx.model.full_size import unshrunk
from ecospa_fx.model.journal import Journal, reduced_anew
from ecospa_fx.model.old_weights import say_of_sizes
from ecospa_fx.model.region import Region
from ecospa_fx.model.restore import restored
from ecospa_fx.passes.follow.attributes import Changes, assigned, sync_layer_sizes
from ecospa_fx.passes.graph.shared_memory import SharedMemory
from ecospa_fx.passes.graph.tensors import dense, join, named_tensors
from ecospa_fx.passes.ir.border import NO_BORDER
from ecospa_fx.plan import Plan
from ecospa_fx.ranks.shards import is_sharded, local_part, split

from .across import joints_in
from .directory import Draft, Save
from .hf_config import config_text, from_config
from .metadata import aliases_of, check_description, describe, numbers_in
from .packing import Packer, Unpacker, flatten_layout, restore_layout
from .rng_state import rng_preserved
from .sharded import WEIGHTS, read_shards

Layouts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Saved:
    """The content of a saved model, not yet compared with a model from the factory.

    Attributes:
        about: the object in model.json.
        plan: the plan.
        tensors: parameters and buffers by name, tied ones once, in memory of their own.
        transient: names of the buffers that state_dict leaves out.
        extra: extra state of modules (`get_extra_state`), by module.
        config: text of config.json, or None.
        attributes: integer attributes of modules that changed with sizes: their values before and now.
        where: the directory, for errors.
    """

    about: dict[str, Any]
    plan: Plan
    tensors: dict[str, Tensor]
    transient: frozenset[str]
    extra: dict[str, Any]
    config: str | None
    attributes: Changes
    where: str


def write_model(draft: Draft, model: nn.Module, compiled: CompiledModel) -> None:
    """Write the files from which the model is made again.

    Raises:
        CheckpointError: a tensor cannot be saved (on the meta device, sharded, quantized).
    """
    tensors = named_tensors(model)
    aliases, transient = aliases_of(tensors), transient_buffers(model)
    layouts: Layouts = {}
    files: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
    for name, tensor in tensors.items():
        if name in aliases:
            continue
        if draft.shards is not None and is_sharded(tensor):
            draft.shards[f"{WEIGHTS}{name}"] = tensor
        else:
            files[name in transient][name], layout = flatten_layout(tensor, name)
            layouts |= {name: layout} if layout else {}
    draft.tensors("model.safetensors", files[False])
    if files[True]:
        draft.tensors("buffers.safetensors", files[True])
    draft.text("plan.json", compiled.plan.to_json())
    packer = Packer()
    extra = {
        name: packer.pack(module.get_extra_state(), name or "model")
        for name, module in model.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }
    if packer.tensors:
        draft.tensors("extra.safetensors", packer.tensors)
    config = config_text(model)
    if config is not None:
        draft.text("config.json", config)
    draft.document("model.json", {**describe(model, compiled), "layouts": layouts, "extra": extra})


def read_model(save: Save, like: Mapping[str, Tensor] = MappingProxyType({}), *, values: bool = True) -> Saved:
    """Read the files of `write_model`.

    Args:
        save: the save.
        like: tensors by name that say how those are to be sharded that were; others come whole.
        values: False: those that were sharded come on the meta device, without values.

    Raises:
        CheckpointError: files are missing or malformed.
    """
    about = save.document("model.json")
    attributes = check_description(about, str(save.directory / "model.json"))
    flat = save.tensors("model.safetensors")
    transient = save.tensors("buffers.safetensors") if "buffers.safetensors" in save.files else {}
    extra = save.tensors("extra.safetensors") if "extra.safetensors" in save.files else {}
    if save.sharded:
        named = {f"{WEIGHTS}{name}": tensor for name, tensor in like.items()}
        shards = read_shards(save, named, prefix=WEIGHTS, values=values)
        flat = flat | {name.removeprefix(WEIGHTS): tensor for name, tensor in shards.items()}
    return Saved(
        about,
        Plan.from_json(save.text("plan.json")),
        {name: _restored(name, tensor, about["layouts"], save) for name, tensor in (flat | transient).items()},
        frozenset(transient),
        Unpacker(extra, str(save.directory / "model.json")).unpack(about["extra"]),
        save.text("config.json") if "config.json" in save.files else None,
        attributes,
        str(save.directory),
    )


def rebuild(saved: Saved, factory: Callable[[], nn.Module] | None, device: torch.device | None) -> nn.Module:
    """Make the saved model again, compiled. A model that does not fit is left as the factory made it.

    Raises:
        CheckpointError: the factory makes another model than the saved one, or there is neither factory nor config.
    """
    about = saved.about
    with rng_preserved():
        if factory is not None:
            model = factory()
        else:
            model = from_config(about["class"], saved.config, about["implementations"], saved.where)
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"the factory made a {type(model).__name__}; it must make the original model")
    if MODEL in model.__dict__ and model.__dict__[MODEL].plan.original_shapes:
        raise CheckpointError("the factory made a model that has shrunk already; it must make the original one")
    _check_fits(model, saved)
    if MODEL in model.__dict__:
        restored(model)
    _fill(model, saved, device)
    for name, module in model.named_modules():
        module.training = about["training"] != (name in about["other_mode"])
    attach_compiled(model, about, saved.plan, saved.attributes)
    return model


def refit(model: nn.Module, saved: Saved) -> None:
    """Give a model the sizes and weights of a save, whatever its sizes are now: one that has shrunk gets its full size.

    Raises:
        CheckpointError: the save is of another model; this one is unchanged then.
    """
    with refitted(model, saved):
        pass


@contextmanager
def refitted(model: nn.Module, saved: Saved) -> Iterator[None]:
    """Refit a model; whatever is raised, by the refit or inside, leaves it as it was."""
    compiled: CompiledModel | None = model.__dict__.get(MODEL)
    own, plan = named_tensors(model), Plan() if compiled is None else compiled.plan
    journal = Journal()
    try:
        journal.note_modules(model)
        for tensor in own.values():
            if not tensor.is_meta:
                journal.note_tensor(tensor)
        if compiled is not None:
            journal.note_object(compiled.state)
            for attribute, (original, _) in compiled.attributes.items():
                attribute.write(model, original)
        for name, data in {name: own[name].data for name in plan.original_shapes}.items():  # tied ones have several
            own[name].data = unshrunk(data, plan, name)
        if compiled is not None:
            compiled.state.plan = Plan()
        rebuild(saved, lambda: model, None)
        reduced_anew(named_tensors(model).values())
        yield
    except BaseException:
        journal.undo()
        raise


def is_as_saved(model: nn.Module, plan: Plan, saved: Saved) -> bool:
    """Decide whether a model with this plan has the sizes and the values of a save, but for dtypes and devices."""
    tensors = named_tensors(model)
    return plan == saved.plan and all(
        name in tensors
        and not tensors[name].is_meta
        and torch.equal(dense(tensors[name]), dense(value).to(tensors[name].device, tensors[name].dtype))
        for name, value in saved.tensors.items()
    )


def check_same(model: nn.Module, plan: Plan, saved: Saved) -> None:
    """Check that a model that is sharded over ranks has the names, the sizes and the plan of a save.

    Raises:
        CheckpointError: it has others; its shards cannot be made anew.
    """
    tensors = named_tensors(model)
    for name, value in saved.tensors.items():
        here = tuple(tensors[name].shape) if name in tensors else None
        if here is not None and here != tuple(value.shape):
            raise CheckpointError(
                f"`{name}` is {tuple(value.shape)} in {saved.where} and {here} in this model, which is sharded "
                "already: make it with ecospa_fx.load before it is sharded, on the meta device if it is large"
            )
    missing = [n for n in tensors if n not in saved.tensors and n not in saved.about["aliases"]]
    odd = [*missing, *(n for n in saved.tensors if n not in tensors)]
    if odd:
        raise CheckpointError(f"{saved.where} is not of this {type(model).__name__}: `{odd[0]}` is in one of them only")
    if plan != saved.plan:
        raise CheckpointError(
            f"{saved.where} holds other entries than this model, at the same sizes, and this model is sharded already: "
            "make it with ecospa_fx.load before it is sharded"
        )


@contextmanager
def filled(model: nn.Module, saved: Saved) -> Iterator[None]:
    """Swap values of a model that is sharded with saved ones of the same sizes; swap back on an error.

    Saved shards lie in the memory of the host, and the old ones take their place there, so that the device holds no
    more than before but for one tensor.
    """
    tensors, old = named_tensors(model), list[tuple[Tensor, Tensor]]()
    try:
        for name, value in saved.tensors.items():
            here = local_part(tensors[name])
            before = here.to("cpu", copy=True)
            old.append((here, before))
            if is_sharded(value):
                here.copy_(local_part(value))
                if value.dtype == before.dtype:
                    old[-1] = here, local_part(value).copy_(before)
            else:  # one process wrote it, in a file that is mapped
                here.copy_(
                    local_part(split(value.to(here.device), tensors[name])) if is_sharded(tensors[name]) else value
                )
        yield
    except BaseException:
        for here, before in old:
            here.copy_(before)
        raise


def attach_compiled(model: nn.Module, about: Mapping[str, Any], plan: Plan, attributes: Changes) -> None:
    """Compile a model that has the sizes of a plan already, as `describe_execution` describes it."""
    compiled = CompiledModel(about["how"], about["experiments"], about["execution"])
    compiled.not_captured = about["given_up"]
    compiled.state.joints, borders, compiled.state.withheld = joints_in(about.get("across", {}), "the save")
    compiled.state.numbers = numbers_in(about, "the save")
    compiled.state.adopt(plan, attributes)
    say_of_sizes(model)
    if about["regions"]:
        model.__dict__[MODEL] = compiled
        memory = SharedMemory(named_tensors(model))
        for name in about["regions"]:
            compiled.regions[name] = Region(name, compiled.state, memory.outside(name), borders.get(name, NO_BORDER))
            compiled.regions[name].unsupported_marks = frozenset(map(str, about["withheld"].get(name) or ()))
            compiled.regions[name].called = about["called"].get(name)
        compiled.route(model)
        if compiled.execution == "module":
            with assigned(model, {attribute: now for attribute, (_, now) in attributes.items()}):
                sync_layer_sizes(model)
            compiled.attach(model)
    else:
        compiled.attach(model)


def _restored(name: str, tensor: Tensor, layouts: Mapping[str, Any], save: Save) -> Tensor:
    try:
        return restore_layout(tensor, layouts.get(name, {}))
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        where = save.directory / "model.json"
        raise CheckpointError(f"{where} gives `{name}` a memory layout that does not fit: {error}") from error


def transient_buffers(model: nn.Module) -> set[str]:
    """Return the names of the buffers that state_dict leaves out."""
    return {
        join(prefix, name)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }


def _check_fits(model: nn.Module, saved: Saved) -> None:
    """Check that a model is the original of the saved one.

    Raises:
        CheckpointError: they differ; the message has both values.
    """
    about, plan, aliases = saved.about, saved.plan, saved.about["aliases"]
    tensors, transient, kind = named_tensors(model), transient_buffers(model), type(model).__name__
    for alias, name in aliases.items():
        if alias in saved.tensors or name not in saved.tensors:
            raise CheckpointError(f"`{alias}` is saved as `{name}`, which is missing")
    names = {
        **dict.fromkeys(name for name in tensors if name in saved.tensors or name in aliases),
        **saved.tensors,
        **aliases,
    }
    odd = [name for name in names if name not in tensors and not (name in saved.transient and _lazy(model, name))]
    odd += [name for name in tensors if name not in names and name not in transient]
    if odd:
        where = "this model" if odd[0] in tensors else "the saved one"
        raise CheckpointError(
            f"the saved model is not a {kind} like this one: {len(odd)} names are in one of them only, "
            f"{', '.join(odd[:3])} in {where}"
        )
    for name in plan.original_shapes:
        if name not in names:
            raise CheckpointError(f"the plan shrinks `{name}`, which is not saved")
    for name in names:
        shape = tuple(saved.tensors[aliases.get(name, name)].shape)
        if name in plan.original_shapes and plan.shape(name) != shape:
            raise CheckpointError(f"`{name}` is saved as {shape}, but the plan leaves {plan.shape(name)} of it")
        original = plan.original_shapes.get(name, shape)
        if name in tensors and name not in transient and tuple(tensors[name].shape) != original:
            here = tuple(tensors[name].shape)
            raise CheckpointError(f"`{name}` was {original} when saved and is {here} in this model")
    _check_ties(tensors, aliases)
    for name in about["regions"]:
        try:
            model.get_submodule(name)
        except AttributeError:
            raise CheckpointError(f"the saved model has a region `{name}`, this {kind} has none") from None
    for attribute, (before, _) in saved.attributes.items():
        try:
            value = attribute.read(model)
        except AttributeError:
            raise CheckpointError(f"the saved model has `{attribute}`, this {kind} does not") from None
        if value != before:
            raise CheckpointError(f"`{attribute}` was {before} when saved and is {value!s:.40} in this model")
    for path in saved.extra:
        if path not in dict(model.named_modules()):
            raise CheckpointError(f"the saved model has state of a module `{path}`, this {kind} has none")
    for path, module in model.named_modules():
        for attribute, value in module.__dict__.items():
            if isinstance(value, Tensor) and value.is_meta:
                raise CheckpointError(
                    f"`{join(path, attribute)}` is on the meta device and was not saved, because it is neither a "
                    "parameter nor a buffer; make it a buffer, or let the factory make the model on a real device"
                )
    missing = [name for name in sorted(transient - set(names)) if name in tensors and tensors[name].is_meta]
    if missing:
        raise CheckpointError(
            f"the buffer `{missing[0]}` is on the meta device and was not saved; let the factory make it on a real "
            "device"
        )


def _lazy(model: nn.Module, name: str) -> bool:
    """Check whether a name that the model does not have may be a buffer that a forward creates."""
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    return attribute in module._buffers or not hasattr(module, attribute)


def _check_ties(tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    parameters = {name: p for name, p in tensors.items() if isinstance(p, nn.Parameter)}
    for name, of in aliases.items():
        if name in parameters and of in parameters and aliases_of({of: tensors[of], name: tensors[name]}) == {}:
            raise CheckpointError(
                f"`{name}` and `{of}` are tied in the saved model and two tensors in this one; tie them in the factory"
            )
    first: dict[int, str] = {}
    for name, parameter in parameters.items():
        of = first.setdefault(id(parameter), name)
        if aliases.get(name, name) != aliases.get(of, of):
            raise CheckpointError(
                f"`{name}` and `{of}` are two tensors in the saved model and tied in this one; untie them in the "
                "factory"
            )


@torch.no_grad()
def _fill(model: nn.Module, saved: Saved, device: torch.device | None) -> None:
    """Put the saved tensors in place. Every parameter stays the same object, on the meta device too."""
    tensors, aliases, done = named_tensors(model), saved.about["aliases"], set[int]()
    placed: dict[tuple[str, torch.device], Tensor] = {}
    for name in (*saved.tensors, *aliases):
        source = aliases.get(name, name)
        if name not in tensors:
            path, _, attribute = name.rpartition(".")
            value = saved.tensors[source].to(device or torch.device("cpu"))
            model.get_submodule(path).register_buffer(attribute, value, persistent=False)
            continue
        tensor = tensors[name]
        if id(tensor) in done:
            continue
        done.add(id(tensor))
        home = device or (torch.device("cpu") if tensor.is_meta else tensor.device)
        if (source, home) not in placed:
            placed[source, home] = saved.tensors[source].to(home)
        value = placed[source, home]
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(False)  # for now: its dtype may not allow gradients
        if tensor.is_meta or value.is_meta or tensor.layout != value.layout:
            _swap(tensor, value)
        elif _is_part(tensor) and _alike(tensor, value):
            tensor.data.copy_(value)
        else:
            tensor.grad = None
            tensor.data = value
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(name not in saved.about["frozen"])
    for path, state in saved.extra.items():
        model.get_submodule(path).set_extra_state(state)


def _swap(tensor: Tensor, value: Tensor) -> None:
    """Swap a tensor for one with the value, wherever it is referred to: a meta tensor cannot be given memory."""
    new = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value.view_as(value)
    new.__dict__.update(tensor.__dict__)
    torch.utils.swap_tensors(tensor, new)


def _is_part(tensor: Tensor) -> bool:
    """Check whether a tensor shares its storage with others, as the weights of recurrent layers on a GPU do."""
    return tensor.layout == torch.strided and tensor.untyped_storage().nbytes() > tensor.nbytes


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
