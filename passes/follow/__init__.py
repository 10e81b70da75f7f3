"""Follow: which couplings the model's own Python can follow, with which integers changed."""
