"""Score: how important each entry of each coupling is."""
