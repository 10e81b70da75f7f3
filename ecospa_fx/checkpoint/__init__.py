"""Checkpoints: models, plans and training runs on disk, complete at every moment."""
