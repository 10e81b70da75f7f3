"""Train: the trainer, which decides when, where and how much a model shrinks while it trains."""
