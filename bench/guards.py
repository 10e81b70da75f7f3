"""Cost of a call beside the model's own: what looking at everything that a forward read takes.

python bench/guards.py [--rounds 200]

Three figures. The time that a forward of two blocks takes over that of the plain model, per region, in microseconds;
that of one token more with a cache; and the part of a training step that finding the programs takes, guards included,
before and after a shrink: of the demo's model, and of one so tiny that a step takes 3 ms.

The last is measured right after a step, when none of it is in the processor's caches. Times are of the thread.
"""

import argparse
import copy
import gc
import statistics
import time

import torch
from machine import write_csv
from rewrite import SIZES, calls, count, gpt2, halves

import ecospa_fx
from ecospa_fx.demo.models import build_model
from ecospa_fx.demo.options import Options
from ecospa_fx.model.lookup import regions_of
from ecospa_fx.model.region import Region


def seconds(call, *args) -> float:
    began = time.thread_time()
    call(*args)
    return time.thread_time() - began


def quartiles(found):
    low, median, high = statistics.quantiles(found, n=4, method="inclusive")
    return {"low": round(low, 3), "median": round(median, 3), "high": round(high, 3)}


def row(measure, regions, state, model, unit, found):
    return {"measure": measure, "regions": regions, "state": state, "parameters": count(model), "unit": unit,
            **quartiles(found), "rounds": len(found)}  # fmt: skip


def extra(rounds: int):
    """Microseconds by which a call of two blocks is slower than plain, per region, side by side."""
    plain = gpt2(64, 2, 4, 256).eval()
    x = torch.randint(0, 256, (2, 16))
    for regions in ("root", "blocks"):
        model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(x,), regions=regions)
        with torch.no_grad():
            for _ in range(10):
                model(x), plain(x)
            found = [seconds(model, x) - seconds(plain, x) for _ in range(rounds)]
            yield row("call over plain, per region", regions, "whole", model, "microseconds", per_region(model, found))
            found = []
            while len(found) < rounds:
                caches = [each(x, use_cache=True).past_key_values for each in (model, plain)]
                for _ in range(50):
                    mine, eager = (
                        seconds(lambda one=one, cache=cache: one(x[:, :1], cache=cache, use_cache=True))
                        for one, cache in zip((model, plain), caches, strict=True)
                    )
                    found.append(mine - eager)
            measure = "token with a cache over plain, per region"
            yield row(measure, regions, "whole", model, "microseconds", per_region(model, found[10:]))


def per_region(model, found):
    return [1e6 * each / len(regions_of(model)) for each in found]


def recorded(model, step):
    """Record the calls of all regions in one step."""
    calls_of_regions, run = [], Region.__call__

    def recording(region, module, args, kwargs):
        calls_of_regions.append((region, module, args, kwargs))
        return run(region, module, args, kwargs)

    Region.__call__ = recording
    try:
        step()
    finally:
        Region.__call__ = run
    return calls_of_regions


def find(of_step) -> None:
    for region, module, args, kwargs in of_step:
        region(module, args, kwargs)


def share(size: str, rounds: int):
    """Percent of a training step that finding its programs takes, in all regions."""
    if size == "demo":
        options = Options()
        plain, x = build_model(options), torch.randint(0, 256, (options.batch_size, options.context))
    else:
        *shape, tokens = SIZES[size]
        plain, x = gpt2(*shape), torch.randint(0, shape[-1], tokens)
    for regions in ("root", "blocks"):
        model = ecospa_fx.compile(
            copy.deepcopy(plain), example_inputs=(x,), example_kwargs={"labels": x}, regions=regions
        )
        for state in ("whole", "blocks halved"):
            if state != "whole":
                ecospa_fx.shrink(model, halves(model))
            step = calls(model, x)["forward + backward"]
            for _ in range(3):
                step()
            found, of_step = [], recorded(model, step)
            for _ in range(rounds):
                whole = seconds(step)
                for region, *_ in of_step:
                    region.watcher = lambda *_: None  # runs in place of the program
                found.append(100 * seconds(find, of_step) / whole)
                for region, *_ in of_step:
                    region.watcher = None
            yield row(f"guards, model of {size} size", regions, state, model, "percent of a step", found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    given = parser.parse_args()
    gc.disable()  # it runs after so and so many objects, in turns as regular as these
    rows = [*extra(given.rounds), *share("tiny", given.rounds), *share("demo", max(10, given.rounds // 10))]
    for each in rows:
        print({key: each[key] for key in ("measure", "regions", "state", "low", "median", "high", "unit")})
    print(write_csv("guards", rows))


if __name__ == "__main__":
    main()
