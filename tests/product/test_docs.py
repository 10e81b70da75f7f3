"""The documentation site: it builds without a warning, its code runs, and its lists are complete."""

import copy
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ecospa_fx

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("page", ["index.md", "scores.md"])
def test_the_code_of_a_page_runs(page, capsys):
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL):
        exec(block, names)
    assert names["trainer"].done
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", ["training.md", "sensitivity.md", "healing.md"])
def test_the_code_of_a_how_to_runs_as_it_stands(page, tmp_path, monkeypatch, capsys):
    """On a small language model, with the names that a reader has: model, optimizer, batches, loader, make_model."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    batches = [{"input_ids": each, "labels": each} for each in torch.randint(0, 16, (8, 2, 8))]
    model = make_model()
    if page == "training.md":
        ecospa_fx.compile(model, example_kwargs=batches[0])
    names = {
        "ecospa_fx": ecospa_fx,
        "torch": torch,
        "copy": copy,
        "make_model": make_model,
        "model": model,
        "steps": 40,
    }
    names |= {
        "model": model,
        "batches": batches,
        "loader": batches,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
    }
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    blocks = blocks[:1] if page == "healing.md" else blocks  # the others are parts of the loops of other libraries
    for block in blocks:
        exec(block, names)
    before = sum(p.numel() for p in make_model().parameters())
    shrunk = before - sum(p.numel() for p in names["model"].parameters())
    match page:
        case "training.md":
            assert sum(p.numel() for p in names["small"].parameters()) <= 0.36 * before
        case "sensitivity.md":
            assert "glu" in capsys.readouterr().out and not shrunk and names["target"].keys() >= {"glu"}
        case "healing.md":
            assert shrunk >= 0.28 * before and names["loss"].isfinite()


def make_model():
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=8, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=16, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_a_run_goes_on_with_the_lines_of_its_page(tmp_path, monkeypatch):
    """After the first hundred steps of the start page, saved; beside the run that never stopped."""
    monkeypatch.chdir(tmp_path)
    blocks = {page: re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL) for page in (
        "index.md", "checkpoints.md")}  # fmt: skip
    start, loop = blocks["index.md"][0].split("for step in range(300):\n")
    loop = loop.partition("\nprint")[0]
    save, load, resume, *_ = blocks["checkpoints.md"]
    torch.manual_seed(0)
    names = {}
    exec(f"{start}\nfor step in range(100):\n{loop}", names)
    shape = names["model"][0].weight.shape
    names["make"] = lambda: torch.nn.Sequential(
        torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 2)
    )
    exec(save, names)
    exec(f"for step in range(100, 300):\n{loop}", names)
    whole_run = [p.detach().clone() for p in names["model"].parameters()]
    exec(load, names)
    assert names["model"][0].weight.shape == shape != whole_run[0].shape
    torch.manual_seed(7)  # what a new process draws
    exec(resume.replace("    ...\n", loop), names)
    assert names["trainer"].steps == 300
    for one, other in zip(whole_run, names["model"].parameters(), strict=True):
        assert torch.equal(one, other)


def test_every_option_of_the_trainer_is_listed_with_its_default():
    listed = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", (DOCS / "options.md").read_text(), flags=re.MULTILINE))
    signature = inspect.signature(ecospa_fx.EcoSpaTrainer.__init__).parameters.values()
    options = {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY}
    assert listed.keys() == options.keys()
    assert {name: eval(text) for name, text in listed.items()} == options


def test_every_option_of_the_trainer_has_advice_and_is_explained_in_its_docstring():
    rows = re.findall(r"^\| `(\w+)` \| `.*?` \| ?(.*?) ?\| (.*) \|$", (DOCS / "options.md").read_text(), re.MULTILINE)
    explained = set(re.findall(r"^ {4,}(\w+): ", ecospa_fx.EcoSpaTrainer.__doc__, re.MULTILINE))
    assert len(rows) > 25 and {name for name, _, _ in rows} <= explained
    assert [name for name, _, advice in rows if len(advice) < 10] == []
    numbers = [name for name, unit, _ in rows if not unit]
    options = inspect.signature(ecospa_fx.EcoSpaTrainer.__init__).parameters
    assert [n for n in numbers if type(options[n].default) in (int, float) and n != "seed"] == []  # each has a unit


def test_every_error_is_in_the_index():
    text = (DOCS / "errors.md").read_text()
    errors = [name for name, each in vars(ecospa_fx.errors).items() if inspect.isclass(each)]
    assert len(errors) > 12
    assert not [name for name in errors if f"`{name}`" not in text and not text.count(f".{name}`")]


def test_what_is_raised_is_in_the_index_with_its_words():
    """The text of errors as they come, beside what was read off the source without running it."""
    messages = load(DOCS / "messages.py")
    index = messages.messages()
    assert index.keys() - {"CommandError", "OptionError"} == {
        name for name, each in vars(ecospa_fx.errors).items() if inspect.isclass(each)
    }
    assert [name for name, listed in index.items() if not listed] == []
    x, line = torch.ones(2, 3), torch.nn.Linear(3, 3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    compiled = ecospa_fx.compile(copy.deepcopy(model), example_inputs=(x,))
    optimizer = torch.optim.SGD(compiled.parameters())
    for wrong in (
        lambda: ecospa_fx.explain(model),
        lambda: ecospa_fx.couplings(model),
        lambda: ecospa_fx.couplings(ecospa_fx.compile(copy.deepcopy(model))),
        lambda: ecospa_fx.compile(copy.deepcopy(model), example_inputs=(x[:, :2],)),
        lambda: ecospa_fx.shrink(compiled, {"fnn": torch.tensor([0])}),
        lambda: ecospa_fx.shrink(compiled, {"ffn": torch.tensor([0, 7])}),
        lambda: ecospa_fx.shrink(compiled, {"ffn": torch.tensor([0])}, optimizer=torch.optim.SGD(line.parameters())),
        lambda: ecospa_fx.EcoSpaTrainer(compiled, optimizer, target=1.5),
        lambda: ecospa_fx.EcoSpaTrainer(compiled, optimizer, target=0.0001),
        lambda: ecospa_fx.load("nowhere", lambda: model),
        lambda: ecospa_fx.save_pretrained(compiled, "nowhere"),
        lambda: ecospa_fx.compile(3),
    ):
        with pytest.raises(ecospa_fx.errors.EcoSpaError) as raised:
            wrong()
        text = " ".join(str(raised.value).split())
        known = [re.escape(each.text) for each in index[type(raised.value).__name__]]
        known = [re.sub("‹[^›]*›|…", ".*", each) for each in known]
        assert [each for each in known if len(each) > 30 and re.fullmatch(each, text)], (
            f"{raised.type.__name__}: {text}"
        )


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_score_is_in_the_list():
    text = (DOCS / "scores.md").read_text()
    assert not [name for name in ecospa_fx.scores.SCORES if f'`"{name}"`' not in text]


def test_every_public_name_is_in_the_reference():
    named = {line.rpartition(".")[2] for line in (DOCS / "reference.md").read_text().splitlines() if line[:4] == "::: "}
    assert set(ecospa_fx.__all__) - {"errors"} <= named


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"(\w[\w-]*\.md)", (ROOT / "mkdocs.yml").read_text()))
    pages = {page.name for page in DOCS.glob("*.md")} | {f"{each.stem}.md" for each in NOTEBOOKS}
    assert len(NOTEBOOKS) == 3 and pages == listed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_is_stored_in_it(path, tmp_path, monkeypatch):
    """Numbers aside, which torch may round otherwise, and what a watch warns of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    texts, names = load(DOCS / "notebooks.py").run(path)
    stored = json.loads(path.read_text())["cells"]
    stored = ["".join("".join(out["text"]) for out in cell["outputs"]) for cell in stored if "outputs" in cell]
    words = [re.findall(r"[a-zA-Z_]{2,}", re.sub(r"(?m)^!.*", "", text)) for text in (*texts, *stored)]
    assert words[: len(texts)] == words[len(texts) :]
    match path.stem:
        case "explain":
            assert names["verification"].ok and (tmp_path / "found.html").exists()
        case "train":
            assert names["trainer"].done and names["trainer"].steps == 300 and texts[-1] == "(300, True)\n"
            assert abs(names["accuracy"](names["model"]) - names["accuracy"](names["dense"])) < 0.05
        case "compress":
            sizes = [sum(p.numel() for p in names[name].parameters()) for name in ("whole", "model")]
            assert sizes[1] <= 0.51 * sizes[0] and texts[-1] == "True\n"
            assert names["accuracy"](names["model"]) > names["accuracy"](names["plain"]) + 0.1


def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    assert "blocks.*" in (tmp_path / "notebooks" / "explain.html").read_text()
    reference = (tmp_path / "reference.html").read_text()
    assert "All messages" in (errors := (tmp_path / "errors.html").read_text())
    assert "is out of range" in errors and "<!-- messages" not in errors
    assert "optimizer state" in reference and "EcoSpaTrainer" in reference
