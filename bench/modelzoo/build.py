"""Builder of zoo models with the arguments of a call: `timm/FAMILY` or `transformers/TYPE`."""

from __future__ import annotations

import torch

from modelzoo.calls import BATCH, calls
from modelzoo.measure import Built
from modelzoo.overrides import CALLS, CLASSES, CONFIGS, TIMM
from modelzoo.shrunken import small_config
from modelzoo.used import USED

SIDES = (64, 96, 128, 160, 192, 224, 256, 288, 320)  # of images, the first that a model takes


def names() -> list[str]:
    """Every model of the zoo, the most used ones first."""
    import timm
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    types = dict.fromkeys((*USED, *sorted({*MODEL_MAPPING_NAMES, *CLASSES})))
    return [*(f"transformers/{kind}" for kind in types), *(f"timm/{family}" for family in timm.list_modules())]


def build(name: str) -> Built:
    """A model with random weights, and the arguments of one call.

    Raises:
        Exception: whatever the library that makes it raises.
    """
    library, _, kind = name.partition("/")
    torch.manual_seed(0)
    return _timm(kind) if library == "timm" else _transformers(kind)


def _timm(family: str) -> Built:
    import timm

    name, options = TIMM[family]
    last: Exception | None = None
    sizes = timm.create_model(name, **options).default_cfg["input_size"] if not options.get("img_size") else (3, 0, 0)
    for side in (options.pop("img_size", None),) if "img_size" in options else SIDES:
        for extra in ({"img_size": side}, {}):
            torch.manual_seed(0)
            try:
                model = timm.create_model(name, **options, **extra).eval()
                x = torch.randn(BATCH, sizes[0], side, side)
                with torch.no_grad():
                    model(x)
                return model, (x,), {}
            except Exception as error:
                last = error
    assert last is not None
    raise last


def _transformers(kind: str) -> Built:
    import transformers.integrations.moe
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers.logging.set_verbosity_error()
    # The kernel of grouped products takes no float64 in eager; what an export takes instead of it does.
    transformers.integrations.moe._can_use_grouped_mm = lambda *_: False
    config = small_config(CONFIG_MAPPING[kind], CONFIGS.get(kind))
    if kind in CLASSES:
        model = getattr(transformers, CLASSES[kind])._from_config(config)
    else:
        model = transformers.AutoModel.from_config(config)
    model.eval()
    first: Exception | None = None
    for call in calls(model, config, CALLS.get(kind, {})):
        try:
            with torch.no_grad():
                model(**call)
            return model, (), call
        except Exception as error:
            first = first or error
    assert first is not None
    raise first
