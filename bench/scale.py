"""Time of explain on a 70B LLaMA shape and a 671B mixture of experts, on the meta device, by shared blocks.

python bench/scale.py

No weight is allocated: parameters are shapes, and equal blocks are captured once.
"""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable

import torch
from machine import machine, write_csv
from rich.console import Console
from rich.table import Table

import ecospa_fx
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops


def llama_70b() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def experts_671b() -> torch.nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(DeepseekV3Config(use_cache=False))


SHAPES: dict[str, Callable[[], torch.nn.Module]] = {
    "LLaMA, 80 layers of 8192": llama_70b,
    "DeepSeek-V3, 61 layers, 256 experts": experts_671b,
}


def main() -> None:
    tolerate_missing_torchvision_ops()
    console, rows = Console(), []
    table = Table(title="explain on the meta device, by shared blocks")
    for column in ("shape", "parameters", "build", "explain", "export", "infer + discover", "couplings", "memory"):
        table.add_column(column, justify="left" if column == "shape" else "right")
    for name, make in SHAPES.items():
        start = time.perf_counter()
        with torch.device("meta"):
            model = make().to(torch.bfloat16)  # grouped products of experts take no other on the meta device
        built = time.perf_counter()
        tokens = torch.zeros(2, 16, dtype=torch.long, device="meta")
        found = ecospa_fx.explain(model, example_inputs=(tokens,), regions="blocks")
        explained = time.perf_counter()
        row: dict[str, object] = {
            "shape": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "build_s": round(built - start, 2),
            "explain_s": round(explained - built, 2),
            "export_s": round(found.seconds["export"], 2),
            "analysis_s": round(found.seconds["infer"] + found.seconds["discover"], 3),
            "couplings": len(found.couplings),
            "kinds": " ".join(f"{kind}:{n}" for kind, n in sorted(Counter(c.kind for c in found.couplings).items())),
            "missing": " ".join(found.missing_rules),
            "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }
        rows.append(row)
        table.add_row(
            name, f"{float(str(row['parameters'])) / 1e9:.1f} billion", f"{row['build_s']} s", f"{row['explain_s']} s",
            f"{row['export_s']} s", f"{row['analysis_s']} s", str(row["couplings"]), f"{row['peak_memory_gib']} GiB",
        )  # fmt: skip
        console.print(f"{name}: {row['kinds']}; ops without a rule: {row['missing'] or 'none'}")
    console.print(table)
    console.print(machine())
    write_csv("scale", rows)
    console.print("written to bench/results/scale.csv")


if __name__ == "__main__":
    main()
