"""CIFAR-10 until most of it is learned: ResNets and a vision transformer, dense and made small along the way.

PYTHONPATH=bench python -m experiments.vision --data DIR [--only resnet] [--steps 4680] [--seeds 1] [--report]

resnet       ResNet-18 at a quarter of its width (0.7 million parameters), 12 epochs of the 25,000 images that there are
resnet-wide  half as wide again (1.6 million), 20 epochs
vit          4 blocks of 128 channels behind a stem of three convolutions (0.9 million), 30 epochs

64 images a step, each flipped and shifted, one cycle of the rate, products in bfloat16. Couplings lose 60% of their
entries in five shrinks between 25% and 65% of the run: by the paper's rule, by the adaptive policy, at random, by
magnitude. In minutes of one core a ResNet takes about 40, a wide one 95, the transformer 120.

A run that is stopped goes on with the same command; rows come to `results/vision.jsonl`, with `--report` they are
reported as far as they are there.
"""

from __future__ import annotations

from machine import RESULTS

from experiments.images import Images
from experiments.results import arguments, over_steps_flops_seconds, report
from experiments.runs import Job, Variant

WAYS: dict[str, dict[str, object]] = {
    "paper": {},
    "adaptive": {"policy": "adaptive"},
    "random": {"score": "random", "index_score": "random"},
    "magnitude": {"score": "magnitude", "index_score": "magnitude"},
}
SIZES = {
    "resnet": {"width": 16, "blocks": (2, 2, 2, 2)},
    "resnet-wide": {"width": 24, "blocks": (2, 2, 2, 2)},
    "vit": {"width": 128, "blocks": (4,), "rate": 1e-3},
}
LARGE = {
    "resnet": {"width": 32, "blocks": (2, 2, 2, 2)},
    "resnet-wide": {"width": 64, "blocks": (2, 2, 2, 2)},
    "vit": {"width": 384, "blocks": (12,), "rate": 5e-4},
}
LONGER = {"resnet": 1.0, "resnet-wide": 5 / 3, "vit": 2.5}


def main() -> None:
    options = arguments(
        __doc__, data=True, steps=4680, seeds=1, workers=1, only={"nargs": "+", "choices": SIZES, "default": [*SIZES]}
    )
    if options.data is None:
        raise SystemExit("pass --data, a folder with cifar10/train.npz and cifar10/test.npz")
    sizes = LARGE if options.scale == "gpu" else SIZES
    variants = tuple(
        Variant(name, 0.25, 0.65, {"target": 0.4, "among": "prunable"} | way, shrinks=5) for name, way in WAYS.items()
    )
    jobs = [
        Job(
            arch, Images(options.data / "cifar10", arch.split("-")[0], **sizes[arch]),
            round(LONGER[arch] * options.steps), seed, variants, evaluations=16, last_rate=0.0, save_every=300,
        )
        for seed in range(options.seeds)
        for arch in SIZES
    ]  # fmt: skip
    rows = report("vision", "CIFAR-10", jobs, options, "variant", also=("accuracy", "seconds"))
    over_steps_flops_seconds(rows, RESULTS / "vision_curves.png", "accuracy", title="CIFAR-10, accuracy on test images")


if __name__ == "__main__":
    main()
