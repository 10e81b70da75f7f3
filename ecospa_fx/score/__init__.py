"""Score: the importance of couplings and of their entries, read, summed up and judged."""
