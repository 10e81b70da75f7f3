"""Cost of a call beside the model's own: what looking at everything that a forward read takes.

python bench/guards.py [--rounds 200] [--size tiny]

Two figures. The time that a forward of two blocks takes over that of the plain model, per region, in microseconds; and
the part of a training step of the demo's model that the guards of its regions take, before and after a shrink.
"""

import argparse
import copy
import statistics
import time

import torch
from machine import write_csv
from rewrite import SIZES, calls, count, gpt2, halves

import ecospa_fx
from ecospa_fx.model.lookup import regions_of
from ecospa_fx.passes.ir.signature import call_key


def seconds(call, *args) -> float:
    began = time.perf_counter()
    call(*args)
    return time.perf_counter() - began


def guards(model, x) -> None:
    """Look at all that a step looks at before it runs its programs."""
    for name, region in regions_of(model).items():
        module = model.get_submodule(name)
        for each in region.specializations:
            region.routing.changed_constant(region.specializations, module, each.program)
        call_key(module, (x,), {})


def quartiles(found):
    low, median, high = statistics.quantiles(found, n=4, method="inclusive")
    return {"low": round(low, 3), "median": round(median, 3), "high": round(high, 3)}


def extra(rounds: int):
    """Microseconds by which the forward of two blocks is slower than plain, per region, side by side."""
    plain = gpt2(64, 2, 4, 256)
    x = torch.randint(0, 256, (2, 16))
    for regions in ("root", "blocks"):
        model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(x,), regions=regions)
        number = len(regions_of(model))
        with torch.no_grad():
            for _ in range(10):
                model(x), plain(x)
            found = [(seconds(model, x) - seconds(plain, x)) / number * 1e6 for _ in range(rounds)]
        yield {"measure": "call over plain, per region", "regions": regions, "state": "whole",
               "parameters": count(model), "unit": "microseconds", **quartiles(found), "rounds": rounds}  # fmt: skip


def share(size: str, rounds: int):
    """Percent of a training step that the look-up of programs, guards included, takes in all regions."""
    *shape, tokens = SIZES[size]
    plain = gpt2(*shape)
    x = torch.randint(0, shape[-1], tokens)
    for regions in ("root", "blocks"):
        model = ecospa_fx.compile(
            copy.deepcopy(plain), example_inputs=(x,), example_kwargs={"labels": x}, regions=regions
        )
        for state in ("whole", "blocks halved"):
            if state != "whole":
                ecospa_fx.shrink(model, halves(model))

            step = calls(model, x)["forward + backward"]
            for _ in range(3):
                step(), guards(model, x)
            found = [100 * seconds(guards, model, x) / seconds(step) for _ in range(rounds)]
            yield {
                "measure": f"guards of a step, {size}", "regions": regions, "state": state, "parameters": count(model),
                "unit": "percent of a step", **quartiles(found), "rounds": rounds,
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--size", default="tiny", choices=SIZES)
    given = parser.parse_args()
    rows = [*extra(given.rounds), *share(given.size, given.rounds)]
    for row in rows:
        print({key: row[key] for key in ("measure", "regions", "state", "low", "median", "high", "unit")})
    print(write_csv("guards", rows))


if __name__ == "__main__":
    main()
