"""Axes: the algebra of axis expressions and selections of their entries, which know nothing of tensors but sizes."""
