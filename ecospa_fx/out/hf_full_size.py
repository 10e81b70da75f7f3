"""save_unshrunk: a shrunk transformers model at the sizes that it had before, for tools that know only those.

What is gone is zero, and the model gives what the shrunk one gives; or it is NaN, a mark that outlives whatever a
converter to another format does with rows and columns, and by which `cut_gguf` finds them again.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.errors import EcoSpaError, FormatError
from ecospa_fx.model.compiled import MODEL, CompiledModel
from ecospa_fx.model.full_size import unshrunk
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.plan import Plan

from .hf_pretrained import differing

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def save_unshrunk(model: nn.Module, directory: str | os.PathLike[str], *, mark: bool = False, **options: Any) -> None:
    """Write a compiled transformers model at its original sizes, as `save_pretrained` of transformers writes it.

    Any tool that reads the model that was compiled reads this one, and gets the same results, to rounding: entries that
    were removed are zero, in all weights that multiply each other. It is as large and as slow as the original.

    Args:
        model: a compiled model of transformers.
        directory: where. Files in it that are none of the model's (a tokenizer's) stay.
        mark: removed entries are NaN. The model cannot run then; what a converter makes of it is for `cut_gguf`.
        options: of `model.save_pretrained`.

    Raises:
        EcoSpaError: it is not compiled, or not of transformers.
        FormatError: its configuration is not that of the original sizes; or, with `mark`, its weights hold NaN already.
    """
    compiled: CompiledModel | None = model.__dict__.get(MODEL)
    kind = type(model).__name__
    if compiled is None:
        raise EcoSpaError(f"{kind} is not compiled; call ecospa_fx.compile(model) first")
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise EcoSpaError(f"{kind} is no model of transformers: it has no save_pretrained")
    writable: Any = model
    plan = compiled.plan
    before = {
        id(tensor): plan.original_shapes[name]
        for name, tensor in named_tensors(model).items()
        if name in plan.original_shapes
    }
    wanted = {name: before.get(id(tensor), tuple(tensor.shape)) for name, tensor in named_tensors(model).items()}
    if wrong := sorted(differing(model, writable.config, wanted)):
        raise FormatError(
            f"the configuration of this {kind} does not make `{wrong[0]}` {wanted[wrong[0]]}, which it was before "
            "anything was removed: it says smaller sizes already. What it says needs no unshrinking: use "
            "model.save_pretrained"
        )
    state = _whole(model, plan, float("nan") if mark else 0.0)
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        writable.save_pretrained(beside, state_dict=state, **options)
        target.mkdir(exist_ok=True)
        made = {path.name for path in beside.iterdir()}
        for name in made:
            os.replace(beside / name, target / name)
        for path in target.iterdir():  # of a save in more parts, or fewer: transformers might read these instead
            if WEIGHTS.fullmatch(path.name) and path.name not in made:
                path.unlink()
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _whole(model: nn.Module, plan: Plan, fill: float) -> dict[str, Tensor]:
    """The state dict at original sizes. Weights that are one stay one.

    Raises:
        FormatError: `fill` is NaN and a weight holds such.
    """
    names = {id(tensor): name for name, tensor in named_tensors(model).items() if name in plan.original_shapes}
    made: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if fill != fill and tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
            raise FormatError(
                f"`{key}` holds NaN, so that NaN could not mark what was removed; train on from a state before that"
            )
        if id(tensor) not in made:
            name = names.get(id(tensor))
            made[id(tensor)] = tensor.detach() if name is None else unshrunk(tensor, plan, name, fill)
        state[key] = made[id(tensor)]
    return state
