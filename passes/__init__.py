"""The verbs, in the order the model flows through them, one per file.

capture -> infer (axes, rules) -> discover -> rewrite -> shrink -> verify
"""
