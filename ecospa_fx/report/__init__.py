"""Report: one HTML file with what was found in a model, which needs no network and no server.

document.py   what the page knows, as plain values
training.py   the curves of a training run
page.html.j2  the page: report.css and report.js beside it are put into it
"""

from .page import write_report
from .training import training_of

__all__ = ["training_of", "write_report"]
