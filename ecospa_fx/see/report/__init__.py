"""Report: the findings of a model as one HTML file, which needs no network and no server.

document.py   the content of the page, as plain values
training.py   the curves of a training run
widths.py     the widths of every layer over time, as a separate picture
page.html.j2  the page, into which report.css and report.js are put
"""

from .page import write_report
from .training import training_of
from .widths import save_widths

__all__ = ["save_widths", "training_of", "write_report"]
