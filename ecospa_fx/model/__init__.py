"""Model: the state of a compiled model, its regions, and every tensor that follows a shrink."""
