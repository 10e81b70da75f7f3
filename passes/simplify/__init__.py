"""Simplify: passes that bring a captured graph into fewer, simpler forms, with the same values."""
