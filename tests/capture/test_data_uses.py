"""Other data for a tensor in a forward, and out arguments."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ecospa_fx
from ecospa_fx.errors import CaptureError

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)


class Net(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.up, self.down, self.step = nn.Linear(4, 8), nn.Linear(8, 3), step
        self.target = nn.Linear(4, 8)
        self.register_buffer("mean", torch.ones(8))
        self.held = [torch.ones(8, dtype=torch.float64)]

    def forward(self, x):
        return self.down(self.step(self, F.relu(self.up(x))))


def _parameter(net, h):
    net.target.weight.data = 0.9 * net.target.weight.data + 0.1 * net.up.weight.data
    return h


def _and_back(net, h):
    weight = net.target.weight.data
    net.target.weight.data = weight * 2
    h = h + net.target.weight.sum()
    net.target.weight.data = weight
    return h


def _buffer(net, h):
    net.mean.data = net.mean * 0.9
    return h * net.mean


def _set(net, h):
    with torch.no_grad():
        net.mean.set_(net.mean * 0.9)
    return h * net.mean


def _held(net, h):
    net.held[0].data = net.held[0] * 0.9
    return h * net.held[0]


def _local(net, h):
    h.data = h.data.clamp(-0.2, 0.2)
    return h


STEPS = {_parameter: "`target.weight`", _and_back: "`target.weight`", _buffer: "`mean`", _set: "`mean`",
         _held: "a tensor", _local: "a tensor"}  # fmt: skip


def assert_shrinks(model, small):
    """Shrink a compiled model, and compare its result and a gradient with those of a plain copy that is cut alike."""
    keep = torch.tensor([0, 2, 3, 6, 7])
    ecospa_fx.shrink(model, {"ffn": keep})
    small.up.weight, small.up.bias, small.down.weight = (
        nn.Parameter(t) for t in (small.up.weight[keep], small.up.bias[keep], small.down.weight[:, keep])
    )
    a, b = model(X), small(X)
    torch.testing.assert_close(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    torch.testing.assert_close(model.up.weight.grad, small.up.weight.grad)


@pytest.mark.parametrize("step", STEPS)
def test_other_data_is_refused_with_its_line(step):
    model = Net(step).double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CaptureError) as caught:
        ecospa_fx.compile(model, example_inputs=(X,), regions="root")
    line = step.__code__.co_firstlineno + (2 if step in (_and_back, _set) else 1)
    assert str(caught.value) == (
        f"the model (Net) gives {STEPS[step]} other data at test_data_uses.py:{line} at every call, which its graph "
        "would not follow. Write into it instead, in torch.no_grad(): `.copy_(...)`, or let smaller submodules be "
        "captured (regions='auto' finds them)"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("step", STEPS)
def test_other_data_between_layers_is_assigned_by_the_models_own_python(step):
    """Where the layers on its sides are joined. What needs all entries of a coupling keeps it whole."""
    torch.manual_seed(0)
    model = Net(step).double()
    small = copy.deepcopy(model)
    if step not in (_and_back, _local):
        with pytest.raises(CaptureError, match=r"Nor can what runs through its submodules shrink: up.weight\[0\]"):
            ecospa_fx.compile(model, example_inputs=(X,))
        return
    ecospa_fx.compile(model, example_inputs=(X,))
    assert_shrinks(model, small)


def test_data_that_is_read_is_named_where_torch_cannot_follow():
    def step(net, h):
        h.data.clamp_(-0.2, 0.2)
        return h

    line = step.__code__.co_firstlineno + 1
    with pytest.raises(CaptureError, match=rf"It reads the data of a tensor at test_data_uses.py:{line} \(`.data`\)"):
        ecospa_fx.compile(Net(step), example_inputs=(X.float(),), regions="root")


def _divided(net, h):
    with torch.no_grad():
        torch.div(h, 2.0, out=(half := torch.empty_like(h)))
    return h + half


def _several(net, h):
    with torch.no_grad():
        scaled, total = torch.empty_like(h), h.new_empty(3, 1)
        torch.mul(h, h, out=scaled)
        torch.add(scaled, 1, alpha=2, out=scaled)
        torch.sum(scaled, 1, keepdim=True, out=total)
    return h / total


def _pairs(net, h):
    with torch.no_grad():
        values, places = h.new_empty(h.shape[1]), torch.empty(h.shape[1], dtype=torch.long)
        torch.max(h, 0, out=(values, places))
    return h - values


@pytest.mark.parametrize("step", [_divided, _several, _pairs])
def test_results_may_be_written_into_tensors_that_are_given(step):
    torch.manual_seed(0)
    model = Net(step).double()
    small = copy.deepcopy(model)
    ecospa_fx.compile(model, example_inputs=(X,))
    assert_shrinks(model, small)


@pytest.mark.filterwarnings("ignore:forward hooks on 0, 2 are part of the captured graph")
def test_spectral_norm_in_training_is_that_of_the_smaller_layer():
    def net(width):
        torch.manual_seed(0)
        norm = nn.utils.spectral_norm
        return nn.Sequential(norm(nn.Linear(4, width)), nn.ReLU(), norm(nn.Linear(width, 3))).double()

    model = ecospa_fx.compile(net(8), example_inputs=(X,))
    for _ in range(2):
        model(X)
    ecospa_fx.shrink(model, {"ffn": torch.tensor([0, 2, 3, 6, 7])})
    small = net(5)
    small.load_state_dict(model.state_dict())
    for _ in range(2):
        torch.testing.assert_close(model(X), small(X))
        for name, buffer in small.named_buffers():
            torch.testing.assert_close(model.get_buffer(name), buffer)


class OwnSpectral(nn.Module):
    """A step of a power iteration per call, kept in buffers by writing into them or by assigning others."""

    def __init__(self, assigns):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.out, self.assigns = nn.Parameter(torch.randn(6, 4)), nn.Linear(6, 3), assigns
        self.register_buffer("u", F.normalize(torch.randn(6), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(4), dim=0))

    def forward(self, x):
        u, v = self.u, self.v
        if self.training:
            with torch.no_grad():
                v = F.normalize(self.weight.t() @ u, dim=0)
                u = F.normalize(self.weight @ v, dim=0)
                if self.assigns:
                    self.u, self.v = u, v
                else:
                    self.u.copy_(u)
                    self.v.copy_(v)
        return self.out(F.relu(F.linear(x, self.weight / torch.dot(u, self.weight @ v))))


SPECTRAL = {
    "parametrized": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3)
    ),
    "written": lambda: OwnSpectral(False),
    "assigned": lambda: OwnSpectral(True),
}


@pytest.mark.parametrize("name", SPECTRAL)
def test_state_that_a_weight_makes_of_itself_is_no_meeting_of_weights(name):
    """The columns of a first layer are those of the input, in training as in eval mode."""
    found = {}
    for training in (True, False):
        model = ecospa_fx.compile(SPECTRAL[name]().double().train(training), example_inputs=(X,), regions="root")
        found[training] = {(m.parameter, m.dim) for c in ecospa_fx.couplings(model) for m in c.members}
        assert [c.size for c in ecospa_fx.couplings(model)] == [6]
    assert found[True] == found[False]


@pytest.mark.parametrize("family", ["normal", "categorical", "independent"])
def test_distributions_that_check_their_arguments_are_captured(family, monkeypatch):
    """As they do by default, in a branch on values, until torch.compile turns that off for the process."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.mean, self.scale = nn.Linear(6, 12), nn.Linear(12, 4), nn.Linear(12, 4)
            self.d, self.e = nn.Linear(4, 10), nn.Linear(10, 3)

        def forward(self, x):
            h = self.a(x).relu()
            if family == "categorical":
                return self.e(self.d(torch.distributions.Categorical(logits=self.mean(h)).probs).relu())
            drawn = torch.distributions.Normal(self.mean(h), self.scale(h).exp())
            if family == "independent":
                drawn = torch.distributions.Independent(drawn, 1)
            z = drawn.rsample()
            return self.e(self.d(z).relu()), drawn.log_prob(z)

    torch.manual_seed(0)
    model, x = Policy(), torch.randn(5, 6)
    plain = copy.deepcopy(model)
    ecospa_fx.compile(model, example_inputs=(x,))
    assert {10, 12} <= {c.size for c in ecospa_fx.couplings(model)}
    results = []
    for each in (plain, model):
        torch.manual_seed(1)
        results.append(each(x))
    torch.testing.assert_close(*results)
    assert torch.distributions.Distribution._validate_args
    ecospa_fx.verify(model, example_inputs=(x,)).raise_if_failed()
