"""Drawings: the levels of detail and the formats of graphs, by name."""

from __future__ import annotations

from typing import Literal, TypeAlias

Level: TypeAlias = Literal["blocks", "couplings", "full"]
Format: TypeAlias = Literal["dot", "svg", "mermaid", "graphml", "json"]
