"""Axes: the algebra of axis expressions, and selections of their entries. Knows nothing but sizes."""
