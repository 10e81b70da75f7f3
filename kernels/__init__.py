"""Kernels, each beside its plain-torch reference `x_ref`, which is also the path taken on a CPU."""

from .compact import compact, compacted
from .slice_sums import add_slice_sums, slice_sums, slice_sums_ref

__all__ = ["add_slice_sums", "compact", "compacted", "slice_sums", "slice_sums_ref"]
