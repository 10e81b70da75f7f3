"""Messages: every error that the source can raise, with its text, for the index of errors.

    python docs/messages.py

It prints the generated part of the page. Values that a message names stand in it as `‹name›`, all else as `…`.
"""

from __future__ import annotations

import ast
import html
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("ecospa_fx", "passes", "kernels")
COMMAND_LINE = {
    "CommandError": "A command line that cannot be carried out. It is printed as one line; the exit code is 2.",
    "OptionError": "An option of the demo that cannot be used. It is printed as one line; the exit code is 2.",
}
LEAST_WORDS = 3
"""Fewer words than this say nothing to look up: such messages are passed on from somewhere else."""


@dataclass(frozen=True, order=True)
class Message:
    """One message of an error.

    Attributes:
        text: with places for values.
        file: the source file that makes it.
    """

    text: str
    file: str


def error_classes() -> dict[str, str]:
    """Collect the names of all errors with the first line of their docstrings, those of the command line last."""
    tree = ast.parse((ROOT / "ecospa_fx" / "errors.py").read_text(encoding="utf-8"))
    found = {node.name: ast.get_docstring(node) or "" for node in tree.body if isinstance(node, ast.ClassDef)}
    return found | COMMAND_LINE


def messages() -> dict[str, list[Message]]:
    """Collect the messages of each error, in the order of the alphabet, equal ones once."""
    found: defaultdict[str, dict[str, Message]] = defaultdict(dict)
    names = error_classes()
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for scope, call in _calls(tree, tree):
                name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
                if name in names and call.args:
                    text = re.sub(r"\s+", " ", _text(call.args[0], [scope, tree])).strip()
                    message = Message(text, path.relative_to(ROOT).as_posix())
                    if len(re.findall(r"[A-Za-z]{2,}", re.sub(r"‹.*?›", "", text))) >= LEAST_WORDS:
                        found[name].setdefault(text, message)
    return {name: sorted(found[name].values(), key=_first_letters) for name in names}


def page() -> str:
    """Format the messages of all errors, a section of each: headings in Markdown, messages in HTML, to be folded."""
    parts = []
    for (name, meaning), listed in zip(error_classes().items(), messages().values(), strict=True):
        lines = [f"### {name}", "", re.sub(r"\s+", " ", meaning), ""]
        if listed:
            count = "1 message" if len(listed) == 1 else f"{len(listed)} messages"
            items = [f"<li>{_as_html(each.text)} <small>{each.file}</small></li>" for each in listed]
            lines += [f"<details><summary>{count}</summary><ul>", *items, "</ul></details>"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _calls(node: ast.AST, scope: ast.AST) -> Iterator[tuple[ast.AST, ast.Call]]:
    """Yield every call, with the function that it is in."""
    for child in ast.iter_child_nodes(node):
        inner = child if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else scope
        if isinstance(child, ast.Call):
            yield scope, child
        yield from _calls(child, inner)


def _text(node: ast.AST, scopes: list[ast.AST]) -> str:
    """Return the text of an expression; a name is looked up in the function and then in the file."""
    match node:
        case ast.Constant(str(value)):
            return value
        case ast.JoinedStr(values):
            return "".join(_text(value, scopes) for value in values)
        case ast.FormattedValue(value):
            return _text(value, scopes)
        case ast.BinOp(left, ast.Add(), right):
            return _text(left, scopes) + _text(right, scopes)
        case ast.Name(name):
            given = _assigned(name, scopes)
            return _text(given, []) if given is not None else f"‹{name}›"
        case ast.Attribute(_, name):
            return "‹class›" if name == "__name__" else f"‹{name}›"
        case ast.Call(ast.Attribute(ast.Constant(str(joint)), "join"), _) if joint.strip(" ,"):
            return joint.join(("…", "…"))
        case ast.Call(ast.Name("repr" | "str" | "shown"), [ast.Name(name)]):
            return f"‹{name}›"
    return "…"


def _assigned(name: str, scopes: list[ast.AST]) -> ast.AST | None:
    """Return the text that a name stands for, if it is assigned once; of constants too."""
    for scope in scopes:
        values = [
            node.value
            for node in ast.walk(scope)
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
        ]
        if values:
            return values[0] if len(values) == 1 and isinstance(values[0], (ast.Constant, ast.JoinedStr)) else None
    return None


def _first_letters(message: Message) -> tuple[str, Message]:
    return re.sub(r"‹.*?›|[^a-z ]", "", message.text.lower()).strip(), message


def _as_html(text: str) -> str:
    """Escape a message for HTML, what stands in backticks as code."""
    return re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(text, quote=False))


if __name__ == "__main__":
    print(page())
