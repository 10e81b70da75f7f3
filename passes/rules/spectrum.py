"""Spectra: Fourier transforms and complex numbers."""

from __future__ import annotations

from typing import Any

import torch

from ecospa_fx.passes.ir.relations import Operand, Pattern, SameDims

from .operands import tensors
from .registry import axis_rule

aten = torch.ops.aten


@axis_rule(aten.fft_fft, aten.fft_ifft)
def fft(x: Operand, n: int | None = None, dim: int = -1, norm: str | None = None) -> SameDims | Pattern:
    """Every frequency depends on all entries along the axis."""
    return SameDims(x, pinned=(dim % x.ndim,)) if n is None else _transformed(x, (dim,))


@axis_rule(aten.fft_rfft, aten.fft_irfft, aten.fft_hfft, aten.fft_ihfft)
def rfft(x: Operand, n: int | None = None, dim: int = -1, norm: str | None = None) -> Pattern:
    """Every frequency depends on all entries along the axis."""
    return _transformed(x, (dim,))


@axis_rule(aten.fft_fft2, aten.fft_ifft2, aten.fft_rfft2, aten.fft_irfft2, aten.fft_hfft2, aten.fft_ihfft2)
def fft2(x: Operand, s: list[int] | None = None, dim: tuple[int, ...] = (-2, -1), norm: str | None = None) -> Pattern:
    """Every frequency depends on all entries along the axes."""
    return _transformed(x, dim)


@axis_rule(aten.fft_fftn, aten.fft_ifftn, aten.fft_rfftn, aten.fft_irfftn, aten.fft_hfftn, aten.fft_ihfftn)
def fftn(x: Operand, s: list[int] | None = None, dim: list[int] | None = None, norm: str | None = None) -> Pattern:
    """Every frequency depends on all entries along the axes."""
    return _transformed(x, dim or (range(x.ndim) if s is None else range(x.ndim - len(s), x.ndim)))


def _transformed(x: Operand, dims: Any) -> Pattern:
    chosen = {dim % x.ndim for dim in dims}
    before = " ".join(f"d{d}!" if d in chosen else f"d{d}" for d in range(x.ndim))
    after = " ".join(f"n{d}!" if d in chosen else f"d{d}" for d in range(x.ndim))
    return Pattern(f"{before} -> {after}", (x,))


@axis_rule(aten.fft_fftshift.default, aten.fft_ifftshift.default)
def shifted(x: Operand, dim: list[int] | None = None) -> SameDims:
    """Entries along the axis move to other positions."""
    return SameDims(x, pinned=tuple(d % x.ndim for d in (range(x.ndim) if dim is None else dim)), moves=True)


@axis_rule(aten.stft.default)
def stft(x: Operand, size: int, hop: Any = None, length: Any = None, window: Operand | None = None,
         scaled: bool = False, half: Any = None, complexes: bool | None = None, *_: Any) -> Pattern:  # fmt: skip
    """Every frequency depends on all entries of a window."""
    windows = tensors(window)
    return Pattern(f"... t!{', +w!' * len(windows)} -> ... f! n!{'' if complexes else ' two!'}", (x, *windows))


@axis_rule(aten.stft.center)
def centered_stft(x: Operand, size: int, hop: Any = None, length: Any = None, window: Operand | None = None,
                  center: bool = True, mode: str = "reflect", *how: Any) -> Pattern:  # fmt: skip
    """Every frequency depends on all entries of a window."""
    return stft(x, size, hop, length, window, *how)


@axis_rule(aten.istft)
def istft(x: Operand, *args: Any, **more: Any) -> Pattern:
    """Every entry of a window depends on all frequencies."""
    windows = tensors(*args, *more.values())
    return Pattern(f"... f! n!{', +w!' * len(windows)} -> ... t!", (x, *windows))


@axis_rule(aten.view_as_complex.default)
def view_as_complex(x: Operand) -> SameDims:
    """The two entries along the axis become one complex number."""
    return SameDims(x, pinned=(x.ndim - 1,), dropped=(x.ndim - 1,), keepdim=False)


@axis_rule(aten.view_as_real.default)
def view_as_real(x: Operand) -> str:
    """Each complex number becomes two entries along the axis."""
    return "... -> ... two!"
