"""Changes of basis between weights, and the optimizers that can follow; see `compensate/rotation.py`."""

from ecospa_fx.compensate.rotation import *  # noqa: F403
