"""GGUF files of shrunk models, run by llama.cpp and compared with torch.

PYTHONPATH=bench python bench/llamacpp.py --llama-cpp DIRECTORY [PATTERN ...] [--report]

Needs llama-cpp-python, and the sources of llama.cpp with its converter: the source distribution of llama-cpp-python has
both (vendor/llama.cpp). Models are small, with random weights and no vocabulary, in float32. Each is shrunk, saved at
its original sizes with marks, converted, cut, and run on a few tokens. `error` is the difference of the logits from
torch's, `changed` the difference from llama.cpp's own before the cut: it computes GELU by a table of 16 bits, which is
wrong by 1e-3, and a difference in the last bit may select another entry of it. `heads` says whether heads were cut:
that is tried first, and `refused` means that the loader does not take the file.

    everything   half of every coupling, more in one layer than in the next; zeros where the format needs entries
    widths       feed-forward layers and heads only; zeros only to make layers equal
    per layer    the same with one width per layer, as an architecture whose loader reads that
    uniform      trained to half (0.7 where heads stay) in its own Python with `deployable="transformers"`, and saved by
                 `save_pretrained`: the converter takes that, and nothing is cut. `written`: entries that are not zero
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
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

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 64, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GPT = {"n_embd": 64, "n_inner": 256, "n_layer": 3, "n_head": 8, "n_positions": 256, "n_ctx": 256}
EXPERTS = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "mixtral": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen2_moe": {**EXPERTS, "norm_topk_prob": False, "shared_expert_intermediate_size": 80},
    "qwen3_moe": {"head_dim": 16, **EXPERTS},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "phi3": {},
    "phi": {"num_key_value_heads": 8, "intermediate_size": 256},
    "gpt2": GPT,
    "starcoder2": {},
    "stablelm": {},
    "olmo": {"clip_qkv": None},
    "olmo2": {},
    "cohere": {},
    "granite": {},
    "smollm3": {},
    "bloom": {"n_layer": 3, "n_head": 8, "hidden_size": 64},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 4},
}
ABOUT = ("GGUF", "general", "tokenizer")  # the first words of fields that hold no sizes
COMPUTES_THE_SAME = {"llama": "deci", "mistral": "deci"}
ENTRY = 2e-4  # what another entry of the table of GELUs, after a difference in the last bit, makes in the end
WHOLE = ("*.heads", "*.groups")
UNIFORM: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen3", "smollm3"), ()),
    **dict.fromkeys(
        ("qwen2", "phi3", "olmo2", "granite"), WHOLE
    ),  # their loaders compute the length of a head from the hidden size
}
WAYS = ("everything", "widths", "per layer", "uniform")
WIDTHS = ("ffn", "glu", "heads", "groups")
COLUMNS = (
    "name",
    "way",
    "kinds",
    "before",
    "left",
    "written",
    "metadata",
    "heads",
    "largest",
    "error",
    "changed",
    "refused",
)


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A model whose scores differ, and tokens."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**{**SIZES, **MODELS[name]})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(noise * scale if parameter.ndim > 1 else parameter + noise * scale)
    return model, torch.randint(5, 60, (1, 9), generator=generator)


def shrunk(name: str, kinds: Sequence[str] | None) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, tokens, and the logits that it gives."""
    model, ids = build(name)
    call = {"input_ids": ids, "use_cache": False}
    ecospa_fx.compile(model, example_kwargs=call)
    couplings = [c for c in ecospa_fx.couplings(model) if kinds is None or c.kind in kinds]
    keep = {}
    generator = torch.Generator().manual_seed(2)
    for coupling in couplings:
        layer = int((re.search(r"\.(\d+)\.", coupling.name) or [0, 0])[1])
        less = layer if coupling.size > 8 else layer % 2 if coupling.size > 2 else -(layer // 2)
        count = max(1, coupling.size // 2 - less)
        keep[coupling] = torch.randperm(coupling.size, generator=generator)[:count].sort().values
    ecospa_fx.shrink(model, keep)
    with torch.no_grad():
        return model, ids, model(**call).logits[0]


def convert(llama_cpp: str, source: Path, target: Path) -> None:
    """Run `convert_hf_to_gguf.py source --outtype f32 --outfile target` for a model without a vocabulary."""
    command = [sys.executable, __file__, "--llama-cpp", llama_cpp, "--convert", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the converter: {done.stderr.strip().splitlines()[-1]}")


def _convert(llama_cpp: str, source: str, target: str) -> None:
    sys.path[:0] = [llama_cpp, f"{llama_cpp}/gguf-py"]
    import convert_hf_to_gguf as converter

    known = converter.get_model_class

    def without_vocabulary(*args: Any, **kwargs: Any) -> Any:
        found = known(*args, **kwargs)

        def set_vocab(self: Any) -> None:
            self._set_vocab_none()
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

        found.set_vocab = set_vocab
        return found

    converter.get_model_class = without_vocabulary
    sys.argv = ["convert_hf_to_gguf.py", source, "--outtype", "f32", "--outfile", target]
    converter.main()


def logits(path: Path, ids: Tensor) -> Tensor:
    """Compute logits with llama.cpp, with keys and values in float32."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0, flash_attn=False
    )
    model.eval(ids[0].tolist())
    found = torch.tensor(model.scores[: ids.shape[1]])
    model.close()
    return found


def measure(name: str, way: str, llama_cpp: str) -> dict[str, Any]:
    """A row."""
    model, ids, expected = shrunk(name, None if way == "everything" else WIDTHS)
    row: dict[str, Any] = {
        "name": name, "way": way, "kinds": " ".join(sorted({c.kind for c in ecospa_fx.couplings(model)})),
        "largest": f"{expected.abs().max():.2f}",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        for kind in ("zeros", "marked"):
            ecospa_fx.save_unshrunk(model, directory / kind, mark=kind == "marked")
            convert(llama_cpp, directory / kind, directory / f"{kind}.gguf")
        unshrunk = logits(directory / "zeros.gguf", ids)
        options: dict[str, Any] = {"zeros": True}
        if way == "per layer":
            options |= {"per_layer": True, "architecture": COMPUTES_THE_SAME[name]}
        for heads in (True, False):
            path = directory / f"small-{heads}.gguf"
            try:
                cut = ecospa_fx.cut_gguf(directory / "marked.gguf", path, heads=heads, **options)
                said = ", ".join(f"{key.partition('.')[2]} {value}" for key, value in cut.metadata.items())
                row |= {"before": cut.before, "left": cut.left, "written": cut.written, "heads": heads}
                row["metadata"] = said
                found = logits(path, ids)
                row["error"], row["changed"] = (f"{(found - e).abs().max():.0e}" for e in (expected, unshrunk))
                break
            except ValueError as error:  # its loader does not take the file, or heads have slopes
                row["refused"] = f"heads={heads}: {str(error).partition(':')[0]}"
    return row


def uniform(name: str, llama_cpp: str) -> dict[str, Any]:
    """A row about a model that needs neither zeros nor a cut."""
    import gguf

    model, ids = build(name)
    before = sum(parameter.numel() for parameter in model.parameters())
    mask = torch.ones_like(ids).repeat(2, 1)
    mask[0, :2] = 0  # without padding, some code takes a path on which a number of heads is of no account
    call = {"input_ids": ids.repeat(2, 1), "attention_mask": mask, "use_cache": False}
    ecospa_fx.compile(model, example_kwargs=call, execution="module")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    trainer = ecospa_fx.EcoSpaTrainer(
        model, optimizer, target=0.7 if UNIFORM[name] else 0.5, among="prunable", interval=1, end=3,
        deployable="transformers", frozen=UNIFORM[name],
    )  # fmt: skip
    for _ in range(4):
        model(**call).logits.square().mean().backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    shrunk = [coupling for coupling in ecospa_fx.couplings(model) if coupling.size < coupling.original_size]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[0]
    row: dict[str, Any] = {
        "name": name, "way": "uniform", "kinds": " ".join(sorted({c.kind for c in shrunk})), "before": before,
        "left": sum(parameter.numel() for parameter in model.parameters()), "largest": f"{expected.abs().max():.2f}",
        "heads": any(c.kind in ("heads", "groups") for c in shrunk),
    }  # fmt: skip
    if not trainer.done:
        return row | {"refused": "the target is not reached"}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        why = ecospa_fx.save_pretrained(model, directory / "saved")
        if why is not None:
            return row | {"refused": why}
        convert(llama_cpp, directory / "saved", directory / "small.gguf")
        reader = gguf.GGUFReader(directory / "small.gguf")
        lists = [
            key for key, field in reader.fields.items() if key.partition(".")[0] not in ABOUT and len(field.data) > 1
        ]
        if lists:
            return row | {"refused": f"{lists[0]} is a list"}
        row["written"] = sum(int((tensor.data != 0).sum()) for tensor in reader.tensors)
        del reader
        row["error"] = f"{(logits(directory / 'small.gguf', ids) - expected).abs().max():.0e}"
    return row


def report(rows: Sequence[dict[str, Any]]) -> None:
    """The table."""
    table = Table(*COLUMNS[:2], *COLUMNS[3:], box=None)
    for row in rows:
        table.add_row(*(str(row.get(column.header, "")) for column in table.columns))
    Console(width=200).print(table)
    fine = sum(float(row.get("changed") or row.get("error") or 1) <= ENTRY for row in rows)
    print(f"{fine} of {len(rows)} compute what they did before the cut, or what torch does, to {ENTRY}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    parser.add_argument("--llama-cpp", metavar="DIRECTORY", help="sources of llama.cpp")
    parser.add_argument("--report", action="store_true", help="only print what the CSV has")
    parser.add_argument("--convert", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        _convert(options.llama_cpp, *options.convert)
        return
    path, rows = RESULTS / "llamacpp.csv", {}
    if path.exists():
        with path.open(newline="") as file:
            rows = {(row["name"], row["way"]): {key: row[key] for key in COLUMNS} for row in csv.DictReader(file)}
    only = {"per layer": COMPUTES_THE_SAME, "uniform": UNIFORM}
    asked = [(name, way) for name in MODELS for way in WAYS if name in only.get(way, MODELS)]
    if not options.report:
        warnings.simplefilter("ignore")
        for name, way in asked:
            if any(re.fullmatch(pattern, name) for pattern in options.patterns or [".*"]):
                try:
                    row = (uniform if way == "uniform" else partial(measure, way=way))(
                        name, llama_cpp=options.llama_cpp
                    )
                except Exception as error:
                    row = {"name": name, "way": way, "refused": f"{type(error).__name__}: {error}"[:300]}
                rows[name, way] = row
                print(json.dumps(row), flush=True)
                done = [each for each in asked if each in rows]
                write_csv("llamacpp", [{key: rows[each].get(key, "") for key in COLUMNS} for each in done])
    report([rows[each] for each in asked if each in rows])


if __name__ == "__main__":
    main()
