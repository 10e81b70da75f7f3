"""Kernels, each beside its plain-torch reference `x_ref`, which is also the path taken on a CPU."""

from .slice_sums import slice_sums_ref

__all__ = ["slice_sums_ref"]
