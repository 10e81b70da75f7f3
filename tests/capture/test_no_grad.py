"""Blocks without gradients: what they read, make and write into has in a graph the gradients that it has in eager."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from twin import assert_equals_twin, kept_positions, zeroed

import ecospa_fx


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("u", torch.randn(3))
        self.register_buffer("w", torch.randn(3))

    def forward(self, x):
        return self.after(self.b(F.relu(self.a(x))))

    def after(self, y):
        return y


class Writes(Mlp):
    """Into a value that goes on, and keeps its gradients as if nothing had been written."""

    def after(self, y):
        y = y + 1.0
        with torch.no_grad():
            y.mul_(3.0).add_(1.0)
        return y.exp()


class WritesAndReturns(Mlp):
    def after(self, y):
        y = y + 1.0
        with torch.no_grad():
            z = y.mul_(3.0)
            total = z.view(-1).sum()
        return z * 2 + y + total


class Reads(Mlp):
    def after(self, y):
        with torch.no_grad():
            scale = y.abs().amax()
            same = y
            part, other = y.unbind(0)[0], self.b.weight.sum(1)
        return y / scale + same + part + other


class Out(Mlp):
    """Into buffers that `out=` names, of arguments that need gradients."""

    def after(self, y):
        with torch.no_grad():
            torch.mul(self.b.bias, self.w, out=self.u)
            F.normalize(self.u, dim=0, out=self.w)
        return y * self.w.clone()


class Power(Mlp):
    """A step of power iteration at each call."""

    def after(self, y):
        with torch.no_grad():
            v = F.normalize(self.b.weight.detach().sum(1) * self.u, dim=0, eps=1e-6)
            self.u.copy_(v)
        return y / torch.dot(self.u.clone(), self.b.bias).abs().add(1.0)


class Decorated(Mlp):
    @torch.no_grad()
    def scale(self, y):
        return y.std(), y.detach().add_(0.5)

    def after(self, y):
        scale, moved = self.scale(y * 1.0)
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            count = (y > 0).sum()
        return y * scale + moved + count


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 6)
        self.c, self.d = spectral_norm(nn.Linear(6, 5)), nn.Linear(5, 2)

    def forward(self, x):
        return self.d(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))


@pytest.mark.parametrize("cls", [Writes, WritesAndReturns, Reads, Out, Power, Decorated, Spectral])
def test_it_trains_as_eager_does_before_and_after_a_shrink(cls):
    torch.manual_seed(0)
    plain, x = cls().double().train(), torch.randn(2, 4).double()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(x,))
    twin, positions = copy.deepcopy(plain), {}
    for shrunk in (False, True):
        if shrunk:
            coupling = next(c for c in ecospa_fx.couplings(model) if any(m.parameter == "a.weight" for m in c.members))
            keeps = {coupling: torch.arange(0, coupling.size, 3)}
            ecospa_fx.shrink(model, keeps)
            positions = kept_positions(plain, keeps)
            twin = zeroed(twin, positions)
        for _ in range(3):
            assert_equals_twin(model, twin, positions, (x,), {}, f"{cls.__name__}, shrunk {shrunk}")
            for name, buffer in twin.named_buffers():
                torch.testing.assert_close(dict(model.named_buffers())[name], buffer)


class State:
    """State that a step of generation leaves for the next one."""

    def __init__(self):
        self.value = None


class Recurrent(nn.Module):
    """Writes its state into a tensor that backward needs, as generation by a state space model does."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x, state=None):
        h = F.relu(self.a(x))
        if state is not None:
            if state.value is None:
                state.value = torch.zeros_like(h)
            state.value.copy_(h.sigmoid() * state.value + h)
            h = state.value * h
            state.value.mul_(0.5)
        return self.b(h)


@pytest.mark.parametrize("before", [True, False], ids=["called before", "called after"])
def test_a_call_of_which_eager_has_no_gradients_is_compared_without_them(before):
    torch.manual_seed(0)
    plain, x = Recurrent(), torch.randn(2, 4)
    twin = copy.deepcopy(plain)
    model = ecospa_fx.compile(plain, example_inputs=(x,), regions="root")

    def steps(model):
        state = State()
        with torch.no_grad():
            return [model(x, state) for _ in range(3)]

    if before:
        assert all(torch.equal(a, b) for a, b in zip(steps(model), steps(twin), strict=True))
    (coupling,) = ecospa_fx.couplings(model)
    keep = torch.tensor([0, 2, 3, 6])
    ecospa_fx.shrink(model, {coupling: keep})
    small = Recurrent()
    small.a, small.b = nn.Linear(4, 4), nn.Linear(4, 4)
    small.load_state_dict(model.state_dict())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(steps(model), steps(small), strict=True))


def test_a_call_with_gradients_that_eager_does_not_have_is_refused_and_says_so():
    torch.manual_seed(0)
    model, x = Recurrent(), torch.randn(2, 4)
    model = ecospa_fx.compile(model, example_inputs=(x,), regions="root")
    ecospa_fx.shrink(model, {c: torch.arange(4) for c in ecospa_fx.couplings(model)})
    wanted = r"its eager backward does not run: .* make it under torch\.no_grad\(\)"
    with pytest.raises(ecospa_fx.errors.CaptureError, match=wanted):
        model(x, State())


class _KeepsNothing(torch.autograd.Function):
    """Its backward needs what only a forward in training keeps, and fails with an error of its own kind."""

    @staticmethod
    def forward(ctx, x, kept):
        ctx.kept = kept
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * len(ctx.kept), None


def test_a_backward_that_raises_an_error_of_its_own_kind_is_refused_by_name():
    class Reversible(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            return _KeepsNothing.apply(self.b(F.relu(self.a(x))), [x] if self.training else None)

    model, x = Reversible().eval(), torch.randn(2, 4)
    with pytest.raises(
        ecospa_fx.errors.CaptureError,
        match=r"its eager backward does not run: object of type 'NoneType' .*torch.no_grad",
    ):
        ecospa_fx.compile(model, example_inputs=(x,), regions="root")
    with torch.no_grad():
        ecospa_fx.compile(model, example_inputs=(x,))
    assert [c.size for c in ecospa_fx.couplings(model)] == [8]
