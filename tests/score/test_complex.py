"""Weights and activations that are complex numbers: each counts as its real and its imaginary part."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ecospa_fx


class Spectral(nn.Module):
    """Two complex products of the spectrum of the input."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(6, 8, dtype=torch.cdouble))
        self.b = nn.Parameter(torch.randn(8, 5, dtype=torch.cdouble))
        self.gates = torch.ones(8, dtype=torch.double)

    def forward(self, x):
        hidden = torch.fft.rfft(x)[..., :6] @ self.a * self.gates
        return torch.view_as_real(hidden @ self.b).sum(-1)


def compiled():
    torch.manual_seed(0)
    model, x = Spectral().eval(), torch.randn(4, 12, dtype=torch.double)
    ecospa_fx.compile(model, example_inputs=(x,))
    (coupling,) = [c for c in ecospa_fx.couplings(model) if c.size == 8]
    return model, x, coupling


def entries(score, model, x, coupling, optimizer=None):
    estimator = ecospa_fx.CoupledEstimator(model, score, optimizer=optimizer)
    model(x).square().sum().backward()
    estimator.accumulate()
    return estimator.entries(coupling)


def along_gates(model, x):
    """The squared derivative along a factor of each hidden number, of each row alone, by plain autograd."""
    plain = Spectral()
    plain.load_state_dict(model.state_dict())
    squares = torch.zeros(8, dtype=torch.double)
    for row in x:
        plain.gates = torch.ones(8, dtype=torch.double, requires_grad=True)
        (gradient,) = torch.autograd.grad(plain(row[None]).square().sum(), plain.gates)
        squares += gradient.square()
    return squares


def test_squared_gradients_are_those_of_both_parts():
    model, x, coupling = compiled()
    found = entries("fisher", model, x, coupling)
    sizes = [p.grad.abs().square() for p in (model.a, model.b)]
    expected = sizes[0].mean(0) + sizes[1].mean(1)
    torch.testing.assert_close(found / found.sum(), expected / expected.sum())


def test_norm_products():
    model, _, coupling = compiled()
    expected = (model.a.abs().square().sum(0).sqrt() * model.b.abs().square().sum(1).sqrt()).detach()
    torch.testing.assert_close(ecospa_fx.scores.index_scores(model, coupling), expected)


def test_magnitudes():
    model, x, coupling = compiled()
    found = entries("magnitude", model, x, coupling)
    expected = (model.a.abs().square().mean(0) + model.b.abs().square().mean(1)).detach()
    torch.testing.assert_close(found / found.sum(), expected / expected.sum())


def test_terms_by_position_are_derivatives_along_gates():
    model, x, coupling = compiled()
    found = entries("taylor_positions", model, x, coupling)
    expected = along_gates(model, x)
    torch.testing.assert_close(found / found.sum(), expected / expected.sum())


def test_activations_count_by_their_size():
    model, x, coupling = compiled()
    found = entries("activation", model.train(), x, coupling)
    hidden = (torch.fft.rfft(x)[..., :6] @ model.a).abs().square().mean(0)
    expected = (hidden * model.b.abs().square().mean(1)).detach()
    order = expected.argsort()
    assert torch.equal(found.argsort(), order), (found, expected)


@pytest.mark.parametrize("policy", ["paper", "adaptive"])
def test_a_run_shrinks_them(policy):
    model, x, _ = compiled()
    optimizer = torch.optim.Adam(model.parameters())
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.7, end=6, shrinks=2, policy=policy)
    for _ in range(8):
        loss = model(x).square().mean()
        loss.backward()
        trainer.step()
        optimizer.zero_grad()
    assert trainer.done and model.a.is_complex() and sum(p.numel() for p in model.parameters()) <= 0.75 * 88


def test_nothing_takes_over_in_complex_weights(caplog):
    """A regression over real parts alone would make the model worse; they stay as they are, and that is said."""
    model, x, coupling = compiled()
    with ecospa_fx.Grams(model) as grams, torch.no_grad():
        model(x)
    before = model.b.detach().clone()
    with caplog.at_level("INFO", logger="ecospa_fx"):
        ecospa_fx.shrink(model, {coupling: torch.arange(7)}, absorb=grams)
    assert torch.equal(model.b.detach(), before[:7])
    assert "complex" in caplog.text


def test_no_basis_is_changed():
    model, x, coupling = compiled()
    before = model(x)
    done = ecospa_fx.rotate(model, [coupling])
    assert "complex" in str(done)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_one_call():
    model, x, _ = compiled()
    report = ecospa_fx.compress(model, [x] * 8, 0.7)
    assert report.parameters[1] < report.parameters[0]
