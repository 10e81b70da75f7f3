"""The verbs, in the order the model flows through them, one per file.

capture -> infer (axes, rules) -> discover -> rewrite -> shrink -> verify
"""

if __name__ != "ecospa_fx.passes":
    raise ImportError(f"the folder of `{__name__}` is the package ecospa_fx.passes: import it by that name")
