"""Graphs of couplings: DOT, SVG, Mermaid, GraphML, JSON; see `see/graphs.py`."""

from ecospa_fx.see.graphs import *  # noqa: F403
