"""What absorption and rotation cost on one core of a CPU, in training steps.

PYTHONPATH=bench python bench/absorb.py [--width 768] [--layers 2] [--sequences 2] [--context 512] [--rounds 3]

A GPT-2 of the width of the 125 M one, with fewer of its equal blocks (all costs grow with their number alike) and a
small vocabulary (which makes a step cheaper, not these). CPU seconds of the process, medians over rounds: other
processes count for little in them. Steps are timed with and without looking at what weights meet, in turns.
"""

import argparse
import copy
import statistics
import time

import torch
from machine import write_csv
from torch.nn.functional import cross_entropy

import ecospa_fx
from ecospa_fx.compensation import GATHERING
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 768), ("layers", 2), ("sequences", 2), ("context", 512), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tolerate_missing_torchvision_ops()
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_positions=given.context, n_embd=given.width, n_layer=given.layers,
            n_head=given.width // 64, use_cache=False,
        )
    )  # fmt: skip
    tokens = torch.randint(256, (given.sequences, given.context))
    ecospa_fx.compile(model, example_inputs=(tokens,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        cross_entropy(model(tokens).logits.flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    grams = ecospa_fx.Grams(model, training=True)
    seconds: dict[str, list[float]] = {"step": [], "looking": []}
    for number in range(given.rounds + 1):
        for name, grams.active in (("step", False), ("looking", True)):
            taken = timed(step)
            if number:  # the first one generates code
                seconds[name].append(taken)
    before = {name: statistics.median(values) for name, values in seconds.items()}
    keep = {c.name: torch.arange(c.size - c.size // 2) for c in ecospa_fx.couplings(model) if c.kind != "heads"}
    linear = [c for c in ecospa_fx.couplings(model) if c.linear]
    plain, state = copy.deepcopy(model), optimizer.state_dict()
    other = torch.optim.AdamW(plain.parameters(), lr=1e-4)
    other.load_state_dict(copy.deepcopy(state))
    rows = {
        "step": before["step"],
        f"looking at {GATHERING} steps": GATHERING * (before["looking"] - before["step"]),
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
