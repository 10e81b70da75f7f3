"""IR: the data that passes hand to each other."""
