"""Kernels and their alternatives, side by side in one run; CSV and plot.

python bench/kernels.py [--device cuda] [--models 125M,1B,8B] [--rounds 15] [--seconds 380]

    slice sums     ours | foreach_norm | vector_norm per tensor | naive | torch.compile | exp_avg_sq | read ceiling
    optimizer      torch's fused AdamW alone | and ours after it | and foreach_norm | ours, fused into AdamW
    compaction     ours | index_select per tensor | copy ceiling
    training       a step of the model, and the time that our pass adds to it (GPU only)

Each round has one run of every candidate, in rotating order; ratios are taken within a round. On a GPU, device time
comes from events and host time is what the call takes to return. Without one, the plain-torch references are timed.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from machine import RESULTS, machine, write_csv
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ecospa_fx.kernels import add_slice_sums, compact
from ecospa_fx.kernels.adamw import adamw_slice_sums
from ecospa_fx.kernels.compact import prepared

Call = Callable[[], object]
OURS = "ours"
CONSOLE = Console()


@dataclass(frozen=True)
class Shapes:
    """Coupled weights of a model: (shape, scored dim) of one layer, and the layers."""

    layer: tuple[tuple[tuple[int, int], int], ...]
    layers: int


def _llama(width: int, keys: int, hidden: int) -> tuple[tuple[tuple[int, int], int], ...]:
    return (
        ((width, width), 0),
        ((keys, width), 0),
        ((keys, width), 0),
        ((width, width), 1),
        ((hidden, width), 0),
        ((hidden, width), 0),
        ((width, hidden), 1),
    )


MODELS = {
    "125M": Shapes((((2304, 768), 0), ((768, 768), 1), ((3072, 768), 0), ((768, 3072), 1)), 12),
    "1B": Shapes(_llama(2048, 512, 8192), 16),
    "8B": Shapes(_llama(4096, 1024, 14336), 32),
}


@dataclass
class Times:
    """Seconds of one candidate, a number per round."""

    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)


def side_by_side(calls: dict[str, Call], rounds: int, device: torch.device) -> dict[str, Times]:
    """Run every candidate once a round, in rotating order, after two rounds to warm up."""
    names = list(calls)
    times = {name: Times() for name in names}
    for turn in range(rounds + 2):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            host, spent = timed(calls[name], device)
            if turn >= 2:
                times[name].device.append(spent)
                times[name].host.append(host)
    return times


def timed(call: Call, device: torch.device) -> tuple[float, float]:
    """Seconds until the call returns, and seconds of the device."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        took = time.perf_counter() - began
        return took, took
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    # The device waits while the host prepares, so that launches that follow each other do not count as device time.
    torch.cuda._sleep(10_000_000)
    start.record()
    began = time.perf_counter()
    call()
    host = time.perf_counter() - began
    end.record()
    torch.cuda.synchronize()
    return host, start.elapsed_time(end) / 1e3


def summarise(section: str, times: dict[str, Times], moved: dict[str, int], base: str, ceiling: str) -> list[dict]:
    """Rows of the CSV: medians, the middle half, the ratio to `base`, the share of the ceiling's bytes per second."""
    rows = []
    rate = moved[ceiling] / statistics.median(times[ceiling].device) if ceiling in times else float("nan")
    for name, found in times.items():
        low, middle, high = statistics.quantiles(found.device, n=4, method="inclusive")
        ratios = [a / b for a, b in zip(found.device, times[base].device)]
        ratio_low, ratio, ratio_high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows.append(
            {
                "section": section,
                "what": name,
                "device_ms": round(middle * 1e3, 4),
                "device_ms_low": round(low * 1e3, 4),
                "device_ms_high": round(high * 1e3, 4),
                "host_ms": round(statistics.median(found.host) * 1e3, 4),
                "ratio": round(ratio, 3),
                "ratio_low": round(ratio_low, 3),
                "ratio_high": round(ratio_high, 3),
                "ratio_to": base,
                "GB_per_s": round(moved[name] / middle / 1e9, 1) if name in moved else "",
                "share_of_ceiling": round(moved[name] / middle / rate, 3) if name in moved else "",
            }
        )
    table = Table(title=section)
    columns = ("what", "device ms (middle half)", "host ms", f"ratio to {base} (middle half)", "GB/s", "of the ceiling")
    for column in columns:
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        table.add_row(
            str(row["what"]),
            f"{row['device_ms']:.3f} ({row['device_ms_low']:.3f} to {row['device_ms_high']:.3f})",
            f"{row['host_ms']:.3f}",
            f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
            str(row["GB_per_s"]),
            f"{row['share_of_ceiling']:.0%}" if row["share_of_ceiling"] != "" else "",
        )
    CONSOLE.print(table)
    return rows


def weights(model: str, layers: int, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[int]]:
    """Tensors of the coupled weights of a model and the dim of each that is scored."""
    shapes = MODELS[model].layer * layers
    return [torch.randn(shape, device=device, dtype=dtype) * 1e-2 for shape, _ in shapes], [dim for _, dim in shapes]


def places(x: list[Tensor], dims: list[int]) -> tuple[list[int], int]:
    sizes = [tensor.shape[dim] for tensor, dim in zip(x, dims)]
    return [sum(sizes[:k]) for k in range(len(sizes))], sum(sizes)


def bench_sums(model: str, layers: int, dtype: torch.dtype, options: argparse.Namespace) -> list[dict]:
    device = torch.device(options.device)
    grads, dims = weights(model, layers, dtype, device)
    offsets, width = places(grads, dims)
    numbers = list(range(len(grads)))
    one, two = torch.zeros(1, width, device=device), torch.zeros(2, width, device=device)
    size = sum(g.numel() for g in grads) * dtype.itemsize
    flat = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    rows = list(zip(grads, dims))
    calls: dict[str, Call] = {
        OURS: lambda: add_slice_sums(one, grads, [], numbers, dims, offsets),
        "ours, with (w*g)^2": lambda: add_slice_sums(two, grads, grads[::-1][::-1], numbers, dims, offsets),
        "read ceiling (sum of as many bytes)": lambda: flat.sum(),
        "foreach_norm": lambda: torch._foreach_norm(grads, 2, dtype=torch.float32),
        "vector_norm per tensor": lambda: [
            torch.linalg.vector_norm(g, dim=1 - d, dtype=torch.float32) for g, d in rows
        ],
        "naive eager": lambda: [(g.float() ** 2).sum(1 - d) for g, d in rows],
    }
    moved = dict.fromkeys(calls, size) | {"ours, with (w*g)^2": 2 * size}
    if model in options.compiled:
        together = torch.compile(lambda tensors: [(g.float() ** 2).sum(1 - d) for g, d in zip(tensors, dims)])
        calls["torch.compile of the list"], moved["torch.compile of the list"] = lambda: together(grads), size
    spare = 0
    if device.type == "cuda":
        spare = torch.cuda.mem_get_info()[0]
    moments = [torch.rand(g.shape, device=device) for g in grads] if device.type != "cuda" or spare > size * 4 else []
    if moments:
        calls["exp_avg_sq, summed per tensor"] = lambda: [v.sum(1 - d) for v, d in zip(moments, dims)]
        moved["exp_avg_sq, summed per tensor"] = size * 4 // dtype.itemsize
    times = side_by_side(calls, options.rounds, device)
    title = f"slice sums, {model}, {layers} layers, {_name(dtype)}, {size / dtype.itemsize / 1e6:.0f} M entries"
    return summarise(title, times, moved, OURS, "read ceiling (sum of as many bytes)")


def bench_adamw(model: str, layers: int, options: argparse.Namespace) -> list[dict]:
    device = torch.device(options.device)
    tensors, dims = weights(model, layers, torch.float32, device)
    offsets, width = places(tensors, dims)
    numbers = list(range(len(tensors)))
    out = torch.zeros(1, width, device=device)
    parameters = [torch.nn.Parameter(tensor) for tensor in tensors]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    grads = [p.grad for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    optimizer.step()
    first = [optimizer.state[p]["exp_avg"] for p in parameters]
    second = [optimizer.state[p]["exp_avg_sq"] for p in parameters]
    data = [p.data for p in parameters]

    def then(call: Call) -> Call:
        return lambda: (optimizer.step(), call())

    alone = "torch's fused AdamW alone"
    calls: dict[str, Call] = {
        alone: optimizer.step,
        "and slice sums of ours": then(lambda: add_slice_sums(out, grads, [], numbers, dims, offsets)),
        "and foreach_norm": then(lambda: torch._foreach_norm(grads, 2)),
        "and vector_norm per tensor": then(
            lambda: [torch.linalg.vector_norm(g, dim=1 - d) for g, d in zip(grads, dims)]
        ),
        "and naive": then(lambda: [(g.float() ** 2).sum(1 - d) for g, d in zip(grads, dims)]),
        "and exp_avg_sq, summed per tensor": then(lambda: [v.sum(1 - d) for v, d in zip(second, dims)]),
        "ours, sums fused into AdamW": lambda: adamw_slice_sums(
            out, data, grads, first, second, numbers, dims, offsets, step=2, lr=1e-6
        ),
    }
    moved = dict.fromkeys((alone, "ours, sums fused into AdamW"), 28 * sum(p.numel() for p in parameters))
    times = side_by_side(calls, options.rounds, device)
    return summarise(f"optimizer, {model}, {layers} layers, fp32", times, moved, alone, alone)


def bench_compaction(model: str, layers: int, dtype: torch.dtype, options: argparse.Namespace) -> list[dict]:
    device = torch.device(options.device)
    tensors, dims = weights(model, layers, dtype, device)
    numbers = list(range(len(tensors)))
    halves = {size: torch.randperm(size)[: size // 2].sort().values for size in {s for t in tensors for s in t.shape}}
    indices = [halves[tensor.shape[dim]] for tensor, dim in zip(tensors, dims)]
    on_device = [index.to(device) for index in indices]
    size = sum(tensor.numel() for tensor in tensors) * dtype.itemsize
    source = torch.randn(size // 2 // 4, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {
        OURS: lambda: compact(tensors, indices, numbers, dims),
        "index_select per tensor": lambda: [t.index_select(d, i) for t, d, i in zip(tensors, dims, on_device)],
        "copy ceiling (of what is kept)": lambda: target.copy_(source),
    }
    if device.type == "cuda":
        _, launches = prepared(tensors, indices, numbers, dims)
        calls["ours, tables included"] = calls[OURS]
        calls[OURS] = lambda: [launch() for launch in launches]
    times = side_by_side(calls, options.rounds, device)
    title = f"compaction to half, {model}, {layers} layers, {_name(dtype)}"
    return summarise(title, times, dict.fromkeys(calls, size), OURS, "copy ceiling (of what is kept)")


def bench_training(options: argparse.Namespace) -> list[dict]:
    """A bf16 step of a 1B model with fused AdamW, and our pass over its gradients in the same rounds."""
    from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops

    tolerate_missing_torchvision_ops()
    from transformers import LlamaConfig, LlamaForCausalLM

    device = torch.device("cuda")
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        use_cache=False,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    tokens = torch.randint(0, config.vocab_size, (4, 1024), device=device)
    scored = [
        (parameter, 1 if name.split(".")[-2] in ("o_proj", "down_proj") else 0)
        for name, parameter in model.named_parameters()
        if "_proj" in name
    ]
    dims = [dim for _, dim in scored]
    offsets, width = places([p for p, _ in scored], dims)
    out, numbers = torch.zeros(1, width, device=device), list(range(len(dims)))

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    step()
    calls: dict[str, Call] = {
        "training step": step,
        "slice sums of ours": lambda: add_slice_sums(out, [p.grad for p, _ in scored], [], numbers, dims, offsets),
    }
    times = side_by_side(calls, options.rounds, device)
    return summarise("training, LLaMA 1B, bf16, 4 x 1024 tokens", times, {}, "training step", "")


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def goals(rows: list[dict]) -> None:
    """Say of each goal whether this run meets it."""

    def find(section: str, what: str, column: str) -> float | None:
        found = [row for row in rows if row["section"].startswith(section) and row["what"] == what]
        return float(found[0][column]) if found else None

    bf16 = next(
        (r["section"] for r in rows if r["section"].startswith("slice sums, 1B") and "bf16" in r["section"]), "-"
    )
    moved = next((row["section"] for row in rows if row["section"].startswith("compaction to half, 1B")), "-")
    checks: tuple[tuple[str, float | None, Callable[[float], bool]], ...] = (
        (
            "slice sums, share of the read ceiling, at least 0.90",
            find(bf16, OURS, "share_of_ceiling"),
            lambda v: v >= 0.9,
        ),
        (
            "slice sums, share of a training step, at most 0.01",
            find("training", "slice sums of ours", "ratio"),
            lambda v: v <= 0.01,
        ),
        ("naive eager, times ours, at least 5", find(bf16, "naive eager", "ratio"), lambda v: v >= 5),
        ("foreach_norm, times ours, at least 1", find(bf16, "foreach_norm", "ratio"), lambda v: v >= 1),
        (
            "AdamW with sums, times torch's alone, at most 1.03",
            find("optimizer, 1B", "ours, sums fused into AdamW", "ratio"),
            lambda v: v <= 1.03,
        ),
        (
            "compaction, share of the copy ceiling, at least 0.80",
            find(moved, OURS, "share_of_ceiling"),
            lambda v: v >= 0.8,
        ),
    )
    for text, value, met in checks:
        verdict = "not measured" if value is None else f"{value:.3f}, {'met' if met(value) else 'NOT met'}"
        CONSOLE.print(f"{text}: {verdict}")


def plot(rows: list[dict], path: str) -> None:
    """Device time of every candidate as a multiple of its section's base."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sections = list(dict.fromkeys(row["section"] for row in rows))
    figure, axes = plt.subplots(len(sections), 1, figsize=(9, 1 + 2.2 * len(sections)), squeeze=False)
    for axis, section in zip(axes[:, 0], sections):
        mine = [row for row in rows if row["section"] == section][::-1]
        low = [row["device_ms"] - row["device_ms_low"] for row in mine]
        high = [row["device_ms_high"] - row["device_ms"] for row in mine]
        colours = ["tab:orange" if row["what"].startswith(OURS) else "tab:blue" for row in mine]
        axis.barh([row["what"] for row in mine], [row["device_ms"] for row in mine], xerr=[low, high], color=colours)
        axis.set_title(section, fontsize=9)
        axis.set_xlabel("ms", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def sections(options: argparse.Namespace) -> Iterator[Callable[[], list[dict]]]:
    """Iterate over the measurements, the most important first."""
    cuda = options.device == "cuda"
    dtypes = (torch.bfloat16, torch.float32)
    for model in options.models:
        layers = MODELS[model].layers if cuda else min(MODELS[model].layers, 4)
        for dtype in dtypes if model != "8B" else dtypes[:1]:
            yield lambda model=model, layers=layers, dtype=dtype: bench_sums(model, layers, dtype, options)
        if model != "8B":
            yield lambda model=model, layers=layers: bench_adamw(model, layers, options)
        dtype = torch.bfloat16 if cuda else torch.float32
        yield lambda model=model, layers=layers, dtype=dtype: bench_compaction(model, layers, dtype, options)
        if model == "1B" and cuda:
            yield lambda: bench_training(options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--models", type=lambda text: text.split(","), default=None)
    parser.add_argument("--compiled", type=lambda text: text.split(","), default=["125M", "1B"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=380, help="no section begins after this long")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU here")
    options.models = options.models or (["1B", "125M", "8B"] if options.device == "cuda" else ["125M"])
    torch.manual_seed(0)
    began, rows, left, name = time.perf_counter(), [], 0, f"kernels_{options.device}"
    for section in sections(options):
        if time.perf_counter() - began > options.seconds:
            left += 1
            continue
        rows += section()
        write_csv(name, rows)  # after each, so that what was measured is kept whatever comes
        if options.device == "cuda":
            torch.cuda.empty_cache()
    plot(rows, str(RESULTS / f"{name}.png"))
    if options.device == "cuda":
        goals(rows)
    CONSOLE.print(f"{machine()}; {time.perf_counter() - began:.0f} s; written to bench/results/{name}.csv and .png")
    if left:
        CONSOLE.print(f"{left} sections left out: the time was up. --models and --seconds choose")


if __name__ == "__main__":
    main()
