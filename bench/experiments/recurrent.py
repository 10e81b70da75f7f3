"""Recurrent models: Mamba and RWKV, whose couplings are not known in advance.

PYTHONPATH=bench python -m experiments.recurrent [--seeds 3] [--steps 160] [--scale gpu]

Small ones on source text, 40% of their parameters removed between 25% and 65% of the run: by the rule of the paper,
at random, and with the pairing broken. On a CPU both run their recurrence step by step, so the context is short.
"""

from __future__ import annotations

from experiments.results import arguments, report
from experiments.runs import Job, Variant
from experiments.tasks import Text


def main() -> None:
    options = arguments(__doc__, steps=160)
    sizes = {"context": 32, "layers": 2, "width": 96}
    if options.scale == "gpu":
        sizes = {"context": 256, "layers": 8, "width": 512, "batch_size": 32}
    variants = (
        Variant("coupled", 0.25, 0.65, {"target": 0.6}),
        Variant("random", 0.25, 0.65, {"target": 0.6, "score": "random", "index_score": "random"}),
        Variant("uncoupled", 0.25, 0.65, {"target": 0.6}, pairing=False),
    )
    jobs = [
        Job(arch, Text(None, arch=arch, **sizes), options.steps, seed, variants)
        for seed in range(options.seeds)
        for arch in ("mamba", "rwkv")
    ]
    report("recurrent", "recurrent models to 60% of their size", jobs, options, "variant")


if __name__ == "__main__":
    main()
