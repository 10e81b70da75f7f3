"""Configs: Hugging Face models written down as their config, and made again from it alone.

Nothing is fetched, and no code beside a config runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ecospa_fx.errors import CheckpointError
from ecospa_fx.json_text import parse_json
from ecospa_fx.passes.graph.tensors import join

KINDS = ("attn", "experts")
"""What a config chooses an implementation of; config.json does not say which one it chose."""


def config_text(model: nn.Module) -> str | None:
    """The config of a Hugging Face model as JSON; None where there is none."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return None
    text: str = config.to_json_string(use_diff=False)
    return text


def implementations(model: nn.Module) -> dict[str, dict[str, str]]:
    """Which attention and which experts a model's config, and those below it, chose: path -> kind -> name."""
    chosen: dict[str, dict[str, str]] = {}
    for path, each in _configs(getattr(model, "config", None)):
        for kind in KINDS:
            if isinstance(value := each.__dict__.get(f"_{kind}_implementation_internal"), str):
                chosen.setdefault(path, {})[kind] = value
    return chosen


def from_config(name: str, text: str | None, chosen: Mapping[str, Any], where: str) -> nn.Module:
    """A model of a class of transformers from its config, with random weights.

    Args:
        name: of the class.
        text: of config.json.
        chosen: what `implementations` returned.
        where: the directory, for errors.

    Raises:
        CheckpointError: there is no config, no such class, or they make no model.
    """
    if text is None:
        raise CheckpointError(
            f"{where} has no config.json to rebuild a {name} from; pass a factory, a function that makes "
            "the original model: load(directory, lambda: MyModel())"
        )
    import transformers

    cls: Any = getattr(transformers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise CheckpointError(f"transformers has no model class {name}; pass a factory")
    document = parse_json(text, f"{where}/config.json")
    if not isinstance(document, dict):
        raise CheckpointError(f"{where}/config.json cannot be read: it holds no object")
    try:
        config_class: Any = vars(cls).get("config_class") or getattr(cls, "config_class")  # noqa: B009
        config = config_class.from_dict(document)
        for path, each in _configs(config):
            for kind in KINDS:
                each.__dict__[f"_{kind}_implementation_internal"] = _local(chosen.get(path, {}).get(kind), where)
        model: nn.Module = cls(config)
    except CheckpointError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{where}/config.json makes no {name}: {type(error).__name__}: {first}; pass a factory"
        ) from error
    return model


def _configs(config: Any, path: str = "") -> list[tuple[str, Any]]:
    """A config and those below it by their attributes."""
    if not hasattr(config, "to_json_string"):
        return []
    below = [(name, getattr(config, name, None)) for name in getattr(config, "sub_configs", {})]
    return [(path, config)] + [each for name, sub in below for each in _configs(sub, join(path, name))]


def _local(implementation: str | None, where: str) -> str | None:
    """An implementation by a name that is no address to fetch code from."""
    if implementation is not None and not re.fullmatch(r"[A-Za-z0-9_]+", str(implementation)):
        raise CheckpointError(f"{where} was saved with the kernels {implementation!r}; pass a factory")
    return implementation
