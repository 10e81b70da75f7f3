"""The house: which room may import which, read off the source files. Type-only imports count as well."""

import ast
import tomllib
from collections import defaultdict
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[2]

# A room imports only rooms further on in this text, files of its own, and the ground that it stands on.
PRODUCT = (
    "cli demo __init__ testing integrations vocabulary out see checkpoint train compensate score api model couple ranks"
)
COMPILER = "transform follow find rewrite infer capture simplify rules objects ir graph axes"
GROUND = "collectives plan json_text text logs threads arguments errors kernels"  # nobody below `score` knows `kernels`
COMPILER_STANDS_ON = {"errors", "logs", "plan"}
ORDER = [*PRODUCT.split(), *(f"passes/{room}" for room in COMPILER.split()), *GROUND.split()]


def name_of(path: Path) -> str:
    """The module of a file: `passes/` and `kernels/` are subpackages of `ecospa_fx`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "ecospa_fx" else ("ecospa_fx", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(p): p for top in ("ecospa_fx", "passes", "kernels") for p in sorted((ROOT / top).rglob("*.py"))}


def room_of(module: str) -> str:
    """The folder that a module lies in, below the package, or the module itself where it lies in none."""
    parts = FILES[module].relative_to(ROOT).with_suffix("").parts
    if parts[0] == "passes":
        return f"passes/{parts[1]}" if len(parts) > 2 else "__init__"
    if parts[0] == "kernels":
        return "kernels"
    if parts[1] == "__main__":
        return "cli"
    return "__init__" if len(parts) == 2 and parts[1] in PUBLIC_FILES else parts[1]


PUBLIC_FILES = {"__init__", "graphs", "report", "optimizers", "scores", "rotation"}


def imports() -> nx.DiGraph:
    """Module -> the modules it imports."""
    graph = nx.DiGraph()
    graph.add_nodes_from(FILES)
    for module, path in FILES.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                origin = ".".join([*base, *([node.module] if node.module else [])])
                # A function of the package may be called as a module is; the package then means the function.
                inside = [f"{origin}.{alias.name}" for alias in node.names]
                targets = [each if each in FILES and origin != "ecospa_fx" else origin for each in inside]
            else:
                continue
            graph.add_edges_from((module, target) for target in targets if target in FILES and target != module)
    return graph


IMPORTS = imports()


def test_no_circle_of_files():
    circles = [sorted(circle) for circle in nx.strongly_connected_components(IMPORTS) if len(circle) > 1]
    assert not circles


def test_rooms_import_only_rooms_further_on():
    assert {room_of(module) for module in FILES} == set(ORDER)
    back = {
        f"{one} -> {other}" for one, other in IMPORTS.edges if ORDER.index(room_of(one)) > ORDER.index(room_of(other))
    }
    assert not back, "an arrow back up"


def test_the_compiler_stands_alone():
    """`passes/` imports nothing of the product, and of the ground what errors, logs and plans are."""
    ours = [module for module in FILES if room_of(module).startswith("passes/")]
    others = {room_of(other) for module in ours for other in IMPORTS.successors(module)}
    assert {room for room in others if not room.startswith("passes/")} <= COMPILER_STANDS_ON


def test_no_class_name_twice():
    places = defaultdict(list)
    for module, path in FILES.items():
        if room_of(module) == "integrations":
            continue  # each offers its class under the same name, to users of another library
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module)
    assert not {name: modules for name, modules in places.items() if len(modules) > 1}


def test_every_package_is_in_the_list_of_the_wheel():
    """Mapped folders cannot be found by setuptools, so the list is written by hand."""
    written = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(written) == sorted(module for module, path in FILES.items() if path.name == "__init__.py")


@pytest.mark.parametrize("module", [module for module, path in FILES.items() if path.name == "__init__.py"])
def test_every_room_says_what_lives_there(module):
    text = ast.get_docstring(ast.parse(FILES[module].read_text()))
    assert text and text.split("\n")[0].endswith((".", ":"))
