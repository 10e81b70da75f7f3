"""Weights that torch.nn.utils computes from others: a reason that they cause ends with the call that undoes it."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

import ecospa_fx
from ecospa_fx.errors import NoCouplingError
from ecospa_fx.model.parametrized import removals

X = torch.linspace(-1, 1, 24).reshape(4, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def old_style(function, *args):
    def change(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            function(module, *args)

    return change


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


CHANGES = [
    (weight_norm, {"original0", "original1"}),
    (lambda m: parametrize.register_parametrization(m, "weight", Halved()), {"original"}),
    (old_style(nn.utils.weight_norm), {"weight_g", "weight_v"}),
    (old_style(nn.utils.spectral_norm), {"weight_orig"}),
    (lambda m: prune.random_unstructured(m, "weight", 0.5), {"weight_orig"}),
]


@pytest.mark.parametrize(("change", "originals"), CHANGES)
def test_the_call_that_is_named_undoes_it(change, originals):
    model = nn.Sequential(Net())
    assert removals(model) == {}
    change(model[0].up)
    calls = removals(model)
    assert {name.rpartition(".")[2] for name in calls} == originals and all("up" in name for name in calls)
    (call,) = set(calls.values())
    eval(call, {"torch": torch, "model": model})
    assert removals(model) == {} and isinstance(model[0].up.weight, nn.Parameter)
    assert "weight" in dict(model[0].up.named_parameters())


class Adding(nn.Module):
    """Makes each entry the sum of those before it: their order counts."""

    def forward(self, weight):
        return weight.cumsum(0).cumsum(1)


def test_a_model_without_couplings_says_what_to_remove():
    model = Net()
    for layer in (model.up, model.down):
        parametrize.register_parametrization(layer, "weight", Adding())
    with pytest.raises(NoCouplingError) as caught:
        ecospa_fx.compile(model, example_inputs=(X,))
    assert str(caught.value).endswith(
        ". Weights are parametrized; remove that first: torch.nn.utils.parametrize.remove_parametrizations("
        "model.get_submodule('up'), 'weight') and 1 more"
    )
    for layer in (model.up, model.down):
        parametrize.remove_parametrizations(layer, "weight")
    assert len(ecospa_fx.couplings(ecospa_fx.compile(model, example_inputs=(X,)))) == 1


class Running(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.down(self.up(x).cumsum(-1))


def test_so_does_a_refusal_that_it_has_caused_and_no_other():
    model = nn.Sequential(Net(), Running())
    parametrize.register_parametrization(model[0].down, "weight", Adding())
    reasons = {refusal.size: refusal.reasons for refusal in ecospa_fx.explain(model, example_inputs=(X,)).refusals}
    way_out = (
        "remove the parametrization first: torch.nn.utils.parametrize.remove_parametrizations("
        "model.get_submodule('0.down'), 'weight')"
    )
    assert reasons[10][-1] == way_out
    assert not [reason for reason in reasons[8] if "remove" in reason]  # that is the sum's
