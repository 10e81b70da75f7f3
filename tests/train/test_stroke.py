"""A stroke of `compress` in little room: a few layers at a time, last ones first, with the result of all at once."""

import copy
import gc

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx
from ecospa_fx.compensate.absorbers import rooms
from ecospa_fx.errors import NoCouplingError
from ecospa_fx.train import stroke

WIDTH, HIDDEN, BLOCKS = 8, 96, 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """Blocks one after another; those of `again` once more at the end."""

    def __init__(self, again=()):
        super().__init__()
        self.blocks, self.again = nn.ModuleList(Block() for _ in range(BLOCKS)), again
        self.ended = 0  # forwards that went to the end

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        for number in self.again:
            x = self.blocks[number](x)
        self.ended += 1
        return x


def stack(again=()):
    torch.manual_seed(0)
    model = Stack(again).double().eval()
    return model, [torch.randn(300, WIDTH, dtype=torch.float64) for _ in range(9)]


def storages(*but):
    """Bytes of the tensors that there are, each memory once, but for those of some."""
    known = {tensor.untyped_storage().data_ptr() for each in but for tensor in each}
    found = {}
    for each in gc.get_objects():
        plain = type(each) in (Tensor, nn.Parameter)
        if plain and each.device.type == "cpu" and not each.is_sparse and not torch._is_functional_tensor(each):
            found[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(size for place, size in found.items() if place not in known)


def compressed(model, batches, monkeypatch, share):
    """Compress a copy; return it, the sizes of the groups, and the bytes held beside it when each group shrinks."""
    monkeypatch.setattr(stroke, "LEAST", 0)
    monkeypatch.setattr(stroke, "SHARE", share)
    model, parted, held = copy.deepcopy(model), [], []
    groups, shrink = stroke.groups, stroke.shrink

    def noted(*args):
        found = groups(*args)
        parted.extend(names for names, _ in found)
        return found

    def counted(*args, **options):
        held.append(storages(batches, model.parameters()) - before)
        return shrink(*args, **options)

    gc.collect()
    before = storages(batches, model.parameters())
    with monkeypatch.context() as patch:
        patch.setattr(stroke, "groups", noted)
        patch.setattr(stroke, "shrink", counted)
        report = ecospa_fx.compress(model, batches, 0.6)
    return model, report, parted, held


def test_groups_take_less_room_and_change_nothing(monkeypatch):
    dense, batches = stack()
    whole, report, parted, [at_once] = compressed(dense, batches, monkeypatch, 1e9)
    assert [len(group) for group in parted] == [BLOCKS]
    needed = sum(rooms(ecospa_fx.compile(copy.deepcopy(dense), example_inputs=(batches[0],))).values())
    small, same, parted, held = compressed(dense, batches, monkeypatch, needed / BLOCKS * 1.1 / bytes_of(dense))
    assert [group[0] for group in parted] == [f"blocks.{n}.ffn" for n in reversed(range(BLOCKS))]
    assert at_once > 0.5 * needed and max(held) < at_once / 3
    for a, b in zip(whole.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert report.removed == same.removed and report.expected == pytest.approx(same.expected)
    assert report.left == pytest.approx(same.left)
    # Each further group has run one forward to its end: that of the batch held out.
    assert small.ended - whole.ended == BLOCKS - 1


def bytes_of(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


def test_a_layer_that_is_called_again_shrinks_with_all_in_between(monkeypatch):
    """Later calls of it see what the layers in between do: one after another would not be the same."""
    dense, batches = stack(again=(2,))
    _, _, parted, _ = compressed(dense, batches, monkeypatch, 1e-9)
    assert [sorted(group) for group in parted] == [
        [f"blocks.{n}.ffn" for n in range(2, BLOCKS)], ["blocks.1.ffn"], ["blocks.0.ffn"],
    ]  # fmt: skip
    small, *_ = compressed(dense, batches, monkeypatch, 1e-9)
    whole, *_ = compressed(dense, batches, monkeypatch, 1e9)
    for a, b in zip(whole.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_moments_of_some_couplings_only():
    model, batches = stack()
    ecospa_fx.compile(model, example_inputs=(batches[0],))
    with torch.no_grad(), ecospa_fx.Grams(model, couplings=["blocks.3.ffn"]) as grams:
        model(batches[0])
    assert {name for name in grams.state_dict() if name.startswith("squares ")} == {"squares blocks.3.down.weight[1]"}
    with pytest.raises(NoCouplingError, match=r"the model has no coupling `ffn`; it has blocks.0.ffn, blocks.1.ffn"):
        ecospa_fx.Grams(model, couplings=["ffn"])


class NotTwice(Stack):
    """Refuses a call while it believes itself to be in another one."""

    inside = False

    def forward(self, x):
        assert not self.inside
        self.inside = True
        x = super().forward(x)
        self.inside = False
        return x


def test_a_forward_that_is_broken_off_leaves_the_state_of_before(monkeypatch):
    torch.manual_seed(0)
    dense, batches = NotTwice().double().eval(), [torch.randn(300, WIDTH, dtype=torch.float64) for _ in range(9)]
    small, _, parted, _ = compressed(dense, batches, monkeypatch, 1e-9)
    assert len(parted) == BLOCKS and not small.inside
    small(batches[0])
