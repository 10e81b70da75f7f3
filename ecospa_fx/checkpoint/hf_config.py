"""Hugging Face configs: models saved as their config, and made again from it alone.

Nothing is downloaded, and no code that lies beside a config runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from ecospa_fx.errors import CheckpointError
from ecospa_fx.json_text import parse_json
from ecospa_fx.passes.graph.tensors import join

KINDS = ("attn", "experts")
"""Parts whose implementation a config chooses; config.json does not record the choice."""


def config_text(model: nn.Module) -> str | None:
    """Return the config of a Hugging Face model as JSON, or None for another model."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return None
    text: str = config.to_json_string(use_diff=False)
    return text


def implementations(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return the implementations that a config, and those below it, chose: path -> kind -> name."""
    chosen: dict[str, dict[str, str]] = {}
    for path, each in _configs(getattr(model, "config", None)):
        for kind in KINDS:
            if isinstance(value := each.__dict__.get(f"_{kind}_implementation_internal"), str):
                chosen.setdefault(path, {})[kind] = value
    return chosen


def from_config(name: str, text: str | None, chosen: Mapping[str, Any], where: str) -> nn.Module:
    """Make a model of a class of transformers from its config, whose weights have no values yet.

    Args:
        name: name of the class.
        text: text of config.json.
        chosen: the result of `implementations`.
        where: the directory, for errors.

    Raises:
        CheckpointError: there is no config, no such class, or no model can be made of them.
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
        raise CheckpointError(f"{where}/config.json cannot be read: it is not a JSON object")
    try:
        config_class: Any = vars(cls).get("config_class") or getattr(cls, "config_class")  # noqa: B009
        config = config_class.from_dict(document)
        for path, each in _configs(config):
            for kind in KINDS:
                each.__dict__[f"_{kind}_implementation_internal"] = _local(chosen.get(path, {}).get(kind), where)
        with _NothingDrawn():
            model: nn.Module = cls(config)
    except CheckpointError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{where}/config.json makes no {name}: {type(error).__name__}: {first}; pass a factory"
        ) from error
    return model


DRAWN = {"uniform_", "normal_", "kaiming_uniform_"}
"""Names of functions that draw values in place, of tensors and of `torch.nn.init`, where transformers puts its own."""


class _NothingDrawn(TorchFunctionMode):
    """A context in which parameters are not filled at random: a save has all of them, and drawing takes most of a load.

    Classes of transformers know that: their own `from_pretrained` makes them so.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = args[0] if args else (kwargs or {}).get("tensor")
        if getattr(func, "__name__", "") in DRAWN and isinstance(drawn, nn.Parameter):
            return drawn
        return func(*args, **(kwargs or {}))


def _configs(config: Any, path: str = "") -> list[tuple[str, Any]]:
    """List a config and those below it, with the path of attributes to each."""
    if not hasattr(config, "to_json_string"):
        return []
    below = [(name, getattr(config, name, None)) for name in getattr(config, "sub_configs", {})]
    return [(path, config)] + [each for name, sub in below for each in _configs(sub, join(path, name))]


def _local(implementation: str | None, where: str) -> str | None:
    """Check that an implementation is a plain name, and not an address to download code from."""
    if implementation is not None and not re.fullmatch(r"[A-Za-z0-9_]+", str(implementation)):
        raise CheckpointError(
            f"{where} was saved with the implementation {implementation!r}, which is not part of transformers; pass a "
            "factory"
        )
    return implementation
