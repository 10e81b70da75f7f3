"""Reports: one HTML file of findings, and pictures of a training run; see `see/report/`."""

from ecospa_fx.see.report import save_widths, training_of, write_report

__all__ = ["save_widths", "training_of", "write_report"]
