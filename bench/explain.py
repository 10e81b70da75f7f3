"""Time of explain on a LLaMA-7B-shaped model on the meta device, pass by pass, by root and by blocks.

python bench/explain.py [--layers 32] [--repeats 3]
"""

import argparse
import statistics

import torch
from machine import machine, write_csv
from rich.console import Console
from rich.table import Table

import ecospa_fx
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops

PASSES = ("export", "infer", "discover")


def model_7b(layers: int) -> torch.nn.Module:
    tolerate_missing_torchvision_ops()
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, use_cache=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = model_7b(options.layers)
    tokens = torch.zeros(2, 16, dtype=torch.long, device="meta")
    rows = []
    for regions in ("blocks", "root"):
        found = [ecospa_fx.explain(model, example_inputs=(tokens,), regions=regions) for _ in range(options.repeats)]
        row: dict[str, object] = {
            "regions": regions,
            "layers": options.layers,
            "parameters": sum(p.numel() for p in model.parameters()),
            "couplings": len(found[0].couplings),
        }
        for name in PASSES:
            times = [explanation.seconds[name] for explanation in found]
            row[f"{name}_s"] = round(statistics.median(times), 4)
            row[f"{name}_spread_s"] = round(max(times) - min(times), 4)
        rows.append(row)
    table = Table(title=f"explain, LLaMA-7B shape, {options.layers} layers, median of {options.repeats} (max - min)")
    table.add_column("regions")
    for name in PASSES:
        table.add_column(name, justify="right")
    table.add_column("infer + discover", justify="right")
    table.add_column("couplings", justify="right")
    for row in rows:
        cells = [f"{row[f'{name}_s']:.3f} s ({row[f'{name}_spread_s']:.3f})" for name in PASSES]
        both = float(str(row["infer_s"])) + float(str(row["discover_s"]))
        table.add_row(str(row["regions"]), *cells, f"{both:.3f} s", str(row["couplings"]))
    console = Console()
    console.print(table)
    console.print(machine())
    write_csv("explain", rows)
    console.print("written to bench/results/explain.csv")


if __name__ == "__main__":
    main()
