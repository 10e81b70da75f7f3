"""Settings: the ids of tokens that a configuration, its sub-configurations and modules hold beside the weights.

They are known by the names that transformers gives them everywhere: `eos_token_id`, `suppress_tokens`, `lang_to_id`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ecospa_fx.errors import FormatError

ONE = re.compile(r"(^|_)(token_(id|ids|index)|token_list|tokens_id|padding_idx)$")
WITHOUT = re.compile(r"(^|_)(suppress_tokens|bad_words_ids)$")
"""Fields of tokens that must not come: one that is gone need not be named."""
PAIRS, BY_NAME = re.compile(r"^forced_decoder_ids$"), re.compile(r"_to_id$")
UNKNOWN = ("sequence_bias", "force_words_ids", "constraints")


def configurations(model: nn.Module) -> list[Any]:
    """Return the configuration of a model, those below it, and that of `generate`; none of a plain module."""
    found = [*below(getattr(model, "config", None))]
    generation = getattr(model, "generation_config", None)
    return [*found, *([generation] if generation is not None and hasattr(generation, "to_dict") else [])]


def below(config: Any) -> Iterator[Any]:
    """Yield a configuration and those below it."""
    if config is None or not hasattr(config, "to_dict"):
        return
    yield config
    for name in getattr(config, "sub_configs", ()):
        yield from below(vars(config).get(name))


def held_ids(model: nn.Module) -> list[tuple[nn.Module, str, int]]:
    """Return the integers of modules that are tokens by their names: (module, name, token)."""
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) is int and ONE.search(name)
    ]


def ids_in(config: Any, rows: int) -> set[int]:
    """Return the tokens that a configuration needs.

    Raises:
        FormatError: it holds tokens in a field of a kind that cannot follow.
    """
    found = set()
    for name, value in vars(config).items():
        if name in UNKNOWN and value:
            raise FormatError(
                f"`{name}` of the {type(config).__name__} holds tokens in a way that cannot follow; unset it"
            )
        if ONE.search(name):
            found |= set(_flat(value))
        elif PAIRS.search(name) and isinstance(value, (list, tuple)):
            found |= {pair[1] for pair in value}
        elif BY_NAME.search(name) and isinstance(value, Mapping):
            found |= set(_flat(list(value.values())))
    return {i for i in found if type(i) is int and 0 <= i < rows}


def renumbered(config: Any, new: Mapping[int, int], rows: int) -> dict[str, Any]:
    """Return the fields of a configuration that change, with their new values; ids of no token stay as they are."""

    def one(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(one(each) for each in value)
        return new[value] if type(value) is int and 0 <= value < rows else value

    def stays(value: Any) -> bool:
        return all(i in new for i in _flat(value))

    changes: dict[str, Any] = {}
    for name, value in vars(config).items():
        if ONE.search(name):
            changes[name] = one(value)
        elif WITHOUT.search(name) and isinstance(value, (list, tuple)):
            changes[name] = [one(each) for each in value if stays(each)] or None
        elif PAIRS.search(name) and isinstance(value, (list, tuple)):
            changes[name] = [[pair[0], one(pair[1])] for pair in value]
        elif BY_NAME.search(name) and isinstance(value, Mapping):
            changes[name] = {key: one(number) for key, number in value.items()}
    return {name: value for name, value in changes.items() if value != vars(config)[name]}


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _flat(each)
    elif type(value) is int:
        yield value
