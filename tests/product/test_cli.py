"""The command line: what it prints, and one line with the right exit code for whatever goes wrong."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import ecospa_fx
from ecospa_fx import cli, graphs
from ecospa_fx.cli import main, training
from ecospa_fx.cli.models import fields_of, named_model

OWN = """
import torch
from torch import nn


def make(hidden=24):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 8)), torch.randn(2, 8)


def silent():
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8))


def broken():
    raise ValueError("out of luck")


def text():
    return "no model"


def batches():
    torch.manual_seed(1)
    return torch.randn(8, 16, 8)


def wide():
    return torch.randn(8, 16, 9)


def endless():
    raise OSError("no such data")
"""
COMMANDS = ["explain", "verify", "graph", "report", "compress", "shrink", "train"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A directory of one's own with a model in it, 80 columns wide."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def run(capsys, *arguments):
    code = main(list(arguments))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def out_of(file):
    return Path(file).read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one"], "name two or more runs: ecospa-fx compare runs/one runs/other"),
        (["one", "./one"], "a run is named twice"),
        (["nowhere", "one"], "nowhere cannot be read as training.json: No such file or directory"),
        (["own.py", "one"], "own.py cannot be read as training.json: "),
    ],
)
def test_compare_says_what_is_wrong_in_one_line(capsys, here, arguments, message):
    (here / "one").mkdir()
    code, out, err = run(capsys, "compare", *arguments)
    assert (code, out) == (2, "") and err.startswith(f"ecospa-fx compare: error: {message}") and err.count("\n") == 1


def with_out(command, out="out"):
    """The least arguments that a command takes, its output where none is in the way."""
    writes = ["--out", out] if command in ("compress", "shrink", "train", "report") else []
    return [command, "own.py:make", *writes, *(["--batches", "own.py:batches"] if command == "compress" else [])]


def test_explain_a_file_of_ones_own(capsys):
    code, out, err = run(capsys, "explain", "own.py:make")
    assert (code, err) == (0, "")
    assert [line.rstrip() for line in out.splitlines()] == [
        "Sequential: 1 coupling in the whole model",
        "",
        "the model itself",
        "  coupling  size  times  between    members",
        "  ffn         24      1  pointwise  0.weight[0] 0.bias[0] 2.weight[1]",
        "",
        "On no coupling, and why:",
        "  it leaves the region as output 0: 2.weight[0] and 1 more",
        "  no weight of the region produces the entries that it sums over: 0.weight[1]",
    ]


@pytest.mark.parametrize("name", ["hf/llama", "hf/qwen3", "hf/mixtral", "timm/vit_tiny_patch16_224"])
def test_explain_reads_well_on_80_columns(capsys, name):
    code, out, _ = run(capsys, "explain", name, *(["--full"] if name.startswith("timm") else []))
    assert code == 0 and "heads" in out and "Refused, and why:" in out
    assert max(map(len, out.splitlines())) <= 80


def test_why_not_sees_through_the_norm(capsys):
    code, out, _ = run(capsys, "explain", "hf/qwen3", "--why-not", "layers.1.self_attn.q_proj")
    words = " ".join(out.split())
    assert code == 0
    assert "model.layers.1.self_attn.q_proj.weight[0] can shrink along its axis of 4 (of 64 in all)" in words
    assert "[1] has no partner along its axis" in words


def test_explain_as_json_markdown_and_to_a_file(capsys, here):
    document = json.loads(run(capsys, "explain", "own.py:make", "--json", "--set", "hidden=10")[1])
    assert document["couplings"][0]["size"] == 10
    code, out, _ = run(capsys, "explain", "own.py:make", "--markdown", "--out", "deep/found.md")
    assert (code, out) == (0, "") and "| ffn | 24 | 1 |" in (here / "deep/found.md").read_text()
    sentences = json.loads(run(capsys, "explain", "own.py:make", "--why", "0,2", "--json")[1])
    assert sentences["ffn"][1].startswith("aten.relu takes it to relu[1]: ")
    assert "hidden" not in run(capsys, "explain", "own.py:make", "--savings")[1]
    assert "416 parameters" in run(capsys, "explain", "own.py:make", "--summary")[1]


@pytest.mark.parametrize("form", [name for name in graphs.WRITERS if name != "svg" or shutil.which("dot")])
def test_graph_offers_every_format_and_level(capsys, here, form):
    for level, draw in graphs.LEVELS.items():
        code, out, err = run(capsys, "graph", "own.py:make", "--format", form, "--level", level)
        assert (code, err) == (0, "")
        model, inputs = named_model("own.py:make").model, named_model("own.py:make").args
        assert out == graphs.WRITERS[form](draw(ecospa_fx.explain(model, example_inputs=inputs))) + "\n"
    assert "|".join(graphs.WRITERS) in "".join(run(capsys, "graph", "--help")[1].split())


def test_verify(capsys, here):
    code, out, _ = run(capsys, "verify", "own.py:make", "--out", "proof.json", "--json")
    document = json.loads(out)
    assert code == 0 and document == json.loads((here / "proof.json").read_text())
    assert document["ok"] and [c["name"] for c in document["comparisons"]] == ["ffn", "all of the model"]
    assert "exact: 2 comparisons" in run(capsys, "verify", "own.py:make")[1]


def test_verify_fails_with_1_where_something_differs(capsys, monkeypatch):
    real = ecospa_fx.verify

    def doubtful(*args, **kwargs):
        result = real(*args, **kwargs)
        object.__setattr__(result.by_coupling["ffn"], "output_error", 1.0)
        return result

    monkeypatch.setattr(ecospa_fx, "verify", doubtful)
    code, out, err = run(capsys, "verify", "own.py:make")
    assert code == 1 and "DIFFERS" in out
    assert err == "ecospa-fx verify: error: some couplings differ from masking; please report this model\n"


def test_shrink_to_multiples_per_kind(capsys):
    arguments = ["--target", "0.5", "--out", "small", "--uniform", "layers", "--multiple-of", "ffn=8", "--json"]
    code, out, _ = run(capsys, "shrink", "own.py:make", *arguments)
    assert code == 0 and json.loads(out)["layers"]["0.weight"][1] == [16, 8]  # 12 would be half


def test_shrink_saves_what_load_reads_and_every_command_takes(capsys, here):
    code, out, _ = run(capsys, "shrink", "own.py:make", "--target", "0.5", "--out", "small")
    assert code == 0 and "x 0." in out and "saved to small" in out
    code, out, _ = run(capsys, "explain", "small", "--factory", "own.py:make")
    assert code == 0 and "of 24" in out
    code, _, err = run(capsys, "explain", "small")
    assert (code, err) == (2, "ecospa-fx explain: error: small was made by a factory; pass --factory FILE.PY:NAME\n")
    given = ["small", "--factory", "own.py:silent", "--input", "2x8"]  # a factory without inputs of its own
    code, out, _ = run(capsys, "explain", *given)
    assert code == 0 and "of 24" in out
    code, out, _ = run(
        capsys, "shrink", "small", "--factory", "own.py:make", "--target", "0.3", "--out", "less", "--json"
    )
    assert code == 0 and json.loads(out)["parameters"] <= 0.3 * 416 + 17


def test_train_on_text_writes_model_curves_and_report(capsys, here):
    (here / "book.txt").write_text("To be, or not to be, that is the question. " * 200)
    (here / "run.toml").write_text('steps = 12\nbatch-size = 2\ncontext = 16\ntext = "book.txt"\ntarget = 0.9\n')
    code, out, err = run(
        capsys, "train", "hf/gpt2", "--config", "run.toml", "--target", "0.6", "--trainer", "top_k=0.5", "--out", "run",
        "--json", "--tensorboard", "board",
    )  # fmt: skip
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert list((here / "board").iterdir())
    lines = [json.loads(line) for line in (here / "run/history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "event" not in line] == list(range(1, 13))
    assert sum(line.get("event") == "shrink" for line in lines) == document["shrinks"]
    assert document["parameters"] <= 0.61 * document["original_parameters"]  # the command line wins over the file
    training = json.loads((here / "run/training.json").read_text())
    assert len(training["loss"]) == 12 and training["sizes"][-1] == document["parameters"]
    assert all(entry["importance"] for entry in training["history"])
    assert "Importance of each coupling" in (here / "run/report.html").read_text()
    code, out, _ = run(capsys, "report", "run/model", "--training", "run/training.json", "--out", "again.html")
    assert code == 0 and "again.html: 8 couplings" in out
    latency = training["latency"]
    assert latency["after"] > 0 and latency["before"] > 0 and f"(x {latency['ratio']:.2f}" in out_of("again.html")
    training["settings"]["target"] = 0.7
    (here / "other").mkdir()
    (here / "other/training.json").write_text(json.dumps(training))
    code, out, err = run(capsys, "compare", "run", "other", "--out", "side.html")
    lines = [line.split() for line in out.splitlines()]
    assert (code, err) == (0, "") and ["run", "other"] in lines and ["steps", "12", "12"] in lines
    assert ["target", "0.6", "0.7"] in lines and not [line for line in lines if line[:1] == ["seed"]]
    assert "Held-out loss" in out_of("side.html")
    document = json.loads(run(capsys, "compare", "run", "other/training.json", "--json")[1])
    assert document["names"] == ["run", "training.json"] and document["settings"] == {"target": [0.6, 0.7]}
    whole, left = document["rows"]["parameters at first"], document["rows"]["parameters"]
    assert document["rows"]["share left"][0] == left[0] / whole[0] and whole[0] > left[0]


def test_train_on_images(capsys, here):
    for label, colour in (("red", (200, 20, 20)), ("blue", (20, 20, 200))):
        (here / "photos" / label).mkdir(parents=True)
        for number in range(12):
            shade = tuple(min(255, c + number) for c in colour)
            Image.new("RGB", (40, 30), shade).save(here / "photos" / label / f"{number}.png")
    small = ["embed_dim=48", "depth=1", "num_heads=3", "img_size=32"]
    settings = [word for field in small for word in ("--set", field)]
    code, out, err = run(
        capsys, "train", "timm/vit_tiny_patch16_224", "--images", "photos", "--steps", "6", "--batch-size", "2",
        "--target", "0.9", "--start", "1", "--end", "4", "--interval", "1", "--out", "run", "--json", *settings,
    )  # fmt: skip
    assert (code, err) == (0, "") and json.loads(out)["shrinks"] >= 1
    assert len(named_model("run/model").call["example_inputs"]) == 1  # it knows what made it


def test_doctor_says_what_is_wrong_and_the_cure(capsys, monkeypatch):
    from ecospa_fx.cli import doctor

    code, out, _ = run(capsys, "doctor", "--json")
    document = json.loads(out)
    assert code == (0 if document["ok"] else 1)
    assert {"torch", "gpu", "triton", "torchvision"} <= {finding["what"] for finding in document["findings"]}
    monkeypatch.setattr(torch, "__version__", "2.3.0")
    monkeypatch.setattr(doctor, "_torchvision", lambda: doctor.Finding("torchvision", "fine"))
    code, out, err = run(capsys, "doctor")
    assert code == 1 and "!!" in out and "pip install 'torch>=2.11'" in " ".join(out.split())
    assert err == "ecospa-fx doctor: error: torch: see the cure above\n"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf/lama", "transformers has no model type `lama`; similar names: llama, "),
        ("nowhere", "there is no model `nowhere`: name hf/TYPE (hf/llama), timm/NAME, a directory that is there, or "),
        ("none.py:make", "there is no file none.py"),
        ("own.py:absent", "own.py has no factory `absent`; it has "),
    ],
)
def test_an_unknown_model_is_one_line_and_exit_code_2(capsys, command, name, message):
    arguments = with_out(command)
    arguments[1] = name
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"ecospa-fx {command}: error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("timm/vit_tini", 2, "timm has no model `vit_tini`; similar names: "),
        ("own.py:silent", 2, "the inputs of own.py:silent are unknown: pass --input 2x16:long for each, "),
        ("own.py:broken", 1, "own.py:broken failed with ValueError: out of luck"),
        ("own.py:text", 2, "own.py:text returns a str, not a module or (module, inputs)"),
        ("empty", 2, "empty holds no model: neither checkpoint.json (ecospa_fx.save) nor config.json (transformers)"),
    ],
)
def test_models_that_cannot_be_made(capsys, here, name, code, message):
    (here / "empty").mkdir()
    returned, _, err = run(capsys, "explain", name)
    assert returned == code and err.startswith(f"ecospa-fx explain: error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unwritable_path_is_found_before_any_work(capsys, here, command, monkeypatch):
    monkeypatch.setattr(cli.models, "named_model", lambda *_, **__: pytest.fail("it worked in vain"))
    arguments = [*with_out(command), "--out", "own.py/inside"]
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err == f"ecospa-fx {command}: error: own.py/inside cannot be written: Not a directory\n"


def test_compress_saves_and_says_what_it_cost(capsys):
    code, out, err = run(capsys, *with_out("compress", "small"), "--target", "0.6")
    assert (code, err) == (0, "") and out.startswith("416 -> ") and "ffn: 24 -> " in out
    given = ["--target", "0.5", "--factory", "own.py:make", "--out", "less", "--batches", "own.py:batches", "--json"]
    document = json.loads(run(capsys, "compress", "small", *given)[1])
    assert document["parameters"] < 0.55 * 416 and document["out"] == "less" and document["widths"].keys() == {"ffn"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--text", "x"], 2, "pass either --text FILE or --batches FILE.PY:NAME, the data that the model is for"),
        (["--target", "0.001"], 1, "target=0.001 of 416 parameters is 1, but the couplings reach down to "),
        (["--kinds", "glue"], 1, "kinds='glue' is none of "),
        (["--batches", "own.py:none"], 2, "own.py has no factory `none`; it has "),
        (["--batches", "own.py:endless"], 1, "--batches own.py:endless failed with OSError: no such data"),
        (["--batches", "own.py:wide"], 1, "batch 0 does not fit the model: "),
    ],
)
def test_compress_says_what_is_wrong_in_one_line(capsys, arguments, code, message):
    returned, out, err = run(capsys, *with_out("compress"), *arguments)
    assert (returned, out) == (code, "")
    assert err.startswith(f"ecospa-fx compress: error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_interrupted_is_one_line_and_130(capsys, command, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for module in (cli.models, training):
        monkeypatch.setattr(module, "named_model", interrupt)
    code, _, err = run(capsys, *with_out(command))
    assert (code, err) == (130, f"ecospa-fx {command}: interrupted\n")


def test_doctor_is_interrupted_too(capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.doctor, "findings", interrupt)
    assert run(capsys, "doctor")[::2] == (130, "ecospa-fx doctor: interrupted\n")


def command_line(*arguments, **environment):
    command = [sys.executable, "-m", "ecospa_fx", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )


def test_ctrl_c_in_the_middle_of_training(here):
    slow = OWN.replace("return nn.Seq", "open('begun', 'w'); import time; time.sleep(60)\n    return nn.Seq", 1)
    (here / "slow.py").write_text(slow)
    # A process started in the background is told to ignore interrupts; its children would be too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = command_line("explain", "slow.py:make")
    finally:
        signal.signal(signal.SIGINT, before)
    while not Path("begun").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "ecospa-fx explain: interrupted\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_network(capsys, command, monkeypatch):
    import transformers

    def offline(name, **_):
        raise OSError(f"We couldn't connect to the hub to load {name}.\nCheck your internet connection.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    arguments = with_out(command)
    arguments[1] = "hf/someone/model"
    code, _, err = run(capsys, *arguments)
    assert code == 1 and err == (
        f"ecospa-fx {command}: error: the configuration of `someone/model` cannot be read from the hub: We couldn't "
        "connect to the hub to load someone/model. Without a network, name hf/TYPE or a directory\n"
    )


def test_a_real_hub_that_is_out_of_reach_is_one_line():
    process = command_line("explain", "hf/someone/model", HF_HUB_OFFLINE="1")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1 and "cannot be read from the hub" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain"], "ecospa-fx explain: error: Missing argument 'MODEL'. (see --help)"),
        (["explain", "own.py:make", "--nope"], "ecospa-fx explain: error: No such option: --nope "),
        (
            ["explain", "own.py:make", "--set", "x"],
            "ecospa-fx explain: error: `x` is not of the form FIELD=VALUE, such as hidden_size=64",
        ),
        (
            ["explain", "own.py:make", "--why", "0"],
            "ecospa-fx explain: error: --why 0: give two names of weights, separated by a comma: --why q_proj,k_proj",
        ),
        (
            ["explain", "own.py:silent", "--input", "2,8"],
            "ecospa-fx explain: error: --input 2,8: write a shape and, after a colon, a dtype: 2x16:long, 1x3x32x32",
        ),
        (
            ["explain", "own.py:make", "--why-not", "9"],
            "ecospa-fx explain: error: the model has no parameter or module `9`",
        ),
        (
            ["explain", "own.py:make", "--regions", "up"],
            "ecospa-fx explain: error: regions: Sequential has no submodule ",
        ),
        (
            ["graph", "own.py:make", "--format", "png"],
            "ecospa-fx graph: error: Invalid value for '--format' / '-f': ",
        ),
        (["shrink", "own.py:make", "--out", "own.py"], "ecospa-fx shrink: error: own.py is a file; name a directory"),
        (
            ["shrink", "own.py:make", "--out", "x", "--multiple-of", "ffn"],
            "ecospa-fx shrink: error: --multiple-of ffn is not a kind and a number, heads=2",
        ),
        (
            ["shrink", "own.py:make", "--out", "x", "--multiple-of", "ffn=64"],
            "ecospa-fx shrink: error: multiple_of['ffn']=64 is more than the 24 of `ffn`; choose at most 24, or keep "
            "it whole with frozen=['ffn']",
        ),
        (
            ["shrink", "own.py:make", "--out", "x", "--deployable", "transformers"],
            "ecospa-fx shrink: error: deployable='transformers': Sequential is not a model of transformers: it has no "
            "save_pretrained",
        ),
        (
            ["shrink", "own.py:make", "--out", "x", "--target", "2"],
            "ecospa-fx shrink: error: target=2.0 is out of range; it is a share, above 0 and at most 1",
        ),
        (["train", "hf/gpt2", "--text", "absent"], "ecospa-fx train: error: --text absent: no such file or folder"),
        (["train", "hf/gpt2", "--images", "absent"], "ecospa-fx train: error: --images absent: no such folder"),
        (
            ["train", "hf/gpt2", "--trainer", "speed=9"],
            "ecospa-fx train: error: --trainer speed: EcoSpaTrainer has no such setting; it has target, ",
        ),
        (["train", "hf/gpt2", "--config", "own.py"], "ecospa-fx train: error: --config own.py cannot be read: "),
        (
            ["report", "own.py:make", "--training", "own.py"],
            "ecospa-fx report: error: own.py cannot be read as training.json: ",
        ),
        (["demo", "--target", "3"], "python -m ecospa_fx demo: error: --target 3 is not between 0 and 1"),
        (["conjure"], "ecospa-fx conjure: error: No such command 'conjure'"),
    ],
)
def test_mistakes_in_options_are_one_line(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code in (1, 2) and out == "" and err.count("\n") == 1
    assert err.startswith(message), err


def test_every_setting_of_the_trainer_can_be_set(capsys):
    import inspect

    settings = [name for name in inspect.signature(ecospa_fx.EcoSpaTrainer).parameters if name not in training.OWN]
    assert all(training.more_settings([f"{name}=1"]) == {name: 1} for name in settings)


def test_fields_are_values_where_they_look_like_some():
    given = ["a=1", "b=0.5", "c=True", "d=[1, 2]", "e=gelu", "f='1'"]
    assert fields_of(given) == {"a": 1, "b": 0.5, "c": True, "d": [1, 2], "e": "gelu", "f": "1"}


@pytest.mark.parametrize("command", [*COMMANDS, "doctor", "demo"])
def test_help_shows_examples(capsys, command):
    with pytest.raises(SystemExit) if command == "demo" else __import__("contextlib").nullcontext():
        assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "xamples:" in out and f"{command} " in out


def test_completion_offers_commands_and_options(capsys, monkeypatch):
    command = command_line("_", _ECOSPA_FX_COMPLETE="complete_bash", COMP_WORDS="ecospa-fx ex", COMP_CWORD="1")
    out, _ = command.communicate(timeout=120)
    assert out.split() == ["explain"]


def test_help_fits_80_columns_and_no_sentence_is_cut_short(capsys):
    code, out, _ = run(capsys, "--help")
    commands = re.findall(r"^  ([a-z-]+) {2,}\S", out.partition("Commands:")[2], flags=re.MULTILINE)
    assert code == 0 and {*COMMANDS, "doctor", "demo"} <= {*commands}
    assert "..." not in out.partition("Commands:")[2]
    for command in commands:
        with contextlib.suppress(SystemExit):  # of the demo's own parser
            main([command, "--help"])
        shown = capsys.readouterr().out.splitlines()
        assert [line for line in shown if len(line) > 80] == [], command


def test_long_lines_go_on_further_in(capsys):
    _, out, _ = run(capsys, "explain", "hf/gpt2", "--why", "h.0.attn.c_attn,h.0.attn.c_proj")
    lines = [line.rstrip() for line in out.splitlines()]
    steps = [line for line in lines if re.match(r" +\d+\. ", line)]
    assert steps and max(map(len, lines)) <= 80
    others = [line for line in lines if line and line not in steps]
    assert len(others) > len(steps) and all(line.startswith(("  ", "transformer.h.0.attn.")) for line in others), out
