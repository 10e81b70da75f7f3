"""Full-size saves of a shrunk transformers model, for tools that know only its original sizes.

Removed entries are zero, and the model returns the results of the shrunk one; or they are NaN, a mark that survives
whatever a converter to another format does with rows and columns, and by which `cut_gguf` finds them again.
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

from ecospa_fx.arguments import FLAG, MODULE, PATH, takes
from ecospa_fx.errors import EcoSpaError, FormatError
from ecospa_fx.model.compiled import CompiledModel
from ecospa_fx.model.full_size import unshrunk
from ecospa_fx.model.lookup import check_whole, compiled_state
from ecospa_fx.passes.axes.selection import touched
from ecospa_fx.passes.graph.nodes import op_name, place
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.passes.rewrite.replay import replay
from ecospa_fx.plan import Plan
from ecospa_fx.ranks.wrappers import looks_inside

from .hf_pretrained import shape_differences

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@takes(model=MODULE, directory=PATH, mark=FLAG)
@looks_inside
def save_unshrunk(model: nn.Module, directory: str | os.PathLike[str], *, mark: bool = False, **options: Any) -> None:
    """Write a compiled transformers model at its original sizes, as `save_pretrained` of transformers writes it.

    Any tool that reads the original model reads this one, with the results of the shrunk model, to rounding: removed
    entries are zero in all weights that multiply each other. It is as large and as slow as the original.

    Args:
        model: a compiled model of transformers.
        directory: the directory. Other files in it, such as those of a tokenizer, stay.
        mark: removed entries are NaN. The model cannot run then; convert it, and pass the result to `cut_gguf`.
        options: options of `model.save_pretrained`.

    Raises:
        EcoSpaError: the model is not compiled, or not of transformers.
        FormatError: its configuration is not that of the original sizes; a norm or an average runs over an axis that
            has shrunk, which would count zeros; it has lost experts; or, with `mark`, its weights hold NaN already.
    """
    compiled, kind = compiled_state(model), type(model).__name__
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise EcoSpaError(f"{kind} is not a model of transformers: it has no save_pretrained")
    check_whole(model, "save_unshrunk")
    writable: Any = model
    plan = compiled.plan
    originals = {
        id(tensor): plan.original_shapes[name]
        for name, tensor in named_tensors(model).items()
        if name in plan.original_shapes
    }
    wanted = {name: originals.get(id(tensor), tuple(tensor.shape)) for name, tensor in named_tensors(model).items()}
    if wrong := sorted(shape_differences(model, writable.config, wanted)):
        raise FormatError(
            f"the configuration of this {kind} does not give `{wrong[0]}` its original shape {wanted[wrong[0]]}: it "
            "has smaller sizes already, which need no unshrinking; use model.save_pretrained"
        )
    if not mark and (where := _counted(compiled)):
        raise FormatError(
            f"zeros cannot stand for the entries that this {kind} has lost: {where} takes what is left of them, and "
            "would count the zeros. Write it with model.save_pretrained or ecospa_fx.save, or frozen=[...] keeps the "
            "weights of norms at full size"
        )
    if fewer := [c.name for c in compiled.couplings() if c.kind == "experts" and c.size < c.original_size]:
        raise FormatError(
            f"`{fewer[0]}` has lost experts, and no zeros can stand for them: a router would choose these. "
            "Write the model with save_pretrained or ecospa_fx.save, or keep them with frozen=['*experts']"
        )
    state = _full_size_state(model, plan, float("nan") if mark else 0.0)
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        writable.save_pretrained(beside, state_dict=state, **options)
        target.mkdir(exist_ok=True)
        written = {path.name for path in beside.iterdir()}
        for name in written:
            os.replace(beside / name, target / name)
        for path in target.iterdir():  # weights of an earlier save in other shards, which transformers might read
            if WEIGHTS.fullmatch(path.name) and path.name not in written:
                path.unlink()
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _counted(compiled: CompiledModel) -> str | None:
    """Name an op that takes what is left of an axis that has shrunk, other than in a sum; None without one."""
    for region in compiled.regions.values():
        axis_facts = region.naming_graph.axis_facts
        kept = replay(axis_facts, compiled.plan)
        for fact in axis_facts.facts:
            if fact.role == "reduced" and touched(fact.expr, kept):
                return f"{op_name(fact.node)} ({place(fact.node, region.name)})"
    return None


def _full_size_state(model: nn.Module, plan: Plan, fill: float) -> dict[str, Tensor]:
    """Return the state dict at original sizes, removed entries set to `fill`. Tied weights stay tied.

    Raises:
        FormatError: `fill` is NaN and a weight holds NaN already.
    """
    names = {id(tensor): name for name, tensor in named_tensors(model).items() if name in plan.original_shapes}
    full: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if fill != fill and tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
            raise FormatError(
                f"`{key}` holds NaN, so NaN cannot mark the removed entries; go back to a state without NaN"
            )
        if id(tensor) not in full:
            name = names.get(id(tensor))
            full[id(tensor)] = tensor.detach() if name is None else unshrunk(tensor, plan, name, fill)
        state[key] = full[id(tensor)]
    return state
