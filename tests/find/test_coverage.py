"""The default regions: blocks, or the root where blocks leave much without a coupling; and words about what is left."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ecospa_fx
from ecospa_fx.errors import TargetError
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.passes.find import regions as choosing


class Block(nn.Module):
    def __init__(self, width=8, hidden=4):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(F.relu(self.up(x)))


class Around(nn.Module):
    """Two blocks after `before`, a network of its own; `branching` keeps a graph from holding all of it."""

    def __init__(self, before, branching=False):
        super().__init__()
        self.before, self.blocks, self.branching = before, nn.ModuleList(Block() for _ in range(2)), branching

    def forward(self, x):
        if self.branching and x.sum().item() > 1e6:
            x = -x
        x = self.before(x)
        for block in self.blocks:
            x = block(x)
        return x


def mlp(hidden):
    return nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 8))


X = torch.randn(3, 8)


def regions(model, *args, how="auto"):
    return ecospa_fx.explain(model, example_inputs=args or (X,), regions=how).regions


def share(model, how):
    """The share of entries of matrices on couplings, counted by hand."""
    found = ecospa_fx.explain(model, example_inputs=(X,), regions=how).couplings
    on = {member.parameter for coupling in found for member in coupling.members}
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1}
    return sum(sizes[name] for name in on & sizes.keys()) / sum(sizes.values())


@pytest.mark.parametrize(("hidden", "taken"), [(2, ("blocks.0", "blocks.1")), (32, ("",))])
def test_blocks_are_regions_unless_the_root_covers_much_more(hidden, taken):
    model = Around(mlp(hidden))
    assert regions(model) == taken
    assert regions(model, how="blocks") == ("blocks.0", "blocks.1")
    assert share(model, "root") == 1.0 and (share(model, "blocks") >= 0.75) == (len(taken) == 2)


def test_a_root_that_cannot_add_anything_is_not_captured(monkeypatch):
    """Sorting pins what has no coupling in a block, as it would in a graph of the whole model."""

    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Sorting() for _ in range(2))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    class Sorting(Block):
        """A block half of whose entries are in a matrix that nothing may cut: what it takes and makes is sorted."""

        def __init__(self):
            super().__init__()
            self.ordered, self.gain = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

        def forward(self, x):
            x = self.ordered((x * self.gain).sort().values).sort().values
            return x + self.down(F.relu(self.up(x)))

    model = Sorted()
    assert share(model, "root") == share(model, "blocks") < 0.75

    def root(*_, **__):
        raise AssertionError("the root is captured")

    monkeypatch.setattr(choosing, "_root", root)
    assert regions(model) == ("blocks.0", "blocks.1")


def test_tables_and_heads_do_not_count():
    """Words have an entry each: no region could take a row of a table, or a row of the head."""

    class Language(Around):
        def __init__(self):
            super().__init__(nn.Embedding(500, 8))
            self.head = nn.Linear(8, 500, bias=False)

        def forward(self, x):
            return self.head(super().forward(x))

    assert regions(Language(), torch.randint(500, (2, 5))) == ("blocks.0", "blocks.1")


def test_where_the_root_cannot_be_captured_regions_are_joined():
    explanation = ecospa_fx.explain(Around(mlp(32), branching=True), example_inputs=(X,))
    assert explanation.regions == ("before", "blocks.0", "blocks.1") and explanation.snapshot.share_outside == 0
    assert [coupling.name for coupling in explanation.couplings] == ["before.ffn", "blocks.0.ffn", "blocks.1.ffn"]


class Branching(nn.Module):
    """A network without layers in which a value decides what is computed, so that no graph holds it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(8, 32)), nn.Parameter(torch.randn(32, 8))

    def forward(self, x):
        h = torch.relu(x @ self.up)
        return (h if h.sum().item() > 1e6 else -h) @ self.down


def test_where_nothing_more_can_be_captured_blocks_stay_and_what_is_outside_is_told():
    model = Around(Branching())
    explanation = ecospa_fx.explain(model, example_inputs=(X,))
    assert explanation.regions == ("blocks.0", "blocks.1")
    outside = sum(p.numel() for p in model.before.parameters()) / sum(p.numel() for p in model.parameters())
    assert explanation.snapshot.share_outside == pytest.approx(outside)
    assert explanation.title == f"Around: 2 couplings in 2 regions, {outside:.0%} of the parameters outside"
    lines = " ".join(str(explanation).split())
    assert "it lies outside of the captured regions: before.up[0] and 3 more" in lines


def test_an_unreachable_target_names_what_lies_outside(caplog):
    model = Around(mlp(2))
    caplog.set_level("INFO", "ecospa_fx.capture")
    ecospa_fx.compile(model, example_inputs=(X,))
    outside = "21.65% of the parameters lie outside of the 2 regions: before"
    assert f"Around: {outside}" in caplog.text
    with pytest.raises(TargetError) as caught:
        ecospa_fx.EcoSpaTrainer(model, torch.optim.SGD(model.parameters(), 0.1), target=0.1)
    assert str(caught.value).endswith(f'. {outside}; compiled with regions="root" the whole model is analysed')
    whole = Around(mlp(2))
    ecospa_fx.compile(whole, example_inputs=(X,), regions="root")
    assert list(whole.__dict__[MODEL].regions) == [""]
    with pytest.raises(TargetError) as caught:
        ecospa_fx.EcoSpaTrainer(whole, torch.optim.SGD(whole.parameters(), 0.1), target=0.01)
    assert "outside" not in str(caught.value)
