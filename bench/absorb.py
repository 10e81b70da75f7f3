"""Cost of absorption, rotation and the adaptive policy on one core of a CPU, in training steps.

PYTHONPATH=bench python bench/absorb.py [--share 0.125] [--layers 12] [--width 768] [--sequences 2] [--context 512]

A share of the entries of all FFNs, queries and keys, values and outputs of the 124 M GPT-2 is removed at once: an
eighth by default, as in a schedule of some shrinks. Times are CPU seconds of the process, medians over rounds, so that
other processes matter little. Steps are timed with and without collecting input statistics, in turns.
"""

import argparse
import copy
import statistics
import time

import torch
from machine import write_csv
from torch.nn.functional import cross_entropy

import ecospa_fx
from ecospa_fx.compensate.compensation import GATHERING
from ecospa_fx.compensate.forecast import forecast
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops
from ecospa_fx.score.saliency import Saliency


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"width": 768, "layers": 12, "vocabulary": 50257, "sequences": 2, "context": 512, "rounds": 2}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--share", type=float, default=0.125)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tolerate_missing_torchvision_ops()
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=given.vocabulary, n_positions=given.context, n_embd=given.width, n_layer=given.layers,
            n_head=given.width // 64, use_cache=False,
        )
    )  # fmt: skip
    tokens = torch.randint(given.vocabulary, (given.sequences, given.context))
    ecospa_fx.compile(model, example_inputs=(tokens,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    saliency = Saliency(model)

    def step(judge: bool = False) -> None:
        cross_entropy(model(tokens).logits.flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        if judge:
            saliency.accumulate()
        optimizer.zero_grad()

    grams = ecospa_fx.Grams(model, training=True)
    seconds: dict[str, list[float]] = {"step": [], "judging": [], "looking": []}
    for number in range(given.rounds + 1):
        for name in seconds:
            grams.active = name == "looking"
            taken = timed(lambda name=name: step(judge=name == "judging"))
            if number:  # the first one generates code
                seconds[name].append(taken)
    before = {name: statistics.median(values) for name, values in seconds.items()}
    linear = [c for c in ecospa_fx.couplings(model) if c.linear]
    some = [c for c in ecospa_fx.couplings(model) if c.kind != "heads"]
    keep = {c.name: torch.arange(c.size - round(given.share * c.size)) for c in some}
    judged = timed(
        lambda: forecast(
            model,
            some,
            saliency,
            grams=grams,
            optimizers=[optimizer],
            absorb=True,
            rotate=True,
            widths={c: len(keep[c.name]) for c in some},
        )
    )
    plain, state = copy.deepcopy(model), optimizer.state_dict()
    other = torch.optim.AdamW(plain.parameters(), lr=1e-4)
    other.load_state_dict(copy.deepcopy(state))
    rows = {
        "step": before["step"],
        f"looking at {GATHERING} steps": GATHERING * (before["looking"] - before["step"]),
        "judging a step": before["judging"] - before["step"],
        "forecast": judged,
        "shrink": timed(lambda: ecospa_fx.shrink(plain, keep, optimizer=other)),
        "rotate": timed(lambda: ecospa_fx.rotate(model, linear, grams=grams, optimizer=optimizer)),
        "shrink, absorbing": timed(lambda: ecospa_fx.shrink(model, keep, optimizer=optimizer, absorb=grams)),
    }
    made = [{"what": name, "cpu_seconds": f"{value:.3f}", "in_steps": f"{value / rows['step']:.2f}", **vars(given)}
            for name, value in rows.items()]  # fmt: skip
    for row in made:
        print(f"{row['what']:24s} {row['cpu_seconds']:>8s} s  {row['in_steps']:>6s} steps")
    write_csv("absorb", made)


def timed(call: object) -> float:
    """CPU seconds of a call."""
    began = time.process_time()
    call()  # type: ignore[operator]
    return time.process_time() - began


if __name__ == "__main__":
    main()
