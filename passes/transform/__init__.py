"""Transform: other weights that compute the same, or nearly: absorb, rotate, eliminate."""
