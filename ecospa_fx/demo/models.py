"""Models of the demo: a small causal language model of any transformers architecture, with random weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from .options import HEAD_DIM, OptionError, Options
from .torchvision_cure import tolerate_missing_torchvision_ops

VOCABULARY = 256
"""Size of the vocabulary: text is read as bytes."""


def build_model(options: Options) -> nn.Module:
    """Build the model of `options` from its config, with the generator state that `torch.manual_seed` left.

    Raises:
        OptionError: transformers has no such causal language model, or cannot build it at these sizes.
    """
    tolerate_missing_torchvision_ops()
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # without this it warns of special tokens, which a vocabulary of bytes does not have
    try:
        probe = AutoConfig.for_model(options.arch)
    except (ValueError, KeyError):
        raise OptionError(
            f"--arch {options.arch}: transformers has no such model type; try gpt2, llama, gpt_neox or qwen2"
        ) from None
    try:
        config = AutoConfig.for_model(options.arch, **_understood(probe, _sizes(options)))
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]
    except Exception as error:  # each architecture refuses sizes in its own way
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise OptionError(
            f"--arch {options.arch}: no causal language model at these sizes: {reason[0]:.160}"
        ) from error


def _sizes(options: Options) -> dict[str, Any]:
    """Return sizes under the names that most configs share, then under names of the others.

    Dropout is off: a run this short sees no byte twice, so there is nothing to regularise, and the random draws of the
    runs would differ from the first shrink on and blur the comparison.
    """
    heads = options.width // HEAD_DIM
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": options.width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads,
        "head_dim": HEAD_DIM,
        "intermediate_size": 4 * options.width,
        "max_position_embeddings": options.context,
        "ffn_dim": 4 * options.width,
        "word_embed_proj_dim": options.width,
        "rotary_dim": HEAD_DIM // 2,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "dropout": 0.0,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _understood(config: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Select the sizes that `config` has, under this name or an alias, and does not derive from others."""
    return {
        name: value
        for name, value in sizes.items()
        if hasattr(config, name) and not isinstance(getattr(type(config), name, None), property)
    }
