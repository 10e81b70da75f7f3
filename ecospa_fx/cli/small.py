"""Small models of any transformers type: a configuration made small by the names of its fields, and a call for it.

Nothing here knows an architecture. A field that its name gets wrong can be set by hand with `--set FIELD=VALUE`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .console import FAILED, CommandError

# Pattern of a field's full name -> its largest value; the first pattern that matches counts.
_LIMITS = [
    (re.compile(pattern), limit)
    for pattern, limit in [
        (r".*(kernel|stride|_id|expand|ratio|factor|level|merge_size|d_conv|type_vocab|chunk_size_feed).*", 10**12),
        (r"(.*_)?(num_key_value_heads|kv_heads|n_kv_heads|num_kv_heads|query_groups)", 2),
        (r"(.*_)?(num_attention_heads|n_heads?|num_heads|attention_heads|heads)", 4),
        (r".*(experts_per_tok(en)?|top_?k|topk_group|n_shared_experts)", 2),
        (r"(.*_)?(n_group|num_expert_groups?)", 1),
        (r"(.*_)?(num_local_experts|n_routed_experts|num_experts|n_experts)", 4),
        (r"(.*_)?(head_dim|d_kv|attention_head_size|head_size|kv_channels|d_head)", 16),
        (r"(.*_)?(d_state|state_size)", 8),
        (r"(.*_)?(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|n_inner|mlp_dim|d_inner|intermediate_dim)", 96),
        (r"(.*_)?(num_hidden_layers|n_layers?|num_layers|num_blocks|layers|depth|.*_layers)", 2),
        (r"(.*_)?(max_position_embeddings|n_positions|.*_positions|max_seq.*|n_ctx|seq_length)", 512),
        (r"(.*_)?(vocab_size|vocabulary_size|n_vocab)", 512),
        (r"(.*_)?(image_size|img_size)", 32),
        (r"(.*_)?patch_size", 8),
        (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|dim|embedding_size|hidden_dim|projection_dim|width)", 64),
        (r".*(_hidden_size|_dim|_width|_rank|_channels)", 64),
    ]
]


def small_config(config_class: type, changes: Mapping[str, Any]) -> Any:
    """Create a configuration of a class with every size small, but for the fields given.

    Raises:
        CommandError: the class refuses the fields.
    """
    default = config_class()
    try:
        return config_class(**{**small_fields(default), **changes})
    except Exception as error:  # each class checks its fields in its own way
        line = (str(error).strip().splitlines() or [""])[0]
        raise CommandError(f"{config_class.__name__} refuses its fields: {line:.160}", FAILED) from None


def small_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a configuration that can be smaller, with small values; nested configurations too."""
    names = [name for name in vars(config) if not name.startswith("_")]
    fields: dict[str, Any] = {"use_cache": False} if hasattr(config, "use_cache") else {}
    for name in names:
        value = getattr(config, name)
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            fields[name] = {**small_fields(value), "model_type": value.model_type}
        elif type(value) is int:
            limit = next((limit for pattern, limit in _LIMITS if pattern.fullmatch(name)), value)
            fields[name] = min(value, limit)
    vocabulary = fields.get("vocab_size")
    if isinstance(vocabulary, int):
        for name in (name for name in names if name.endswith("token_id")):
            if isinstance(value := getattr(config, name), int) and value >= vocabulary:
                fields[name] = vocabulary - 1
    # As many key heads as heads, if the default has as many.
    for keys in ("num_key_value_heads",):
        if keys in fields and getattr(config, keys) == getattr(config, "num_attention_heads", None):
            fields[keys] = fields["num_attention_heads"]
    changed = {name: value for name, value in fields.items() if isinstance(value, dict) or value != _of(config, name)}
    return changed


def _of(config: Any, name: str) -> Any:
    return getattr(config, name, None)


BATCH, LENGTH, FRAMES, SAMPLES = 2, 16, 64, 800


def call_of(model: nn.Module, config: Any) -> dict[str, Any]:
    """Make keyword arguments for one call of a transformers model from the signature of its forward.

    Raises:
        CommandError: it requires an argument of an unknown kind.
    """
    accepted = inspect.signature(model.forward).parameters
    required = [
        name for name, p in accepted.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]  # fmt: skip
    main = str(getattr(model, "main_input_name", "input_ids"))
    wanted = dict.fromkeys([*([main] if main in accepted else []), *required])
    if "input_ids" in accepted and not wanted:
        wanted["input_ids"] = None
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        wanted["decoder_input_ids"] = None
    unknown = [name for name in wanted if name not in _MAKERS]
    if unknown:
        raise CommandError(
            f"{type(model).__name__} requires `{unknown[0]}`, for which there is no example value; write a "
            "file.py:factory that returns (model, inputs)",
            FAILED,
        )
    call: dict[str, Any] = {name: _MAKERS[name](config) for name in wanted}
    if "use_cache" in accepted:
        call["use_cache"] = False
    return call


def _tokens(config: Any) -> Tensor:
    return torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 97 + 3


def _image(config: Any) -> Tensor:
    size = _nested(config, "image_size", 32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(BATCH, _nested(config, "num_channels", 3), height, width)


def _nested(config: Any, name: str, default: Any) -> Any:
    """Read a field of a configuration or of one inside it."""
    for each in (config, *(value for value in vars(config).values() if hasattr(value, "model_type"))):
        if getattr(each, name, None) is not None:
            return getattr(each, name)
    return default


_MAKERS: dict[str, Callable[[Any], Tensor]] = {
    "input_ids": _tokens,
    "decoder_input_ids": _tokens,
    "pixel_values": _image,
    "input_features": lambda config: torch.randn(BATCH, _nested(config, "num_mel_bins", 16), FRAMES),
    "input_values": lambda config: torch.randn(BATCH, SAMPLES),
}
