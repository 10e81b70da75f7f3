"""Peers: ecospa_fx and Torch-Pruning side by side, with success, exactness, times and removed slices.

pip install torch-pruning==1.6.1
PYTHONPATH=bench python bench/peers.py [PATTERN ...] [--left 0.7]

Both remove rows and columns of the smallest norms, once, until 0.7 of a model's parameters are left. Then both get the
same checks: the shrunk model runs, and equals the original one with removed entries set to zero (float64, eval mode).
The removed rows and columns are found by the values of the weights, which are distinct random numbers.

Torch-Pruning is set up as its own examples do it for each kind of model: the output layer in `ignored_layers`,
`num_heads` for attention, head sizes written into the modules afterwards, timm's attention with the forward of
`prune_timm_vit.py`, group magnitude importance, defaults for the rest. It takes a ratio of channels and not of
parameters, so ratios are tried in steps of 0.05, and the smallest that reaches the target counts and is timed.
`bottleneck` is the option of its ViT examples that leaves the width of the residual stream unchanged; `blocks` is
`regions="blocks"`, which does so in ecospa_fx. Models that no example covers run with defaults.

Where a norm runs over fewer entries than before, neither library gives the original with zeros: it gives what a smaller
model of the same class does. Of ecospa_fx `verify` says whether that is so, which is its own judge.
"""

from __future__ import annotations

import argparse
import copy
import csv
import re
import signal
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops

tolerate_missing_torchvision_ops()

import timm  # noqa: E402
import torch  # noqa: E402
import torch_pruning as tp  # noqa: E402
import transformers as tf  # noqa: E402
from machine import RESULTS, write_csv  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import ecospa_fx  # noqa: E402
from ecospa_fx.passes.graph.tensors import named_tensors  # noqa: E402

EXACT = 1e-8  # of the largest output; both compute in float64
PATIENCE = 10.0  # seconds of computing per attempt
SIZES = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 200}
EAGER = {"use_cache": False, "attn_implementation": "eager"}
SIZES |= {"max_position_embeddings": 32, **EAGER}
TOKENS = torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    """A model to shrink: how to make it and call it, and which layers write into its residual stream."""

    make: Callable[[], nn.Module]
    call: dict[str, Tensor]
    writers: tuple[str, ...] = ()


def hf(kind: str, config: Any, *writers: str, **more: Tensor) -> Case:
    return Case(lambda: getattr(tf, kind)(config), {"input_ids": TOKENS, **more}, writers)


def image(name: str, *writers: str, size: int = 64, **options: Any) -> Case:
    def make() -> nn.Module:
        return timm.create_model(name, num_classes=10, **options)

    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Case(make, {"x": x}, writers)


LLAMA = {**SIZES, "intermediate_size": 192, "num_key_value_heads": 2}
GPT2 = {"n_layer": 3, "n_head": 4, "n_embd": 64, "vocab_size": 200, "n_positions": 32, **EAGER}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
CASES = {
    "llama": hf("LlamaForCausalLM", tf.LlamaConfig(**LLAMA), "o_proj", "down_proj"),
    "qwen3": hf("Qwen3ForCausalLM", tf.Qwen3Config(**LLAMA, head_dim=16), "o_proj", "down_proj"),
    "phi3": hf("Phi3ForCausalLM", tf.Phi3Config(**{**LLAMA, "num_key_value_heads": 4}, **ENDS), "o_proj", "down_proj"),
    "opt": hf("OPTForCausalLM", tf.OPTConfig(**SIZES, ffn_dim=192, **ENDS), "out_proj", "fc2"),
    "gpt2": hf("GPT2LMHeadModel", tf.GPT2Config(**GPT2, **ENDS), "attn.c_proj", "mlp.c_proj"),
    "bert": hf("BertModel", tf.BertConfig(**SIZES, intermediate_size=192), "output.dense"),
    "t5": hf(
        "T5ForConditionalGeneration",
        tf.T5Config(
            num_layers=2, d_model=64, d_kv=16, num_heads=4, d_ff=192, vocab_size=200, dropout_rate=0.0, **EAGER
        ),
        "o", "wo", decoder_input_ids=TOKENS,
    ),
    "resnet18": image("resnet18"),
    "mobilenetv3": image("mobilenetv3_small_050"),
    "regnety": image("regnety_002"),
    "convnext": image("convnext_atto", "mlp.fc2"),
    "vit": image("vit_tiny_patch16_224", "proj", "fc2", img_size=64, depth=3, embed_dim=64, num_heads=4),
    "mixer": Case(
        lambda: timm.models.mlp_mixer.MlpMixer(num_classes=10, img_size=64, num_blocks=3, embed_dim=64),
        {"x": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)},
        ("fc2",),
    ),
}  # fmt: skip


def made(case: Case) -> nn.Module:
    """The model with random numbers in every parameter and buffer of floats, so that each value tells its place."""
    torch.manual_seed(0)
    model = case.make().double().eval()
    with torch.no_grad():
        for tensor in {id(t): t for t in named_tensors(model).values()}.values():
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.1 * torch.rand_like(tensor)).add_(0.01 * torch.rand_like(tensor))
    return model


def output_of(model: nn.Module, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(*call.values()) if "x" in call else model(**call)
    return out if isinstance(out, Tensor) else out[0]


# Torch-Pruning, as its examples have it.


def vit_forward(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Attention of timm at any head size: that of Torch-Pruning's `prune_timm_vit.py`."""
    b, n, _ = x.shape
    q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    x = nn.functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
    return self.proj(x.transpose(1, 2).reshape(b, n, -1))


def torch_pruning(model: nn.Module, case: Case, ratio: float, bottleneck: bool) -> None:
    config = getattr(model, "config", None)
    heads: dict[nn.Module, int] = {}
    groups: dict[nn.Module, int] = {}
    options: dict[str, Any] = {}
    ignored = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 10]
    ignored += [getattr(model, name) for name in ("lm_head", "pooler") if hasattr(model, name)]
    named = list(model.named_modules())
    language = config is not None and hasattr(model, "lm_head")
    for name, m in named:
        if language and hasattr(m, "q_proj"):  # prune_llm.py
            keys = getattr(config, "num_key_value_heads", config.num_attention_heads)
            heads |= {m.q_proj: config.num_attention_heads, m.k_proj: keys, m.v_proj: keys}
        elif hasattr(m, "qkv_proj"):
            heads[m.qkv_proj] = config.num_attention_heads
        elif hasattr(m, "query") and hasattr(m, "num_attention_heads"):  # prune_hf_bert.py
            heads |= dict.fromkeys((m.query, m.key, m.value), m.num_attention_heads)
        elif hasattr(m, "qkv") and hasattr(m, "num_heads"):  # prune_timm_models.py
            heads[m.qkv] = m.num_heads
            if isinstance(m, timm.layers.Attention):
                m.forward = types.MethodType(vit_forward, m)
        if hasattr(m, "gate_up_proj"):
            groups[m.gate_up_proj] = 2
        if bottleneck and any(name == w or name.endswith(f".{w}") for w in case.writers):
            ignored.append(m)
    if config is not None:
        options = {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": ratio}
        options["output_transform"] = lambda out: out[0].sum()
    pruner = tp.pruner.BasePruner(
        model, case.call.get("x", case.call), importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio, ignored_layers=ignored, num_heads=heads, out_channel_groups=groups, **options,
    )  # fmt: skip
    for group in pruner.step(interactive=True):
        group.prune()
    for _, m in named:
        if language and hasattr(m, "head_dim") and (hasattr(m, "q_proj") or hasattr(m, "qkv_proj")):
            queries = m.q_proj.out_features if hasattr(m, "q_proj") else m.qkv_proj.out_features // 3
            m.num_heads = queries // m.head_dim
            keys = m.k_proj.out_features // m.head_dim if hasattr(m, "k_proj") else m.num_heads
            m.num_key_value_groups = m.num_heads // keys
            config.num_attention_heads, config.num_key_value_heads = m.num_heads, keys
        elif hasattr(m, "query") and hasattr(m, "num_attention_heads"):
            m.num_attention_heads = pruner.num_heads[m.query]
            m.attention_head_size = m.query.out_features // m.num_attention_heads
            m.all_head_size = m.query.out_features
        elif hasattr(m, "qkv") and hasattr(m, "num_heads"):
            m.num_heads = pruner.num_heads[m.qkv]
            m.head_dim = m.qkv.out_features // (3 * m.num_heads)


def ecospa(model: nn.Module, case: Case, left: float, regions: str) -> None:
    ecospa_fx.compile(model, **call_of(case), regions=regions)
    sparsifier = ecospa_fx.CoupledSparsifier(model, target=left)
    estimator = ecospa_fx.CoupledEstimator(model, "magnitude")
    while not sparsifier.reached():
        keeps = sparsifier.decide(estimator.importance(), sparsifier.target_size(sparsifier.sizes()))
        if not keeps:
            break
        ecospa_fx.shrink(model, keeps)


def call_of(case: Case) -> dict[str, Any]:
    return {"example_inputs": tuple(case.call.values())} if "x" in case.call else {"example_kwargs": case.call}


def with_ecospa(case: Case, left: float, regions: str) -> dict[str, Any]:
    """The row; where it is not the original with zeros, whether `verify` finds it to be a smaller model."""
    row = question(case, lambda m: ecospa(m, case, left, regions))
    if row.get("exact") == "no" and not row.get("why"):
        model = ecospa_fx.compile(made(case), **call_of(case), regions=regions)
        exact = ecospa_fx.verify(model, **call_of(case)).ok
        row["why"] = f"norms run over what is left; verify, which counts so: {'exact' if exact else 'DIFFERS'}"
    return row


# The same questions to both.


def places(before: Tensor, after: Tensor) -> list[Tensor] | None:
    """Find the positions of each dim that are left, by their values; None if `after` is not a part of `before`."""
    values, order = before.flatten().sort()
    found = []
    for dim in range(before.ndim):
        line = after[tuple(slice(None) if d == dim else 0 for d in range(after.ndim))].contiguous()
        at = torch.searchsorted(values, line).clamp(max=len(values) - 1)
        if not torch.equal(values[at], line):
            return None
        found.append(torch.stack(torch.unravel_index(order[at], before.shape))[dim])
    return found


def masked(original: nn.Module, shrunk: nn.Module) -> str | None:
    """Set what the shrunk model lacks to zero in the original one; or why that cannot be done."""
    now = named_tensors(shrunk)
    for name, tensor in named_tensors(original).items():
        if tensor.is_floating_point() and now[name].shape != tensor.shape:
            left = places(tensor.detach(), now[name].detach()) if now[name].ndim == tensor.ndim else None
            if left is None:
                return f"{name} holds other values than before"
            keep = torch.zeros_like(tensor)
            keep[torch.meshgrid(*left, indexing="ij")] = 1
            tensor.data = tensor.data * keep
    return None


def question(case: Case, tool: Callable[[nn.Module], None]) -> dict[str, Any]:
    """Shrink a new model, run it, compare it."""
    model = made(case)
    before, whole = sum(p.numel() for p in model.parameters()), copy.deepcopy(model)
    row: dict[str, Any] = {"parameters": before}
    start = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        tool(model)
    except Exception as error:
        return {**row, "runs": "no", "why": f"shrinking: {described(error)}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    row["seconds"] = round(time.process_time() - start, 2)
    after = sum(p.numel() for p in model.parameters())
    row |= {"left": after, "share": round(after / before, 3)}
    try:
        found = output_of(model, case.call)
    except Exception as error:
        return {**row, "runs": "no", "why": f"afterwards: {described(error)}"}
    row["runs"] = "yes"
    if after == before:
        return {**row, "why": "nothing was removed"}
    unmasked = output_of(whole, case.call)
    why = masked(whole, model)
    expected = output_of(whole, case.call)
    if why is not None or found.shape != expected.shape:
        return {**row, "exact": "no", "why": why or f"output {tuple(found.shape)}, was {tuple(expected.shape)}"}
    error = float((found - expected).abs().max() / expected.abs().max())
    moved = float((unmasked - expected).abs().max() / expected.abs().max())
    assert moved > 1e-4, "what was removed makes no difference, so that exactness cannot be seen"
    return {**row, "exact": "yes" if error < EXACT else "no", "error": f"{error:.1e}"}


def give_up(*_: Any) -> None:
    raise TimeoutError(f"not done after {PATIENCE:.0f} s")


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:120]


def with_torch_pruning(case: Case, left: float, bottleneck: bool) -> dict[str, Any]:
    """The smallest ratio, in steps of 0.05, by which enough goes; the largest, if none does."""
    rows: dict[int, dict[str, Any]] = {}
    low, high = 1, 19
    while low <= high:
        step = (low + high) // 2
        rows[step] = question(case, lambda m, step=step: torch_pruning(m, case, 0.05 * step, bottleneck))
        if "TimeoutError" in rows[step].get("why", ""):
            return rows[step]
        enough = "share" not in rows[step] or rows[step]["share"] <= left  # or it failed, which less may not
        low, high = (low, step - 1) if enough else (step + 1, high)
    done = {step: row for step, row in rows.items() if "share" in row}
    if not done:
        return rows[min(rows)] | {"ratio": round(0.05 * min(rows), 2)}
    reached = [step for step, row in done.items() if row["share"] <= left]
    step = min(reached) if reached else max(done)
    return rows[step] | {"ratio": round(0.05 * step, 2)}


def write(rows: list[dict[str, Any]]) -> Path:
    """Write what was measured, beside what was measured before of other models."""
    old = RESULTS / "peers.csv"
    again = {row["model"] for row in rows}
    kept = [row for row in csv.DictReader(old.open()) if row["model"] not in again] if old.exists() else []
    both = rows + [{key: row[key] for key in rows[0]} for row in kept]
    return write_csv("peers", sorted(both, key=lambda row: list(CASES).index(row["model"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    parser.add_argument("--left", type=float, default=0.7, help="share of the parameters that is left")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, give_up)
    columns = ["parameters", "left", "share", "runs", "exact", "error", "seconds", "ratio", "why"]
    rows: list[dict[str, Any]] = []
    for name, case in CASES.items():
        if not any(re.fullmatch(pattern, name) for pattern in options.patterns or [".*"]):
            continue
        tools: dict[str, Callable[[], dict[str, Any]]] = {
            "ecospa_fx": lambda case=case: with_ecospa(case, options.left, "auto"),
            "Torch-Pruning": lambda case=case: with_torch_pruning(case, options.left, False),
        }
        if case.writers:
            tools["ecospa_fx, blocks"] = lambda case=case: with_ecospa(case, options.left, "blocks")
            tools["Torch-Pruning, bottleneck"] = lambda case=case: with_torch_pruning(case, options.left, True)
        for tool, ask in tools.items():
            row = {"model": name, "tool": tool, **dict.fromkeys(columns, ""), **ask()}
            print("  ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
            rows.append({**row, **{package: version(package) for package in ("torch-pruning", "transformers", "timm")}})
        written = write(rows)
    print(written)
    table = Table("model", "tool", "runs", "exact", "error", "left", "seconds")
    for row in rows:
        table.add_row(*(str(row[key]) for key in ("model", "tool", "runs", "exact", "error", "share", "seconds")))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
