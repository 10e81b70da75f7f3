"""Graph: small tools for any FX graph or tensor, without axes."""
