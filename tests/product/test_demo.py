"""The demo's parts that need no training: corpus, ablation, options, report."""

import csv
import io
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from ecospa_fx.cli import main
from ecospa_fx.demo.ablation import break_pairing, own_order
from ecospa_fx.demo.corpus import Corpus, read_corpus, split_by_file, training_batches, validation_batches
from ecospa_fx.demo.options import OptionError, Options
from ecospa_fx.demo.plot import save_plot
from ecospa_fx.demo.report import rows_of, table_of, write_results
from ecospa_fx.demo.timing import Ratio
from ecospa_fx.demo.train import Run, learning_rate


def member(parameter, dim, index, of=None):
    return SimpleNamespace(
        parameter=parameter, dim=dim, index=torch.as_tensor(index), matrix=of is None, of=of or parameter
    )


class Coupling(SimpleNamespace):
    __hash__ = object.__hash__


class Toy(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.up = nn.Linear(3, inner)
        self.down = nn.Linear(inner, 3)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "books"
    (root / "more").mkdir(parents=True)
    (root / ".hidden").mkdir()
    for number in range(20):
        (root / ("more" if number % 2 else ".") / f"{number}.txt").write_bytes(bytes([65 + number]) * 1000)
    (root / "image.bin").write_bytes(b"\0" * 1000)
    (root / ".hidden" / "secret.txt").write_bytes(b"?" * 1000)
    return root


def test_a_folder_is_split_by_file_the_same_way_every_time(folder):
    train, valid = split_by_file(folder)
    assert (train, valid) == split_by_file(folder)
    assert len(train) == 18_000 and len(valid) == 2_000
    assert not set(train) & set(valid)
    assert set(train) | set(valid) == set(range(65, 85))  # neither the binary nor the hidden file


def test_the_split_does_not_depend_on_where_the_folder_lies(folder, tmp_path):
    before = split_by_file(folder)
    assert split_by_file(folder.rename(tmp_path / "moved")) == before


def test_the_end_of_a_single_file_is_held_out(tmp_path):
    file = tmp_path / "book.txt"
    file.write_bytes(bytes(range(100)))
    corpus = read_corpus(file, least=100)
    assert corpus.train.tolist() == list(range(90))
    assert corpus.valid.tolist() == list(range(90, 100))
    assert corpus.source == "book.txt"


def test_the_standard_library_is_the_default_and_large_enough():
    corpus = read_corpus(None, least=1_000_000)
    again = read_corpus(None, least=1_000_000)
    assert torch.equal(corpus.train, again.train) and torch.equal(corpus.valid, again.valid)
    assert 0.05 < len(corpus.valid) / (len(corpus.train) + len(corpus.valid)) < 0.15


def test_batches_repeat_with_their_seed_and_targets_are_the_next_bytes():
    text = torch.arange(200, dtype=torch.uint8)
    corpus = Corpus(text, text, "numbers")
    first, second = (list(training_batches(corpus, 3, 4, 8, seed=7)) for _ in range(2))
    for (x, y), (x_again, y_again) in zip(first, second):
        assert x.shape == y.shape == (4, 8)
        assert torch.equal(y, x + 1)
        assert torch.equal(x, x_again) and torch.equal(y, y_again)
    held_out = [x for x, _ in validation_batches(corpus, 3, 4, 8)]
    assert [len(x) for x in held_out] == [4, 4, 4]
    assert held_out[0][0, 0] == 0 and held_out[-1][-1, -1] == 198


def test_own_order_brings_the_largest_slices_to_the_kept_positions():
    weight = torch.diag(torch.tensor([4.0, 1.0, 3.0, 2.0]))
    order = own_order(weight, 0, torch.arange(4), keep=torch.tensor([1, 3]))
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert order[[1, 3]].tolist() == [0, 2]
    assert order[[0, 2]].tolist() == [1, 3]


def test_own_order_changes_nothing_where_the_choice_agrees():
    weight = torch.diag(torch.tensor([1.0, 4.0, 2.0, 3.0]))
    assert own_order(weight, 1, torch.arange(4), keep=torch.tensor([1, 3])).tolist() == [0, 1, 2, 3]


def test_own_order_moves_all_slices_of_a_position_together_and_leaves_other_couplings_alone():
    # Two heads of three dims, then two slices of another coupling; dims weigh 4, 2, 5 over both heads.
    norms = torch.tensor([3.0, 1.0, 2.0, 1.0, 1.0, 3.0, 9.0, 9.0]).sqrt()
    index = torch.tensor([0, 1, 2, 0, 1, 2, -1, -1])
    order = own_order(torch.diag(norms), 0, index, keep=torch.tensor([0, 1]))
    assert order.tolist() == [0, 2, 1, 3, 5, 4, 6, 7]


def test_own_order_can_let_each_copy_choose():
    # Q of one head, then K of the same head, in one matrix: Q keeps 0 and 2, K keeps 1 and 2.
    norms = torch.tensor([3.0, 1.0, 2.0, 1.0, 2.0, 3.0])
    index = torch.tensor([0, 1, 2, 0, 1, 2])
    order = own_order(torch.diag(norms), 0, index, keep=torch.tensor([0, 1]), together=False)
    assert order.tolist() == [0, 2, 1, 4, 5, 3]


@pytest.mark.parametrize(("together", "expected"), [(True, [2, 3, 0, 1]), (False, [2, 1, 0, 3])])
def test_own_order_handles_interleaved_slices(together, expected):
    norms = torch.tensor([1.0, 5.0, 4.0, 4.0])
    order = own_order(torch.diag(norms), 0, torch.tensor([0, 0, 1, 1]), torch.tensor([0]), together=together)
    assert order.tolist() == expected


def test_own_order_refuses_positions_that_cannot_trade_places():
    with pytest.raises(ValueError, match=r"^positions own between 1 and 2 slices; they cannot trade places$"):
        own_order(torch.eye(3), 0, torch.tensor([0, 0, 1]), keep=torch.tensor([0]))


def test_break_pairing_reorders_each_matrix_alone_with_its_bias_and_moments():
    torch.manual_seed(0)
    model = Toy(inner=4)
    with torch.no_grad():
        model.up.weight.copy_(torch.tensor([4.0, 3.0, 2.0, 1.0])[:, None].expand(4, 3))
        model.up.bias.copy_(torch.tensor([40.0, 30.0, 20.0, 10.0]))
        model.down.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(3, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model.down(model.up(torch.randn(2, 3))).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():  # moments that say where their slice came from
            optimizer.state[parameter]["exp_avg"].copy_(parameter)
            optimizer.state[parameter]["exp_avg_sq"].copy_(parameter)
    down_bias = model.down.bias.clone()
    parameters = list(model.parameters())
    everything = torch.arange(4)
    coupling = Coupling(
        name="ffn",
        size=4,
        members=[
            member("up.weight", 0, everything),
            member("up.bias", 0, everything, of="up.weight"),
            member("down.weight", 1, everything),
        ],
    )

    break_pairing(model, {coupling: torch.tensor([2, 3])}, optimizer)

    assert model.up.weight[:, 0].tolist() == [2.0, 1.0, 4.0, 3.0]
    assert model.up.bias.tolist() == [20.0, 10.0, 40.0, 30.0]
    assert model.down.weight[0].tolist() == [1.0, 2.0, 3.0, 4.0]  # its own choice already: the pairing is lost
    assert torch.equal(model.down.bias, down_bias)
    assert all(a is b for a, b in zip(parameters, model.parameters()))
    for parameter in model.parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], parameter)
        assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], parameter)


def test_break_pairing_parts_q_from_k_in_one_fused_matrix():
    model = nn.Sequential(nn.Linear(1, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [2.0], [4.0], [3.0]]))
    coupling = Coupling(name="qk", size=2, members=[member("0.weight", 0, [0, 1, 0, 1])])
    break_pairing(model, {coupling: torch.tensor([0])}, torch.optim.SGD(model.parameters()))
    assert model[0].weight.flatten().tolist() == [2.0, 1.0, 4.0, 3.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "1.5"], "--target 1.5 is not between 0 and 1; 0.5 keeps half of the parameters"),
        (["--target", "nan"], "--target nan is not between 0 and 1; 0.5 keeps half of the parameters"),
        (["--text", "no/such"], "--text no/such: no such file or folder"),
        (["--steps", "3"], "--steps 3 is too small; the minimum is 20"),
        (["--width", "50"], "--width 50 is not a positive multiple of 32, the width of one head"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many' (see --help)"),
        (
            ["--arch", "gpt17"],
            "--arch gpt17: transformers has no such model type; try gpt2, llama, gpt_neox or qwen2",
        ),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path):
    out = tmp_path / "out"
    try:
        code = main(["demo", "--out", str(out), *arguments])
    except SystemExit as stopped:  # argparse's own way out
        code = stopped.code
    assert code == 2
    assert capsys.readouterr().err == f"python -m ecospa_fx demo: error: {message}\n"
    assert not out.exists()


def test_too_little_text_says_how_much_is_needed(tmp_path, capsys):
    file = tmp_path / "note.txt"
    file.write_text("short")
    assert main(["demo", "--text", str(file)]) == 2
    assert capsys.readouterr().err.endswith("note.txt holds 5 bytes of text; this batch size and context need 20,640\n")


def test_a_folder_with_one_file_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "only.txt").write_text("x" * 100)
    with pytest.raises(OptionError, match="holds a single file of text; name that file itself"):
        read_corpus(tmp_path, least=10)


def test_help_shows_examples_and_exit_codes():
    command = [sys.executable, "-m", "ecospa_fx", "demo", "--help"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "examples:" in finished.stdout and "--arch llama" in finished.stdout
    assert "exit codes: 0" in finished.stdout


def test_the_schedule_shrinks_about_ten_times_and_leaves_time_to_recover():
    options = Options()
    assert 8 <= (options.end - options.start) / options.interval <= 12
    assert options.end <= 0.8 * options.steps


def test_the_learning_rate_rises_then_falls():
    rates = [learning_rate(step, 100) for step in range(1, 101)]
    assert rates.index(max(rates)) == 4
    assert rates[:5] == sorted(rates[:5]) and rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.1 * max(rates))


@pytest.fixture
def runs():
    def run(name, parameters, loss):
        model = Toy(inner=parameters)
        made = Run(name, model, torch.optim.AdamW(model.parameters()))
        for step in range(1, 41):
            made.losses.append(5 * math.exp(-step / 20) + loss)
            made.sizes.append(1000 if step < 20 else parameters * 100)
            made.seconds.append(0.2 if step < 20 else parameters / 100)
        made.valid = [(step, made.losses[step - 1]) for step in (10, 20, 30, 40)]
        made.shrinks = [20] if parameters < 10 else []
        made.final_loss = loss
        return made

    return [run("dense", 10, 1.0), run("EcoSpa", 5, 1.1), run("uncoupled", 5, 1.5)]


RATIOS = {"dense": Ratio(1, 1, 1), "EcoSpa": Ratio(0.6, 0.55, 0.65), "uncoupled": Ratio(0.61, 0.56, 0.66)}


def test_rows_compare_with_dense(runs):
    dense, ecospa, _ = rows_of(runs, RATIOS)
    assert (dense.parameters_ratio, dense.validation_loss_ratio, dense.state_bytes_ratio) == (1, 1, 1)
    assert ecospa.parameters_ratio == 0.5
    assert ecospa.perplexity == pytest.approx(math.exp(1.1))
    assert ecospa.perplexity_ratio == pytest.approx(math.exp(0.1))
    assert ecospa.step_ms == pytest.approx(50)
    assert dense.step_ms == pytest.approx(100)  # over the same steps, although it never shrank
    assert ecospa.step_ratio == 0.6


def test_the_table_fits_80_columns_and_shows_every_ratio(runs):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table_of(rows_of(runs, RATIOS)))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for expected in ("dense", "EcoSpa", "uncoupled", "x 0.500", "x 1.100", "x 0.60", "(0.55-0.65)", "3.004"):
        assert expected in text, text


def test_results_and_plot_are_written(runs, tmp_path):
    options = Options(out=tmp_path)
    corpus = Corpus(torch.zeros(90, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8), "zeros")
    rows = rows_of(runs, RATIOS)
    write_results(tmp_path, rows, runs, options, corpus)
    save_plot(runs, tmp_path / "curves.png", "fake")
    written = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row["run"] for row in written] == ["dense", "EcoSpa", "uncoupled"]
    assert float(written[1]["parameters_ratio"]) == 0.5
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["curves"]["EcoSpa"]["shrinks"] == [20]
    assert len(results["curves"]["dense"]["train_loss"]) == 40
    assert str(tmp_path.parent) not in json.dumps(results)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
