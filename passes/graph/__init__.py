"""Graph: what is true of any FX graph or tensor, without axes."""
