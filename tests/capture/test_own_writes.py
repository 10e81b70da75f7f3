"""Functions with a backward of their own, whose forward writes into what it has computed with."""

import copy

import torch
from torch import nn

import ecospa_fx


class Scan(torch.autograd.Function):
    """A recurrence `h[t] = a[t] h[t-1] + x[t]` in place, and the running products of `a` with it."""

    @staticmethod
    def forward(ctx, a, x):
        product, h = a.clone(), x.clone()
        for t in range(1, h.shape[1]):
            h[:, t].add_(product[:, t].mul(h[:, t - 1]))
            product[:, t].mul_(product[:, t - 1])
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, gradient):
        a, h = ctx.saved_tensors
        left = gradient.clone()
        for t in range(gradient.shape[1] - 2, -1, -1):
            left[:, t].add_(a[:, t + 1] * left[:, t + 1])
        of_a = torch.zeros_like(h)
        of_a[:, 1:] = h[:, :-1] * left[:, 1:]
        return of_a, left


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.x, self.a, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, u):
        return self.out(Scan.apply(self.a(u).sigmoid(), self.x(u)))


def test_a_forward_that_writes_into_its_own_values_has_the_gradients_of_its_backward():
    torch.manual_seed(0)
    plain = Recurrent().double()
    model = ecospa_fx.compile(copy.deepcopy(plain))
    u = torch.randn(2, 5, 6).double()
    for shrunk in (False, True):
        if shrunk:
            (coupling,) = ecospa_fx.couplings(model)
            ecospa_fx.shrink(model, {coupling: torch.tensor([0, 3, 4, 7])})
            plain.out.weight.data[:, [1, 2, 5, 6]] = 0.0
        for each in (model, plain):
            each.zero_grad()
            each(u).square().sum().backward()
        torch.testing.assert_close(model(u), plain(u))
        torch.testing.assert_close(model.out.bias.grad, plain.out.bias.grad)
        rows = [0, 3, 4, 7] if shrunk else [*range(8)]
        torch.testing.assert_close(model.a.weight.grad, plain.a.weight.grad[rows])
        torch.testing.assert_close(model.x.weight.grad, plain.x.weight.grad[rows])
