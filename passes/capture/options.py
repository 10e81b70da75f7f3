"""Capture options: the choices of whoever has a model captured, handed down from the front door to every pass."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CaptureOptions:
    """The choices that hold for every capture of one model, and how the call is made.

    Attributes:
        experiments: try ops that have no axis rule, see `passes.infer.probe`.
        objects: capture calls that hand in objects, such as caches. A region that runs its own Python needs no graph
            for such calls, and refuses to have one.
        gradients: the call is made with gradients, and refused where eager cannot compute them, as where it writes to
            what backward needs (a state of generation). One that is made without is compared by outputs and state then.
    """

    experiments: bool = False
    objects: bool = True
    gradients: bool = True


DEFAULTS = CaptureOptions()
