"""restore: a plain module again, with the weights it has now, where its own forward can run them.

restore(model)
  -> fitted         layers of torch.nn are told the sizes of their weights, for a trial
  -> calls_of       every call signature met so far, filled with random values
  -> _try           the region's own forward against its generated code
  -> plain          original classes, nothing of ours left in the model
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .compiled import MODEL, REGION, CompiledModel
from .errors import EcoSpaError, NoInputsError, RestoreError
from .passes.agree import TOLERANCE, forked_rng, relative_error
from .passes.names import join
from .passes.record import traceless
from .passes.rewrite import Program
from .region import Region
from .shrinkable import ShrinkableLinear, original_class, unswap_forward
from .signature import TENSOR, Signature, below

Module = TypeVar("Module", bound=nn.Module)


def restore(
    model: Module,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Module:
    """Undo `compile`: the same object as a plain module of its original classes, with the weights it has now.

    Where something has shrunk, the model's own Python must be able to run at the sizes that are left: many a forward
    reads them off its weights, others hold a size in an attribute (a number of heads, a split). That is tried, region
    by region, with every call signature met so far, and compared with what the compiled model gives.

    >>> plain = ecospa_fx.restore(model)

    Args:
        model: a compiled model.
        example_inputs: positional arguments of a call, to try too.
        example_kwargs: keyword arguments of that call.

    Returns:
        `model`.

    Raises:
        EcoSpaError: it is not compiled.
        NoInputsError: it has shrunk, was loaded and not called since, and no inputs are given.
        RestoreError: a module cannot run with its weights, or gives something else; nothing was changed.
    """
    compiled: CompiledModel | None = model.__dict__.get(MODEL)
    if compiled is None:
        raise EcoSpaError(f"{type(model).__name__} is not compiled; there is nothing to restore")
    if compiled.plan.original_shapes:
        if example_inputs is not None or example_kwargs is not None:
            with traceless(model), torch.no_grad():
                model(*(example_inputs or ()), **(example_kwargs or {}))  # captures what has not been called so far
        with fitted(model):
            for name, region in compiled.regions.items():
                if any(True for _ in compiled.plan.under(name)):
                    _try(region, model.get_submodule(name))
    _fit(model)
    for name in compiled.regions:
        plain(model.get_submodule(name))
    plain(model)
    return model


def plain(module: nn.Module) -> None:
    """Give a module, and the linear layers in it, their original classes, and take away what is ours."""
    child: nn.Module
    for child in module.modules():
        if type(child) is ShrinkableLinear:
            sizes = child.in_features, child.out_features
            child.__class__ = nn.Linear  # type: ignore[assignment]
            child.in_features, child.out_features = sizes
    unswap_forward(module)
    for key in (MODEL, REGION):
        module.__dict__.pop(key, None)


def _sizes(module: nn.Module) -> dict[str, Any]:
    """The attributes in which layers of torch.nn keep the sizes of their own weights, as these are now."""
    weight: Any = getattr(module, "weight", None)
    match module:
        case nn.modules.conv._ConvTransposeNd():
            return {"in_channels": weight.shape[0], "out_channels": weight.shape[1] * module.groups}
        case nn.modules.conv._ConvNd():
            if module.groups > 1 and module.groups == module.in_channels:  # depthwise: a group per channel
                out_in_group = module.out_channels // module.groups
                groups = weight.shape[0] // out_in_group
                return {"groups": groups, "in_channels": groups, "out_channels": weight.shape[0]}
            return {"in_channels": weight.shape[1] * module.groups, "out_channels": weight.shape[0]}
        case nn.modules.batchnorm._NormBase():
            held = weight if weight is not None else module.running_mean
            return {} if held is None else {"num_features": held.shape[0]}
        case nn.GroupNorm() if weight is not None:
            return {"num_channels": weight.shape[0]}
        case nn.LayerNorm() | nn.RMSNorm() if weight is not None:
            return {"normalized_shape": tuple(weight.shape)}
        case nn.Embedding() | nn.EmbeddingBag():
            return {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}
        case nn.PReLU():
            return {"num_parameters": weight.shape[0]}
    return {}


def _fit(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Tell every layer of torch.nn the sizes of its weights; returns what was there."""
    before = []
    for child in model.modules():
        for attribute, size in _sizes(child).items():
            if getattr(child, attribute) != size:
                before.append((child, attribute, getattr(child, attribute)))
                setattr(child, attribute, size)
    return before


@contextmanager
def fitted(model: nn.Module) -> Iterator[None]:
    """`_fit`, for the time inside."""
    before = _fit(model)
    try:
        yield
    finally:
        for child, attribute, size in before:
            setattr(child, attribute, size)


def _try(region: Region, module: nn.Module) -> None:
    """Compare a region's own forward with its generated code in every way it has been called.

    Raises:
        NoInputsError: it has not been called.
        RestoreError: they differ, or its own forward fails.
    """
    if not region.programs:
        raise NoInputsError(
            f"{_named(region.name, module)} has shrunk and not been called since it was loaded, so that nothing can be "
            "tried; pass example_inputs=(x,)"
        )
    modes = {child: child.training for child in module.modules()}
    try:
        for program in region.programs:
            for child, training in zip(below(module), program.captured.signature.training, strict=True):
                child.training = training
            args, kwargs = _call(program.captured.signature)
            with traceless(module), torch.no_grad():
                _compare(region, module, program, args, kwargs)
    finally:
        for child, training in modes.items():
            child.training = training


def _compare(region: Region, module: nn.Module, program: Program, args: Any, kwargs: Any) -> None:
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    with forked_rng(module):
        torch.manual_seed(0)
        expected = program.run(module, *(t.clone() for t in inputs), *program.constants)
    inside: list[tuple[str, nn.Module]] = []
    with forked_rng(module), _following(module, inside):
        torch.manual_seed(0)
        try:
            found = pytree.tree_leaves(original_class(module).forward(module, *args, **kwargs))
        except Exception as error:
            path, failing = inside[-1] if inside else ("", module)
            where = _named(join(region.name, path) if path else region.name, failing)
            raise RestoreError(
                f"{where} cannot run with the weights that are left: {str(error).strip().splitlines()[0]}. It "
                "holds a size of its own; keep the model compiled, or change that attribute in a class of yours"
            ) from error
    tensors = [leaf for leaf in found if isinstance(leaf, Tensor)]
    for mine, theirs in zip(tensors, expected[: program.captured.returned], strict=True):
        if mine.shape != theirs.shape:
            different = f"a result of {tuple(mine.shape)} and not of {tuple(theirs.shape)}"
        elif mine.is_meta or (difference := relative_error(theirs, mine)) <= TOLERANCE.get(mine.dtype, 0.0):
            continue
        else:
            different = f"results that differ by {difference:.1e}"
        raise RestoreError(
            f"{_named(region.name, module)} runs with the weights that are left, but gives {different}: it derives "
            "something else from their sizes (a scale, a split). Keep the model compiled"
        )


@contextmanager
def _following(module: nn.Module, inside: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """Keep in `inside` the calls of submodules that have begun and not ended, for messages."""
    handles = []
    for path, child in module.named_modules():
        if path:
            entering = lambda _, __, here=(path, child): inside.append(here)  # noqa: E731
            handles.append(child.register_forward_pre_hook(entering))
            handles.append(child.register_forward_hook(lambda *_: inside.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call(signature: Signature) -> tuple[Any, Any]:
    """A call of a signature, with random values."""
    generator = torch.Generator().manual_seed(0)
    sizes = {}
    for i, (symbol, (low, high)) in enumerate(sorted(signature.ranges.items(), key=lambda item: str(item[0]))):
        sizes[symbol] = int(min(max(low, 3 + i), high))
    leaves: list[Any] = []
    tensors = iter(signature.tensors)
    for leaf in signature.leaves:
        if leaf is not TENSOR:
            leaves.append(leaf)
            continue
        dtype, device, shape = next(tensors)
        size = [int(n.subs(sizes)) if isinstance(n, sympy.Expr) else int(n) for n in shape]
        if dtype.is_floating_point or dtype.is_complex:
            value = torch.randn(size, generator=generator)
        elif dtype == torch.bool:
            value = torch.ones(size)
        else:  # positions and words: such as any table has
            value = torch.randint(2, size, generator=generator)
        leaves.append(value.to(device, dtype))
    args, kwargs = pytree.tree_unflatten(leaves, signature.spec)
    return args, kwargs


def _named(name: str, module: nn.Module) -> str:
    return f"`{name}` ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
