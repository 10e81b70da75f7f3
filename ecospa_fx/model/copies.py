"""Copies of a model that shrink with it, such as averages of its weights over training.

also= -> modules with tensors of the same names, also inside of other objects; dicts of names and tensors
      -> Copy: tensors by their names in the model
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ecospa_fx.arguments import SEVERAL
from ecospa_fx.errors import ShrinkError
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.plan import Plan

from .class_swap import ShrinkableLinear, original_class


@dataclass(frozen=True, eq=False)
class Copy:
    """A copy of a model.

    Attributes:
        tensors: its tensors by their names in the model; tied ones under each name.
        module: the module that holds them; None for a dict.
        kind: class of the object in `also=` that it was found in, for messages.
    """

    tensors: Mapping[str, Tensor]
    module: nn.Module | None
    kind: str


def copies_of(model: nn.Module, also: Any) -> list[Copy]:
    """Find the copies of `model` in the objects of `also=`.

    Args:
        model: the model that shrinks.
        also: modules, objects that hold some (`torch.optim.swa_utils.AveragedModel`, timm's `ModelEma`), dicts of
            names and tensors; or one of these.

    Raises:
        ShrinkError: one of them holds no copy, or a copy of other sizes.
    """
    mine = named_tensors(model)
    copies = []
    for each in listed(also):
        found, kind = copies_in(each, model), type(each).__name__
        if any(copy.module is model for copy in found):
            raise ShrinkError(f"the {kind} in also= holds this {type(model).__name__} itself, not a copy of it")
        if not found:
            raise ShrinkError(
                f"the {kind} in also= holds no copy of this {type(model).__name__}: neither a module of its classes "
                "with tensors of the same names, nor a dict of such names and tensors. Pass an object that holds one"
            )
        copies += found
    for copy in copies:
        for name, tensor in copy.tensors.items():
            if tensor.shape != mine[name].shape:
                raise ShrinkError(
                    f"`{name}` is {tuple(tensor.shape)} in the {copy.kind} in also= and {tuple(mine[name].shape)} in "
                    "the model: it has missed a shrink, or is not a copy of this model. Name it in also= at every "
                    "shrink, or copy the model anew"
                )
    return copies


def check_plan(copy: Copy, theirs: Plan, plan: Plan) -> None:
    """Refuse a copy that has shrunk to the same sizes, but not by the same entries.

    Raises:
        ShrinkError: it has.
    """
    if theirs != plan:
        raise ShrinkError(
            f"the {copy.kind} in also= keeps other rows and columns than the model: they have not shrunk together. "
            "Name it in also= at every shrink, or copy the model anew"
        )


def listed(also: Any) -> Iterable[Any]:
    """Return the objects in `also=`, which may be one or several."""
    if isinstance(also, (nn.Module, Mapping)) or not SEVERAL.fits(also):
        return [also]
    return list(also)


def copies_in(given: Any, model: nn.Module) -> list[Copy]:
    """Find what has the classes and the names of `model` in an object, at whatever sizes; `model` itself too."""
    kind, mine = type(given).__name__, named_tensors(model)
    holders = list(_modules_and_dicts(given))
    modules = [module for each in holders if isinstance(each, nn.Module) for module in _alike(each, model, mine)]
    copies = [Copy(named_tensors(module), module, kind) for module in modules]
    for each in holders:
        if isinstance(each, Mapping):
            named = {name: each[name] for name in mine if isinstance(each.get(name), Tensor)}
            copies += [Copy(named, None, kind)] if named else []
    return copies


def _modules_and_dicts(given: Any) -> Iterator[Any]:
    """Yield an object if it is a module or dict, else the modules and dicts among its attributes."""
    if isinstance(given, (nn.Module, Mapping)):
        yield given
    else:
        yield from (
            value for value in getattr(given, "__dict__", {}).values() if isinstance(value, (nn.Module, Mapping))
        )


def _alike(root: nn.Module, model: nn.Module, mine: Mapping[str, Tensor]) -> list[nn.Module]:
    """Find the outermost modules under `root` of the model's classes, with tensors of the same names."""
    classes = _classes(model)
    alike: list[nn.Module] = []
    queue = [root]
    while queue:
        module = queue.pop(0)
        same = original_class(module) is original_class(model) and named_tensors(module).keys() == mine.keys()
        if same and _classes(module) == classes:
            alike.append(module)
        else:
            queue.extend(module.children())
    return alike


def _classes(model: nn.Module) -> list[type[nn.Module]]:
    """Return the classes that all modules had before any class swap."""
    classes = [original_class(module) for module in model.modules()]
    return [nn.Linear if cls is ShrinkableLinear else cls for cls in classes]
