"""Tokenizers: a fast tokenizer, of transformers or of `tokenizers` itself, as JSON, and made again from other JSON."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ecospa_fx.arguments import shown
from ecospa_fx.errors import ArgumentError, FormatError

FILE = "tokenizer.json"
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
AT_ONCE = 512


def document_of(tokenizer: Any) -> dict[str, Any]:
    """Return the JSON of a fast tokenizer.

    Raises:
        ArgumentError: it is none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if isinstance(tokenizer, type) or not hasattr(backend, "to_str") or not hasattr(backend, "get_vocab_size"):
        slow = hasattr(tokenizer, "save_vocabulary")
        why = "has no tokenizer.json behind it (it is a slow one)" if slow else "is no tokenizer"
        raise ArgumentError(
            f"trim_vocabulary: `tokenizer` is {shown(tokenizer)}, which {why}; pass a fast tokenizer of transformers, "
            "or one of the library tokenizers"
        )
    document: dict[str, Any] = json.loads(backend.to_str())
    return document


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of the special tokens that a tokenizer of transformers names; its JSON need not know them."""
    return {i for i in getattr(tokenizer, "all_special_ids", ()) if isinstance(i, int)}


def counted(tokenizer: Any, texts: Iterable[str]) -> Counter[int]:
    """Count the tokens of some texts.

    Raises:
        ArgumentError: one of them is no text.
    """
    counts: Counter[int] = Counter()
    for lines in _groups(texts):
        for ids in encoded(tokenizer, lines):
            counts.update(ids)
    return counts


def encoded(tokenizer: Any, lines: Sequence[str]) -> list[list[int]]:
    """Return the ids of some texts, without those that are put around a text."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    padding, truncation = backend.padding, backend.truncation
    backend.no_padding()
    backend.no_truncation()
    try:
        return [each.ids for each in backend.encode_batch(list(lines), add_special_tokens=False)]
    finally:
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    lines = iter(texts)
    while group := list(islice(lines, AT_ONCE)):
        for line in group:
            if not isinstance(line, str):
                raise ArgumentError(f"trim_vocabulary: `texts` holds {shown(line)}; it must be texts")
        yield group


def made_from(tokenizer: Any, document: Mapping[str, Any], kept: Sequence[int]) -> Any:
    """Make a tokenizer of the same class from other JSON, by way of its files, as another process will.

    Raises:
        FormatError: the class makes another tokenizer of them.
    """
    text = json.dumps(document, ensure_ascii=False)
    if not hasattr(tokenizer, "backend_tokenizer"):
        return type(tokenizer).from_str(text)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        tokenizer.save_pretrained(here)
        for path in here.iterdir():
            if path.is_file() and path.name not in BESIDE:
                path.unlink()  # such as lists of tokens and merges, which a class would read in place of the JSON
        (here / FILE).write_text(text, encoding="utf-8")
        settings = here / BESIDE[0]
        about = json.loads(settings.read_text(encoding="utf-8"))
        if about.get("added_tokens_decoder"):
            new = {old: i for i, old in enumerate(kept)}
            decoder = about["added_tokens_decoder"].items()
            about["added_tokens_decoder"] = {str(new[int(i)]): token for i, token in decoder if int(i) in new}
            settings.write_text(json.dumps(about, indent=2, ensure_ascii=False), encoding="utf-8")
        try:
            made = type(tokenizer).from_pretrained(here)
        except Exception as error:  # each class fails in its own way
            line = (str(error).strip().splitlines() or [""])[0]
            raise FormatError(
                f"{type(tokenizer).__name__} cannot be loaded with {len(kept):,} tokens: {type(error).__name__}: "
                f"{line:.200}"
            ) from error
    made.name_or_path = getattr(tokenizer, "name_or_path", "")  # not the folder that is gone
    before = getattr(tokenizer, "backend_tokenizer").get_vocab(with_added_tokens=True)  # noqa: B009
    new = {old: i for i, old in enumerate(kept)}
    expected = {token: new[i] for token, i in before.items() if i in new}
    if made.backend_tokenizer.get_vocab(with_added_tokens=True) != expected:
        raise FormatError(
            f"{type(tokenizer).__name__} makes a tokenizer of other tokens from the JSON of {len(kept):,}; pass its "
            "backend_tokenizer, and load the result with PreTrainedTokenizerFast(tokenizer_object=...)"
        )
    return made


def first_difference(before: Any, after: Any, kept: Sequence[int], lines: Sequence[str]) -> str | None:
    """Return a text whose tokens all stay and that the two cut in different ways; None without one."""
    new = {old: i for i, old in enumerate(kept)}
    for line, old, now in zip(lines, encoded(before, lines), encoded(after, lines), strict=True):
        if all(i in new for i in old) and [new[i] for i in old] != now:
            return line
    return None
