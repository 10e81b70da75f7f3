"""Small configurations of transformers models, by the names of their fields; `overrides` has the exceptions.

small_config(type) -> fields with a number in them, each as small as its name allows
                   -> the overrides of that type
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from modelzoo.calls import field

VOCABULARY = 128
HIDDEN, HEADS, KEY_HEADS, HEAD_DIM, FFN, LAYERS, POSITIONS = 32, 4, 2, 8, 64, 2, 64

# Pattern of a field's whole name -> the largest value that it gets. The first that fits counts.
LIMITS: list[tuple[str, int]] = [
    (r".*(num_)?(key_value_heads|kv_heads|n_kv_heads|query_groups|num_kv_head)", KEY_HEADS),
    (r"(.*_)?(num_attention_heads|n_heads?|num_heads?|attention_heads|heads|nhead)", HEADS),
    (r"num_(query|attention_query)_heads|.*_num_heads|.*attn_heads|.*_n_heads", HEADS),
    (r"num_(experts_per_tok(en)?|selected_experts)|.*top_?k(_experts)?|moe_top_?k", 2),
    (r"n_group|num_expert_groups?|topk_groups?|n_groups_moe", 1),
    (r"(.*_)?(num_local_experts|n_routed_experts|num_experts|n_experts|num_routed_experts)", 4),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r".*lora_rank", 16),
    (r"(.*_)?(head_dim|d_kv|attention_head_size|head_size|kv_channels|d_head|key_dim)", HEAD_DIM),
    (r"linear_num_(key|value)_heads", KEY_HEADS),
    (r"(.*_)?(d_state|state_size)|mamba_d_ssm", 8),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|n_inner|inner_dim|mlp_dim|feedforward_dim|ff_dim)", FFN),
    (r"(.*_)?(d_inner|dim_feedforward|intermediate_dim|ffn_size|mlp_hidden_size|.*ffn_intermediate.*)", FFN),
    (r"(.*_)?(n_layers?|num_blocks|layers|depth)|num_.*_blocks", LAYERS),
    (r"(.*_)?(max_position_embeddings|n_positions|max_(source|target)_positions|max_seq(uence)?_len(gth)?)", POSITIONS),
    (r"(.*_)?(n_ctx|seq_length|max_length|model_max_length|max_text_len)", POSITIONS),
    (r"(.*_)?(vocab_size|vocabulary_size|codebook_size|n_vocab|num_embeddings)", VOCABULARY),
    (r"(.*_)?(image_size|img_size|input_size|crop_size)", 32),
    (r"(.*_)?patch_size", 8),
    (r"(.*_)?(num_queries|num_query_tokens|num_latents|num_object_queries)", 8),
    (r"(.*_)?(num_mel_bins|mel_bins|feature_size|num_mel_bands)", 16),
    (r"(.*_)?num_channels_?", 3),
    (r"(.*_)?(sliding_window|attention_window|window_size|local_attention|block_size|chunk_size)", 8),
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_size|dim|width|channels|size|rank)", HIDDEN),
]  # fmt: skip
_LIMITS = [(re.compile(pattern), limit) for pattern, limit in LIMITS]
# Not sizes, whatever their names say.
LEFT = re.compile(
    r".*(kernel|stride|token_id|token_index|_id|dtype|expand|ratio|factor|conv_dim|temporal_patch_size|d_conv|"
    r"type_vocab_size|chunk_size_feed_forward|num_labels|pretraining_tp|level|num_feature|merge_size|output_stride)s?"
)


def small_fields(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that can be smaller, with small values."""
    small: dict[str, Any] = {}
    for name, value in defaults.items():
        if name.endswith(("token_id", "token_index", "_token_ids")):
            continue
        if isinstance(value, bool) or LEFT.fullmatch(name):
            continue
        if isinstance(value, int):
            limit = next((limit for pattern, limit in _LIMITS if pattern.fullmatch(name)), None)
            if limit is not None and value > limit:
                small[name] = limit
        elif isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
            fitted = small_list(name, list(value))
            if fitted != list(value):
                small[name] = type(value)(fitted)
    heads = [name for name in defaults if _KEY_HEADS.fullmatch(name)]
    for name in heads:  # as many key heads as heads, where that is how the model is
        whole = defaults.get("num_attention_heads", defaults.get("n_head"))
        if isinstance(defaults[name], int) and defaults[name] == whole and name in small:
            small[name] = HEADS
    return small


_KEY_HEADS = re.compile(LIMITS[0][0])


def small_list(name: str, values: list[int]) -> list[int]:
    """A list of sizes, one per stage."""
    if re.fullmatch(r".*(depths?|num_blocks|layers|num_layers|blocks)", name):
        return [1 for _ in values]
    if re.fullmatch(r".*heads?", name):
        return [min(value, HEADS) if value in (1, 2, 4) else HEADS for value in values]
    if re.fullmatch(r".*(hidden_sizes|embed_dims?|dims|hidden_channels|widths?|channels|neck_hidden_sizes)", name):
        return [min(value, 32 if value < 200 else 64) for value in values]
    if re.fullmatch(r".*(image_size|img_size|input_size)", name):
        return [min(value, 32) for value in values]
    return values


def small_config(config_class: type, overrides: Mapping[str, Any] | None = None) -> Any:
    """A small configuration of a class; overrides are by field, nested by dict."""
    return config_class(**_fields(config_class(), dict(overrides or {})))


def _fields(default: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    names = [each.name for each in dataclasses.fields(default)] if dataclasses.is_dataclass(default) else vars(default)
    defaults = {name: field(default, name) for name in names if not name.startswith("_")}
    fields = small_fields(defaults)
    for name, value in defaults.items():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            nested = overrides.pop(name, {})
            if isinstance(nested, dict) and "model_type" not in nested:  # another type is given whole
                nested = {**_fields(value, dict(nested)), "model_type": value.model_type}
            fields[name] = nested
    vocabulary = fields.get("vocab_size", defaults.get("vocab_size"))
    if isinstance(vocabulary, int):
        special = [name for name in defaults if name.endswith(("token_id", "token_index"))]
        for i, name in enumerate(special):
            value = defaults[name]
            if isinstance(value, int) and value >= vocabulary:
                fields[name] = vocabulary - 1 - i
    rope = defaults.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope and len(rope["mrope_section"]) == 3:
        entries = fields.get("head_dim", defaults.get("head_dim") or HIDDEN // HEADS)
        half = int(entries * (rope.get("partial_rotary_factor") or defaults.get("partial_rotary_factor") or 1)) // 2
        fields["rope_parameters"] = {**rope, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    if defaults.get("use_cache"):
        fields["use_cache"] = False
    fields |= overrides
    return fields
