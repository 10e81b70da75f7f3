"""Description: what is to be known of a compiled model beside its plan and its tensors, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.errors import CheckpointError
from ecospa_fx.model.compiled import CompiledModel
from ecospa_fx.model.region import Region
from ecospa_fx.model.state import EXECUTIONS
from ecospa_fx.passes.follow.attributes import Changes, changes_in
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.passes.infer.sizes import called_sizes

from .hf_config import implementations


def described(model: nn.Module, compiled: CompiledModel) -> dict[str, Any]:
    """What is to be known of a compiled model beside its plan and its tensors."""
    held = named_tensors(model)
    return {
        "class": type(model).__name__,
        "torch": str(torch.__version__),
        **about_execution(compiled),
        "training": model.training,
        "other_mode": [name for name, module in model.named_modules() if module.training != model.training],
        "frozen": [name for name, p in held.items() if isinstance(p, nn.Parameter) and not p.requires_grad],
        "aliases": aliases_of(held),
        "layouts": {},
        "extra": {},
        "implementations": implementations(model),
    }


def about_execution(compiled: CompiledModel) -> dict[str, Any]:
    """How a model is run, and what is known of it, as plain values."""
    return {
        "regions": list(compiled.regions),
        "how": compiled.how if isinstance(compiled.how, str) else list(compiled.how),
        "experiments": compiled.experiments,
        "execution": compiled.execution,
        "attributes": [[*astuple(a), *values] for a, values in sorted(compiled.attributes.items(), key=str)],
        "given_up": compiled.not_captured,
        "withheld": {name: marks for name, region in compiled.regions.items() if (marks := region.offers.marks())},
        "called": {name: sizes for name, region in compiled.regions.items() if (sizes := _first_sizes(region))},
    }


def check_about(about: Mapping[str, Any], where: str) -> Changes:
    """Refuse what `about_execution` cannot have written; the attributes in it.

    Raises:
        CheckpointError: what is wrong.
    """
    kinds: dict[str, Any] = {
        "regions": list, "how": (str, list), "experiments": bool, "execution": str, "attributes": list,
        "given_up": dict, "withheld": dict, "called": dict,
    }  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(about.get(key), kind):
            raise CheckpointError(f"{where} has no `{key}`, or one of another kind")
    if not all(isinstance(name, str) for name in about["regions"]):
        raise CheckpointError(f"{where} has a `regions` that holds no names")
    if about["execution"] not in EXECUTIONS:
        raise CheckpointError(f"{where} has an `execution` that is none: {about['execution']!s:.40}")
    for sizes in about["called"].values():
        if not isinstance(sizes, list) or any(type(n) is not int or n < 0 for shape in sizes for n in shape):
            raise CheckpointError(f"{where} has a `called` that holds no sizes")
    return changes_in(about["attributes"], where)


def check_description(about: Mapping[str, Any], where: str) -> Changes:
    """Refuse what `described` would not have said; the attributes in it.

    Raises:
        CheckpointError: a field is missing, or of another kind.
    """
    kinds: dict[str, Any] = {
        "class": str, "training": bool, "other_mode": list, "frozen": list, "aliases": dict, "layouts": dict,
        "extra": dict, "implementations": dict,
    }  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(about.get(key), kind):
            raise CheckpointError(f"{where} has no `{key}`, or one of another kind")
    names = {"other_mode": about["other_mode"], "frozen": about["frozen"], "aliases": about["aliases"].values()}
    for key, held in names.items():
        if not all(isinstance(name, str) for name in held):
            raise CheckpointError(f"{where} has a `{key}` that holds no names")
    return check_about(about, where)


def _first_sizes(region: Region) -> list[list[int]] | None:
    if region.called is None and region.specializations:
        return called_sizes(region.naming_graph.axis_facts)
    return region.called


def aliases_of(held: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are one with an earlier one, and its name."""
    first: dict[Any, str] = {}
    aliases = {}
    for name, tensor in held.items():
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(key, name) != name:
            aliases[name] = first[key]
    return aliases
