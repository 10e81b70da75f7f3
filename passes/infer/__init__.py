"""Infer: an axis expression for every dim of every value."""
