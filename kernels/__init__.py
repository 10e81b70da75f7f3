"""Kernels, each beside its reference `x_ref` in plain torch, which is also the path on a CPU."""

if __name__ == "ecospa_fx.kernels":
    from .adamw import adamw_slice_sums
    from .compact import compact, compacted
    from .slice_sums import add_slice_sums, add_slice_sums_now, slice_sums, slice_sums_ref
else:  # the folder was found on `sys.path` by who meant the package of PyPI
    from .own_name import stand_aside

    stand_aside(__name__)

__all__ = [
    "adamw_slice_sums",
    "add_slice_sums",
    "add_slice_sums_now",
    "compact",
    "compacted",
    "slice_sums",
    "slice_sums_ref",
]
