"""Calls of transformers models: the main input, explicit masks, and the other required arguments."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH, FRAMES, SAMPLES, VOCABULARY = 2, 7, 128, 800, 128


def field(config: Any, name: str) -> Any:
    """A field of a configuration, or None where it has none or one per layer."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def find(config: Any, *names: str, default: Any = None) -> Any:
    """The first field of that name in a configuration or one nested in it."""
    for name in names:
        value = field(config, name)
        if value is not None:
            return value
    for nested in _nested(config):
        value = find(nested, *names)
        if value is not None:
            return value
    return default


def _nested(config: Any) -> list[Any]:
    return [value for value in vars(config).values() if hasattr(value, "model_type") and hasattr(value, "to_dict")]


def _tokens(config: Any) -> Tensor:
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) * 7 % 23 + 5
    return ids % find(config, "vocab_size", default=VOCABULARY)


def _image(config: Any) -> Tensor:
    size = find(config, "image_size", "img_size", "input_size", default=32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(BATCH, find(config, "num_channels", "in_channels", default=3), height, width)


def _mask(config: Any) -> Tensor:
    return torch.ones(BATCH, LENGTH, dtype=torch.long)


def _frames(config: Any) -> list[Tensor]:
    bins = find(config, "num_mel_bins", "input_channels", "feature_size", "num_mel_bands", "n_mels", default=16)
    frames = torch.randn(BATCH, bins, FRAMES)
    return [frames, frames.transpose(1, 2).contiguous()]


def _waves(config: Any) -> list[Tensor]:
    waves = torch.randn(BATCH, SAMPLES)
    return [waves, waves[:, None], torch.cat([waves] * 20, dim=1), *reversed(_frames(config))]


def _video(config: Any) -> Tensor:
    frames = find(config, "num_frames", "frames_per_clip", default=2)
    return _image(config)[:, None].expand(-1, frames, -1, -1, -1).contiguous()


def _images(config: Any) -> list[Tensor]:
    image = _image(config)
    return [
        image,
        _video(config),
        image.new_zeros(BATCH, 3, 64, 64).normal_(),
        image.new_zeros(BATCH, 3, 128, 128).normal_(),
    ]


def _series(config: Any) -> list[Tensor]:
    length = find(config, "context_length", "seq_len", default=32)
    series = torch.randn(BATCH, length, find(config, "num_input_channels", "input_size", default=1))
    return [series, series[..., 0]]


ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    "input_ids": _tokens,
    "decoder_input_ids": _tokens,
    "attention_mask": _mask,
    "decoder_attention_mask": _mask,
    "pixel_values": _images,
    "pixel_values_videos": _video,
    "pixel_mask": lambda config: torch.ones(*_image(config)[:, 0].shape, dtype=torch.long),
    "input_features": _frames,
    "input_values": _waves,
    "past_values": _series,
    "inputs": lambda config: torch.randn(BATCH, LENGTH, find(config, "d_model", "hidden_size")),
    "input_features_mask": lambda config: torch.ones(BATCH, FRAMES, dtype=torch.long),
    "bbox": lambda config: torch.arange(4).mul(3).expand(BATCH, LENGTH, 4).contiguous(),
    "token_type_ids": lambda config: torch.zeros(BATCH, LENGTH, dtype=torch.long),
    "inputs_embeds": lambda config: torch.randn(BATCH, LENGTH, find(config, "hidden_size", "d_model")),
    "hidden_states": lambda config: torch.randn(BATCH, LENGTH, find(config, "hidden_size", "d_model")),
    "position_ids": lambda config: torch.arange(LENGTH).expand(BATCH, LENGTH).contiguous(),
}  # fmt: skip


def calls(model: nn.Module, config: Any, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Keyword arguments of one call, the likeliest first: several shapes may be meant by one name.

    Args:
        model: a transformers model.
        config: its configuration.
        given: arguments, or functions of the configuration that make them, to take before the general ones; None
            leaves an argument out.

    Raises:
        LookupError: an argument is required that nothing is known of.
    """
    parameters = inspect.signature(model.forward).parameters
    required = [
        name for name, p in parameters.items()
        if p.default is inspect.Parameter.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]  # fmt: skip
    wanted = dict.fromkeys([model.main_input_name, *required] if model.main_input_name in parameters else required)
    if not wanted and "input_ids" in parameters:
        wanted["input_ids"] = None
    if "pixel_values" in parameters and "input_ids" not in parameters:
        wanted["pixel_values"] = None
    if "decoder_input_ids" in parameters and getattr(config, "is_encoder_decoder", False):
        wanted["decoder_input_ids"] = None
    if "input_ids" in wanted and "attention_mask" in parameters:
        wanted["attention_mask"] = None
    if "decoder_input_ids" in wanted and "decoder_attention_mask" in parameters:
        wanted["decoder_attention_mask"] = None
    optional = [name for name in ("pixel_values", "input_features", "input_values", "bbox") if name in parameters]
    for extra in ((), *((name,) for name in optional if name not in wanted)):
        choices: dict[str, list[Any]] = {}
        for name in (*wanted, *extra):
            if name not in given and name not in ARGUMENTS:
                raise LookupError(f"{type(model).__name__}.forward requires `{name}`, which no one knows how to make")
            if name not in given:
                made = ARGUMENTS[name](config)
                choices[name] = made if isinstance(made, list) else [made]
        choices |= {
            name: [make(config) if callable(make) else make] for name, make in given.items() if make is not None
        }
        if "use_cache" in parameters:
            choices["use_cache"] = [False]
        for values in itertools.product(*choices.values()):
            yield dict(zip(choices, values, strict=True))
