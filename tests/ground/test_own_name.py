"""Names of folders: from the repository's root, which has folders that are called as packages of others are."""

import os
import subprocess
import sys
from pathlib import Path

import ecospa_fx

ROOT = Path(__file__).parents[2]
PACKAGE = Path(ecospa_fx.__file__).parents[1]

IMPORTS = """
import importlib, importlib.util, sys, torch
import ecospa_fx
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops
from ecospa_fx.kernels import add_slice_sums, compact, slice_sums
import ecospa_fx.passes.graph.boundary_op as boundary

def sums(of):
    out = torch.zeros(1, 4)
    of(out, [torch.full((4, 3), 2.0)], [], [0], [0], [0])
    return out.tolist() == [[12.0] * 4]

ops = torch.ops.ecospa_fx
before = [ops.add_slice_sums.default, ops.compact.default, ops.adamw_slice_sums.default, ops.edge.default]
tolerate_missing_torchvision_ops()
from transformers import GPT2LMHeadModel
from transformers.utils import is_kernels_available
print("transformers finds kernels:", is_kernels_available())
for text in ("from kernels import compact", "import kernels.slice_sums", "import passes", "import passes.graph.nodes"):
    try:
        exec(text)
        print(text, "worked")
    except ImportError:
        pass
for name in ("register", "slice_sums", "compact", "adamw"):
    importlib.reload(sys.modules[f"ecospa_fx.kernels.{name}"])
importlib.reload(boundary)
for name in [name for name in sys.modules if name.startswith("ecospa_fx.kernels") or name == boundary.__name__]:
    del sys.modules[name]
again = importlib.import_module("ecospa_fx.kernels")
importlib.import_module(boundary.__name__)
after = [ops.add_slice_sums.default, ops.compact.default, ops.adamw_slice_sums.default, ops.edge.default]
print("the same operators:", all(a is b for a, b in zip(before, after)))
print("sums:", sums(add_slice_sums), sums(again.add_slice_sums), again.add_slice_sums is not add_slice_sums)
print("compact:", [t.tolist() for t in again.compact([torch.arange(4)], [torch.tensor([1, 3])], [0], [0])])
"""


def child(*command, **environment):
    """A Python whose path has the root on it: in the empty tail of PYTHONPATH, and in front for `-m`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=inherited | environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_nothing_is_registered_twice_and_transformers_does_not_take_the_folder_for_a_package(tmp_path):
    script = tmp_path / "imports.py"
    script.write_text(IMPORTS)
    assert child(str(script), PYTHONPATH=f"{PACKAGE}{os.pathsep}tests{os.pathsep}") == [
        "transformers finds kernels: False",
        "the same operators: True",
        "sums: True True True",
        "compact: [[1, 3]]",
    ]


def test_the_folder_is_empty_under_another_name():
    """Without an error, at which the import of whoever asks whether there is such a package would end."""
    code = (
        "import importlib.util, kernels; "
        "print([n for n in vars(kernels) if n[:2] != '__'], getattr(kernels, '__file__', None), "
        "getattr(kernels, '__version__', 'none'), importlib.util.find_spec('kernels') is kernels.__spec__)"
    )
    assert child("-c", code) == ["[] None none True"]


def test_a_package_of_that_name_further_down_on_the_path_is_found(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("from .hub import get_kernel\n__version__ = '9.9'\n")
    (package / "hub.py").write_text("def get_kernel(): return 'theirs'\n")
    code = "import kernels, kernels.hub; print(kernels.__version__, kernels.get_kernel(), kernels.hub.__file__)"
    assert child("-c", code, PYTHONPATH=str(tmp_path)) == [f"9.9 theirs {package / 'hub.py'}"]


def test_the_command_line_runs_in_the_root():
    assert any("ffn" in line for line in child("-m", "ecospa_fx", "explain", "hf/gpt2", PYTHONWARNINGS="ignore"))
