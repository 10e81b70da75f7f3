"""Ranks: the processes that train one model together, what wraps it there, and how they decide as one."""
