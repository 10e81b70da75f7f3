"""Train: when, where and how much to shrink while a model trains."""
