"""Generation with caches in graph execution, over many models, and the cost of a token.

PYTHONPATH=bench python bench/generate.py [PATTERN ...]
PYTHONPATH=bench python bench/generate.py --time

The causal language models and encoder-decoders of bench/module.py, in float64, half of every coupling removed. Tokens
generated with a cache must equal those without one, and those of the original model with removed entries set to zero:
greedy, with beams, sampled, with a static cache. The number of graphs after few tokens must equal that after many.

`--time` measures seconds per token of a larger model, the original, its own Python and graphs side by side.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import time
import traceback
from typing import Any

import torch
from machine import write_csv
from module import CAUSAL, PAIRS, build
from torch import nn

import ecospa_fx
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.full_size import unshrunk
from ecospa_fx.passes.graph.tensors import named_tensors

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
    """Count the graphs of all regions."""
    return sum(len(region.specializations) for region in model.__dict__[MODEL].regions.values())


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
                more |= {"max_new_tokens": FEW, "min_new_tokens": FEW, "use_cache": False}
                without = generated(model, given, **more)
                said = said if torch.equal(found, without) else f"{said}, DIFFERS from no cache"
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


def seconds(model: nn.Module, ids: torch.Tensor) -> float:
    """Of one token of `TIMED`, in the whole loop of `generate`."""
    start = time.perf_counter()
    model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=TIMED, min_new_tokens=TIMED, do_sample=False
    )
    return (time.perf_counter() - start) / TIMED


def timed(hidden: int, layers: int, rounds: int) -> list[dict[str, Any]]:
    """Rows about a LLaMA: per token, over what the original takes in the same round."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=1000, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    plain = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 900, (1, 32))
    call = {"input_ids": ids.expand(2, -1), "use_cache": False}
    models: dict[str, nn.Module] = {"original": plain}
    module = ecospa_fx.compile(copy.deepcopy(plain), example_kwargs=call, execution="module")
    followed = {coupling.name: keep for coupling, keep in halves(module).items()}
    models["module, halved"] = module
    for name, keep in (("graph", {}), ("graph, halved as module", followed), ("graph, halved", None)):
        models[name] = graph = ecospa_fx.compile(copy.deepcopy(plain), example_kwargs=call)
        if keep is None or keep:
            ecospa_fx.shrink(graph, halves(graph) if keep is None else keep)
    ecospa_fx.shrink(module, followed)
    rows = []
    for name, model in models.items():
        start = time.perf_counter()
        seconds(model, ids[:, :4])
        rows.append({"model": f"{hidden} x {layers}", "measure": f"first {TIMED} tokens, {name}", "unit": "s",
                     "median": round(time.perf_counter() - start, 2), "low": "", "high": "", "rounds": 1})  # fmt: skip
        seconds(model, ids)
    found: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            found[name].append(seconds(model, ids))
    own = statistics.median(found["original"])
    for name, each in found.items():
        ratios = sorted(a / b for a, b in zip(each, found["original"], strict=True))
        quarter = len(ratios) // 4
        shown = [1e3 * own] if name == "original" else ratios
        rows.append({"model": f"{hidden} x {layers}", "measure": f"a token, {name}",
                     "unit": "ms" if name == "original" else "of the original",
                     "median": round(statistics.median(shown), 3), "low": round(ratios[quarter], 3),
                     "high": round(ratios[-1 - quarter], 3), "rounds": rounds})  # fmt: skip
    return rows


VERBOSE = False
TIMED = 24  # tokens


def main() -> None:
    """Measure and print rows as they come."""
    global VERBOSE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    parser.add_argument("--verbose", action="store_true", help="print where a model fails")
    parser.add_argument("--time", action="store_true", help="seconds per token instead")
    given = parser.parse_args()
    VERBOSE = given.verbose
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if given.time:
        for hidden, layers, rounds in ((64, 2, 12), (256, 8, 12)):
            rows += timed(hidden, layers, rounds)
            print(*rows[-10:], sep="\n", flush=True)
        write_csv("generate_time", rows)
        return
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
    if not given.patterns:
        write_csv("generate", [{key: row.get(key, "") for key in COLUMNS} for row in rows])


COLUMNS = ("name", "regions", "kinds", *WAYS, "graphs", "seconds")

if __name__ == "__main__":
    main()
