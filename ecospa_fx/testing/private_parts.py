"""Private parts: the names below torch with a leading underscore that this library reads, and whether they are there.

    python -m ecospa_fx.testing.private_parts

It prints a table of what the installed torch has, and exits with 1 if something is missing. They are read off the
source, so that the list is never older than the code. Attributes of objects (`module._forward_hooks`) are not among
them: which object has one is known only when the code runs.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ecospa_fx.passes import axes

ROOTS = {"ecospa_fx": Path(__file__).parents[1], "passes": Path(str(axes.__file__)).parents[1]}


def private_parts() -> dict[str, list[str]]:
    """Collect the names, such as `torch._C._is_any_autocast_enabled`, with the files that read them."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for package, root in ROOTS.items():
        for directory, inner, files in os.walk(root, followlinks=True):
            inner[:] = [name for name in inner if name not in ROOTS]  # installed, one lies in the other
            for path in (Path(directory, file) for file in files if file.endswith(".py")):
                for name in _names_in(ast.parse(path.read_text(encoding="utf-8"))):
                    if any(part.startswith("_") and not part.startswith("__") for part in name.split(".")):
                        found[name].add(Path(package, path.relative_to(root)).as_posix())
    return {name: sorted(files) for name, files in sorted(found.items())}


def missing(names: Mapping[str, object]) -> list[str]:
    """Return the names that the installed torch does not have."""
    return [name for name in names if not _there(name)]


def _names_in(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names below torch in a file: of imports, attributes, and `getattr` with the name as a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "torch")
        elif isinstance(node, ast.Attribute):
            yield from filter(None, [_dotted(node)])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            owner, name, *_ = node.args
            dotted = _dotted(owner)
            if dotted and isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield f"{dotted}.{name.value}"


def _dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return "torch" if node.id == "torch" else None
    owner = _dotted(node.value) if isinstance(node, ast.Attribute) else None
    return f"{owner}.{node.attr}" if owner and isinstance(node, ast.Attribute) else None


def _there(name: str) -> bool:
    first, *rest = name.split(".")
    owner, way = importlib.import_module(first), first
    for part in rest:
        way = f"{way}.{part}"
        if not hasattr(owner, part):
            try:
                importlib.import_module(way)
            except ImportError:
                return False
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True


def main() -> int:
    """Print the table."""
    parts = private_parts()
    gone = missing(parts)
    print(f"torch {torch.__version__}: {len(parts)} private parts, {len(gone)} missing")
    for name, files in parts.items():
        print(f"{'MISSING' if name in gone else 'there':8}{name}  ({', '.join(files)})")
    return 1 if gone else 0


if __name__ == "__main__":
    sys.exit(main())
