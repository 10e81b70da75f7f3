"""JSON text: written so that a person can read it, read without trust in its origin."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from .errors import CheckpointError

WIDTH = 120


def format_json(value: Any) -> str:
    """Format as JSON; a value that fits on one line is put on one line."""
    return _format(value, "") + "\n"


def _format(value: Any, indent: str) -> str:
    line = json.dumps(value, allow_nan=False)
    if len(indent) + len(line) <= WIDTH or not isinstance(value, (dict, list)) or _flat(value):
        return line
    inner = indent + " "
    if isinstance(value, dict):
        parts = [f"{inner}{json.dumps(key)}: {_format(entry, inner)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + _format(entry, inner) for entry in value) + f"\n{indent}]"


def _flat(value: dict[str, Any] | list[Any]) -> bool:
    """Check for a list of plain values, such as positions, which reads better on one line."""
    return isinstance(value, list) and not any(isinstance(entry, (dict, list)) for entry in value)


def parse_json(text: str, source: str) -> Any:
    """Parse a JSON text.

    Args:
        text: the text, from any origin.
        source: its name in errors.

    Raises:
        CheckpointError: it is not JSON, has a key twice, is nested too deeply, or has numbers outside of JSON (NaN).
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} cannot be read: {type(error).__name__}: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} appears twice")
    return entries


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")
