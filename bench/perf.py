"""Times that people wait, beside the least that they could be: imports, captures, calls, steps and explanations.

PYTHONPATH=bench python bench/perf.py [PART ...] [--rounds 5]

Each row is measured beside its baseline, in turns, in one run: CPU seconds of one thread, so that other load of the
machine counts as little as can be. Baselines are plain torch (an empty program, `import torch`, `torch.export` of the
whole model at the sizes of the call, the plain model), a plain model of the same class *built* at the sizes that are
left, and Torch-Pruning's dependency graph where it is installed (pip install torch-pruning==1.6.1).
The ratio is taken within each round; low and high are its quartiles.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from machine import RESULTS, machine, write_csv
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import ecospa_fx
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops
from ecospa_fx.model.lookup import regions_of

Call = Callable[[], float]  # runs once, and returns its CPU seconds
Row = tuple[str, str, Call, Call, float | None]  # what, baseline, ours, the baseline's, the goal in seconds of ours


def seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    began = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - began) / repeats


def program(text: str) -> float:
    """CPU seconds of a Python program, its start included."""
    process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, text
    return usage.ru_utime + usage.ru_stime


def starts() -> Iterator[Row]:
    helping = "import sys; sys.argv[1:] = ['--help']; from ecospa_fx.cli import main; main()"
    every = "import ecospa_fx; [getattr(ecospa_fx, name) for name in ecospa_fx.__all__]"
    beyond = lambda text: program(text) - program("import torch")  # noqa: E731
    yield "ecospa-fx --help", "python -c pass", lambda: program(helping), lambda: program("pass"), 0.2
    yield (
        "import ecospa_fx, beyond torch",
        "import torch",
        lambda: max(0.0, beyond("import torch, ecospa_fx")),
        lambda: program("import torch"),
        0.5,
    )
    yield (
        "import of every public name, beyond torch",
        "first torch.export, beyond torch",
        lambda: beyond(every),
        lambda: beyond("import torch; torch.export.export(torch.nn.ReLU(), (torch.ones(2),))"),
        None,
    )


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(0))


def llama(**fields: Any) -> nn.Module:
    import transformers as tf

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2} | fields
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False} | fields
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**sizes, **heads})).eval()


def gpt2() -> nn.Module:
    import transformers as tf

    sizes = {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=128, use_cache=False, **sizes)).eval()


def t5() -> nn.Module:
    import transformers as tf

    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=128, use_cache=False, **sizes)).eval()


def image(name: str, **fields: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10, **fields).eval()

    return make


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))


# Model -> how to make it, a call, and the goal in seconds: a third of what the first version took.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], float]] = {
    "MLP": (mlp, {"input": torch.randn(4, 64)}, 0.02),
    "GPT-2": (gpt2, {"input_ids": tokens(2, 16)}, 0.11),
    "LLaMA": (llama, {"input_ids": tokens(2, 16)}, 0.14),
    "T5": (t5, {"input_ids": tokens(2, 16), "decoder_input_ids": tokens(2, 16)}, 0.77),
    "ResNet-18": (image("resnet18"), {"x": torch.randn(2, 3, 64, 64)}, 0.33),
    "ViT-tiny": (image("vit_tiny_patch16_224", img_size=64), {"x": torch.randn(2, 3, 64, 64)}, 0.15),
    "Swin-tiny": (image("swin_tiny_patch4_window7_224"), {"x": torch.randn(1, 3, 224, 224)}, 2.0),
}


def compiled(make: Callable[[], nn.Module], call: dict[str, Tensor], **how: Any) -> float:
    model = make()
    return seconds(lambda: ecospa_fx.compile(model, example_inputs=(), example_kwargs=call, **how))


def captures() -> Iterator[Row]:
    for name, (make, call, goal) in MODELS.items():
        arguments = (compiled, make, call)

        def exported(make: Any = make, call: Any = call) -> float:
            model = make()
            return seconds(lambda: torch.export.export(model, (), call))

        yield f"compile {name}", "torch.export, static", _later(*arguments), exported, goal
        pruned = _torch_pruning(make, call)
        if pruned is not None:
            yield f"compile {name}", "Torch-Pruning", _later(*arguments), pruned, goal
    make, call, _ = MODELS["LLaMA"]
    by_root = _later(compiled, make, call, regions="root")
    in_python = _later(compiled, make, call, regions="root", execution="module")
    yield "compile LLaMA by root for its own Python", "for generated code", in_python, by_root, 1.0


def _later(function: Callable[..., float], *args: Any, **kwargs: Any) -> Call:
    return lambda: function(*args, **kwargs)


def _torch_pruning(make: Callable[[], nn.Module], call: dict[str, Tensor]) -> Call | None:
    """Its search for dependencies; None where it is not installed, or fails on the model."""
    try:
        import torch_pruning as tp
    except ImportError:
        return None

    def first(output: Any) -> Tensor:
        return output if isinstance(output, Tensor) else next(iter(output.values()))

    def build() -> float:
        model, inputs = make(), call if len(call) > 1 or "input_ids" in call else next(iter(call.values()))
        graph = tp.DependencyGraph()
        return seconds(lambda: graph.build_dependency(model, inputs, output_transform=first, verbose=False))

    try:
        build()
    except Exception as error:  # of any kind: it may not know the model's ops
        print(f"Torch-Pruning: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return None
    return build


class Perceptron(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def stack(blocks: int, width: int = 8, hidden: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Perceptron(width, hidden) for _ in range(blocks)))


def region_calls() -> Iterator[Row]:
    """A call of a region, in models of few and of many: per region, in the order of a forward."""
    x = torch.randn(2, 8)
    for blocks in (2, 32, 128):
        plain = stack(blocks)
        model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(x,))
        assert len(regions_of(model)) == blocks
        yield _side_by_side(f"region's call, {blocks} blocks", "plain", model, plain, (x,), {}, blocks)
    plain, ids = gpt2(), tokens(2, 16)
    for regions in ("root", "blocks"):
        model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(ids,), regions=regions)
        yield f"token with a cache, GPT-2 by {regions}", "plain", _tokens(model, ids), _tokens(plain, ids), None


def _tokens(model: nn.Module, ids: Tensor, count: int = 20) -> Call:
    def run() -> float:
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            return seconds(lambda: model(ids[:, :1], cache=cache, use_cache=True), count)

    return run


def _forward(model: nn.Module, args: Any, kwargs: Any, share: int = 1, repeats: int = 20) -> Call:
    def run() -> float:
        with torch.no_grad():
            return seconds(lambda: model(*args, **kwargs), repeats) / share

    return run


def _side_by_side(what: str, beside: str, model: Any, plain: Any, args: Any, kwargs: Any, share: int = 1) -> Row:
    return what, beside, _forward(model, args, kwargs, share), _forward(plain, args, kwargs, share), None


def steps() -> Iterator[Row]:
    """Forward and backward, before and after half of the hidden units are gone."""
    x, ids = torch.randn(64, 256), tokens(2, 64)

    def step(model: nn.Module, arguments: Any, loss: Callable[[Any], Tensor]) -> Call:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            loss(model(**arguments)).backward()

        return lambda: seconds(run)

    perceptrons = (lambda hidden: stack(4, 256, hidden), 1024, {"input": x}, lambda out: out.square().mean())
    language = (
        lambda hidden: llama(hidden_size=256, intermediate_size=hidden),
        768,
        {"input_ids": ids, "labels": ids},
        lambda out: out.loss,
    )
    for name, (make, hidden, arguments, loss) in (("perceptrons", perceptrons), ("LLaMA", language)):
        for regions in ("root", "blocks"):
            model = ecospa_fx.compile(make(hidden), example_kwargs=arguments, regions=regions)
            mine, what = step(model, arguments, loss), f"step of {name} by {regions}"
            yield what, "plain", mine, step(make(hidden), arguments, loss), None
            units = [c for c in ecospa_fx.couplings(model) if c.kind in ("ffn", "glu") and c.size == hidden]
            ecospa_fx.shrink(model, {c: torch.arange(0, hidden, 2) for c in units})
            yield f"{what}, halved", "plain, built so", mine, step(make(hidden // 2), arguments, loss), None


def scoring() -> Iterator[Row]:
    """A training step, AdamW included, that gathers scores, in small batches."""
    ids = tokens(4, 64)
    for name, settings in (("paper", {}), ("adaptive", {"policy": "adaptive"})):
        plain = llama(hidden_size=256, intermediate_size=768)
        model = ecospa_fx.compile(copy.deepcopy(plain), example_kwargs={"input_ids": ids, "labels": ids})
        optimizers = [torch.optim.AdamW(each.parameters(), 1e-4) for each in (model, plain)]
        trainer = ecospa_fx.EcoSpaTrainer(
            model, optimizers[0], target=0.5, start=10_000, interval=10_000, end=100_000, **settings
        )

        def step(model: nn.Module, optimizer: Any, then: Callable[[Tensor], Any]) -> Call:
            def run() -> None:
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                then(loss)
                optimizer.zero_grad()

            return lambda: seconds(run)

        mine = step(model, optimizers[0], lambda loss, trainer=trainer: trainer.step(loss=loss))
        yield (
            f"step of 256 tokens with scores, {name}",
            "plain",
            mine,
            step(plain, optimizers[1], lambda loss: None),
            None,
        )


def decisions() -> Iterator[Row]:
    """A sparsification step of the adaptive policy in a model of the size of SmolLM2-135M, beside a training step."""
    ids = tokens(2, 256)
    fields = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    model = llama(**fields, num_key_value_heads=3)
    ecospa_fx.compile(model, example_kwargs={"input_ids": ids, "labels": ids})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, policy="adaptive", target=0.8, start=2, interval=2, end=40)
    steps: list[float] = []

    def until_decided() -> float:
        decided = len(trainer.history)
        while len(trainer.history) == decided:
            began = time.process_time()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            steps.append(time.process_time() - began)
            began = time.process_time()
            trainer.step(loss=loss)
            taken = time.process_time() - began
            optimizer.zero_grad()
        return taken

    yield "adaptive decision, 30 layers of 576/1536", "step of 512 tokens", until_decided, lambda: steps[-1], None


def loads() -> Iterator[Row]:
    """A shrunk model from its save, beside the whole one as transformers loads it."""
    from transformers import LlamaForCausalLM

    fields = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    model, ids = llama(**fields, num_key_value_heads=3, vocab_size=49152), tokens(2, 16)
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(f"{place}/plain")
        ecospa_fx.compile(model, example_inputs=(ids,))
        ecospa_fx.shrink(model, {c: torch.arange(768) for c in ecospa_fx.couplings(model) if c.kind == "glu"})
        ecospa_fx.save(model, f"{place}/shrunk")
        yield (
            "load of 163 million parameters, 123 left",
            "from_pretrained, whole",
            lambda: seconds(lambda: ecospa_fx.load(f"{place}/shrunk")),
            lambda: seconds(lambda: LlamaForCausalLM.from_pretrained(f"{place}/plain")),
            0.9,
        )


def inductor() -> Iterator[Row]:
    """Forward and backward under torch.compile, halved, beside a plain model built at those sizes."""
    x = torch.randn(64, 256)
    for regions in ("root", "blocks"):
        model = ecospa_fx.compile(stack(4, 256, 1024), example_inputs=(x,), regions=regions)
        ecospa_fx.shrink(model, {c: torch.arange(0, 1024, 2) for c in ecospa_fx.couplings(model) if c.size == 1024})

        def step(model: nn.Module) -> Call:
            compiled = torch.compile(model)

            def run() -> None:
                model.zero_grad(set_to_none=True)
                compiled(x).square().mean().backward()

            return lambda: seconds(run)

        what = f"step of perceptrons by {regions}, inductor, halved"
        yield what, "plain, built so, inductor", step(model), step(stack(4, 256, 512)), None


def explanations() -> Iterator[Row]:
    """LLaMA-70B on the meta device, beside making it there."""
    fields = {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    }  # fmt: skip

    def made() -> nn.Module:
        with torch.device("meta"):
            return llama(**fields)

    model, ids = made(), torch.zeros(2, 16, dtype=torch.long, device="meta")
    explain = lambda: seconds(lambda: ecospa_fx.explain(model, example_inputs=(ids,)))  # noqa: E731
    yield "explain LLaMA-70B on meta", "to make it there", explain, lambda: seconds(made), 2.0


EVERY = (starts, captures, region_calls, steps, scoring, decisions, loads, inductor, explanations)
PARTS = {part.__name__: part for part in EVERY}


def measured(row: Row, rounds: int) -> dict[str, object]:
    what, beside, ours, theirs, goal = row
    ours(), theirs()  # what only the first call does
    mine, base = [], []
    for i in range(rounds):
        for found, call in ((mine, ours), (base, theirs))[:: 1 if i % 2 else -1]:
            found.append(call())
    ratios = [a / b for a, b in zip(mine, base, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else (*ratios, 0.0, *ratios)
    return {
        "what": what, "seconds": f"{statistics.median(mine):.3g}", "goal": "" if goal is None else goal,
        "baseline": beside, "baseline_seconds": f"{statistics.median(base):.3g}",
        "ratio": f"{statistics.median(ratios):.3g}", "low": f"{low:.3g}", "high": f"{high:.3g}", "rounds": rounds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", help=f"{', '.join(PARTS)}; without any, all; the rows of others stay in the file"
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tolerate_missing_torchvision_ops()
    rows = []
    for part in options.parts or PARTS:
        for row in PARTS[part]():
            brief = row[0].startswith(("region's", "token", "step"))  # milliseconds
            found = measured(row, 8 * options.rounds if brief else options.rounds)
            rows.append({"part": part, **found, **versions(), "measured": date.today().isoformat()})
            print(*(f"{key}={value}" for key, value in found.items()), flush=True)
    table = Table(title="CPU seconds on one thread")
    for name in found:
        table.add_column(name)
    for each in rows:
        table.add_row(*(str(each[name]) for name in found))
    Console(width=160).print(table)
    print(write_csv("perf", [*rows, *others(options.parts or PARTS)]))


def others(parts: Collection[str]) -> list[dict[str, str]]:
    """The rows of earlier runs of other parts, by the same machine."""
    path = RESULTS / "perf.csv"
    if not path.exists():
        return []
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["part"] not in parts and row["machine"] == machine()]
    return [{key: value for key, value in row.items() if key not in ("machine", "date")} for row in rows]


def versions() -> dict[str, str]:
    found = {}
    for name in ("transformers", "timm", "torch-pruning"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


if __name__ == "__main__":
    main()
