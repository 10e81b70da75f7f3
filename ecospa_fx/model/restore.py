"""Restoration: a compiled model as a plain module again, where its own forward can run with its current weights.

restore(model)
  -> fitted      layers of torch.nn get the sizes of their weights, for a trial
  -> _try        the region's own forward against its generated code, in every call signature met so far
  -> plain       original classes, and no attributes of this library
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from ecospa_fx.arguments import CALL, MODULE, takes
from ecospa_fx.errors import EcoSpaError, NoInputsError, RestoreError
from ecospa_fx.passes.follow.attributes import fitted, sync_layer_sizes
from ecospa_fx.passes.follow.given import Given
from ecospa_fx.ranks.wrappers import looks_inside

from .class_swap import ShrinkableLinear, unswap_forward
from .compiled import COPIES, MODEL, REGION, CompiledModel
from .inner import INNER, difference_of_python, inner_as_is
from .lookup import try_call
from .old_weights import say_no_more
from .region import Region
from .whole import held_whole

Module = TypeVar("Module", bound=nn.Module)


@takes(model=MODULE, **CALL)
@looks_inside
def restore(
    model: Module,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Module:
    """Undo `compile`: the same object as a plain module of its original classes, with the weights it has now.

    Where something has shrunk, the model's own Python must be able to run at the sizes that are left: many a forward
    reads them off its weights, others hold a size in an attribute (a number of heads, a split). That is tried, region
    by region, with every call signature met so far, and compared with the results of the compiled model.

    >>> plain = ecospa_fx.restore(model)

    Args:
        model: a compiled model.
        example_inputs: positional arguments of a call, to try too.
        example_kwargs: keyword arguments of that call.

    Returns:
        `model`.

    Raises:
        EcoSpaError: the model is not compiled.
        NoInputsError: the model has shrunk, was loaded and not called since, and no inputs are given.
        RestoreError: a module cannot run with its weights, or gives other results; nothing was changed.
    """
    restored(model, example_inputs, example_kwargs)
    say_no_more(model)
    return model


def restored(
    model: nn.Module, example_inputs: Sequence[Any] | None = None, example_kwargs: Mapping[str, Any] | None = None
) -> None:
    """Restore a model as `restore` does, but for the words of `load_state_dict`, which may be calling this."""
    compiled: CompiledModel | None = model.__dict__.get(MODEL)
    if compiled is None:
        raise EcoSpaError(f"{type(model).__name__} is not compiled; there is nothing to restore")
    for given in sorted((a for a in compiled.attributes if isinstance(a, Given)), key=str):
        if (taken := len(given.read(model))) < given.size:
            raise RestoreError(
                f"`{given.module}` has shrunk and takes {taken} of {given.size} entries of dim {given.dim} of "
                f"`{given.inside}`, which the model around it makes at full size. Keep the model compiled"
            )
    for coupling in compiled.couplings():
        if coupling.kind == "heads" and not coupling.size:
            raise RestoreError(
                f"`{coupling.name}` has no entry left, and its own Python would keep keys of no heads, by which a "
                "cache counts its tokens. Keep the model compiled"
            )
    if compiled.plan.original_shapes:
        if example_inputs is not None or example_kwargs is not None:
            try_call(
                model, tuple(example_inputs or ()), dict(example_kwargs or {})
            )  # captures what has not been called
        with held_whole(model, compiled.regions), fitted(model), inner_as_is(model):
            for name, region in compiled.regions.items():
                if any(True for _ in compiled.plan.under(name)):
                    _try(region, model.get_submodule(name))
    sync_layer_sizes(model)
    for name in compiled.regions:
        plain(model.get_submodule(name))
    plain(model)


def plain(module: nn.Module) -> None:
    """Give a module, and the linear layers in it, their original classes, and remove the attributes of this library."""
    unswap_forward(module)
    child: nn.Module
    for child in module.modules():
        if child.__dict__.pop(INNER, None) is not None:
            unswap_forward(child)
        if type(child) is ShrinkableLinear:
            sizes = child.in_features, child.out_features
            child.__class__ = nn.Linear  # type: ignore[assignment]
            child.in_features, child.out_features = sizes
    for key in (MODEL, REGION, COPIES):
        module.__dict__.pop(key, None)


def _try(region: Region, module: nn.Module) -> None:
    """Refuse a region whose own forward differs from its programs.

    Raises:
        NoInputsError: the region has not been called.
        RestoreError: its own forward fails, or gives other results.
    """
    if not region.specializations:
        raise NoInputsError(
            f"{_named(region.name, module)} has shrunk and not been called since it was loaded, so that its own "
            "forward cannot be tried; pass example_inputs=(x,)"
        )
    for program in [each.program for each in reversed(region.specializations)]:
        why = difference_of_python(program, module)
        if why is None:
            continue
        way = "Keep the model compiled"
        if why.startswith("fails"):
            way = "It reads a size from an attribute; keep the model compiled, or change that attribute in a class "
            way += "of yours"
        elif why.startswith("runs"):
            way = "It derives a number from their sizes (a scale, a split); keep the model compiled"
        raise RestoreError(f"with the weights that are left, {_named(region.name, module)} {why}. {way}")


def _named(name: str, module: nn.Module) -> str:
    return f"`{name}` ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
