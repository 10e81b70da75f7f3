"""Uniform models in llama.cpp: its own converter takes what was saved, and its loader the file."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

TYPES = ("llama", "mistral", "mixtral", "qwen3", "olmo2", "granite", "smollm3", "qwen2", "phi3")
BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def llamacpp():
    """The module bench/llamacpp.py, and the directory of the sources of llama.cpp."""
    sources = os.environ.get("LLAMA_CPP", "")
    if importlib.util.find_spec("llama_cpp") is None or not (Path(sources) / "convert_hf_to_gguf.py").exists():
        pytest.fail(
            "this needs llama-cpp-python, and LLAMA_CPP=the sources of llama.cpp, which its source distribution has in "
            "vendor/llama.cpp"
        )
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("llamacpp"), sources
    finally:
        sys.path.remove(str(BENCH))


@pytest.mark.sweep
@pytest.mark.parametrize("name", TYPES)
def test_a_uniform_model_needs_no_zeros(name, llamacpp):
    bench, sources = llamacpp
    row = bench.uniform(name, sources)
    assert "refused" not in row, row["refused"]
    assert row["left"] < row["before"] and float(row["error"]) < 2e-5
    assert row["written"] >= row["left"] - bench.SIZES["hidden_size"]  # the embedding of the padding is zero
