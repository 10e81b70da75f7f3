"""Rebuild: any model again from its factory, wherever that makes it, or an error that says what differs."""

import copy
import functools
import json
import shutil

import pytest
import torch
from torch import nn

import ecospa_fx
from ecospa_fx import errors
from ecospa_fx.checkpoint.directory import saved_files

X = torch.linspace(-1, 1, 40).view(5, 8)


class Net(nn.Module):
    """Tied weights, a buffer that state_dict leaves out, one that it does not, a batch norm and a frozen layer."""

    def __init__(self, hidden=12, tied=True, where=None):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, hidden), nn.BatchNorm1d(hidden), nn.GELU(), nn.Linear(hidden, 8))
            for _ in range(2)
        )
        self.first, self.last = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        if tied:
            self.last.weight = self.first.weight
        self.register_buffer("table", torch.linspace(0, 1, 8), persistent=False)
        self.register_buffer("count", torch.tensor(3))
        self.first.weight._note = "kept"

    def forward(self, x):
        x = self.first(x) + self.table
        for layer in self.layers:
            x = x + layer(x)
        return self.last(x)


def shrunk(tied=True):
    return copy.deepcopy(_shrunk(tied))


@functools.cache
def _shrunk(tied):
    torch.manual_seed(0)
    model = ecospa_fx.compile(Net(tied=tied), example_inputs=(X,))
    model.layers[0][0].requires_grad_(False)
    model.layers[1][1].eval()
    for _ in range(3):
        model(X)
    ecospa_fx.shrink(model, {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model)})
    return model


def assert_equal(a, b):
    assert type(a).__name__ == type(b).__name__
    for x, y in (
        (dict(a.named_parameters()), dict(b.named_parameters())),
        (dict(a.named_buffers()), dict(b.named_buffers())),
    ):
        assert x.keys() == y.keys()
        for name, t in x.items():
            assert torch.equal(t, y[name]) and t.dtype == y[name].dtype and t.stride() == y[name].stride(), name
            assert t.requires_grad == y[name].requires_grad and not y[name].is_meta, name
    assert a.state_dict().keys() == b.state_dict().keys()
    assert [m.training for m in a.modules()] == [m.training for m in b.modules()]
    assert ecospa_fx.plan(a) == ecospa_fx.plan(b)


def meta(make=Net):
    with torch.device("meta"):
        return make()


@pytest.mark.parametrize("factory", [Net, meta, lambda: Net().double(), lambda: ecospa_fx.compile(Net())])
def test_it_comes_back_from_any_factory(tmp_path, factory):
    """With its modes, what is frozen, what is tied, and buffers that no state_dict holds."""
    model = shrunk()
    model.table.mul_(2)
    ecospa_fx.save(model, tmp_path)
    before = torch.random.get_rng_state()
    loaded = ecospa_fx.load(tmp_path, factory)
    assert torch.equal(before, torch.random.get_rng_state())
    assert_equal(model, loaded)
    assert loaded.first.weight is loaded.last.weight and loaded.first.weight._note == "kept"
    ecospa_fx.save(loaded, tmp_path / "again")
    for name in ("model.safetensors", "buffers.safetensors", "plan.json", "model.json"):
        assert (saved_files(tmp_path) / name).read_bytes() == (saved_files(tmp_path / "again") / name).read_bytes()
    assert torch.equal(loaded(X), model(X))
    loaded(X).sum().backward()
    assert loaded.layers[0][0].weight.grad is None and loaded.layers[1][0].weight.grad is not None
    if factory is meta:
        ecospa_fx.verify(loaded, example_inputs=(X,)).raise_if_failed()


def test_a_device_may_be_named(tmp_path):
    model = shrunk()
    ecospa_fx.save(model, tmp_path)
    assert_equal(model, ecospa_fx.load(tmp_path, meta, device="cpu"))
    nowhere = ecospa_fx.load(tmp_path, Net, device="meta")
    assert all(t.is_meta for t in nowhere.state_dict().values())
    assert [p.shape for p in nowhere.parameters()] == [p.shape for p in model.parameters()]
    with pytest.raises(errors.CheckpointError) as caught:
        ecospa_fx.save(nowhere, tmp_path)
    assert str(caught.value) == "`layers.0.0.weight` is on the meta device and has no values"
    assert_equal(model, ecospa_fx.load(tmp_path, Net))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_come_back_also_where_the_factory_makes_others(tmp_path, dtype):
    model = shrunk().to(dtype)
    ecospa_fx.save(model, tmp_path)
    for factory in (Net, meta):
        assert_equal(model, ecospa_fx.load(tmp_path, factory))


def test_before_the_first_call(tmp_path):
    model = ecospa_fx.compile(Net(), regions=["layers.0", "layers.1"])
    ecospa_fx.save(model, tmp_path)
    loaded = ecospa_fx.load(tmp_path, Net)
    assert_equal(model, loaded)
    assert torch.equal(model(X), loaded(X))
    assert [str(c) for c in ecospa_fx.couplings(loaded)] == [str(c) for c in ecospa_fx.couplings(model)]
    ecospa_fx.save(ecospa_fx.load(tmp_path, Net), tmp_path / "b")  # loaded, saved, never called
    assert torch.equal(ecospa_fx.load(tmp_path / "b", Net)(X), ecospa_fx.load(tmp_path, Net)(X))


class Ways(nn.Module):
    """In one of the ways it is called, the hidden entries must all be there: each is added to those before it."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.in_, self.out = (nn.Linear(*s) for s in ((8, 12), (12, 8), (8, 10), (10, 8)))

    def forward(self, x, running=False):
        hidden = self.up(x)
        x = x + self.down(hidden.cumsum(-1) if running else hidden.relu())
        return x + self.out(torch.relu(self.in_(x)))


def test_what_another_call_needs_whole_stays_whole(tmp_path):
    """Also before that call is met again: a schedule must not take what it would not have taken."""
    torch.manual_seed(0)
    model = ecospa_fx.compile(Ways(), example_inputs=(X,))
    assert len(ecospa_fx.couplings(model)) == 2
    model(X, running=True)
    assert len(ecospa_fx.couplings(model)) == 1
    ecospa_fx.save(model, tmp_path)
    loaded = ecospa_fx.load(tmp_path, Ways)
    ecospa_fx.save(loaded, tmp_path / "again")  # not called in between
    for directory in (tmp_path, tmp_path / "again"):
        loaded = ecospa_fx.load(directory, Ways)
        assert torch.equal(loaded(X), model(X))
        assert [str(c) for c in ecospa_fx.couplings(loaded)] == [str(c) for c in ecospa_fx.couplings(model)]
    ecospa_fx.shrink(loaded, {c: torch.arange(3) for c in ecospa_fx.couplings(loaded)})
    assert loaded(X, running=True).shape == X.shape


class Odd(nn.Module):
    """Complex weights, a state of its own, channels last, a buffer that a forward makes, weights in one piece."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.wave = nn.Parameter(torch.randn(8, dtype=torch.complex128))
        self.conv = nn.Conv2d(3, 6, 2).to(memory_format=torch.channels_last)
        both = torch.randn(16)
        self.left, self.right = nn.Parameter(both[:8]), nn.Parameter(both[8:])
        self.seen = {"calls": 0, "at": (1.5, None)}

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state

    def forward(self, x):
        if not hasattr(self, "made"):
            self.register_buffer("made", x.detach().mean(0), persistent=False)
        x = x + self.down(torch.relu(self.up(x)))
        return (
            torch.fft.ifft(torch.fft.fft(x * self.left + self.right) * self.wave.to(torch.complex64)).real + self.made
        )


def test_odd_things_come_back(tmp_path):
    torch.manual_seed(0)
    model = Odd()
    model(X)
    model.seen = {"calls": 7, "at": (float("inf"), torch.arange(3))}
    ecospa_fx.compile(model, example_inputs=(X,))
    ecospa_fx.shrink(model, {"ffn": torch.arange(5)})
    ecospa_fx.save(model, tmp_path)
    for factory in (Odd, lambda: meta(Odd)):
        loaded = ecospa_fx.load(tmp_path, factory)
        assert_equal(model, loaded)
        assert loaded.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert loaded.seen["calls"] == 7 and loaded.seen["at"][0] == float("inf")
        assert torch.equal(loaded.seen["at"][1], torch.arange(3))
        assert torch.equal(loaded(X), model(X))
    together = ecospa_fx.load(tmp_path, Odd)
    assert together.left.untyped_storage()._cdata == together.right.untyped_storage()._cdata


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(8, 12), nn.Linear(12, 8), torch.tensor(2.0)

    def forward(self, x):
        return self.down(torch.relu(self.up(x))) * self.scale


def refused(directory, factory, words):
    with pytest.raises(errors.CheckpointError) as caught:
        ecospa_fx.load(directory, factory)
    assert str(caught.value) == words


def test_what_was_never_saved_is_not_made_up(tmp_path):
    ecospa_fx.save(ecospa_fx.compile(Table(), example_inputs=(X,)), tmp_path)
    assert float(ecospa_fx.load(tmp_path, Table).scale) == 2
    refused(
        tmp_path, lambda: meta(Table),
        "`scale` is on the meta device and was not saved, because it is neither a parameter nor a buffer; make it a "
        "buffer, or let the factory make the model on a real device",
    )  # fmt: skip


def test_ties_that_differ_are_refused(tmp_path):
    ecospa_fx.save(shrunk(), tmp_path / "tied")
    ecospa_fx.save(shrunk(tied=False), tmp_path / "apart")
    refused(
        tmp_path / "tied", lambda: Net(tied=False),
        "`last.weight` and `first.weight` are tied in the saved model and two tensors in this one; tie them in the "
        "factory",
    )  # fmt: skip
    refused(
        tmp_path / "apart", Net,
        "`last.weight` and `first.weight` are two tensors in the saved model and tied in this one; untie them in the "
        "factory",
    )  # fmt: skip


def test_a_refused_model_is_left_as_it_was(tmp_path):
    ecospa_fx.save(shrunk(), tmp_path)
    mine = Net(hidden=14)
    before, classes = copy.deepcopy(mine.state_dict()), [type(m) for m in mine.modules()]
    refused(tmp_path, lambda: mine, "`layers.0.0.weight` was (12, 8) when saved and is (14, 8) in this model")
    assert all(torch.equal(t, before[name]) for name, t in mine.state_dict().items())
    assert classes == [type(m) for m in mine.modules()]
    model = shrunk()
    refused(tmp_path, lambda: model, "the factory made a model that has shrunk already; it must make the original one")


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    from test_models import gpt2

    tmp_path = tmp_path_factory.mktemp("hugging_face")

    torch.manual_seed(0)
    tokens = torch.arange(12).view(2, 6)
    model = ecospa_fx.compile(gpt2(), example_kwargs={"input_ids": tokens}).eval()
    ecospa_fx.shrink(model, {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model)})
    ecospa_fx.save(model, tmp_path)
    return tmp_path, model, tokens


def test_from_a_config_alone_or_a_factory_on_the_meta_device(hugging_face):
    directory, model, tokens = hugging_face
    for factory in (None, lambda: meta(lambda: type(model)(copy.deepcopy(model.config)))):
        loaded = ecospa_fx.load(directory, factory)
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_hostile_config_runs_nothing(hugging_face, tmp_path):
    """Neither code beside the config, nor kernels from somewhere else, nor classes that are no models."""
    from test_checkpoint import edited, rewritten

    directory = shutil.copytree(hugging_face[0], tmp_path / "run")
    where = saved_files(directory)
    (where / "evil.py").write_text("raise SystemExit('ran')")
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    rewritten(directory, "config.json", edited(lambda c: c.update(auto_map=auto)))
    assert type(ecospa_fx.load(directory)).__name__ == "GPT2LMHeadModel"
    rewritten(directory, "model.json", edited(lambda m: m.update(implementations={"": {"attn": "someone/kernels"}})))
    refused(
        directory,
        None,
        f"{where} was saved with the implementation 'someone/kernels', which is not part of transformers; pass a "
        "factory",
    )
    rewritten(directory, "model.json", edited(lambda m: m.update({"class": "Trainer", "implementations": {}})))
    refused(directory, None, "transformers has no model class Trainer; pass a factory")
    rewritten(directory, "model.json", edited(lambda m: m.update({"class": "GPT2LMHeadModel"})))
    rewritten(directory, "config.json", edited(lambda c: c.update(n_embd=10**12)))
    with pytest.raises(errors.CheckpointError, match=r"config\.json makes no GPT2LMHeadModel: .*; pass a factory"):
        ecospa_fx.load(directory)
    rewritten(directory, "config.json", lambda _: json.dumps([1]).encode())
    refused(directory, None, f"{where}/config.json cannot be read: it is not a JSON object")
