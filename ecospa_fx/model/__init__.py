"""Model: compiled models, their regions, and every tensor that follows a shrink."""
