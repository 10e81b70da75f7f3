"""Generating with caches in graph execution, over many models; and what a token costs.

PYTHONPATH=bench python bench/generate.py [PATTERN ...]
PYTHONPATH=bench python bench/generate.py --time

The causal language models and encoder-decoders of bench/module.py, in float64, half of every coupling removed. Tokens
generated with a cache must be those without one, and those of the original model with zeros in place of what is gone:
greedily, with beams, drawn at random, with a static cache. Graphs are counted after few tokens and after many: there
must be as many.

`--time` measures seconds per token of a larger model, the original, its own Python and graphs side by side.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
import traceback
from typing import Any

import torch
from module import CAUSAL, PAIRS, build
from torch import nn

import ecospa_fx
from ecospa_fx.compiled import MODEL
from ecospa_fx.passes.names import named_tensors
from ecospa_fx.stand_ins import unshrunk

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled": {"do_sample": True},
    "static": {"do_sample": False, "cache_implementation": "static"},
}
FEW, MANY = 5, 12  # tokens


def halves(model: nn.Module) -> dict[Any, torch.Tensor]:
    """Every other entry of every coupling of more than one."""
    return {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model) if c.size > 1}


def graphs(model: nn.Module) -> int:
    """How many there are, in all regions."""
    return sum(len(region.programs) for region in model.__dict__[MODEL].regions.values())


def generated(model: nn.Module, given: dict[str, Any], **options: Any) -> torch.Tensor:
    """Tokens, with a fixed seed."""
    torch.manual_seed(0)
    found: torch.Tensor = model.generate(**given, **{"use_cache": True, **options})
    return found


def masked(model: nn.Module, twin: nn.Module) -> nn.Module:
    """`twin`, the original, with zeros where `model` has shrunk."""
    plan, held = ecospa_fx.plan(model), named_tensors(model)
    with torch.no_grad():
        for name, tensor in named_tensors(twin).items():
            value = held[name].detach()
            tensor.copy_(unshrunk(value, plan, name) if name in plan.original_shapes else value)
    return twin


def measure(name: str) -> dict[str, Any]:
    """A row about one model."""
    row: dict[str, Any] = {"name": name}
    model, _, kwargs = build(name)
    twin = copy.deepcopy(model)
    ecospa_fx.compile(model, example_kwargs=kwargs)
    row["regions"] = len(model.__dict__[MODEL].regions)
    ecospa_fx.shrink(model, halves(model))
    row["kinds"] = " ".join(sorted({c.kind for c in ecospa_fx.couplings(model)}))
    masked(model, twin)
    given = {key: kwargs[key] for key in ("input_ids", "attention_mask")}
    if name.startswith("pair/"):
        given["decoder_start_token_id"] = 0
    start = time.perf_counter()
    for way, options in WAYS.items():
        try:
            more = {"max_new_tokens": FEW, "min_new_tokens": FEW, **options}
            expected = generated(twin, given, **more)
        except Exception as error:
            row[way] = f"not by the original either: {type(error).__name__}"
            continue
        try:
            found = generated(model, given, **more)
            before = graphs(model)
            more |= {"max_new_tokens": MANY, "min_new_tokens": MANY}
            longer = generated(model, given, **more)
            after = graphs(model)
            wanted = generated(twin, given, **more)
            said = "equal" if torch.equal(found, expected) and torch.equal(longer, wanted) else "DIFFERS from masked"
            if way != "static":
                without = generated(model, given, **more, use_cache=False)
                said = said if torch.equal(longer, without) else f"{said}, DIFFERS from no cache"
            # A static cache of another size is another prefill; tokens make no graphs.
            if after > before + (row["regions"] if way == "static" else 0):
                said += f", graphs grow {before} to {after}"
            row[way] = said
        except Exception as error:
            row[way] = f"{type(error).__name__}: {error}"[:300]
            if VERBOSE:
                traceback.print_exc()
    row["seconds"], row["graphs"] = round(time.perf_counter() - start, 1), graphs(model)
    return row


VERBOSE = False


def main() -> None:
    """Measure and print rows as they come."""
    global VERBOSE
    parser = argparse.ArgumentParser()
    parser.add_argument("patterns", nargs="*")
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    VERBOSE = given.verbose
    torch.set_num_threads(1)
    rows = []
    for name in [*(f"causal/{kind}" for kind in CAUSAL), *(f"pair/{kind}" for kind in PAIRS)]:
        if given.patterns and not any(re.fullmatch(pattern, name) for pattern in given.patterns):
            continue
        try:
            rows.append(measure(name))
        except Exception as error:
            rows.append({"name": name, "greedy": f"{type(error).__name__}: {error}"[:300]})
            if VERBOSE:
                traceback.print_exc()
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
