"""Objects: what a forward reads of the objects it is called with, caches for one, and what it does to them."""
