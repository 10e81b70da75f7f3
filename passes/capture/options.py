"""Capture options: the choices of whoever has a model captured, handed down from the front door to every pass."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CaptureOptions:
    """The choices that hold for every capture of one model.

    Attributes:
        experiments: try ops that have no axis rule, see `passes.infer.probe`.
        objects: capture calls that hand in objects, such as caches. A region that runs its own Python needs no graph
            for such calls, and refuses to have one.
    """

    experiments: bool = False
    objects: bool = True


DEFAULTS = CaptureOptions()
