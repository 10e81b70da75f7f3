"""Capture: a region of a model as a graph of ATen ops, compared with eager."""
