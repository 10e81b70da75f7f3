"""Cross-entropy and labels made of some rows after another, beside torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from ecospa_fx.train import cross_entropy as chunked


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 100)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(50, 7), (3, 400), (1, 1)])
def test_value_and_gradient_are_those_of_torch(shape, dtype, close):
    torch.manual_seed(0)
    logits = (5 * torch.randn(shape, dtype=dtype)).requires_grad_()
    labels = torch.randint(shape[1], shape[:1])
    value = chunked.mean_cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(3 * value, logits)
    precise = logits.detach().double().requires_grad_()
    expected = cross_entropy(precise, labels)
    (wanted,) = torch.autograd.grad(3 * expected, precise)
    torch.testing.assert_close(value.double(), expected, atol=close, rtol=close)
    torch.testing.assert_close(gradient.double(), wanted, atol=close, rtol=close)
    assert gradient.dtype == dtype


def test_backward_holds_the_logits_alone():
    logits, held = torch.randn(50, 40, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
        chunked.mean_cross_entropy(logits, torch.zeros(50, dtype=torch.long))
    assert [tuple(tensor.shape) for tensor in held if tensor.numel() > 50] == [(50, 40)]


def test_labels_are_drawn_from_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(40_000, 3)
    labels = chunked.drawn_labels(logits, torch.Generator().manual_seed(0))
    torch.testing.assert_close(labels.bincount() / len(labels), logits[0].softmax(0), atol=0.01, rtol=0)


def test_labels_do_not_depend_on_how_many_rows_are_seen_at_a_time(monkeypatch):
    logits = torch.randn(90, 37)
    some = chunked.drawn_labels(logits, torch.Generator().manual_seed(3))
    monkeypatch.setattr(chunked, "CHUNK", 1 << 20)
    assert torch.equal(chunked.drawn_labels(logits, torch.Generator().manual_seed(3)), some)
