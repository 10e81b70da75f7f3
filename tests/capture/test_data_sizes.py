"""Sizes that data decide: counted as they were in the call that was captured; the couplings shrink as any others."""

import copy

import pytest
import torch
from torch import nn
from twin import assert_equals_twin, kept_positions, selections, zeroed

import ecospa_fx
from ecospa_fx import errors
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.cost import CostModel


def positive(x):
    return x[:, 0] > 0


def counted(x):
    n = positive(x).sum().item()
    torch._check(n >= 0)
    torch._check(n <= x.shape[0])
    return x[:n]


ROWS = {
    "mask": lambda x: x[positive(x)],
    "nonzero": lambda x: x[torch.nonzero(positive(x)).squeeze(1)],
    "select": lambda x: torch.masked_select(x, positive(x)[:, None]).view(-1, 8),
    "item": counted,
    "repeat": lambda x: x.repeat_interleave(positive(x).long(), 0),
}


class Routed(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.rows = rows

    def forward(self, x):
        return self.b(self.a(ROWS[self.rows](x)).relu())


@pytest.mark.parametrize("rows", ROWS)
def test_flops_are_those_of_the_call(rows):
    torch.manual_seed(0)
    x, plain = torch.randn(20, 8, dtype=torch.float64), Routed(rows).double()
    each = 2 * (8 * 16 + 16 * 4)
    several = int(positive(x).sum())
    savings = ecospa_fx.explain(plain, example_inputs=(x,)).savings()
    assert savings.flops == several * each
    assert savings["ffn"].flops == several * 2 * (8 + 4)
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(x,))
    ecospa_fx.EcoSpaTrainer(model, torch.optim.SGD(model.parameters(), 0.1), target=0.5, cost="flops")
    assert CostModel(model, model.__dict__[MODEL], "flops").total({"ffn": 5}) == several * each * 5 // 16
    for name, keeps in selections(ecospa_fx.couplings(model)):
        shrunk = copy.deepcopy(model)
        ecospa_fx.shrink(shrunk, keeps)
        positions = kept_positions(plain, keeps)
        twin = zeroed(plain, positions)
        for inputs in (x, torch.randn(7, 8, dtype=torch.float64)):
            assert_equals_twin(shrunk, twin, positions, (inputs,), {}, f"{rows}, {name}")


def test_where_there_are_no_data():
    explanation = ecospa_fx.explain(Routed("mask").to("meta"), example_inputs=(torch.randn(20, 8, device="meta"),))
    assert [c.name for c in explanation.couplings] == ["ffn"]
    with pytest.raises(errors.EcoSpaError) as caught:
        explanation.savings()
    assert str(caught.value) == (
        "a size in the graph depends on values in tensors (a mask, a number read with item()), and the call that was "
        "captured had none, so FLOPs cannot be counted: use a device other than meta, or count parameters"
    )


class Gated(Routed):
    """A matrix whose rows meet no other and stay whole: what picks single entries is looked at."""

    def __init__(self):
        super().__init__("item")
        self.gate = nn.Linear(8, 5)

    def forward(self, x):
        n = positive(x).sum().item()
        torch._check(n >= 0)
        torch._check(n // 4 + 1 <= x.shape[0])
        some = slice(n // 4 + 1)
        return self.b(self.a(x[some]).relu()) * self.gate(x)[some].cumsum(1).amax(1, keepdim=True)


def test_a_slice_whose_length_data_decide_is_not_taken_for_one_entry():
    torch.manual_seed(0)
    x, plain = torch.randn(20, 8), Gated()
    explanation = ecospa_fx.explain(plain, example_inputs=(x,))
    assert {c.kind for c in explanation.couplings} == {"ffn"}
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(x,))
    assert torch.equal(model(x), plain(x))
