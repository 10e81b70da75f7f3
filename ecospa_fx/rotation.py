"""Rotation: changes of basis between weights; see `compensate/rotation.py`."""

from ecospa_fx.compensate.rotation import Rotation, rotate

__all__ = ["Rotation", "rotate"]
