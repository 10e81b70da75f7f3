"""The independent twin: what removal means, said without any graph.

A copy of the plain model in which every row and column that a shrink takes away is zero, run by its own Python. It
knows only the member index of each coupling: which row of which parameter belongs to which entry.

Where a norm or an average runs over an axis it is of what is left, and zeros are no judge: see `without_stream`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import ecospa_fx

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
Keeps = Mapping[ecospa_fx.Coupling, Tensor]
Positions = dict[tuple[str, int], Tensor]


def half(size: int, seed: int) -> Tensor:
    """A sorted random half of `range(size)`, one entry at least."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, size // 2)].sort().values


def halves(coupling: ecospa_fx.Coupling, seed: int) -> Tensor:
    """A random half of a coupling; another one in each context where it may differ."""
    if coupling.context is None:
        return half(coupling.size, seed)
    return torch.stack([half(coupling.size, seed + 100 * row) for row in range(coupling.contexts)])


def without_stream(model: nn.Module) -> list[ecospa_fx.Coupling]:
    """Couplings of a transformer that zeros can judge: all but its residual stream, of which norms take what is left.

    The stream has judges that know that: `test_smaller_class.py` builds the same class at the smaller sizes.
    """
    return [coupling for coupling in ecospa_fx.couplings(model) if coupling.kind != "residual"]


def selections(couplings: Sequence[ecospa_fx.Coupling], seed: int = 0) -> Iterator[tuple[str, Keeps]]:
    """A random half of every coupling alone, then of all together, the same in every context and not."""
    keeps = {coupling: half(coupling.size, seed + i) for i, coupling in enumerate(couplings)}
    for coupling, keep in keeps.items():
        yield coupling.name, {coupling: keep}
        if coupling.context is not None:
            yield f"{coupling.name} by context", {coupling: halves(coupling, seed)}
    yield "all together", keeps
    if any(coupling.context is not None for coupling in couplings):
        yield "all together by context", {coupling: halves(coupling, seed + i) for i, coupling in enumerate(couplings)}


def _stays(member: ecospa_fx.Member, keep: Tensor) -> Tensor:
    """Return the rows of a member that a selection keeps, as far as they belong to the coupling."""
    if keep.ndim == 1:
        return torch.isin(member.index, keep)
    return torch.stack([torch.isin(i, keep[c]) for i, c in zip(member.index, member.context)])


def kept_positions(plain: nn.Module, keeps: Keeps) -> Positions:
    """Return the positions left of each (parameter name, dim) that a selection touches."""
    shapes = {name: p.shape for name, p in plain.named_parameters(remove_duplicate=False)}
    masks: dict[tuple[str, int], Tensor] = {}
    for coupling, keep in keeps.items():
        for member in coupling.members:
            assert len(member.index) == shapes[member.parameter][member.dim]
            gone = (member.index >= 0) & ~_stays(member, keep)
            axis = member.parameter, member.dim
            masks[axis] = masks.get(axis, torch.ones(len(gone), dtype=torch.bool)) & ~gone
    # A tied parameter is named once in a coupling; here each of its names counts.
    named = dict(plain.named_parameters(remove_duplicate=False))
    for (first, dim), mask in list(masks.items()):
        masks |= {(name, dim): mask for name, p in named.items() if p is named[first]}
    return {axis: mask.nonzero().flatten() for axis, mask in masks.items()}


def zeroed(plain: nn.Module, positions: Positions) -> nn.Module:
    """A copy of `plain` with nothing but zeros outside of `positions`."""
    twin = copy.deepcopy(plain)
    named = dict(twin.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for (name, dim), kept in positions.items():
            gone = torch.ones(named[name].shape[dim], dtype=torch.bool)
            gone[kept] = False
            named[name].index_fill_(dim, gone.nonzero().flatten(), 0.0)
    return twin


def sliced(tensor: Tensor, name: str, positions: Positions) -> Tensor:
    """The positions that are left of a tensor shaped like parameter `name`."""
    for dim in range(tensor.ndim):
        if (name, dim) in positions:
            tensor = tensor.index_select(dim, positions[name, dim])
    return tensor


def run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and gradients of a fixed random projection of them by parameter name and by number of argument."""
    model.zero_grad(set_to_none=True)
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    leaves = [
        x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves
    ]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    outputs = [out for out in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(out, Tensor)]
    generator = torch.Generator().manual_seed(3)
    projected = [
        (out * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)).sum() for out in outputs
    ]
    torch.stack(projected).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.grad is not None:
            gradients[f"argument {i}"] = leaf.grad
    return [out.detach() for out in outputs], gradients


def assert_same(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], tolerance: float, what: str) -> None:
    """Equal up to `tolerance` of each tensor's largest entry; what is rounding noise beside the rest counts as zero."""
    assert expected.keys() == got.keys(), what
    scale = max((float(t.abs().max()) for t in expected.values() if t.numel()), default=0.0)
    for name, a in expected.items():
        b = got[name]
        assert a.shape == b.shape, f"{what}: {name} is {tuple(b.shape)}, expected {tuple(a.shape)}"
        noise = scale * torch.finfo(a.dtype).eps * 1e2
        error = float((a - b).abs().max()) if a.numel() else 0.0
        largest = float(a.abs().max()) if a.numel() else 0.0
        assert error <= max(tolerance * largest, noise), f"{what}: {name} differs by {error:.1e} of {largest:.1e}"


def assert_equals_twin(
    shrunk: nn.Module, twin: nn.Module, positions: Positions, args: Sequence[Any], kwargs: Mapping[str, Any], what: str
) -> None:
    """Outputs of both are equal, and so are the gradients of all that is left."""
    dtype = next(p.dtype for p in twin.parameters())
    outputs, gradients = run(shrunk, args, kwargs)
    twin_outputs, twin_gradients = run(twin, args, kwargs)
    named = lambda tensors: {f"output {i}": tensor for i, tensor in enumerate(tensors)}  # noqa: E731
    assert_same(named(twin_outputs), named(outputs), TOLERANCE[dtype], what)
    expected = {name: sliced(gradient, name, positions) for name, gradient in twin_gradients.items()}
    assert_same(expected, gradients, TOLERANCE[dtype], f"{what}, gradients")


def assert_is_slice(shrunk: nn.Module, plain: nn.Module, positions: Positions) -> None:
    """Every parameter is exactly what a selection leaves of the plain model's, under the same name."""
    before, after = (
        dict(plain.named_parameters(remove_duplicate=False)),
        dict(shrunk.named_parameters(remove_duplicate=False)),
    )
    assert before.keys() == after.keys()
    for name, parameter in after.items():
        assert torch.equal(parameter, sliced(before[name], name, positions)), name
