"""Couple: couplings as people and policies see them: members, positions, constraints, reasons."""
