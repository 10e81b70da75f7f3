"""Follow: the couplings that the model's own Python can follow, and the integers that change with them."""
