"""Output of models in formats that other programs read."""
