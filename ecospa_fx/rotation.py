"""Changes of basis between weights; see `compensate/rotation.py`."""

from ecospa_fx.compensate.rotation import *  # noqa: F403
