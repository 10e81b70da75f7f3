"""Reports: one HTML file of findings or of several runs, and pictures of a training run; see `see/report/`."""

from ecospa_fx.see.report import SideBySide, compare_runs, latency_of, save_widths, training_of, write_report

__all__ = ["SideBySide", "compare_runs", "latency_of", "save_widths", "training_of", "write_report"]
