"""Kernels, each beside its reference `x_ref` in plain torch, which is also the path on a CPU."""

from .adamw import adamw_slice_sums
from .compact import compact, compacted
from .slice_sums import add_slice_sums, add_slice_sums_now, slice_sums, slice_sums_ref

__all__ = [
    "adamw_slice_sums",
    "add_slice_sums",
    "add_slice_sums_now",
    "compact",
    "compacted",
    "slice_sums",
    "slice_sums_ref",
]
