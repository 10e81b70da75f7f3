"""Looking at the sizes of layers leaves no trace, also where a weight is computed at every look."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import ecospa_fx

X = torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(5, 8)


class Drops(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return torch.nn.functional.dropout(weight, 0.2, self.training)


def dropped(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Drops())
    return layer


MODELS: dict[str, Callable[[], nn.Module]] = {
    "a linear layer": lambda: nn.Sequential(spectral_norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 4)),
    "a convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8)), spectral_norm(nn.Conv1d(1, 6, 3)), nn.ReLU(), nn.Conv1d(6, 4, 3)
    ),
    "a layer that draws": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8)), dropped(nn.Conv1d(1, 6, 3)), nn.ReLU(), nn.Conv1d(6, 4, 3)
    ),
}


def state(model: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.detach().clone() for name, t in tensors.items()} | {"generator": torch.get_rng_state()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("execution", ["graph", "module"])
def test_compile_and_restore_leave_state_and_generators_alone(name: str, execution: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double().train()
    twin = copy.deepcopy(model)
    before = state(model)
    ecospa_fx.compile(model, example_inputs=(X,), regions="root", execution=execution)  # type: ignore[arg-type]
    repr(model)
    ecospa_fx.restore(model)
    for key, value in state(model).items():
        assert torch.equal(value, before[key]), key
    results = []
    for each in (model, twin):
        torch.set_rng_state(before["generator"])
        results.append(each(X))
    assert torch.equal(*results)


def test_its_own_python_follows_a_spectral_norm_in_training() -> None:
    torch.manual_seed(0)
    plain = MODELS["a linear layer"]().double().train()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(X,), regions="root", execution="module")
    keep = torch.tensor([0, 2, 5])
    ecospa_fx.shrink(model, {"ffn": keep})
    small = nn.Sequential(spectral_norm(nn.Linear(8, 3)), nn.ReLU(), nn.Linear(3, 4)).double().train()
    small.load_state_dict(model.state_dict())
    for _ in range(3):
        torch.testing.assert_close(model(X), small(X), rtol=0, atol=0)
    for name, buffer in small.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)
