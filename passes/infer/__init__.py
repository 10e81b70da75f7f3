"""Inference: an axis expression for every dim of every value, by rules and, for ops without one, by experiment."""
