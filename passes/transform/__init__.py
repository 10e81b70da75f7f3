"""Transform: weights that compute the same, or nearly, in other entries: absorb, rotate, eliminate."""
