"""Uniform layers, multiples per kind, ties: the sizes that constraints allow, and what they refuse."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import ecospa_fx
from ecospa_fx.couple.ties import Ties, alike, general_names
from ecospa_fx.errors import ShrinkError, TargetError


class Block(nn.Module):
    """A residual feed-forward block; one that reverses its hidden entries needs all of them in order."""

    def __init__(self, width: int, hidden: int, reverse: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.reverse = nn.Linear(width, hidden), nn.Linear(hidden, width), reverse

    def forward(self, x):
        h = torch.relu(self.up(x))
        return x + self.down(h.flip(-1) if self.reverse else h)


class Net(nn.Module):
    """Two lists of blocks, `first` and `second`, alike in all but their names, and a wider block on its own."""

    def __init__(self, blocks: int = 3, hidden: int = 10, reverse: bool = False) -> None:
        super().__init__()
        self.first = nn.ModuleList(Block(6, hidden, reverse and i == 1) for i in range(blocks))
        self.second = nn.Sequential(*(Block(6, hidden) for _ in range(2)))
        self.alone = Block(6, 12)

    def forward(self, x):
        for block in self.first:
            x = block(x)
        return self.alone(self.second(x))


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@functools.cache
def original(**options):
    torch.manual_seed(0)
    model = Net(**options).double()
    with torch.no_grad():  # weights of unequal blocks: without a tie they would not keep equal sizes
        for i, block in enumerate((*model.first, *model.second, model.alone)):
            block.up.weight.mul_(torch.logspace(0, -i, len(block.up.weight), dtype=torch.float64)[:, None])
    return ecospa_fx.compile(model, example_inputs=(X,), regions="root")


def net(**options):
    return copy.deepcopy(original(**options))


def sizes(model):
    return {c.name.removesuffix(".ffn"): c.size for c in ecospa_fx.couplings(model)}


def trained(model, steps=4, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, interval=1, end=3, **settings)
    seen = []
    for _ in range(steps):
        model(X).pow(2).mean().backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
        seen.append(sizes(model))
    return trainer, seen


@pytest.mark.parametrize("policy", ["paper", "adaptive"])
def test_repeated_blocks_keep_equal_sizes_at_every_step_and_the_target_is_met_from_above(policy):
    model = net()
    total = sum(p.numel() for p in model.parameters())
    trainer, seen = trained(model, policy=policy, target=0.55, uniform="layers")
    for now in seen:
        assert len({now[f"first.{i}"] for i in range(3)}) == 1 and now["second.0"] == now["second.1"]
    assert trainer.done and seen[-1] != seen[0]
    assert 0.55 * total <= trainer.size < 0.55 * total + 3 * 13  # an entry of a set costs 13 in each of its blocks
    assert ecospa_fx.verify(model, example_inputs=(X,)).ok
    other = net()
    _, free = trained(other, policy=policy, target=0.55)
    assert len({free[-1][f"first.{i}"] for i in range(3)}) > 1  # what the tie is for


def test_blocks_need_not_keep_the_same_entries():
    model = net()
    with torch.no_grad():
        for i, block in enumerate(model.first):
            strength = torch.ones(10, dtype=torch.float64).index_fill(0, torch.tensor([i, i + 3]), 1e-3)
            block.up.weight.copy_(strength[:, None].expand(10, 6))
            block.down.weight.copy_(strength.expand(6, 10))
    names = [f"first.{i}.ffn" for i in range(3)]
    frozen = [c.name for c in ecospa_fx.couplings(model) if c.name not in names]
    sparsifier = ecospa_fx.CoupledSparsifier(
        model, target=0.85, constraints=ecospa_fx.Constraints(uniform="layers", frozen=frozen)
    )
    importance = dict.fromkeys(ecospa_fx.couplings(model), 1.0)
    keeps = {c.name: keep.tolist() for c, keep in sparsifier.decide(importance).items()}
    assert {name: sorted(set(range(10)) - set(keep)) for name, keep in keeps.items()} == {
        f"first.{i}.ffn": [i, i + 3] for i in range(3)
    }


def test_lists_under_other_names_are_not_tied():
    groups = alike(ecospa_fx.couplings(net()))
    assert sorted(sorted(c.name for c in group) for group in groups) == [
        ["alone.ffn"], ["first.0.ffn", "first.1.ffn", "first.2.ffn"], ["second.0.ffn", "second.1.ffn"],
    ]  # fmt: skip


def test_names_count_from_the_first_block_that_a_coupling_reaches():
    assert general_names(["a.3.w", "a.4.w", "b.7.c.2.w"]) == {
        "a.3.w": "a.#0.w", "a.4.w": "a.#1.w", "b.7.c.2.w": "b.#0.c.#0.w",
    }  # fmt: skip


def test_a_chain_of_equal_layers_is_tied_too():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))
    ecospa_fx.compile(model, example_inputs=(torch.ones(2, 8),), regions="root")
    assert [len(group) for group in alike(ecospa_fx.couplings(model))] == [3]


def whole(model, **constraints):
    units, reasons = ecospa_fx.Constraints(**constraints).units(model, ecospa_fx.couplings(model))
    return {c.name: unit.sizes for unit in units for c in unit.couplings}, reasons


def test_if_one_block_is_frozen_all_stay_whole():
    may, reasons = whole(net(), uniform="layers", frozen=["first.1"])
    assert sorted(may) == ["alone.ffn", "second.0.ffn", "second.1.ffn"]
    assert reasons == {
        "first.1.ffn": "frozen by `first.1`",
        "first.0.ffn": "uniform='layers' ties it to `first.1.ffn`, which stays whole: frozen by `first.1`",
        "first.2.ffn": "uniform='layers' ties it to `first.1.ffn`, which stays whole: frozen by `first.1`",
    }


def test_if_one_block_cannot_shrink_all_stay_whole():
    _, reasons = whole(net(reverse=True), uniform="layers")
    why = "uniform='layers': `first.1.up.weight[0]` corresponds to it and is on no coupling"
    assert reasons == {"first.0.ffn": why, "first.2.ffn": why}


def test_multiples_come_on_top_of_round_to_and_what_is_none_shrinks_to_one_at_once():
    may, _ = whole(net(), multiple_of={"ffn": 4}, round_to=2)
    assert may["first.0.ffn"] == (4, 8) and may["alone.ffn"] == (4, 8, 12)
    assert whole(net(), multiple_of={"ffn": 4}, round_to=3, frozen=["first", "second"])[0]["alone.ffn"] == (12,)
    model = net()
    trainer, seen = trained(model, target=0.6, uniform="layers", multiple_of={"ffn": 4})
    assert all(size % 4 == 0 for size in seen[0].values())  # after the first step
    assert trainer.done and all(size % 4 == 0 for size in seen[-1].values())
    assert trainer.size >= 0.6 * sum(p.numel() for p in net().parameters())


def test_adaptive_begins_at_allowed_sizes_too():
    model = net()
    _, seen = trained(model, policy="adaptive", target=0.6, multiple_of={"ffn": 4})
    assert all(size % 4 == 0 for now in seen for size in now.values())


def test_sizes_that_are_unequal_become_equal():
    model = net()
    ecospa_fx.shrink(model, {"first.0.ffn": torch.arange(5), "first.1.ffn": torch.arange(7)})
    assert whole(model, uniform="layers")[0]["first.2.ffn"] == (1, 2, 3, 4, 5)
    _, seen = trained(model, target=0.4, uniform="layers")
    assert len({seen[0][f"first.{i}"] for i in range(3)}) == 1 and seen[0]["first.0"] <= 5


def test_by_hand():
    model = net()
    even = ecospa_fx.Constraints(uniform="layers")
    with pytest.raises(ShrinkError) as caught:
        ecospa_fx.shrink(model, {"first.0.ffn": torch.arange(5)}, constraints=even)
    assert str(caught.value) == (
        "cannot shrink `first.0.ffn` to 5, `first.1.ffn` to 10, `first.2.ffn` to 10: by the constraints `first.0.ffn` "
        "may have 3, 4, 5, 6, 7, 8, 9, 10, and 2 others in proportion"
    )
    assert set(sizes(model).values()) == {10, 12}
    with pytest.raises(ShrinkError, match=r"cannot shrink `alone.ffn`: frozen by `alone`"):
        ecospa_fx.shrink(model, {"alone.ffn": torch.arange(5)}, constraints=ecospa_fx.Constraints(frozen=["alone"]))
    ecospa_fx.shrink(model, {f"first.{i}.ffn": torch.arange(i, i + 5) for i in range(3)}, constraints=even)
    assert [sizes(model)[f"first.{i}"] for i in range(3)] == [5, 5, 5]


def test_ties_in_other_proportions():
    small, large = ecospa_fx.couplings(net())[0], ecospa_fx.couplings(net())[-1]
    may, _ = whole(net(), tied=[[small.name, large.name]])
    assert may[small.name] == (5, 10)  # of 10 and of 12: halves are the only share in whole entries
    ties = Ties([small, large])
    ties.join(small, large, 1, 1, "one setting")
    with pytest.raises(TargetError) as caught:
        ties.join(large, small, 1, 2, "another")
    assert str(caught.value) == (
        f"another wants 2 entries of `{small.name}` for 1 of `{large.name}`, and one setting wants 1 for 1; leave one "
        "of the two settings out"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"uniform": "all"}, "uniform='all' is none of 'layers'"),
        ({"uniform": True}, "uniform=True is none of 'layers'"),
        (
            {"multiple_of": {"mlp": 2}},
            "multiple_of has 'mlp', which is not a kind; kinds are qk, vo, ffn, glu, heads, groups, experts, conv, "
            "recurrent, residual",
        ),
        ({"multiple_of": {"ffn": 0}}, "multiple_of['ffn']=0 is out of range; it is a whole number, at least 1"),
        (
            {"multiple_of": {"ffn": 11}},
            "multiple_of['ffn']=11 is more than the 10 of `first.0.ffn`; choose at most 10, or keep it whole with "
            "frozen=['first.0.ffn']",
        ),
        (
            {"multiple_of": {"ffn": 4}, "min_keep": 9},
            "no sizes meet all of min_keep=9, multiple_of={'ffn': 4}; the sizes now are `first.0.ffn` 10; loosen one "
            "of them",
        ),
        (
            {"multiple_of": {"ffn": 4}, "target": 0.95},
            "target=0.95 is 800, and the sizes that the constraints allow begin at 712: `first.0.ffn` has 10 and may "
            "have 8; choose a smaller target, or loosen multiple_of",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, words):
    model = net()
    with pytest.raises(TargetError) as caught:
        ecospa_fx.EcoSpaTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), **settings)
    assert str(caught.value) == words


def test_uniform_blocks_of_which_a_frozen_one_is_wider_than_another_is_now():
    model = net()
    ecospa_fx.shrink(model, {"first.0.ffn": torch.arange(5)})
    with pytest.raises(TargetError) as caught:
        whole(model, uniform="layers", frozen=["first.2"])
    assert str(caught.value) == (
        "no sizes meet all of `first.2.ffn` stays at 10 (frozen by `first.2`), uniform='layers'; the sizes now are "
        "`first.0.ffn` 5, `first.1.ffn` 10, `first.2.ffn` 10; loosen one of them"
    )
