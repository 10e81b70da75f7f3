"""Report: the findings of a model as one HTML file, which needs no network and no server.

document.py   the content of the page, as plain values
training.py   the curves of a training run
latency.py    the time of a forward before and after
compare.py    several training runs side by side
widths.py     the widths of every layer over time, as a separate picture
page.py       templates, into which styles and scripts are put: page.html.j2 with report.js and graph.js, and
              compare.html.j2 with compare.js
"""

from .compare import SideBySide, compare_runs
from .latency import latency_of
from .page import write_report
from .training import training_of
from .widths import save_widths

__all__ = ["SideBySide", "compare_runs", "latency_of", "save_widths", "training_of", "write_report"]
