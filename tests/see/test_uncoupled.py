"""Nothing is left out: each dim of each matrix of a model is on a coupling, refused, or has a reason of its own."""

import json
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ecospa_fx
from ecospa_fx.testing.random_program import random_program


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    """Blocks between a network that is called outside of them, and a layer that this call does not use."""

    def __init__(self):
        super().__init__()
        self.stem, self.unused = nn.Linear(4, 6), nn.Linear(6, 6)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


X = torch.randn(5, 4)


def assert_nothing_is_left_out(model, explanation):
    told = {f"{member.parameter}[{member.dim}]" for c in explanation.couplings for member in c.members}
    for left in (*explanation.refusals, *explanation.uncoupled):
        assert left.reasons and all(left.reasons)
        told.update(left.members)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert {f"{name}[{dim}]" for dim, size in enumerate(parameter.shape) if size > 1} <= told


@pytest.mark.parametrize("regions", ["blocks", "root", ["layers.1"]])
def test_every_matrix_of_a_model_is_told(regions):
    model = Model()
    explanation = ecospa_fx.explain(model, example_inputs=(X,), regions=regions)
    assert_nothing_is_left_out(model, explanation)
    reasons = {axis: left.reasons[0] for left in explanation.uncoupled for axis in left.members}
    assert reasons["unused.weight[0]"].startswith(
        "the captured call does not use it" if regions == "root" else "it lies outside of the captured regions"
    )
    if regions == "root":
        assert reasons["stem.weight[1]"].startswith("no weight of the region produces the entries that it sums over")
        assert reasons["head.weight[0]"] == "it leaves the region as output 0"


def test_a_matrix_that_only_another_mode_needs_whole_is_told():
    class Moody(Layer):
        def forward(self, x):
            hidden = F.gelu(self.up(x))
            return self.down(hidden if self.training else hidden.sort(-1).values)

    model = Moody()
    ecospa_fx.compile(model, example_inputs=(torch.randn(5, 6),))
    model.eval()(torch.randn(5, 6))
    assert_nothing_is_left_out(model, ecospa_fx.explain(model))


def test_tables_group_what_is_left_by_reason():
    explanation = ecospa_fx.explain(Model(), example_inputs=(X,), regions="blocks")
    section = str(explanation).split("On no coupling, and why:\n")[1]
    assert len(section.splitlines()) <= 4
    assert "it lies outside of the captured regions: stem.weight[0] and 5 more" in section
    assert "### On no coupling, and why" in explanation.to_markdown()
    told = json.loads(explanation.to_json())["uncoupled"]
    assert len(told) == len(explanation.uncoupled) and {"members", "size", "reasons", "region"} == told[0].keys()


def test_inputs_of_recurrent_layers_are_summed_over():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.make, self.out = nn.Linear(5, 12), nn.Linear(16, 3)
            self.steps = nn.GRU(12, 8, num_layers=2, bidirectional=True)
            self.present = None

        def forward(self, x):
            hidden = F.relu(self.make(x))
            if self.present is not None:
                hidden = hidden * self.present
            return self.out(self.steps(hidden)[0])

    torch.manual_seed(0)
    model, twin, x = Recurrent().double(), Recurrent().double(), torch.randn(2, 4, 5).double()
    twin.load_state_dict(model.state_dict())
    explanation = ecospa_fx.explain(model, example_inputs=(x,))
    assert_nothing_is_left_out(model, explanation)
    coupling, _ = sorted(explanation.couplings, key=lambda c: c.kind)  # the other one is of hidden units
    assert {str(m) for m in coupling.members if m.matrix} == {
        "make.weight[0]", "steps.weight_ih_l0[1]", "steps.weight_ih_l0_reverse[1]"
    }  # fmt: skip
    ecospa_fx.compile(model, example_inputs=(x,))
    keep = torch.tensor([1, 4, 5, 10])
    ecospa_fx.shrink(model, {coupling.name: keep})
    twin.present = torch.zeros(12).double().index_fill(0, keep, 1.0)
    torch.testing.assert_close(model(x), twin(x))


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.sweep) for seed in range(6, 300))])
def test_random_programs_leave_nothing_out(seed):
    model, args = random_program(random.Random(seed)).build()
    assert_nothing_is_left_out(model, ecospa_fx.explain(model, example_inputs=args, regions="root"))
