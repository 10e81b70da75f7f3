"""Checkpoint: models, plans and training runs on disk, whole at every moment."""
