"""Rewrite: generated code at the sizes that a plan leaves, and its verification against masking."""
