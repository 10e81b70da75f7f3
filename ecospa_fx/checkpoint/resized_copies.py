"""Copies of a model, such as averages of its weights, that are to take a state at the sizes of a save."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.copies import Copy, copies_in
from ecospa_fx.model.journal import Journal
from ecospa_fx.plan import Plan

from .rebuild import Saved, refitted


@contextmanager
def copies_resized(
    model: nn.Module, owners: Mapping[str, Any], states: Mapping[str, Any], saved: Saved
) -> Iterator[None]:
    """Give copies of a model the sizes of a save; whatever is raised, here or inside, leaves them as they were.

    Args:
        model: the model, at the sizes of the save.
        owners: the objects that hold copies, by name, and others.
        states: the state that each of them is to take. One without the sizes of the save is not of such a copy.
        saved: the save.
    """
    needed = {tuple(tensor.shape) for name, tensor in saved.tensors.items() if name not in saved.transient}
    journal = Journal()
    with ExitStack() as stack:
        try:
            for name, owner in owners.items():
                leaves = pytree.tree_leaves(states[name])
                if needed <= {tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)}:
                    for each in copies_in(owner, model):
                        _resize(each, saved, stack, journal)
            yield
        except BaseException:
            journal.undo()
            raise


def _resize(copied: Copy, saved: Saved, stack: ExitStack, journal: Journal) -> None:
    shapes = {name: tensor.shape for name, tensor in saved.tensors.items() if name in copied.tensors}
    other = [name for name, shape in shapes.items() if copied.tensors[name].shape != shape]
    if copied.module is not None:
        compiled = copied.module.__dict__.get(MODEL)
        if other or (Plan() if compiled is None else compiled.plan) != saved.plan:
            own = {name: tensor.clone() for name, tensor in saved.tensors.items()}
            stack.enter_context(refitted(copied.module, replace(saved, tensors=own)))
        return
    for name in other:
        tensor = copied.tensors[name]
        journal.note_tensor(tensor)
        tensor.data = saved.tensors[name].to(tensor.device, tensor.dtype, copy=True)
