"""The module's own Python runs in both modes: what it does in the other one counts, though no call has shown it."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from twin import half, kept_positions, zeroed

import ecospa_fx


class TwoModes(nn.Module):
    """A network that does something else in training mode."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.up, self.norm, self.mid, self.down = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.drop, self.what = nn.Dropout(0.2), what

    def forward(self, x: Tensor) -> Tensor:
        """Return two numbers a row."""
        x = F.dropout(self.drop(self.norm(self.up(x)).tanh()), 0.1, self.training)
        if self.training:
            match self.what:
                case "flip":
                    x = x.flip(-1)
                case "count":
                    x = x * torch.arange(x.shape[-1])
                case "scale":
                    x = x * 2
        return self.down(self.mid(x).tanh())


@pytest.mark.parametrize("what", ["nothing", "scale", "flip", "count"])
@pytest.mark.parametrize("training", [False, True])
def test_what_the_other_mode_does_along_an_axis_keeps_it_whole(what: str, training: bool) -> None:
    torch.manual_seed(0)
    model, x = TwoModes(what).double().train(training), torch.randn(5, 4, dtype=torch.float64)
    before = copy.deepcopy(model)
    ecospa_fx.compile(model, example_inputs=(x,), execution="module")
    assert model.training == training
    found = {coupling.size: coupling for coupling in ecospa_fx.couplings(model)}
    assert found.keys() == ({6, 8} if what in ("nothing", "scale") else {6})
    keeps = {coupling: half(coupling.size, 1) for coupling in found.values()}
    positions = kept_positions(before, keeps)
    ecospa_fx.shrink(model, keeps)
    expected = zeroed(before, positions)
    torch.testing.assert_close(model.eval()(x), expected.eval()(x), rtol=1e-12, atol=1e-12)
    if what in ("flip", "count"):
        (refusal,) = [r for r in ecospa_fx.explain(model).refusals if r.size == 8]
        said = {"flip": "aten.flip", "count": "differ" if training else "in training mode"}[what]
        assert any(said in reason for reason in refusal.reasons)


@pytest.mark.parametrize("training", [False, True])
def test_a_second_graph_is_captured_only_where_the_modes_differ(training: bool) -> None:
    captured = []
    for what in ("nothing", "scale", "flip"):
        model = TwoModes(what).train(training)
        ecospa_fx.compile(model, example_inputs=(torch.randn(5, 4),), execution="module")
        (region,) = model.__dict__["_ecospa_model"].regions.values()
        captured.append(len(region.specializations))
    assert captured == [1, 1, 2]  # scaling is entry by entry, as noise is


class Noisy(nn.Module):
    """A linear layer with noise on its weight in training, as exploration in weights has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mean, self.spread = (nn.Parameter(torch.randn(outputs, inputs)) for _ in range(2))
        self.register_buffer("noise", torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        weight = self.mean + self.spread * self.noise if self.training else self.mean
        return x @ weight.t()


@pytest.mark.parametrize("execution", ["graph", "module"])
@pytest.mark.parametrize("training", [False, True])
def test_weights_that_one_mode_alone_uses_shrink_with_the_others(execution: str, training: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Noisy(6, 8), nn.Tanh(), Noisy(8, 3)).train(training), torch.randn(5, 6)
    expected = copy.deepcopy(model)
    ecospa_fx.compile(model, example_inputs=(x,), execution=execution)
    if execution == "graph":  # its own Python is captured in both modes at once
        model.train(not training)(x)
    (coupling,) = ecospa_fx.couplings(model)
    ecospa_fx.shrink(model, {coupling: torch.tensor([1, 2, 5])})
    assert {tuple(tensor.shape) for tensor in (*model.parameters(), *model.buffers())} == {(3, 6), (3, 3)}
    with torch.no_grad():
        for tensor in expected[0].state_dict().values():
            tensor[[0, 3, 4, 6, 7]] = 0.0
    for each in (False, True):
        torch.testing.assert_close(model.train(each)(x), expected.train(each)(x))
    assert ecospa_fx.verify(model, example_inputs=(x,)).ok
