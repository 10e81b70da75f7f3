"""Equal blocks are captured once, and only equal ones."""

import copy

import pytest
import torch
from torch import nn

import ecospa_fx
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.passes.capture import capture
from ecospa_fx.passes.find import analyse


class Block(nn.Module):
    def __init__(self, number, slope=0.1, width=6, hidden=10):
        super().__init__()
        self.number, self.slope = number, slope  # forward reads only one of them
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(nn.functional.leaky_relu(self.up(x), self.slope))


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def graphs(model):
    """The graph of each region, per call signature, the first call first."""
    regions = model.__dict__[MODEL].regions.values()
    return list(zip(*([each.captured.graph for each in region.specializations] for region in regions)))


def checked(model):
    x = torch.randn(3, 6)
    expected = model(x)
    ecospa_fx.compile(model, example_inputs=(x,))
    assert torch.equal(model(x), expected)
    ecospa_fx.verify(model, example_inputs=(x,)).raise_if_failed()
    return graphs(model)


def test_equal_blocks_share_a_graph_whatever_their_numbers():
    train, evaluation = checked(Stack(Block(0), Block(1), Block(2)))
    for first, second, third in (train, evaluation):
        assert first is second is third
    assert train[0] is not evaluation[0]


def test_each_is_compared_with_eager_and_the_first_in_every_way(monkeypatch):
    compared = {}

    class Forward:
        """The forward of a block, which notes whether gradients are on; a graph holds nothing of it."""

        def __init__(self):
            self.grads = []

        def __call__(self, block, x):
            self.grads.append(torch.is_grad_enabled())
            return Block.forward(block, x)

    for module in (capture, analyse):

        def compare(captured, block, forward, args, kwargs, compare=module.difference_from_eager, **how):
            noting = Forward()
            outcome = compare(captured, block, noting, args, kwargs, **how)
            compared[captured.region] = noting.grads
            return outcome

        monkeypatch.setattr(module, "difference_from_eager", compare)
    ecospa_fx.compile(Stack(Block(0), Block(1), Block(2)), example_inputs=(torch.randn(3, 6),))
    assert compared == {"blocks.0": [True, True, False], "blocks.1": [True], "blocks.2": [True]}


def test_they_do_for_a_new_call_after_they_shrank_apart():
    model = Stack(Block(0), Block(1), Block(2))
    ecospa_fx.compile(model, example_inputs=(torch.randn(3, 6),))
    ecospa_fx.shrink(model, {"blocks.1.ffn": torch.arange(4), "blocks.2.ffn": torch.arange(2, 9)})
    x = torch.randn(2, 3, 6)
    train = model(x)
    assert torch.equal(model.eval()(x), train)
    for graphs_of_a_call in graphs(model):
        assert len(set(graphs_of_a_call)) == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda: Block(1, slope=0.2),
        lambda: Block(1, hidden=12),
        lambda: Block(1).requires_grad_(False),
        lambda: Block(1).eval(),
    ],
    ids=["attribute", "shape", "frozen", "eval"],
)
def test_blocks_that_differ_do_not(other):
    (first, second, third), *_ = checked(Stack(Block(0), other(), Block(2)))
    assert first is third and first is not second


def test_a_difference_that_no_attribute_shows_is_seen_in_the_outputs():
    blocks = Block(0), Block(1)
    slopes = {id(blocks[0]): 0.1, id(blocks[1]): 0.3}

    def forward(self, x):
        return x + self.down(nn.functional.leaky_relu(self.up(x), slopes[id(self)]))

    hidden = type("Block", (Block,), {"forward": forward})
    for block in blocks:
        block.__class__ = hidden
    (first, second), *_ = checked(Stack(*blocks))
    assert first is not second


def test_blocks_that_share_a_graph_shrink_apart():
    torch.manual_seed(0)
    model = Stack(Block(0), Block(1), Block(2))
    x = torch.randn(3, 6)
    ecospa_fx.compile(model, example_inputs=(x,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ecospa_fx.shrink(model, {"blocks.1.ffn": torch.arange(4)}, optimizer=optimizer)
    assert [c.size for c in ecospa_fx.couplings(model)] == [10, 4, 10]
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5, interval=1)
    while not trainer.done:
        model(x).square().sum().backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    assert 0.5 <= trainer.size / (3 * 136) < 0.55
    ecospa_fx.verify(model, example_inputs=(x,)).raise_if_failed()


class Moody(Block):
    """Takes another path for the word `none` than for no word."""

    def forward(self, x, mood=None):
        return super().forward(x) * (1.0 if mood is None else 2.0)


def test_a_constant_argument_is_not_mistaken_for_another():
    model, x = Moody(0), torch.randn(3, 6)
    ecospa_fx.compile(model, example_inputs=(x, None))
    plain = model(x, None)
    assert torch.equal(model(x, "none"), 2 * plain)
    assert torch.equal(model(x, None), plain)


class Flagged(nn.Module):
    """Reads plain attributes of its own, and keeps the names of what is on in a list."""

    doubled = False

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.slope, self.on = 0.0, ["relu"]

    def forward(self, x):
        x = self.up(x)
        x = nn.functional.leaky_relu(x, self.slope) if "relu" in self.on else x
        return self.down(x) * (2 if self.doubled else 1)


@pytest.mark.parametrize("how", ["root", "blocks"])
@pytest.mark.parametrize("shrunk", [False, True])
def test_attributes_that_change_after_capture_are_seen(how, shrunk):
    torch.manual_seed(0)
    plain = Flagged() if how == "root" else nn.Sequential(Flagged(), Flagged())
    x = torch.randn(3, 6)
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(x,), regions=how)
    if shrunk:
        keep = {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model)}
        ecospa_fx.shrink(model, keep)
        with torch.no_grad():
            for layer in plain.modules():
                if isinstance(layer, Flagged):
                    layer.down.weight[:, 1::2] = 0
    regions = list(model.__dict__[MODEL].regions.values())
    one, twin = (next(m for m in each.modules() if isinstance(m, Flagged)) for each in (model, plain))
    for change in (
        lambda m: None, lambda m: setattr(m, "slope", 0.5), lambda m: m.on.clear(),
        lambda m: setattr(m, "doubled", True), lambda m: m.on.append("relu"),
    ):  # fmt: skip
        change(one), change(twin)
        torch.testing.assert_close(model(x), plain(x))
    graphs = [len(region.specializations) for region in regions]
    assert graphs[0] == 4 and all(others == 1 for others in graphs[1:])
    one.doubled = twin.doubled = False
    one.slope = twin.slope = 0.0
    torch.testing.assert_close(model(x), plain(x))
    assert len(regions[0].specializations) == graphs[0]  # it was that at first
