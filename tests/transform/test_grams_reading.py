"""How Grams reads calls: some are held out, padding is left out, and what is asked for in numbers is plain."""

import copy

import pytest
import torch
from test_absorb import Mlp, gathered, mlp

import ecospa_fx
from ecospa_fx.compensate.moments import EVERY, HELD
from ecospa_fx.errors import TargetError

SQUARES, HELD_OUT = "squares down.weight[1]", "held down.weight[1]"


def hidden_of(model, x):
    return torch.nn.functional.gelu(model.up(x)).detach()


def test_every_fourth_call_is_held_out_by_default_only():
    model, _ = mlp()
    calls = [(torch.randn(10, 6, dtype=torch.float64),) for _ in range(9)]
    state = gathered(model, *calls).state_dict()
    held = torch.cat([hidden_of(model, calls[i][0]) for i in (EVERY - 1, 2 * EVERY - 1)])
    torch.testing.assert_close(state[HELD_OUT], held)
    fitted = torch.cat([hidden_of(model, x) for i, (x,) in enumerate(calls) if i % EVERY != EVERY - 1])
    torch.testing.assert_close(state[SQUARES], fitted.T @ fitted)
    plain = gathered(model, *calls, ridge=1e-3).state_dict()
    everything = torch.cat([hidden_of(model, x) for (x,) in calls])
    torch.testing.assert_close(plain[SQUARES], everything.T @ everything)
    assert HELD_OUT not in plain


def test_only_so_many_positions_are_held():
    model, _ = mlp()
    calls = [(torch.randn(400, 6, dtype=torch.float64),) for _ in range(3 * EVERY)]
    assert 256 <= len(gathered(model, *calls).state_dict()[HELD_OUT]) <= HELD


def test_positions_held_out_follow_shrinks_and_saves():
    model, _ = mlp()
    calls = [(torch.randn(30, 6, dtype=torch.float64),) for _ in range(8)]
    grams = gathered(model, *calls)
    loaded = ecospa_fx.Grams(model)
    loaded.detach()
    loaded.load_state_dict(grams.state_dict())
    twin = copy.deepcopy(model)
    ecospa_fx.shrink(model, {"ffn": torch.arange(1, 11)}, absorb=grams)
    ecospa_fx.shrink(model, {"ffn": torch.arange(5)}, absorb=grams)
    assert grams.state_dict()[HELD_OUT].shape[1] == 10 and 0 <= grams.left["down.weight", 1] <= 1
    first = ecospa_fx.Grams(twin)
    first.detach()
    first.load_state_dict(loaded.state_dict())
    ecospa_fx.shrink(twin, {"ffn": torch.arange(1, 11)}, absorb=first)
    ecospa_fx.shrink(twin, {"ffn": torch.arange(5)}, absorb=first)
    torch.testing.assert_close(model.down.weight, twin.down.weight)


class Masked(Mlp):
    def forward(self, x, attention_mask=None, valid=None):
        return super().forward(x)


@pytest.mark.parametrize("way", ["argument", "name", "tensor"])
def test_padding_is_left_out(way):
    torch.manual_seed(0)
    model, x = Masked().double(), torch.randn(3, 5, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    given = {"argument": {"attention_mask": mask}, "name": {"valid": mask}, "tensor": {}}[way]
    ecospa_fx.compile(model, example_inputs=(x,), example_kwargs=given)
    options = {"argument": {}, "name": {"mask": "valid"}, "tensor": {"mask": mask}}[way]
    with ecospa_fx.Grams(model, **options) as grams, torch.no_grad():
        model(x, **given)
        if way == "tensor":
            grams.mask = 1 - mask
            model(x)
    seen = hidden_of(model, x)
    rows = seen.flatten(0, 1) if way == "tensor" else seen[mask.bool()]
    state = grams.state_dict()
    torch.testing.assert_close(state[SQUARES], rows.T @ rows)
    assert state["counts down.weight[1]"].tolist()[0] == len(rows) == grams.positions
    everything = gathered(model, (x,), mask=None).state_dict()
    assert int(everything["counts down.weight[1]"][0]) == 15


def test_a_mask_that_is_none_is_refused():
    model, _ = mlp()
    with pytest.raises(TargetError, match=r"mask is a tensor of torch.float32; it has booleans or integers, 0 where"):
        ecospa_fx.Grams(model, mask=torch.ones(3, 5))
    with pytest.raises(TargetError, match="mask=3 is neither the name of an argument nor a tensor"):
        ecospa_fx.Grams(model, mask=3)
