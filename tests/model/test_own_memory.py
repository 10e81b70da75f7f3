"""Weights as views of one vector, as averages over ranks leave them: they shrink, unless someone has the vector."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import ecospa_fx
from ecospa_fx.errors import NoCouplingError, TargetError

X = torch.linspace(-1, 1, 48).reshape(6, 8)


def made():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)) for _ in range(2)]
    return nn.Sequential(*blocks, nn.GRU(8, 4)).double()


def as_views(model):
    """Put the weights into one vector; return it."""
    vector = parameters_to_vector(model.parameters()).detach()
    vector_to_parameters(vector, model.parameters())
    return vector


def trained(model, after):
    ecospa_fx.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.8, start=3, interval=2, end=7)
    for _ in range(9):
        model(X.double())[0].square().mean().backward()
        optimizer.step()
        after(model)
        trainer.step()
        optimizer.zero_grad()
    return trainer.history


def test_weights_side_by_side_shrink_as_others():
    one, other = made(), made()
    as_views(other)  # before the first call, too
    histories = [trained(one, lambda model: None), trained(other, as_views)]
    assert histories[0] == histories[1] and len(histories[0]) == 3
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("since", "error"), [(0, TargetError), (1, NoCouplingError)])
def test_weights_in_a_vector_that_someone_has_stay_in_it(since, error):
    model, held = made(), []
    with pytest.raises(error, match=r"`0\.0\.weight`, `0\.0\.bias` and 10 more lie in one buffer"):
        trained(model, lambda model: held.append(as_views(model) if len(held) >= since else None))
    vector = as_views(model)
    ecospa_fx.couplings(model)
    vector.zero_()
    assert not any(p.any() for p in model.parameters())


def test_weights_of_a_recurrent_layer_stay_side_by_side():
    model = made()
    ecospa_fx.compile(model, example_inputs=(X.double(),))
    as_views(model[2])
    before = [p.data_ptr() for p in model[2].parameters()]
    assert ecospa_fx.couplings(model)
    assert [p.data_ptr() for p in model[2].parameters()] == before
