"""The tutorial is true: it runs alone, on torch only, prints what it finds, and names files that exist."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "axes_from_scratch.py"

FINDS = """\
2. Axes of the parameters
   scale        a:3, ()
   up.weight    [(a:3 p:2) | (a:3 p:2)], c:6
   up.bias      [(a:3 p:2) | (a:3 p:2)]
   down.weight  e:4, (a:3 p:2)
   down.bias    e:4
   out.weight   h:6, e:4
   out.bias     h:6
3. Couplings and refusals
   a:3   scale[0], up.weight[0], up.bias[0], down.weight[1]: coupling
   c:6   up.weight[1]: refusal, it enters the region
   e:4   down.weight[0], down.bias[0], out.weight[1]: coupling
   h:6   out.weight[0], out.bias[0]: refusal, it leaves the region
   p:2   up.weight[0], up.bias[0], down.weight[1]: refusal, cumsum: every entry along it feeds those behind it
4. The plan without head 1 and without hidden entry 2
   scale[0]: [0, 2]
   up.weight[0]: [0, 1, 4, 5, 6, 7, 10, 11]
   up.bias[0]: [0, 1, 4, 5, 6, 7, 10, 11]
   down.weight[0]: [0, 1, 3]
   down.weight[1]: [0, 1, 4, 5]
   down.bias[0]: [0, 1, 3]
   out.weight[1]: [0, 1, 3]
5. The program at the sizes that are left
   view: [5, 2, 2]
   view_1: [5, 4]
   145 parameters, 97 are left
6. Shrunk equals masked, outputs and gradients, in all 105 selections
"""


def test_it_runs_and_prints_what_it_finds() -> None:
    ran = subprocess.run([sys.executable, str(TUTORIAL)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    graph, finds = ran.stdout.split("2. ", 1)
    assert graph.startswith("1. The graph\n") and graph.count("linear.default") == 3
    assert "2. " + finds == FINDS


INSIDE = """
import runpy
axes = runpy.run_path(PATH)
fresh, product, unify, resolve, Segments = (axes[n] for n in ("fresh", "product", "unify", "resolve", "Segments"))
one, other = product(fresh(2), fresh(6)), product(fresh(4), fresh(3))
unify(one, other)
assert resolve(one) == resolve(other) and [f.size for f in resolve(one).factors] == [2, 2, 3]
left, right = Segments((fresh(2), fresh(3))), Segments((fresh(2), fresh(3)))
unify(left, right)
assert resolve(left) == resolve(right)
try:
    unify(one, left)
except axes["Mismatch"] as mismatch:
    assert "meets" in str(mismatch)
else:
    raise AssertionError
"""


def test_axes_with_an_inside_are_unified_part_by_part() -> None:
    """Where the model of the tutorial does not go."""
    code = INSIDE.replace("PATH", repr(str(TUTORIAL)))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_it_imports_torch_only() -> None:
    imported = set()
    for node in ast.walk(ast.parse(TUTORIAL.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch"}


def test_the_files_that_it_names_exist() -> None:
    paths = re.findall(r"\b(?:passes|ecospa_fx|docs)/[\w/.]*\w/?", TUTORIAL.read_text())
    assert len(paths) >= 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
