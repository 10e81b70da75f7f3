"""Vision transformer on CIFAR-10: dense, with EcoSpa, and with as many entries removed by magnitude.

PYTHONPATH=bench python -m experiments.vision --data DIR [--seeds 3] [--steps 900] [--scale gpu]
"""

from __future__ import annotations

from experiments.results import arguments, report
from experiments.runs import Job, Variant
from experiments.tasks import Images


def main() -> None:
    options = arguments(__doc__, data=True, steps=900)
    if options.data is None:
        raise SystemExit("pass --data, a folder with cifar10/train.npz and cifar10/test.npz")
    sizes = {"width": 384, "layers": 12, "heads": 6, "batch_size": 256} if options.scale == "gpu" else {}
    ways = {
        "coupled": {},
        "magnitude": {"score": "magnitude", "index_score": "magnitude"},
        "random": {"score": "random", "index_score": "random"},
    }
    variants = tuple(
        Variant(name, 0.25, 0.65, {"target": target, **how}, labels={"removed": f"{1 - target:.0%}"})
        for target in (0.5, 0.3)
        for name, how in ways.items()
    )
    task = Images(options.data / "cifar10", **sizes)
    jobs = [Job("CIFAR-10", task, options.steps, seed, variants) for seed in range(options.seeds)]
    report("vision", "ViT on CIFAR-10", jobs, options, "removed", "variant", also=("accuracy",))


if __name__ == "__main__":
    main()
