"""TODO."""

from __future__ import annotations

MOST_ROUTES = 1024  # calls remembered per region, one per combination of sizes
