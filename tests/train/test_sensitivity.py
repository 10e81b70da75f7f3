"""Sensitivity: what it measures, that nothing is left of it, and the shares that it leads to."""

from __future__ import annotations

import copy
import csv
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ecospa_fx
from ecospa_fx import errors


class Blocks(nn.Module):
    """Two blocks. Half of the hidden units of the first do nothing, and the second does much."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(2))
        with torch.no_grad():
            self.blocks[0]["down"].weight[:, ::2] = 0
            self.blocks[1]["down"].weight.mul_(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        for block in self.blocks:
            x = x + block["down"](F.gelu(block["up"](x)))
        return x


def loss(model, batch):
    return (model(batch) - 1).square().mean()


def rise(smaller, batches):
    """What the library takes by default of a model that has no loss of its own, in plain words."""
    differences = [smaller(batch) - Blocks()(batch) for batch in (batches[1], batches[3])]
    return float(sum(each.square().sum() / (2 * len(each)) for each in differences) / 2)


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(16, 6, generator=generator) for _ in range(4)]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("execution", [None, "graph", "module"])
def test_measured_and_put_back(batches, execution):
    model = Blocks()
    if execution is not None:
        ecospa_fx.compile(model, example_inputs=(batches[0],), execution=execution)
    model.train()
    model.blocks[0]["up"].weight.requires_grad_(False)
    before, drawn, kind = state(model), torch.get_rng_state(), type(model)
    table = ecospa_fx.sensitivity(model, batches, shares=[0.5, 0.75], by="layer")
    plain = Blocks()
    with torch.no_grad():
        assert table.loss == 0
        # The units of the first block that do nothing are the first to go, and go for nothing.
        assert table.curve("ffn", "blocks.0")[1] == (0.5, pytest.approx(0, abs=1e-6))
        others = {}
        for unit in (1, 3, 5, 7):  # three quarters gone leaves two units of the four that count
            for other in range(unit + 2, 8, 2):
                smaller = Blocks()
                gone = [i for i in range(8) if i not in (unit, other)]
                smaller.blocks[0]["down"].weight[:, gone] = 0
                others[unit, other] = rise(smaller, batches)
        measured = {(row.layer, row.share): row.loss for row in table.measured}
        assert any(measured["blocks.0", 0.75] == pytest.approx(value, rel=1e-5) for value in others.values())
        assert measured["blocks.1", 0.5] > measured["blocks.0", 0.5]
    after = state(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), drawn) and type(model) is kind and model.training
    assert not model.blocks[0]["up"].weight.requires_grad and model.blocks[1]["up"].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    if execution is not None:
        assert [c.size for c in ecospa_fx.couplings(model)] == [8, 8]
    torch.testing.assert_close(model(batches[0]), plain(batches[0]))
    with torch.no_grad():
        mean = float(loss(plain, batches[1]) + loss(plain, batches[3])) / 2
    table = ecospa_fx.sensitivity(Blocks(), batches, loss=loss, shares=[0.5])
    assert table.loss == pytest.approx(mean, rel=1e-5)


def test_table_and_files(batches, tmp_path):
    table = ecospa_fx.sensitivity(Blocks(), batches, loss=loss, by="layer")
    text = str(table)
    assert max(map(len, text.splitlines())) <= 80 and "ffn blocks.1" in text and "-25%" in text
    rows = list(csv.DictReader(io.StringIO(table.to_csv(tmp_path / "table.csv"))))
    assert (tmp_path / "table.csv").read_text() == table.to_csv()
    assert [row["entries"] for row in rows] == ["1", "2", "4"] * 2  # a tenth of eight is one
    assert float(rows[-1]["rise"]) == pytest.approx(float(rows[-1]["loss"]) - table.loss)
    figure = table.plot(tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 5000 and len(figure.axes[0].lines) == 2
    with pytest.raises(errors.EcoSpaError, match="cannot be written"):
        table.plot(tmp_path / "nowhere" / "table.png")
    with pytest.raises(errors.TargetError, match="nothing was measured of glu"):
        table.curve("glu")
    model = ecospa_fx.compile(Blocks(), example_inputs=(batches[0],))
    ecospa_fx.explain(model).report(tmp_path / "page.html", sensitivity=table)
    page = (tmp_path / "page.html").read_text()
    assert "ffn blocks.1" in page and 'id="tab-sensitivity"' in page and page.count("#d55e00") == 6


def test_shares_under_a_limit(batches):
    """What costs nothing goes first; the result is a target that a model is held to."""
    model = ecospa_fx.compile(Blocks(), example_inputs=(batches[0],))
    table = ecospa_fx.sensitivity(model, batches, shares=[0.25, 0.5, 0.75], by="layer")
    parameters = sum(p.numel() for p in model.parameters())
    target = table.targets(0.8)
    assert target == {"blocks.0.ffn": pytest.approx(0.5, abs=0.1)}
    further = table.targets(0.6)
    assert further["blocks.0.ffn"] < further["blocks.1.ffn"]
    for limit, found in ((0.8, target), (0.6, further)):
        smaller = copy.deepcopy(model)
        sparsifier = ecospa_fx.CoupledSparsifier(smaller, target=found)
        while not sparsifier.reached():
            importance = dict.fromkeys(ecospa_fx.couplings(smaller), 1.0)
            ecospa_fx.shrink(smaller, sparsifier.decide(importance, sparsifier.target_size(sparsifier.sizes())))
        left = sum(p.numel() for p in smaller.parameters()) / parameters
        assert limit - 0.1 < left <= limit
    assert table.targets(0.8, cost="flops").keys() == target.keys()
    latency = ecospa_fx.Latency(measure=lambda m: sum(p.numel() for p in m.parameters()))
    assert table.targets(0.8, cost=latency, model=model).keys() == target.keys()
    with pytest.raises(errors.TargetError, match="needs the model"):
        table.targets(0.8, cost=latency)
    with pytest.raises(errors.TargetError, match="remains; measure with larger"):
        table.targets(0.2)
    with pytest.raises(errors.TargetError, match="out of range"):
        table.targets(1.2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"shares": []}, "shares is empty"),
        ({"shares": [1.0]}, "1.0, which is out of range"),
        ({"kinds": ["glu"]}, "glu that this model could lose entries of: its kinds are ffn"),
        ({"kinds": ["attention"]}, "'attention' is none of"),
        ({"kinds": "ffn"}, "one string"),
        ({"by": "block"}, "by='block' is none of"),
        ({"batches": []}, "batches is empty"),
        ({"batches": [torch.zeros(2, 5)]}, "batch 0 does not fit"),
    ],
)
def test_what_is_wrong_is_said(batches, arguments, words):
    model = Blocks()
    before = state(model)
    with pytest.raises(errors.TargetError, match=words):
        ecospa_fx.sensitivity(model, **{"batches": batches, "loss": loss, **arguments})
    assert type(model) is Blocks and all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_a_trainer_does_not_see_it(batches):
    """What a policy has gathered stays as it is."""
    model = ecospa_fx.compile(Blocks(), example_inputs=(batches[0],))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5, policy="adaptive", interval=4, end=8)
    loss(model, batches[0]).backward()
    trainer.step()
    before = copy.deepcopy(trainer.state_dict())
    ecospa_fx.sensitivity(model, batches, loss=loss)
    after = trainer.state_dict()
    assert str(after) == str(before)


def test_an_error_in_the_middle_leaves_nothing(batches):
    """The loss fails while the model is smaller."""
    model, calls = Blocks(), []

    def failing(model, batch):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return loss(model, batch)

    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        ecospa_fx.sensitivity(model, batches, loss=failing)
    assert type(model) is Blocks and all(torch.equal(value, before[name]) for name, value in state(model).items())
    torch.testing.assert_close(model(batches[0]), Blocks()(batches[0]))
