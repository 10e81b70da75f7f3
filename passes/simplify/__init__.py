"""Simplify: a captured graph in fewer spellings, with the same values."""
