"""Pieces: the tokens of a fast tokenizer as its JSON has them, and the JSON of one that keeps some of them.

A text whose tokens all stay must be cut as before:

BPE         a token is made by merges, one after another. With every token on its way kept, the merges left are some of
            those before, and at each step the one that was taken is among them and still comes first
WordPiece   the longest piece that fits is taken: it still is the longest
Unigram     the best path is taken: it still is the best. A character without a piece costs ten below the lowest score,
            so the piece of that score stays
WordLevel   a word is a token
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ecospa_fx.errors import FormatError

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
KINDS = ("BPE", "WordPiece", "Unigram", "WordLevel")


class Pieces:
    """The tokens of a tokenizer.

    Attributes:
        kind: `"BPE"`, `"WordPiece"`, `"Unigram"` or `"WordLevel"`.
        tokens: id -> token, added ones included.
        required: ids that a tokenizer cannot lose: special and added tokens, bytes, and those that its JSON names.
        draws: whether a text is cut in another way each time.
        characters: ids of single characters, without which a text may hold what has no token; none where bytes do.

    Raises:
        FormatError: it is of another kind, or some part of it holds ids in a way that is not known.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document
        model = self._model = document["model"]
        self.kind: str = model.get("type") or _kind(model)
        if self.kind not in KINDS:
            raise FormatError(
                f"the tokenizer is a {self.kind}; of {', '.join(KINDS[:-1])} and {KINDS[-1]} a vocabulary can go"
            )
        self._ids = self._own_ids()
        added = {entry["content"]: entry["id"] for entry in document.get("added_tokens") or ()}
        self.tokens: dict[int, str] = {i: token for token, i in (self._ids | added).items()}
        self._prefix: str = model.get("continuing_subword_prefix") or ""
        self._suffix: str = model.get("end_of_word_suffix") or ""
        named = _named_ids(document)
        unknown = model.get("unk_id") if self.kind == "Unigram" else self._ids.get(model.get("unk_token"))
        self.required = {*added.values(), *named, *(() if unknown is None else (unknown,))} & self.tokens.keys()
        falls_back = bool(model.get("byte_fallback"))
        singles = {i for token, i in self._ids.items() if len(self._bare(token)) == 1}
        if falls_back:
            self.required |= {i for token, i in self._ids.items() if BYTE.fullmatch(token)}
        if self.kind == "Unigram" and model["vocab"]:
            self.required.add(min(range(len(model["vocab"])), key=lambda i: model["vocab"][i][1]))
        by_bytes = _by_bytes(document)
        if by_bytes:
            self.required |= {i for i in singles if self._bare(self.tokens[i]) in _BYTE_LETTERS}
        self.characters: set[int] = set() if falls_back or by_bytes else singles
        self._merges = [tuple(m if isinstance(m, list) else m.split(" ")) for m in model.get("merges") or ()]
        self._ranks = {pair: rank for rank, pair in enumerate(self._merges)}
        self._ways: dict[int, frozenset[int]] = {}
        self.draws = bool(model.get("dropout"))

    def __len__(self) -> int:
        return len(self.tokens)

    def way(self, number: int) -> frozenset[int]:
        """Return the ids of the tokens that merges make on the way to a token, without itself; none without merges."""
        if self.kind != "BPE" or number not in self.tokens:
            return frozenset()
        if number not in self._ways:
            self._ways[number] = self._merged(self.tokens[number])
        return self._ways[number]

    def _merged(self, token: str) -> frozenset[int]:
        symbols, made = self._symbols(token), set[str]()
        while True:
            made.update(symbols)
            ranked = [(self._ranks[pair], at) for at, pair in enumerate(pairwise(symbols)) if pair in self._ranks]
            if not ranked:
                break
            _, at = min(ranked)
            symbols[at : at + 2] = [self._joined(*symbols[at : at + 2])]
        # A token that no merges reach stands for a word as a whole (`ignore_merges`), or never comes up.
        return frozenset(self._ids[s] for s in made - {token} if s in self._ids) if symbols == [token] else frozenset()

    def _symbols(self, token: str) -> list[str]:
        """Split a token into the symbols that merging begins with."""
        continues = bool(self._prefix) and token.startswith(self._prefix)
        ends = bool(self._suffix) and token.endswith(self._suffix)
        letters = self._bare(token)
        symbols = [(self._prefix if continues or at else "") + letter for at, letter in enumerate(letters)]
        return [*symbols[:-1], symbols[-1] + self._suffix] if ends else symbols

    def _joined(self, left: str, right: str) -> str:
        return left + right.removeprefix(self._prefix)

    def _bare(self, token: str) -> str:
        """Return a token without the marks of a continued and of an ended word."""
        bare = token.removeprefix(self._prefix) if len(token) > len(self._prefix) else token
        return bare.removesuffix(self._suffix) if len(bare) > len(self._suffix) else bare

    def keeping(self, kept: Sequence[int]) -> dict[str, Any]:
        """Return the JSON of the tokenizer with these ids alone, which become 0, 1, 2, ... in this order."""
        new = {old: i for i, old in enumerate(kept)}
        document = copy.deepcopy({key: value for key, value in self._document.items() if key != "model"})
        model = {key: value for key, value in self._model.items() if key not in ("vocab", "merges")}
        if self.kind == "Unigram":
            pieces = self._model["vocab"]
            model["vocab"] = [pieces[old] for old in kept if old < len(pieces)]
            if model.get("unk_id") is not None:
                model["unk_id"] = new[model["unk_id"]]
        else:
            model["vocab"] = {token: new[old] for token, old in self._ids.items() if old in new}
        if self.kind == "BPE":
            left = model["vocab"].keys()
            pairs = zip(self._merges, self._model["merges"], strict=True)
            model["merges"] = [
                given for pair, given in pairs if left >= {*pair} and self._joined(*pair) in left
            ]  # fmt: skip
        document["model"] = model
        for entry in document.get("added_tokens") or ():
            entry["id"] = new[entry["id"]]
        if document.get("padding"):
            document["padding"]["pad_id"] = new.get(document["padding"]["pad_id"], document["padding"]["pad_id"])
        if document.get("post_processor"):
            _renumber(document["post_processor"], new)
        return document

    def _own_ids(self) -> dict[str, int]:
        vocabulary = self._model["vocab"]
        if self.kind == "Unigram":
            return {piece: i for i, (piece, _) in enumerate(vocabulary)}
        return dict(vocabulary)


def _kind(model: Mapping[str, Any]) -> str:
    """Return the kind of a tokenizer's model that does not say it, as early files do not."""
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _parts(step: Any) -> Iterable[Mapping[str, Any]]:
    """Yield a step of a tokenizer, and the steps in it."""
    if isinstance(step, Mapping):
        yield step
        for value in step.values():
            for each in value if isinstance(value, list) else ():
                yield from _parts(each)


def _by_bytes(document: Mapping[str, Any]) -> bool:
    """Return whether a text is turned into bytes before it is cut, each of which has a letter."""
    steps = [document.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
    return any(part.get("type") == "ByteLevel" for step in steps for part in _parts(step))


def _named_ids(document: Mapping[str, Any]) -> set[int]:
    """Return the ids that the steps of a tokenizer name."""
    found: dict[int, int] = {}
    padding = document.get("padding")
    _renumber(copy.deepcopy(document.get("post_processor") or {}), _Noting(found))
    return {*found, *((padding["pad_id"],) if padding else ())}


class _Noting(dict[int, int]):
    """A mapping of each id to itself that notes which were asked for."""

    def __init__(self, found: dict[int, int]) -> None:
        super().__init__()
        self.found = found

    def __missing__(self, key: int) -> int:
        self.found[key] = key
        return key


def _renumber(step: dict[str, Any], new: Mapping[int, int]) -> None:
    """Renumber the ids in a step that adds tokens to a text.

    Raises:
        FormatError: it is a step that is not known.
    """
    kind = step.get("type")
    if kind == "Sequence":
        for each in step["processors"]:
            _renumber(each, new)
    elif kind == "TemplateProcessing":
        for token in step["special_tokens"].values():
            token["ids"] = [new[i] for i in token["ids"]]
    elif kind in ("BertProcessing", "RobertaProcessing"):
        for name in ("sep", "cls"):
            step[name] = [step[name][0], new[step[name][1]]]
    elif kind not in ("ByteLevel", None):
        raise FormatError(f"the tokenizer ends in a {kind}, in which ids are not known")


def _byte_letters() -> frozenset[str]:
    """Return the letters that stand for bytes: printable ones for themselves, then further ones in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return frozenset(map(chr, (*printable, *range(256, 256 + 256 - len(printable)))))


_BYTE_LETTERS = _byte_letters()
