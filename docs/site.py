"""Hooks of the documentation site: files outside of docs/ that pages link to become files of the site.

Notebooks become pages. The index of errors gets all messages of the source. Examples in docstrings (`>>> `) become
blocks of code, which Markdown alone takes for quotations.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import messages
import notebooks
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)(#[^)]*)?\)")
FOLDER = "files"


class Examples(Extension):
    """Lines of an interactive session as blocks of code."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Register the preprocessor before that of fenced blocks."""
        md.preprocessors.register(_Examples(md), "examples", 40)


class _Examples(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        written, inside, fenced = [], False, False
        for line in lines:
            fenced ^= line.lstrip().startswith("```")
            session = not fenced and (line.startswith(">>> ") or (inside and line.startswith("... ")))
            if session != inside:
                written.append("```python" if session else "```")
            inside = session
            written.append(line)
        return [*written, "```"] if inside else written


def on_config(config: Any) -> Any:
    """Add the extension of Markdown."""
    config.markdown_extensions.append(Examples())
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add notebooks as pages, and the files outside of the folder that a page links to."""
    linked = set()
    for page in files.documentation_pages():
        linked |= {match[1] for match in _OUTSIDE.finditer(page.content_string)}
    for name in sorted(linked):
        files.append(File.generated(config, f"{FOLDER}/{name}", abs_src_path=str(ROOT / name)))
    for path in sorted(notebooks.FOLDER.glob("*.ipynb")):
        name = f"{notebooks.FOLDER.name}/{path.stem}.md"
        files.append(File.generated(config, name, content=notebooks.page(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links that leave the folder to the files that were added, and fill in the messages of errors."""
    if page.file.src_uri == "errors.md":
        markdown = markdown.replace("<!-- messages -->", messages.page())
    if page.file.src_uri.startswith(f"{notebooks.FOLDER.name}/"):
        return markdown  # they lie one folder down, and link to pages
    up = "../" * page.file.src_uri.count("/")
    if page.file.src_uri.startswith(f"{FOLDER}/"):
        return re.sub(r"\]\((?!https?:)([^)]+)\)", "]", markdown)  # its own links lead elsewhere in the repository
    return _OUTSIDE.sub(lambda match: f"]({up}{FOLDER}/{match[1]}{match[2] or ''})", markdown)
