"""What the compiler makes of the kernels, with no GPU at hand: registers, spills and widths of loads per variant.

python bench/aot.py [--json]     prints a table and writes bench/results/kernels_aot.csv, or prints JSON and writes nothing
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import triton
import triton.language as tl
from machine import machine, write_csv
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ecospa_fx.kernels.slice_sums import FINAL_COLS, FINAL_ROWS, WARPS, WARPS_WEIGHTED, finish_kernel, slice_sums_kernel
from ecospa_fx.kernels.windows import COLS, ROWS, WIDTH

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
BYTES_OF = {"fp32": 4, "bf16": 2, "fp16": 2}
ELEMENT = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}


def variants() -> Iterator[tuple[str, object, dict[str, str], dict[str, object], int]]:
    """Every variant that a step can launch: name, kernel, types of arguments, constants, warps."""
    for dtype, size in BYTES_OF.items():
        for weighted in (False, True):
            for vector in (16 // size, 1, 0):
                for scaled in (False, True) if vector == 16 // size else (False,):
                    kind = {16 // size: "wide", 1: "narrow", 0: "strided"}[vector]
                    extra = " (w*g)^2" * weighted + " scaled" * scaled
                    yield (
                        f"slice_sums {dtype} {kind}{extra}",
                        slice_sums_kernel,
                        {
                            "pointers": "*i64",
                            "weight_pointers": "*i64",
                            "table": "*i64",
                            "partials": "*fp32",
                            "scale": "*fp32",
                            "plane": "i32",
                        },
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
                        WARPS_WEIGHTED if weighted else WARPS,
                    )
    for decaying in (False, True):
        yield (
            f"finish{' decaying' * decaying}",
            finish_kernel,
            {
                "table": "*i64",
                "partials": "*fp32",
                "out": "*fp32",
                "found_inf": "*fp32",
                "plane": "i32",
                "width": "i32",
                "decay": "fp32",
                "gain": "fp32",
            },
            {
                "DECAYING": decaying,
                "SKIPPING": False,
                "ROWS": FINAL_ROWS,
                "COLS": FINAL_COLS,
            },
            4,
        )


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
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
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


def report() -> list[dict[str, object]]:
    rows = []
    for name, kernel, types, constants, warps in variants():
        for target, read in (("sm_90", nvidia), ("gfx942", amd)):
            found = read(compile_for(target, kernel, types, constants, warps))
            rows.append({"kernel": name, "target": target, "warps": warps, **found, "triton": triton.__version__})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    rows = report()
    if parser.parse_args().json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    print(machine(), write_csv("kernels_aot", rows))


if __name__ == "__main__":
    main()
