"""One HTML file of findings, and pictures of a training run; see `see/report/`."""

from ecospa_fx.see.report import *  # noqa: F403
