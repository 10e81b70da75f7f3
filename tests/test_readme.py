"""The README is true: its code runs in the order it stands there, and what it says is printed is printed."""

import re
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(python|text)\n(.*?)```", README, flags=re.DOTALL)


def make_model():
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=32, use_cache=False,
        )
    )  # fmt: skip


def test_the_code_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokens = torch.randint(0, 32, (2, 6))
    names = {"make_model": make_model, "loader": [{"input_ids": tokens, "labels": tokens}]}
    for language, text in BLOCKS:
        if language == "python":
            capsys.readouterr()
            torch.manual_seed(0)
            exec(text, names)
        else:
            assert settled(capsys.readouterr().out) == settled(text)
    assert len(BLOCKS) == 14


def settled(text):
    """What does not depend on the versions of torch and transformers, or on rounding."""
    text = re.sub(r"\w+\.py:\d+", "FILE:LINE", text)
    text = re.sub(r"worst .*", "worst", text)
    return [line.rstrip() for line in text.strip().splitlines()]
