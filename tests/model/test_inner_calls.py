"""Modules inside a shrunk region, called by themselves: as exact as the region, or refused by name."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from twin import kept_positions, zeroed

import ecospa_fx

WIDTH = 16


class Attention(nn.Module):
    """Views by a number of heads of its own: half of the heads would be viewed as as many, half as long."""

    def __init__(self):
        super().__init__()
        self.heads, self.qkv, self.out = 4, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.reshape(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.attention, self.head = nn.Linear(WIDTH, WIDTH), Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, still=False):
        x = x if still and x.sum().item() > 1e6 else x + self.attention(self.into(x))
        return self.head(x)


class Denoiser(nn.Module):
    """Its forward is the loss, and all else it does calls the network inside."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        return (self.net(x) - x).square().mean(-1)

    def sample(self, x):
        return self.net(x)


@pytest.fixture
def shrunk():
    """A model shrunk by its root to half of the heads, its twin with zeros, and an input."""
    torch.manual_seed(0)
    model, x = Denoiser().double(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    plain = copy.deepcopy(model)
    ecospa_fx.compile(model, example_inputs=(x,))
    assert {c.region for c in ecospa_fx.couplings(model)} == {""}
    keeps = {c: torch.tensor([1, 2]) for c in ecospa_fx.couplings(model) if c.kind == "heads"}
    twin = zeroed(plain, kept_positions(plain, keeps))
    ecospa_fx.shrink(model, keeps)
    return model, twin, x


def check(model, twin, x):
    for call in (Denoiser.sample, Denoiser.forward, lambda m, x: m.net.attention(x)):
        torch.testing.assert_close(call(model, x), call(twin, x), rtol=1e-10, atol=1e-12)


def test_a_module_inside_a_region_is_exact_by_itself(shrunk):
    check(*shrunk)


@pytest.mark.parametrize("made", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_so_it_is_in_a_copy(shrunk, made):
    model, twin, x = shrunk
    check(made(model), twin, x)


def test_so_it_is_once_loaded(shrunk, tmp_path):
    model, twin, x = shrunk
    ecospa_fx.save(model, tmp_path)
    check(ecospa_fx.load(tmp_path, lambda: Denoiser().double()), twin, x)


def test_python_that_follows_its_weights_goes_on_running():
    """So it takes and returns what the region holds at fewer entries, which a program by itself could not."""

    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = Encoder(), Decoder()

        def forward(self, x):
            return self.decoder(self.encoder(x))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 8)

        def forward(self, x):
            return self.b(self.norm(self.a(x)).relu()).tanh()

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 6)

        def forward(self, z):
            return self.a(z)

    torch.manual_seed(0)
    model, x = Autoencoder().double(), torch.randn(5, 6, dtype=torch.float64)
    ecospa_fx.compile(model, example_inputs=(x,), regions="root")
    ecospa_fx.shrink(model, {c: torch.arange(c.size // 2) for c in ecospa_fx.couplings(model)})
    latent = model.encoder(x)
    assert latent.shape == (5, 4)
    torch.testing.assert_close(model.decoder(latent), model(x), rtol=1e-10, atol=1e-12)


def test_a_second_shrink_is_followed(shrunk):
    model, _, x = shrunk
    model.sample(x)
    (vo,) = [c for c in ecospa_fx.couplings(model) if c.name.endswith("vo")]
    ecospa_fx.shrink(model, {vo: torch.arange(vo.size // 2)})
    torch.testing.assert_close((model.sample(x) - x).square().mean(-1), model(x), rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_what_is_left(shrunk):
    model, _, x = shrunk
    by_forward = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    by_sample = torch.autograd.grad((model.sample(x) - x).square().mean(-1).sum(), list(model.parameters()))
    torch.testing.assert_close(by_sample, by_forward, rtol=1e-9, atol=1e-12)


def test_restoring_tries_the_python_inside(shrunk):
    model, _, x = shrunk
    with pytest.raises(ecospa_fx.errors.RestoreError):
        ecospa_fx.restore(model)
    torch.testing.assert_close((model.sample(x) - x).square().mean(-1), model(x), rtol=1e-10, atol=1e-12)


def test_one_that_cannot_be_captured_is_refused_by_name(shrunk):
    model, _, x = shrunk
    with pytest.raises(
        ecospa_fx.errors.CaptureError, match="`net` lies in the model, which has shrunk and runs as one"
    ):
        model.net(x, still=True)


class Generated(nn.Module):
    """A layer with a forward that a program has written, which is in no module of Python."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.down(self.up(x).relu())

    forward.__module__ = None


def test_a_forward_without_a_module_is_one_of_the_models_own():
    model = ecospa_fx.compile(nn.Sequential(Generated(), nn.Linear(4, 4)))
    model(torch.randn(2, 4))
    ecospa_fx.shrink(model, {coupling: torch.arange(3) for coupling in ecospa_fx.couplings(model)})
    assert model[0].up.weight.shape == (3, 4)
