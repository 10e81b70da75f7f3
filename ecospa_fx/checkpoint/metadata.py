"""Metadata of a compiled model: all that is saved beside its plan and its tensors, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.errors import CheckpointError
from ecospa_fx.model.class_swap import original_class
from ecospa_fx.model.compiled import CompiledModel
from ecospa_fx.model.execution import EXECUTIONS
from ecospa_fx.passes.capture.outside_numbers import Place
from ecospa_fx.passes.follow.attributes import Changes
from ecospa_fx.passes.follow.saved import changes_in, changes_listed
from ecospa_fx.passes.graph.tensors import named_tensors, storage_key
from ecospa_fx.ranks.shards import is_sharded

from .across import describe_across, joints_in
from .hf_config import implementations


def describe(model: nn.Module, compiled: CompiledModel) -> dict[str, Any]:
    """Describe a compiled model beside its plan and its tensors, as plain values."""
    tensors = named_tensors(model)
    return {
        "class": original_class(model).__name__,
        "torch": str(torch.__version__),
        **describe_execution(compiled),
        "training": model.training,
        "other_mode": [name for name, module in model.named_modules() if module.training != model.training],
        "frozen": [name for name, p in tensors.items() if isinstance(p, nn.Parameter) and not p.requires_grad],
        "aliases": aliases_of(tensors),
        "layouts": {},
        "extra": {},
        "implementations": implementations(model),
    }


def describe_execution(compiled: CompiledModel) -> dict[str, Any]:
    """Describe the execution of a model and the results of its analysis, as plain values."""
    return {
        "regions": list(compiled.regions),
        "how": compiled.how if isinstance(compiled.how, str) else list(compiled.how),
        "experiments": compiled.experiments,
        "execution": compiled.execution,
        "attributes": changes_listed(compiled.attributes),
        "given_up": compiled.not_captured,
        "withheld": {name: marks for name, region in compiled.regions.items() if (marks := region.offers.marks())},
        "called": {name: r.first_sizes for name, r in compiled.regions.items() if r.first_sizes is not None},
        "across": describe_across(compiled),
        "numbers": _numbers_listed(compiled),
    }


def _numbers_listed(compiled: CompiledModel) -> list[Any] | None:
    places = compiled.state.numbers
    return None if places is None else [[path, *names] for path, names in sorted(places)]


def numbers_in(about: Mapping[str, Any], where: str) -> frozenset[Place] | None:
    """Read the places of the numbers that the model's own Python reads outside of its regions; None without any.

    Raises:
        CheckpointError: they are malformed.
    """
    listed = about.get("numbers")  # saves of earlier versions have none
    if listed is None:
        return None
    if not isinstance(listed, list) or not all(
        isinstance(each, list) and len(each) > 1 and all(isinstance(name, str) for name in each) for each in listed
    ):
        raise CheckpointError(f"{where}: `numbers` holds something that is not a list of names")
    return frozenset((path, tuple(names)) for path, *names in listed)


def check_execution(about: Mapping[str, Any], where: str) -> Changes:
    """Check a result of `describe_execution` and return the attributes in it.

    Raises:
        CheckpointError: a field is missing or malformed.
    """
    kinds: dict[str, Any] = {
        "regions": list, "how": (str, list), "experiments": bool, "execution": str, "attributes": list,
        "given_up": dict, "withheld": dict, "called": dict,
    }  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(about.get(key), kind):
            raise CheckpointError(f"{where}: `{key}` is missing or not a {_type_name(kind)}")
    if not all(isinstance(name, str) for name in about["regions"]):
        raise CheckpointError(f"{where}: `regions` holds something that is not a name")
    if about["execution"] not in EXECUTIONS:
        raise CheckpointError(f"{where}: `execution` is {about['execution']!s:.40}, not one of {', '.join(EXECUTIONS)}")
    for sizes in about["called"].values():
        if not isinstance(sizes, list) or any(type(n) is not int or n < 0 for shape in sizes for n in shape):
            raise CheckpointError(f"{where}: `called` holds something that is not a list of sizes")
    joints_in(about.get("across", {}), where)  # saves of earlier versions have none
    numbers_in(about, where)
    return changes_in(about["attributes"], where)


def check_description(about: Mapping[str, Any], where: str) -> Changes:
    """Check a result of `describe` and return the attributes in it.

    Raises:
        CheckpointError: a field is missing or malformed.
    """
    kinds: dict[str, Any] = {
        "class": str, "training": bool, "other_mode": list, "frozen": list, "aliases": dict, "layouts": dict,
        "extra": dict, "implementations": dict,
    }  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(about.get(key), kind):
            raise CheckpointError(f"{where}: `{key}` is missing or not a {_type_name(kind)}")
    names = {"other_mode": about["other_mode"], "frozen": about["frozen"], "aliases": about["aliases"].values()}
    for key, entries in names.items():
        if not all(isinstance(name, str) for name in entries):
            raise CheckpointError(f"{where}: `{key}` holds something that is not a name")
    return check_execution(about, where)


def _type_name(kind: type | tuple[type, ...]) -> str:
    return " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))


def aliases_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Map each name of a tensor that has an earlier name to that one."""
    first: dict[Any, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        place = (tensor.storage_offset(), tensor.stride()) if tensor.layout is torch.strided else ()
        key = (id(tensor),) if is_sharded(tensor) else (storage_key(tensor), tensor.shape, *place)
        if tensor.numel() and first.setdefault(key, name) != name:
            aliases[name] = first[key]
    return aliases
