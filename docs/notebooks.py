"""Notebooks: run without Jupyter, their outputs stored, and written as pages of the site.

    python docs/notebooks.py

It runs every notebook in a directory of its own and stores what the cells print.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "notebooks"


def cells_of(path: Path) -> list[dict[str, Any]]:
    """Read the cells of a notebook, each with its source as one text."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in cells]


def run(path: Path) -> tuple[list[str], dict[str, Any]]:
    """Run the cells of code in order, and return the text of each, with the names that there are in the end.

    As in Jupyter, the value of the expression that ends a cell is printed.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    texts = []
    for number, cell in enumerate(cell for cell in cells_of(path) if cell["cell_type"] == "code"):
        tree = ast.parse(cell["source"], f"{path.name}, cell {number + 1}")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(tree, f"{path.name}, cell {number + 1}", "exec"), names)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), f"{path.name}, cell {number + 1}", "eval"), names)
                if value is not None:
                    print(repr(value))
        texts.append(printed.getvalue())
    return texts, names


def outputs_of(path: Path) -> list[str]:
    """Return the stored text of each cell of code."""
    return [
        "".join("".join(output["text"]) for output in cell["outputs"])
        for cell in cells_of(path)
        if cell["cell_type"] == "code"
    ]


def page(path: Path) -> str:
    """Write a notebook as Markdown; other notebooks that it links to are pages too."""
    parts = []
    for cell in cells_of(path):
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", cell["source"]))
            continue
        parts.append(f"```python\n{cell['source']}\n```")
        for output in cell["outputs"]:
            parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
    parts.append(f"[This page as a notebook]({path.name})")
    return "\n\n".join(parts) + "\n"


def store(path: Path, texts: list[str]) -> None:
    """Put the texts of a run into a notebook as its outputs."""
    document = json.loads(path.read_text(encoding="utf-8"))
    left: Iterator[str] = iter(texts)
    for number, cell in enumerate(cell for cell in document["cells"] if cell["cell_type"] == "code"):
        text = next(left)
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell |= {"execution_count": number + 1, "outputs": [stream] if text else []}
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Run all notebooks and store what they print."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            texts, _ = run(path)
        store(path, texts)
        print(f"{path.name}: {len(texts)} cells of code")


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "80")
    main()
