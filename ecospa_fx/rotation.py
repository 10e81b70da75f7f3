"""Rotation: changes of basis between weights, and the optimizers that can follow; see `compensate/rotation.py`."""

from ecospa_fx.compensate.rotation import TURNS, Follows, Rotation, rotate

__all__ = ["TURNS", "Follows", "Rotation", "rotate"]
