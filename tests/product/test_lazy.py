"""Imports that neither `import ecospa_fx` nor `ecospa-fx --help` makes: torch takes a second, its tracer two."""

import ast
import copy
import importlib
import importlib.metadata
import pickle
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import ecospa_fx
from ecospa_fx.see import drawings, graphs

SLOW = ["torch", "numpy", "sympy", "networkx", "triton", "transformers", "timm"]

LOOK = """
import contextlib, io, sys
import ecospa_fx
seen = {"import": [m for m in SLOW if m in sys.modules]}
dir(ecospa_fx)
from ecospa_fx.cli import main
for command in ["", "explain", "verify", "graph", "report", "compress", "shrink", "train", "compare", "doctor", "demo"]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*([command] if command else []), "--help"])
    assert "sage: " in text.getvalue(), command
    seen[command] = [m for m in SLOW if m in sys.modules]
print({where: slow for where, slow in seen.items() if slow})
ecospa_fx.compile
print("torch" in sys.modules)
"""


def test_neither_an_import_nor_help_imports_torch():
    program = f"SLOW = {SLOW}\n{LOOK}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["{}", "True"]


SEEDED = """
import random
import numpy, torch
import ecospa_fx
random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
state = lambda: (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
before = state()
for name in ecospa_fx.__all__:
    getattr(ecospa_fx, name)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
before = (before[0], before[1], state()[2])
x = torch.ones(2, 3)
ecospa_fx.compile(model)
model(x)
str(ecospa_fx.explain(model, example_inputs=(x,)))
print(state() == before)
"""


def test_a_seed_that_is_set_after_the_import_stays():
    done = subprocess.run([sys.executable, "-c", SEEDED], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def imported_for_types():
    """The names of the package, with their modules, as type checkers see them."""
    body = ast.parse(Path(ecospa_fx.__file__).read_text()).body
    block = next(node for node in body if isinstance(node, ast.If))
    for node in block.body:
        origin = f"ecospa_fx.{node.module or ''}" if node.level else node.module
        yield from ((alias.name, origin.removesuffix(".")) for alias in node.names)


@pytest.mark.parametrize(("name", "origin"), list(imported_for_types()))
def test_a_name_is_what_type_checkers_take_it_for(name, origin):
    if origin == "ecospa_fx":
        assert getattr(ecospa_fx, name) is importlib.import_module(f"ecospa_fx.{name}")
    else:
        assert getattr(ecospa_fx, name) is getattr(importlib.import_module(origin), name)
        assert name in ecospa_fx.__all__
    assert name in dir(ecospa_fx)


def test_every_public_name_is_typed():
    assert set(ecospa_fx.__all__) <= {name for name, _ in imported_for_types()}


def test_plan_is_the_function_whatever_is_imported(monkeypatch):
    module = importlib.import_module("ecospa_fx.plan")
    monkeypatch.delitem(sys.modules, "ecospa_fx.plan")
    again = importlib.import_module("ecospa_fx.plan")  # binds the module to the name of the function
    assert again is not module and ecospa_fx.plan.__module__ == "ecospa_fx.model.lookup"


def test_a_name_can_be_replaced_and_put_back(monkeypatch):
    before = ecospa_fx.plan
    with monkeypatch.context() as patch:
        patch.setattr(ecospa_fx, "plan", len)
        assert ecospa_fx.plan is len
    assert ecospa_fx.plan is before


def test_what_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'ecospa_fx' has no attribute 'shrnk'"):
        ecospa_fx.shrnk  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'shrnk' from 'ecospa_fx'"):
        from ecospa_fx import shrnk  # noqa: F401


def test_what_lies_deeper_is_reached_from_the_package():
    program = "import ecospa_fx; print(ecospa_fx.passes.rules.registry.axis_rule.__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "axis_rule\n"


def test_the_choices_of_the_command_line_are_the_rows_of_the_tables():
    assert set(get_args(drawings.Level)) == set(graphs.LEVELS)
    assert set(get_args(drawings.Format)) == set(graphs.WRITERS)


def test_the_package_goes_to_other_processes_by_its_name():
    """Ray, Dask and joblib pickle the globals of functions that they send, modules among them."""
    assert pickle.loads(pickle.dumps(ecospa_fx)) is ecospa_fx and copy.copy(ecospa_fx) is ecospa_fx


def test_the_version_is_that_of_the_distribution():
    assert ecospa_fx.__version__ == importlib.metadata.version("ecospa-fx")
