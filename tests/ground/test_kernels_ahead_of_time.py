"""Kernels compiled ahead of time, and training where there is no Triton at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")  # the extra `test` brings it on Linux


def test_without_triton_the_references_are_there():
    """A CPU build of torch brings no Triton: importing and training must not need it."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, ecospa_fx\n"
        "from ecospa_fx.kernels import slice_sums\n"
        "print(float(slice_sums([torch.ones(2, 3)], [0])[0].sum()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "6.0", ran.stderr


@pytest.fixture(scope="module")
def compiled():
    """What bench/aot.py finds; in a process of its own, because this one may interpret."""
    script = Path(__file__).parents[2] / "bench" / "aot.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(script.parent)}
    command = [sys.executable, str(script), "--json", "--few"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_compiled_ahead_of_time_nothing_spills(compiled):
    assert {row["target"] for row in compiled} == {"sm_90", "sm_100", "gfx942"}
    assert [row["kernel"] for row in compiled if row["spills"]] == []


def test_compiled_ahead_of_time_loads_are_16_bytes_wide(compiled):
    wide = [row for row in compiled if " wide" in row["kernel"]]
    assert wide
    for row in wide:
        assert row["loads_16_bytes"] >= row["wide_loads_least"], row
        assert row["stores_16_bytes"] >= row["wide_stores_least"], row


def test_compiled_ahead_of_time_registers_leave_room_for_many_warps(compiled):
    for row in compiled:
        assert row["registers"] <= 128, row  # 16 warps of 32 threads per SM at least
