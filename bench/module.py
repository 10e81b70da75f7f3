"""Execution "module" over many models: the trainer shrinks them to 0.6 of the prunable parameters, in their own Python.

PYTHONPATH=bench python bench/module.py [PATTERN ...] [--seconds 300] [--report]

25 causal language models, 10 encoders, 5 encoder-decoders and 15 timm families, small and with random weights, in
float64. Each is trained for six steps, in which it shrinks, and then checked: it returns the results of the original
with removed entries set to zero (where norms run over what is left, those of its graphs), gradients flow, `generate`
gives the same with and without a cache, and a new process loads the save and gives equal results.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, write_csv
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops

tolerate_missing_torchvision_ops()

import ecospa_fx  # noqa: E402
from ecospa_fx.model.full_size import unshrunk  # noqa: E402
from ecospa_fx.model.lookup import regions_of  # noqa: E402
from ecospa_fx.passes.capture.compare_eager import relative_error  # noqa: E402
from ecospa_fx.passes.capture.record import record  # noqa: E402
from ecospa_fx.passes.follow import trial  # noqa: E402
from ecospa_fx.passes.graph.tensors import named_tensors  # noqa: E402

Call = dict[str, Any]

CAUSAL = (
    "gpt2", "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "phi", "phi3",
    "gpt_neox", "gptj", "gpt_neo", "opt", "bloom", "olmo", "stablelm", "starcoder2", "cohere", "granite", "mpt",
    "smollm3", "mamba",
)  # fmt: skip
ENCODERS = (
    "bert", "roberta", "distilbert", "electra", "albert", "deberta-v2", "mpnet", "camembert", "xlm-roberta",
    "modernbert",
)  # fmt: skip
PAIRS = ("t5", "bart", "pegasus", "mbart", "m2m_100")
TIMM = (
    "vision_transformer", "deit", "beit", "eva", "swin_transformer", "cait", "mlp_mixer", "convnext", "resnet",
    "regnet", "efficientnet", "mobilenetv3", "densenet", "davit", "metaformer",
)  # fmt: skip
NAMES = (
    *(f"causal/{kind}" for kind in CAUSAL),
    *(f"encoder/{kind}" for kind in ENCODERS),
    *(f"pair/{kind}" for kind in PAIRS),
    *(f"timm/{family}" for family in TIMM),
)
WIDER: dict[str, Call] = {
    "t5": {"d_ff": 96}, "gpt_neox": {"rotary_pct": 0.5}, "stablelm": {"partial_rotary_factor": 0.5},
}  # fmt: skip
"""Where a size of the zoo's smallest is that of another thing, too, or one pair of dims is all that turns."""
VARIANTS = {"mlp_mixer": ("mixer_s32_224", {})}
"""Where the zoo's smallest can lose nothing: its gates normalise what they gate."""
CLOSE = 1e-5  # a tolerance for norms that compute in float32
GRAPHS = "as graphs"  # what stands for an error where zeros are no judge, and each region is as its graph
TARGET, NEW = 0.6, 6  # of the prunable parameters; tokens to generate


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], Call]:
    """A model in float64 and eval mode, and a call without a cache.

    Weights are such that scores differ: those of a model that has just been made are next to nothing.
    """
    import transformers
    import transformers.integrations.moe
    from modelzoo.build import build as of_the_zoo
    from modelzoo.overrides import CONFIGS
    from modelzoo.overrides import TIMM as TIMM_MODELS
    from modelzoo.shrunken import small_config
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers.logging.set_verbosity_error()
    sort, _, kind = name.partition("/")
    torch.manual_seed(0)
    if sort == "timm":
        TIMM_MODELS.update(VARIANTS)
        model, args, kwargs = of_the_zoo(name)
    elif sort == "encoder":
        model, args, kwargs = of_the_zoo(f"transformers/{kind}")
    else:
        # The kernel of grouped products takes no float64 in eager; what stands in for it does.
        transformers.integrations.moe._can_use_grouped_mm = lambda *_: False
        auto = transformers.AutoModelForCausalLM if sort == "causal" else transformers.AutoModelForSeq2SeqLM
        config = small_config(CONFIG_MAPPING[kind], {**(CONFIGS.get(kind) or {}), **WIDER.get(kind, {})})
        model = auto.from_config(config)
        ids = torch.randint(5, 60, (2, 9))
        args, kwargs = (), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        if sort == "pair":
            kwargs |= {"decoder_input_ids": ids[:, :5]}
    model = model.double().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.copy_(noise / max(1, parameter.numel() // max(parameter.shape)) ** 0.5)
    args, kwargs = torch.utils._pytree.tree_map_only(Tensor, _double, (args, kwargs))
    return model, args, kwargs


def _padded(kwargs: Call) -> Call:
    """With padding. Without any, some code takes a path on which a number of heads is of no account."""
    if "use_cache" not in kwargs:
        return {}
    mask = kwargs["attention_mask"].clone()
    mask[0, :2] = 0
    return {"attention_mask": mask}


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def first_tensor(result: Any) -> Tensor:
    """Return the first tensor in the result of a call."""
    return next(leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor))


def measure(name: str, directory: str) -> dict[str, Any]:
    """A row about one model."""
    row: dict[str, Any] = {"name": name}
    model, args, kwargs = build(name)
    twin = copy.deepcopy(model)
    start = time.perf_counter()
    ecospa_fx.compile(model, example_inputs=args, example_kwargs=kwargs | _padded(kwargs), execution="module")
    row["seconds"] = round(time.perf_counter() - start, 1)
    everything = ecospa_fx.explain(twin, example_inputs=args, example_kwargs=kwargs | _padded(kwargs))
    row["couplings"] = f"{len(ecospa_fx.couplings(model))} of {len(everything.couplings)}"
    row["kinds"] = " ".join(sorted({coupling.kind for coupling in ecospa_fx.couplings(model)}))
    row["attributes"] = len({change for c in ecospa_fx.couplings(model) for change in c.changes})
    row["before"] = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    trainer = ecospa_fx.EcoSpaTrainer(
        model, optimizer, target=TARGET, among="prunable", start=2, end=4, interval=1, min_keep=1
    )
    for _ in range(6):
        loss = first_tensor(model(*args, **kwargs)).pow(2).mean()
        loss.backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    row["after"] = sum(p.numel() for p in model.parameters())
    row["target"] = "reached" if trainer.done else "not reached"
    with torch.no_grad():
        out = first_tensor(model(*args, **kwargs))
    error = _against_masked(model, twin, args, kwargs, out)
    row["forward"] = f"{error:.0e}" if error < CLOSE else _against_graphs(model, args, kwargs) or GRAPHS
    first_tensor(model(*args, **kwargs)).pow(2).mean().backward()
    finite = all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    row["backward"] = "finite" if finite and any(p.grad is not None for p in model.parameters()) else "NOT finite"
    row["generate"] = _generates(model, name, kwargs)
    ecospa_fx.save(model, Path(directory) / name)
    torch.save({"out": out}, Path(directory) / name / "out.pt")
    return row


def _against_masked(model: nn.Module, twin: nn.Module, args: Any, kwargs: Call, out: Tensor) -> float:
    """Compute the difference from the original model with removed entries set to zero."""
    plan, held = ecospa_fx.plan(model), named_tensors(model)
    with torch.no_grad():
        for name, tensor in named_tensors(twin).items():
            value = held[name].detach()
            tensor.copy_(unshrunk(value, plan, name) if name in plan.original_shapes else value)
        return relative_error(first_tensor(twin(*args, **kwargs)), out)


def _against_graphs(model: nn.Module, args: Any, kwargs: Call) -> str | None:
    """Compare with the graphs at the same sizes: zeros are no judge where a norm runs over what is left."""
    regions = regions_of(model)
    for name, call in record(model, args, kwargs, set(regions)).items():
        module = model.get_submodule(name)
        program, _ = regions[name].program_for(module, *call)
        with torch.no_grad():
            difference = trial.difference(module, program, type(module).forward, *call)
        if difference is not None:
            return f"{name} {difference}"
    return None


def _generates(model: nn.Module, name: str, kwargs: Call) -> str:
    if name.startswith(("encoder/", "timm/")):
        return ""
    given = {key: kwargs[key] for key in ("input_ids", "attention_mask")}
    if name.startswith("pair/"):
        given["decoder_start_token_id"] = 0
    more: Call = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    ways = {"greedy": {}, "beams": {"num_beams": 3}}
    said = []
    for way, options in ways.items():
        ids = [model.generate(**given, **more, **options, use_cache=cache) for cache in (True, False)]
        said.append(way if torch.equal(*ids) else f"{way} DIFFER")
    return " ".join(said)


def reloaded(directory: str, names: Sequence[str]) -> None:
    """Load every saved model and print how far its results are from those before, as JSON lines."""
    for name in names:
        try:
            model, args, kwargs = build(name)
            factory = (lambda made=model: made) if name.startswith("timm/") else None
            loaded = ecospa_fx.load(Path(directory) / name, factory)
            with torch.no_grad():
                out = first_tensor(loaded(*args, **kwargs))
            expected = torch.load(Path(directory) / name / "out.pt")["out"]
            print(json.dumps({"name": name, "reload": f"{relative_error(expected, out):.0e}"}), flush=True)
        except Exception as error:
            print(json.dumps({"name": name, "reload": f"{type(error).__name__}: {error}"[:200]}), flush=True)


def _child(name: str, directory: str, end: Any) -> None:
    torch.set_num_threads(1)
    try:
        end.send(measure(name, directory))
    except Exception as error:
        end.send({"name": name, "error": f"{type(error).__name__}: {error}"[:300]})


def limited(name: str, directory: str, seconds: float) -> dict[str, Any]:
    """`measure` in a process of its own."""
    context = multiprocessing.get_context("fork")
    here, end = context.Pipe()
    child = context.Process(target=_child, args=(name, directory, end))
    child.start()
    row = here.recv() if here.poll(seconds) else {"name": name, "error": f"took over {seconds:.0f} s"}
    child.kill()
    child.join()
    return row


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table."""
    shown = ("name", "couplings", "kinds", "before", "after", "forward", "backward", "generate", "reload")
    table = Table(*shown, "error", box=None)
    for row in rows:
        table.add_row(*(str(row.get(key, "")) for key in shown), row.get("error", ""))
    Console(width=170).print(table)
    fine = sum(is_fine(row) for row in rows)
    print("{} of {} couplings of graph execution are followed by the models' own Python".format(*followed(rows)))
    print(f"{fine} of {len(rows)} to {TARGET} of what is prunable, equal, trained on, generated with and reloaded")


def is_fine(row: Mapping[str, Any]) -> bool:
    """Check that a row has no failure."""
    if row.get("error") or row.get("target") != "reached" or row.get("backward") != "finite":
        return False
    try:
        exact = (row["forward"] == GRAPHS or float(row["forward"]) < CLOSE) and float(row["reload"]) < 1e-12
    except (KeyError, ValueError):
        return False
    return exact and "DIFFER" not in row.get("generate", "")


def followed(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """How many of the couplings that graph execution has the Python of these models follows."""
    counts = [re.fullmatch(r"(\d+) of (\d+)", row.get("couplings") or "") for row in rows]
    pairs = [(int(found[1]), int(found[2])) for found in counts if found]
    return sum(mine for mine, _ in pairs), sum(all_ for _, all_ in pairs)


COLUMNS = (
    "name", "couplings", "kinds", "attributes", "before", "after", "target", "forward", "backward", "generate",
    "reload", "seconds", "error",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    parser.add_argument("--seconds", type=float, default=300, help="limit per model")
    parser.add_argument("--report", action="store_true", help="only print what the CSV has")
    parser.add_argument("--reload", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = [name for name in NAMES if any(re.fullmatch(p, name) for p in options.patterns or [".*"])]
    if options.reload:
        reloaded(options.reload, names)
        return
    path = RESULTS / "module.csv"
    rows: dict[str, dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            rows = {row["name"]: {key: row[key] for key in COLUMNS} for row in csv.DictReader(file)}
    if not options.report:
        with tempfile.TemporaryDirectory() as directory:
            for name in names:
                rows[name] = limited(name, directory, options.seconds)
                print(json.dumps(rows[name]), flush=True)
            saved = [name for name in names if (Path(directory) / name / "out.pt").exists()]
            patterns = [re.escape(name) for name in saved] or ["none"]
            command = [sys.executable, __file__, *patterns, "--reload", directory]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
            for line in output.splitlines():
                if line.startswith("{"):
                    said = json.loads(line)
                    rows[said["name"]]["reload"] = said["reload"]
        ordered = [{key: rows[name].get(key, "") for key in COLUMNS} for name in NAMES if name in rows]
        write_csv("module", ordered)
    report([rows[name] for name in NAMES if name in rows])


if __name__ == "__main__":
    main()
