"""The README is true: its code runs in the order it stands there, and what it says is printed is printed."""

import ast
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ecospa_fx

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
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
    assert len(BLOCKS) == 17


def test_a_save_can_be_read_without_the_library(tmp_path, monkeypatch, capsys):
    """With the code in docs/checkpoints.md."""
    monkeypatch.chdir(tmp_path)
    up, down = torch.nn.Linear(6, 10), torch.nn.Linear(10, 6)
    model = torch.nn.Sequential(up, torch.nn.ReLU(), down)
    whole = up.weight.detach().clone()
    ecospa_fx.compile(model, example_inputs=(torch.ones(2, 6),))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    ecospa_fx.shrink(model, {"ffn": torch.tensor([1, 3, 7])}, optimizer=optimizer)
    ecospa_fx.save(model, "run", optimizer=optimizer)
    *_, text = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "checkpoints.md").read_text(), flags=re.DOTALL)
    assert "import ecospa_fx" not in text
    names = {}
    exec(text, names)
    mask = torch.zeros(10, 1, dtype=torch.bool)
    mask[[1, 3, 7]] = True
    assert torch.equal(names["original"]["0.weight"], whole * mask)
    assert capsys.readouterr().out.startswith("0.weight [3, 6] {'step': torch.Size([]), 'exp_avg': torch.Size([3, 6])")


def test_the_architecture_draws_the_rooms_in_the_order_in_which_they_import():
    """The order that tests/ground/test_house.py holds, each room with a file that exists."""
    house = ast.parse((ROOT / "tests" / "ground" / "test_house.py").read_text())
    product, compiler, ground = (
        ast.literal_eval(node.value).split()
        for name in ("PRODUCT", "COMPILER", "GROUND")
        for node in house.body
        if isinstance(node, ast.Assign) and node.targets[0].id == name
    )
    text = (ROOT / "ARCHITECTURE.md").read_text()
    drawn = re.findall(r"^    [↓│┌] (\w+) .* (\w+\.py)$", text, flags=re.MULTILINE)
    assert [room for room, _ in drawn] == [*product, *compiler, ground[-1]]
    (line,) = re.findall(r"^    the ground .*: (.*)$", text, flags=re.MULTILINE)
    assert line.split(", ") == ground[:-1]
    for room, file in drawn:
        within = "passes" if room in compiler else "." if room in ground else "ecospa_fx"
        folder = ROOT / within / room
        assert (folder / file if folder.is_dir() else ROOT / within / file).is_file(), room


PAGES = [ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    named = re.findall(r"`((?:ecospa_fx|passes|kernels|tests|bench|docs|examples)/[\w/.]+)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
    linked = re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text)
    assert [path for path in linked if not (page.parent / path).exists()] == []


def settled(text):
    """What does not depend on the versions of torch and transformers, or on rounding."""
    text = re.sub(r"\w+\.py:\d+", "FILE:LINE", text)
    text = re.sub(r"worst .*", "worst", text)
    return [line.rstrip() for line in text.strip().splitlines()]
