"""Compiler output for the kernels, without a GPU: registers, spills and widths of loads per variant.

python bench/aot.py [--few] [--json]     prints a table and writes bench/results/kernels_aot.csv
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what has been the default; Triton 3.9 warns of a change

import triton
import triton.language as tl
from machine import machine, write_csv
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ecospa_fx.kernels import adamw
from ecospa_fx.kernels.compact import COMPACT_WIDTH, compact_kernel, tile
from ecospa_fx.kernels.slice_sums import FINAL_COLS, FINAL_ROWS, WARPS, WARPS_WEIGHTED, finish_kernel, slice_sums_kernel
from ecospa_fx.kernels.windows import COLS, ROWS, WIDTH

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BYTES_OF = {"fp32": 4, "bf16": 2, "fp16": 2}
ELEMENT = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}


@dataclass(frozen=True)
class Variant:
    """One way a kernel is launched.

    Attributes:
        key: one of the few that the tests compile.
        loads, stores: 16-byte accesses that each thread must make at least, where they are wide.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    key: bool
    loads: int = 0
    stores: int = 0


SUMS = {
    "pointers": "*i64",
    "weight_pointers": "*i64",
    "table": "*i64",
    "partials": "*fp32",
    "scale": "*fp32",
    "plane": "i32",
}
FINISH = {
    "table": "*i64",
    "partials": "*fp32",
    "out": "*fp32",
    "found_inf": "*fp32",
    "plane": "i32",
    "width": "i32",
    "decay": "fp32",
    "gain": "fp32",
}
ADAMW = {"pointers": "*i64", "table": "*i64", "partials": "*fp32", "count": "i32"}
ADAMW |= dict.fromkeys(("keep", "toward", "beta2", "fresh", "rate", "root", "eps"), "fp32")
COMPACT = {"pointers": "*i64", "table": "*i64", "indices": "*i64", "count": "i32"}


def variants() -> Iterator[Variant]:
    """Every variant that a step or a shrink can launch."""
    for dtype, size in BYTES_OF.items():
        for weighted, (kind, vector), scaled in product(
            (False, True), (("wide", 16 // size), ("narrow", 1), ("strided", 0)), (False, True)
        ):
            if scaled and kind != "wide":
                continue
            warps = WARPS_WEIGHTED if weighted else WARPS
            yield Variant(
                f"slice_sums {dtype} {kind}{' (w*g)^2' * weighted}{' scaled' * scaled}",
                slice_sums_kernel,
                SUMS,
                {
                    "ELEMENT": ELEMENT[dtype],
                    "VECTOR": vector,
                    "ALIGN": max(vector, 1) * size,
                    "WEIGHTED": weighted,
                    "SCALED": scaled,
                    "ROWS": ROWS,
                    "COLS": COLS,
                    "WIDTH": WIDTH,
                },
                warps,
                key=dtype != "fp16" and not scaled and (kind == "wide" or (dtype == "bf16" and weighted)),
                loads=ROWS * COLS * size // 16 // (64 * warps) * (1 + weighted),
            )
    for decaying in (False, True):
        constants = {"DECAYING": decaying, "SKIPPING": False, "ROWS": FINAL_ROWS, "COLS": FINAL_COLS}
        yield Variant(f"finish{' decaying' * decaying}", finish_kernel, FINISH, constants, 4, key=decaying)
    for (size, name), (kind, wide) in product(
        ((2, "int16"), (4, "int32")), (("wide", 1), ("narrow", 0), ("indexed", 0))
    ):
        vector = 16 // size if wide else 1 if kind == "narrow" else 0
        lines, warps = tile(vector)
        constants = {
            "ELEMENT": getattr(tl, name),
            "VECTOR": vector,
            "ALIGN": max(vector, 1) * size,
            "ROWS": lines,
            "COLS": COLS,
            "WIDTH": COMPACT_WIDTH,
        }
        least = lines * COLS * size // 16 // (64 * warps)
        key = size == 4 and kind != "narrow"
        yield Variant(f"compact {8 * size} bit {kind}", compact_kernel, COMPACT, constants, warps, key, least, least)

    for dtype, kind in product(("fp32", "bf16"), ("wide", "narrow", "strided")):
        size = BYTES_OF[dtype]
        vector = {"wide": 16 // size, "narrow": 1, "strided": 0}[kind]
        constants = {
            "ELEMENT": ELEMENT[dtype],
            "STATE": ELEMENT[dtype],
            "VECTOR": vector,
            "ALIGN": max(vector, 1) * size,
            "ROWS": adamw.lines(vector),
            "COLS": COLS,
            "WIDTH": WIDTH,
        }
        each = adamw.lines(vector) * COLS * size // 16 // (64 * adamw.WARPS)
        name, key = f"adamw {dtype} {kind}", kind == "wide"
        yield Variant(name, adamw.adamw_kernel, ADAMW, constants, adamw.WARPS, key, 4 * each, 3 * each)


def compile_for(target: str, kernel: object, types: Mapping[str, str], constants: Mapping[str, object], warps: int):
    names = list(kernel.arg_names)
    signature = {name: types.get(name, "constexpr") for name in names}
    # Tensors that torch allocates are aligned, which a launch tells the compiler.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "").startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=aligned)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": warps})


def nvidia(compiled: object) -> dict[str, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout + usage.stderr)
    registers, stack, shared, local = map(int, found.groups())
    loads = re.findall(r"\bLDG\.E\S*", sass)
    return {
        "registers": registers,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)) + stack + local,
        "shared_bytes": shared,
        "loads_16_bytes": sum(".128" in load for load in loads),
        "loads": len(loads),
        "stores_16_bytes": len(re.findall(r"\bSTG\.E\S*\.128", sass)),
    }


def amd(compiled: object) -> dict[str, int]:
    text = compiled.asm["amdgcn"]
    number = lambda key: int(re.search(rf"\.{key}:\s*(\d+)", text).group(1))  # noqa: E731
    loads = re.findall(r"\b(?:global|buffer)_load_\w+", text)
    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "shared_bytes": number("group_segment_fixed_size"),
        "loads_16_bytes": sum(load.endswith("dwordx4") and "s_load" not in load for load in loads),
        "loads": len(loads),
        "stores_16_bytes": len(re.findall(r"\b(?:global|buffer)_store_dwordx4", text)),
    }


def report(few: bool) -> list[dict[str, object]]:
    rows = []
    for variant in variants():
        for target in TARGETS if variant.key or not few else ():
            read = nvidia if target.startswith("sm_") else amd
            found = read(compile_for(target, variant.kernel, variant.types, variant.constants, variant.warps))
            rows.append(
                {
                    "kernel": variant.name,
                    "target": target,
                    "warps": variant.warps,
                    **found,
                    "wide_loads_least": variant.loads,
                    "wide_stores_least": variant.stores,
                    "triton": triton.__version__,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON and write no file")
    parser.add_argument("--few", action="store_true", help="only the variants that the tests look at")
    options = parser.parse_args()
    rows = report(options.few)
    if options.json:
        print(json.dumps(rows))
        return
    table = Table(title="per thread and program, compiled ahead of time")
    columns = ("kernel", "target", "warps", "registers", "spills", "shared_bytes", "loads_16_bytes", "stores_16_bytes")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    console = Console()
    console.print(table)
    write_csv("kernels_aot", rows)
    console.print(f"{machine()}, triton {triton.__version__}; written to bench/results/kernels_aot.csv")


if __name__ == "__main__":
    main()
