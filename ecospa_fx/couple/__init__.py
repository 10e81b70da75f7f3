"""Couple: couplings as users and policies see them, with their members, constraints and reasons."""
