"""The table of optimizers: what is taught of a class holds for its subclasses, field by field."""

import pytest
import torch
from torch import nn, optim

import ecospa_fx
from ecospa_fx.model.optimizer_table import TABLE, rules_for


@pytest.fixture
def table():
    """Yield the table, and put it back as it was."""
    before = dict(TABLE)
    yield TABLE
    TABLE.clear()
    TABLE.update(before)


def test_a_subclass_has_what_it_does_not_say_from_its_base(table):
    class Mine(optim.AdamW):
        pass

    assert rules_for(Mine) == rules_for(optim.AdamW)
    ecospa_fx.state_rule(Mine)(lambda state, parameter, keep: {})
    mine, base = rules_for(Mine), rules_for(optim.AdamW)
    assert mine.slices is not base.slices
    assert mine.transforms == base.transforms and mine.unscales is True
    ecospa_fx.optimizers.register(Mine, transforms={"exp_avg": "update"}, average="shadow")
    assert rules_for(Mine).slices is mine.slices
    assert rules_for(Mine).transforms == {"exp_avg": "update"} and rules_for(Mine).average == "shadow"
    assert rules_for(optim.AdamW) == base and rules_for(optim.Optimizer) == rules_for(object)


def test_a_class_is_taught_by_its_full_name(table):
    class Named(optim.Optimizer):
        pass

    ecospa_fx.optimizers.register(f"{Named.__module__}.{Named.__qualname__}", unscales=True)
    assert rules_for(Named).unscales and Named not in table


def test_an_optimizer_that_is_taught_turns_with_a_rotation(table):
    class Sign(optim.Optimizer):
        """Steps along a running average of gradients."""

        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self):
            for parameter in self.param_groups[0]["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 0.5)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    model = ecospa_fx.compile(Attention(), example_inputs=(x,))
    optimizer = Sign(model.parameters())
    model(x).square().sum().backward()
    optimizer.step()
    refused = ecospa_fx.rotate(model, ["vo"], optimizer=optimizer).refused
    assert refused["vo"].endswith(": how `average` of Sign follows a change of basis is not known")
    ecospa_fx.optimizers.register(Sign, transforms={"average": "gradient"})
    assert not ecospa_fx.rotate(model, ["vo"], optimizer=optimizer).refused
    expected = {name: p.grad / 2 for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(optimizer.state[parameter]["average"], expected[name], msg=name)
