"""Report: one HTML file with what was found in a model, which needs no network and no server.

document.py   what the page knows, as plain values
training.py   the curves of a training run
widths.py     the widths of every layer over time, as a picture of its own
page.html.j2  the page: report.css and report.js beside it are put into it
"""

from .page import write_report
from .training import training_of
from .widths import save_widths

__all__ = ["save_widths", "training_of", "write_report"]
