"""Out: models as other programs read them."""
