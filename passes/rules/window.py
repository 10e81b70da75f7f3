"""Windows over positions: taken out, put back, sampled; and positions traded for channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ecospa_fx.passes.ir.relations import Operand, Pattern

from .operands import letters, spaced
from .registry import axis_rule

if TYPE_CHECKING:
    from ecospa_fx.passes.ir.op_site import OpSite

aten = torch.ops.aten


@axis_rule(aten.im2col.default)
def im2col(x: Operand, kernel: list[int], *_: Any) -> Pattern:
    """Windows of neighbouring positions are laid out side by side."""
    batch = "b " if x.ndim == 4 else ""
    return Pattern(f"{batch}c h! w! -> {batch}(c k!) l!", (x,), sizes={"k": kernel[0] * kernel[1]}, moves=True)


@axis_rule(aten.col2im.default)
def col2im(x: Operand, size: list[int], kernel: list[int], *_: Any) -> Pattern:
    """Windows of neighbouring positions are added where they overlap."""
    batch = "b " if x.ndim == 3 else ""
    return Pattern(f"{batch}(c k!) l! -> {batch}c h! w!", (x,), sizes={"k": kernel[0] * kernel[1]})


@axis_rule(aten.unfold.default)
def unfold(x: Operand, dim: int, size: int, step: int) -> Pattern:
    """Windows of neighbouring positions are laid out side by side."""
    return Pattern(f"{letters(x, dim, 'along!')} -> {letters(x, dim, 'windows!')} inside!", (x,), moves=True)


def resize_grid(site: OpSite) -> None:
    """Write the number of samples that are left."""
    size = site.args["size"]
    site.args["size"] = [site.resized(size[0], site.operands[0].exprs[0]), *size[1:]]


@axis_rule(aten.affine_grid_generator.default, resize=resize_grid)
def affine_grid(theta: Operand, size: list[Any], *_: Any) -> Pattern:
    """All entries of a map decide where each position lies."""
    return Pattern(f"b m! n! -> b {spaced('x', len(size) - 2, '!')} place!", (theta,))


@axis_rule(aten.grid_sampler.default)
def grid_sampler(x: Operand, grid: Operand, *_: Any) -> Pattern:
    """Positions are chosen, and blended, by the values of a grid."""
    space = range(x.ndim - 2)
    here, there = " ".join(f"x{i}!" for i in space), " ".join(f"y{i}" for i in space)
    return Pattern(f"b c {here}, b {there} place! -> b c {there}", (x, grid), apart=True)


@axis_rule(aten.pixel_shuffle.default)
def pixel_shuffle(x: Operand, factor: int) -> Pattern:
    """Blocks of channels become blocks of positions."""
    return Pattern("... (c r! s!) h w -> ... c (h r!) (w s!)", (x,), sizes={"r": factor, "s": factor}, moves=True)


@axis_rule(aten.pixel_unshuffle.default)
def pixel_unshuffle(x: Operand, factor: int) -> Pattern:
    """Blocks of positions become blocks of channels."""
    return Pattern("... c (h r!) (w s!) -> ... (c r! s!) h w", (x,), sizes={"r": factor, "s": factor}, moves=True)


@axis_rule(aten.channel_shuffle.default)
def channel_shuffle(x: Operand, groups: int) -> Pattern:
    """The channels of all groups take turns."""
    space = spaced("x", x.ndim - 2)
    return Pattern(f"b (g! n) {space} -> b (n g!) {space}", (x,), sizes={"g": groups}, moves=True)
