"""Documents: JSON that a person can read, and that is read without trust."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from .errors import CheckpointError

WIDTH = 120


def written(value: Any) -> str:
    """JSON, with everything that fits on a line on one."""
    return _written(value, "") + "\n"


def _written(value: Any, indent: str) -> str:
    line = json.dumps(value, allow_nan=False)
    if len(indent) + len(line) <= WIDTH or not isinstance(value, (dict, list)) or _flat(value):
        return line
    inner = indent + " "
    if isinstance(value, dict):
        parts = [f"{inner}{json.dumps(key)}: {_written(entry, inner)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + _written(entry, inner) for entry in value) + f"\n{indent}]"


def _flat(value: dict[str, Any] | list[Any]) -> bool:
    """A list of plain values: positions, say, which nobody wants one to a line."""
    return isinstance(value, list) and not any(isinstance(entry, (dict, list)) for entry in value)


def parsed(text: str, what: str) -> Any:
    """The value of a JSON text.

    Args:
        text: may come from anyone.
        what: what it is, for errors.

    Raises:
        CheckpointError: it is no JSON, says a thing twice, is nested without end, or holds numbers that JSON has not.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} cannot be read: {type(error).__name__}: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} is there twice")
    return read


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
