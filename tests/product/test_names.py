"""The modules of the library's first layout still import, with the names that documentation and programs use."""

import importlib

import pytest

NAMES = {
    "errors": ["EcoSpaError", "CaptureError", "CheckpointError", "FormatError", "NoCouplingError"],
    "graphs": ["COLOURS", "WRITERS", "block_graph", "coupling_graph", "full_graph", "to_dot", "to_graphml", "to_json",
               "to_mermaid", "to_svg"],
    "logs": ["set_logs"],
    "optimizers": ["elementwise", "factored", "register", "state_rule", "take"],
    "report": ["save_widths", "training_of", "write_report"],
    "rotation": ["Rotation", "rotate"],
    "scores": ["SCORES", "Score", "index_scores", "score_named"],
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_first_layout_imports(name):
    module = importlib.import_module(f"ecospa_fx.{name}")
    assert [each for each in NAMES[name] if not hasattr(module, each)] == []
    public = getattr(module, "__all__", NAMES[name])
    assert set(NAMES[name]) <= set(public) and all(hasattr(module, each) for each in public)


@pytest.mark.parametrize("name", ["graphs", "optimizers", "report", "rotation", "scores"])
def test_star_imports_give_the_names_and_nothing_else(name):
    scope = {}
    exec(f"from ecospa_fx.{name} import *", scope)
    source = "ecospa_fx.see.graphs" if name == "graphs" else f"ecospa_fx.{name}"
    assert scope.keys() - {"__builtins__"} == set(importlib.import_module(source).__all__)


def test_a_rule_of_the_first_layout_is_the_library_s():
    import ecospa_fx
    from ecospa_fx.model.optimizer_table import state_rule, take

    assert ecospa_fx.state_rule is ecospa_fx.optimizers.state_rule is state_rule
    assert ecospa_fx.optimizers.take is take
