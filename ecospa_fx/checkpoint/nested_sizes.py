"""Nested sizes on disk: a plan for each size beside the weights of the largest, of which it takes a part.

sizes.json    target, plan and integers of modules of each size
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from torch import nn

from ecospa_fx.errors import CheckpointError, EcoSpaError
from ecospa_fx.model.lookup import compiled_state
from ecospa_fx.model.slicing import kept_positions
from ecospa_fx.passes.follow.saved import changes_in, changes_listed
from ecospa_fx.plan import Plan
from ecospa_fx.ranks.shards import is_sharded
from ecospa_fx.train.nested import NestedSizes

from .directory import Draft, Save
from .rebuild import Saved

FILE = "sizes.json"


def write_sizes(draft: Draft, model: nn.Module, nested: NestedSizes) -> None:
    """Write the plans of the sizes of a model.

    Raises:
        EcoSpaError: they are of another model.
        CheckpointError: the model is sharded.
    """
    if nested.model is not model:
        raise EcoSpaError(f"nested= holds sizes of another {type(nested.model).__name__} than the one that is saved")
    if any(map(is_sharded, model.parameters())):
        raise CheckpointError("the sizes of a model that is sharded over ranks cannot be saved; gather it before")
    sizes = []
    for number, each in enumerate(nested.sizes):
        with nested.at(number):
            compiled = compiled_state(model)
            plan, attributes = json.loads(compiled.plan.to_json()), changes_listed(compiled.attributes)
            sizes.append({"target": each.target, "plan": plan, "attributes": attributes})
    draft.document(FILE, {"sizes": sizes})


def at_size(save: Save, saved: Saved, size: Any) -> Saved:
    """Return the saved model at one of its sizes; None for the largest.

    Raises:
        CheckpointError: there is no such size.
    """
    if size is None:
        return saved
    where = save.directory / FILE
    sizes = save.document(FILE)["sizes"] if FILE in save.files else []
    found = next((each for each in sizes if each["target"] == size), None)
    if found is None:
        there = ", ".join(str(each["target"]) for each in sizes) or "none but the one it was saved at"
        raise CheckpointError(f"{save.directory} has no size {size!r}; it has {there}")
    plan, attributes = Plan.from_json(json.dumps(found["plan"])), changes_in(found["attributes"], str(where))
    tensors = dict(saved.tensors)
    for name in saved.tensors:
        for dim, keep in (kept_positions(name, saved.plan, plan) if name in plan.original_shapes else {}).items():
            tensors[name] = tensors[name].index_select(dim, keep)
    return replace(saved, tensors=tensors, plan=plan, attributes=attributes)
