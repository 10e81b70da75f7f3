"""execution="module": the model's own Python runs at the sizes that are left, exactly, or a coupling is refused."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_models import made
from torch import nn
from twin import assert_same, half, kept_positions, sliced, zeroed
from twin import run as run_twice

import ecospa_fx
from ecospa_fx import errors
from ecospa_fx.model.lookup import regions_of
from ecospa_fx.passes.follow import follow
from ecospa_fx.passes.follow.attributes import Attribute, with_field

WIDTH, HEADS, DIM = 24, 4, 6


class Config:
    """One object for all layers, as libraries of models have it."""

    def __init__(self, heads=HEADS):
        self.heads, self.attention, self.layers = heads, "sdpa", 4  # as many layers as heads


class Attention(nn.Module):
    """Views by integers that it holds in several places; its number equals that of its heads in one block."""

    def __init__(self, config, number):
        super().__init__()
        self.config, self.number, self.num_heads, self.split_size = config, number, config.heads, WIDTH
        self.shape = (config.heads, DIM)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = DIM**-0.5

    def forward(self, x, cache=None):
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, *self.shape).transpose(1, 2) for t in self.qkv(x).split(self.split_size, dim=-1))
        if cache is not None:
            k, v = cache.setdefault(self.number, (k, v))
        scores = q @ k.mT * self.scale
        y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, s, self.config.heads * DIM))


class Block(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.attention, self.norm = Attention(config, number), nn.LayerNorm(WIDTH)
        self.up, self.inner, self.down = nn.Linear(WIDTH, 32), nn.BatchNorm1d(32), nn.Linear(32, WIDTH)

    def forward(self, x, cache=None):
        x = x + self.attention(self.norm(x), cache)
        return x + self.down(F.gelu(self.inner(self.up(x).mT).mT))


class Net(nn.Module):
    def __init__(self, layers=5):
        super().__init__()
        self.config = Config()
        self.layers = nn.ModuleList(Block(self.config, i) for i in range(layers))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x, cache=None):
        for layer in self.layers:
            x = layer(x, cache)
        return self.head(x)


def net(layers=5, execution="module"):
    torch.manual_seed(0)
    model, x = Net(layers).double().eval(), torch.randn(2, 7, WIDTH, dtype=torch.float64)
    plain = copy.deepcopy(model)
    return ecospa_fx.compile(model, example_inputs=(x,), execution=execution), plain, x


def halves(model):
    return {coupling: half(coupling.size, i) for i, coupling in enumerate(ecospa_fx.couplings(model))}


def assert_masked(model, plain, positions, args=(), kwargs=None):
    """The model equals the plain one with zeros, outputs and gradients."""
    outputs, gradients = run_twice(model, args, kwargs or {})
    expected, whole = run_twice(zeroed(plain, positions), args, kwargs or {})
    for out, masked in zip(outputs, expected, strict=True):
        torch.testing.assert_close(out, masked, rtol=1e-9, atol=1e-10)
    wanted = {name: sliced(g, name, positions) for name, g in whole.items()}
    assert_same(wanted, gradients, 1e-8, "gradients")


def test_its_own_python_runs_and_its_integers_follow():
    model, plain, x = net()
    assert {c.kind for c in ecospa_fx.couplings(model)} == {"heads", "ffn"}
    heads = next(c for c in ecospa_fx.couplings(model) if c.name == "layers.3.attention.heads")
    of = "layers.3.attention"
    assert set(heads.changes) == {f"{of}.config.heads", f"{of}.num_heads", f"{of}.shape[0]", f"{of}.split_size"}
    keeps = halves(model)
    positions = kept_positions(plain, keeps)
    ecospa_fx.shrink(model, keeps)
    assert type(model.layers[3]) is Block and model.layers[3].forward.__func__ is Block.forward
    assert_masked(model, plain, positions, (x,))
    attention = model.layers[3].attention
    assert (attention.num_heads, attention.split_size, attention.shape, attention.config.heads) == (2, 12, (2, 6), 2)
    assert attention.number == 3 and model.layers[4].attention.number == 4  # no size, though it equals one
    assert model.config.heads == HEADS and model.config.layers == attention.config.layers == 4
    assert model.layers[0].inner.num_features == 16
    model.config.attention = "eager"  # and still one configuration
    assert attention.config.attention == "eager"


def test_another_call_than_the_one_that_was_captured():
    model, plain, x = net()
    keeps = halves(model)
    positions = kept_positions(plain, keeps)
    ecospa_fx.shrink(model, keeps)
    masked = zeroed(plain, positions)
    with torch.no_grad():
        torch.testing.assert_close(model(x, {}), masked(x, {}), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(model(x[:1, :3]), masked(x[:1, :3]), rtol=1e-9, atol=1e-10)
    assert len(regions_of(model)["layers.0"].specializations) == 1  # nothing was captured for these


def test_what_its_python_cannot_follow_is_refused_with_a_reason():
    model, _, _ = net(2)
    assert {c.kind for c in ecospa_fx.couplings(net(2, "graph")[0])} == {"heads", "ffn", "qk", "vo"}
    refused = [str(refusal) for refusal in ecospa_fx.explain(model).refusals if refusal.size == DIM]
    assert len(refused) == 4
    where = "layers.1.attention.qkv.weight[0], layers.1.attention.qkv.bias[0]"
    assert any(
        text.startswith(f"{where} ({DIM}): its own Python fails in `attention` (Attention): ") for text in refused
    )
    assert all(text.endswith("; execution='graph' can shrink it") for text in refused)


class Scaled(nn.Module):
    """Scales by a width that it reads off what it is given."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


def test_a_forward_that_would_run_and_give_something_else_is_refused():
    torch.manual_seed(0)
    model = ecospa_fx.compile(Scaled(), example_inputs=(torch.randn(2, 5, 8),), execution="module")
    assert [c.kind for c in ecospa_fx.couplings(model)] == ["vo"]
    (refusal,) = (r for r in ecospa_fx.explain(model).refusals if r.size == 6)
    assert "its own Python runs, but gives results that differ by" in str(refusal)


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).view(-1, 8))


def test_nothing_to_follow():
    model, x = Fixed(), torch.randn(3, 4)
    with pytest.raises(errors.NoCouplingError) as caught:
        ecospa_fx.compile(model, example_inputs=(x,), execution="module")
    assert str(caught.value).startswith(
        "the Python of Fixed can follow none of its couplings, and it is left as it was"
    )
    assert "shape '[-1, 8]' is invalid for input of size" in str(caught.value)
    assert type(model) is Fixed and not [key for key in model.__dict__ if "ecospa" in key]
    assert ecospa_fx.compile(model, example_inputs=(x,)) is model  # and graph execution still can


def test_one_that_waits_for_its_first_call():
    torch.manual_seed(0)
    model, x = Net(2).double(), torch.randn(2, 7, WIDTH, dtype=torch.float64)
    ecospa_fx.compile(model, execution="module")
    assert model(x).shape == (2, 7, 5)
    assert type(model) is Net and len(ecospa_fx.couplings(model)) == 4
    with pytest.raises(errors.EcoSpaError, match=r"is compiled with execution='module'; ecospa_fx.restore"):
        ecospa_fx.compile(model)
    with pytest.raises(errors.EcoSpaError, match="execution='eager' is none of 'graph', 'module'"):
        ecospa_fx.compile(Net(2), execution="eager")


def test_a_shrink_that_fails_changes_no_integer(monkeypatch):
    model, _, x = net(2)
    before = model.layers[1].attention.shape, model(x)

    def fail(self, journal):
        raise RuntimeError("no memory")

    monkeypatch.setattr("ecospa_fx.model.slicing.Change.commit", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        ecospa_fx.shrink(model, halves(model))
    attention = model.layers[1].attention
    assert (attention.shape, attention.num_heads, attention.config) == (before[0], HEADS, model.config)
    assert torch.equal(model(x), before[1])


def test_averages_of_its_weights_shrink_with_it():
    model, plain, x = net(2)
    average = torch.optim.swa_utils.AveragedModel(model)
    keeps = halves(model)
    positions = kept_positions(plain, keeps)
    ecospa_fx.shrink(model, keeps, also=average)
    assert average.module.layers[1].attention.shape == (2, DIM)
    torch.testing.assert_close(average(x), zeroed(plain, positions).eval()(x), rtol=1e-9, atol=1e-10)


def test_copies_and_pickles_go_on():
    model, _, x = net(2)
    ecospa_fx.shrink(model, halves(model))
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (twin, again):
        assert torch.equal(other(x), model(x))
        assert other.layers[0].attention.config.heads == 2 and other.config.heads == HEADS
    twin.config.attention = "flash"
    assert twin.layers[0].attention.config.attention == "flash" and model.config.attention == "sdpa"
    ecospa_fx.compile(again, example_inputs=(x,), execution="module")
    for other in (model, twin, again):
        ecospa_fx.shrink(other, {"layers.0.attention.heads": torch.tensor([1]), "layers.1.ffn": torch.arange(3)})
        assert other.layers[0].attention.split_size == DIM
        assert torch.equal(other(x), model(x))


def test_saved_and_loaded_it_runs_and_shrinks_on(tmp_path):
    model, _, x = net(2)
    ecospa_fx.shrink(model, halves(model))
    ecospa_fx.save(model, tmp_path / "run")
    loaded = ecospa_fx.load(tmp_path / "run", lambda: Net(2).double())
    assert loaded.layers[1].attention.shape == (2, DIM)
    with torch.no_grad():
        assert torch.equal(loaded(x, {}), model(x, {}))  # a call that no graph could hold
    with pytest.raises(errors.NoInputsError):
        ecospa_fx.couplings(loaded)
    loaded(x)
    assert type(loaded) is Net
    assert [(c.name, c.size, c.changes) for c in ecospa_fx.couplings(loaded)] == [
        (c.name, c.size, c.changes) for c in ecospa_fx.couplings(model)
    ]
    for each in (model, loaded):
        ecospa_fx.shrink(each, {"layers.0.attention.heads": torch.tensor([0]), "layers.1.ffn": torch.arange(3)})
    assert torch.equal(loaded(x), model(x))
    other = Net(2).double()
    other.layers[0].attention.config = Config(3)
    with pytest.raises(errors.CheckpointError, match=r"`layers.0.attention.config.heads` was 4 when saved and is 3"):
        ecospa_fx.load(tmp_path / "run", lambda: other)


def test_training_to_a_target():
    model, _, x = net(2)
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, start=1, end=3, interval=1)
    for _ in range(6):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        trainer.step(loss=loss)
        optimizer.zero_grad()
    assert trainer.done and trainer.history[-1]["size"] <= 0.61 * sum(p.numel() for p in Net(2).parameters())
    assert ecospa_fx.verify(model, example_inputs=(x,)).ok
    restored = ecospa_fx.restore(model)
    assert type(restored.layers[0]) is Block and restored(x).isfinite().all()


def test_scores_that_look_into_graphs_are_refused():
    model, _, _ = net(2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(errors.EcoSpaError, match=r"execution='module'.*graph"):
        ecospa_fx.EcoSpaTrainer(model, optimizer, score="activation")


def language_model(name):
    """Three key heads for two queries each: no two sizes of the llama are equal."""
    if name == "gpt2":
        return made(name, torch.float64)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
        head_dim=8, vocab_size=61, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    ids = torch.randint(3, 60, (2, 7))
    return transformers.LlamaForCausalLM(config).double().eval(), {"input_ids": ids, "use_cache": False}


def test_an_integer_that_may_be_two_things():
    """As many key heads as queries for each: which of the two is repeated by, only a call with a mask shows."""
    plain, kwargs = made("llama", torch.float64)
    ids = kwargs["input_ids"]
    call = {"input_ids": ids, "use_cache": False}
    model = ecospa_fx.compile(copy.deepcopy(plain), example_kwargs=call, execution="module")
    assert {c.kind for c in ecospa_fx.couplings(model)} == {"glu", "qk", "vo"}
    refused = [str(refusal) for refusal in ecospa_fx.explain(model).refusals]
    assert (
        sum("`self_attn.num_key_value_groups`, which is 2 and may be the size of this axis" in t for t in refused) == 4
    )
    call["attention_mask"] = torch.ones_like(ids)
    call["attention_mask"][0, 0] = 0
    model = ecospa_fx.compile(copy.deepcopy(plain), example_kwargs=call, execution="module")
    groups = next(c for c in ecospa_fx.couplings(model) if c.kind == "groups")
    assert "model.layers.0.self_attn.num_key_value_groups" in groups.changes
    assert {c.kind for c in ecospa_fx.couplings(model)} == {"glu", "heads", "groups", "qk", "vo"}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generate_with_every_cache(name):
    plain, kwargs = language_model(name)
    for parameter in plain.parameters():
        parameter.data.mul_(3)
    model = ecospa_fx.compile(copy.deepcopy(plain), example_kwargs=kwargs, execution="module")
    kinds = {"gpt2": {"heads", "ffn", "qk", "vo"}, "llama": {"heads", "groups", "glu", "qk", "vo"}}[name]
    assert {coupling.kind for coupling in ecospa_fx.couplings(model)} == kinds
    keeps = halves(model)
    positions = kept_positions(plain, keeps)
    ecospa_fx.shrink(model, keeps)
    assert_masked(model, plain, positions, kwargs=kwargs)
    ids, masked = kwargs["input_ids"], zeroed(plain, positions)
    more = {"max_new_tokens": 5, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    for way in ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}):
        torch.manual_seed(0)
        found = model.generate(ids, do_sample=False, **more, **way)
        assert torch.equal(found, masked.generate(ids, do_sample=False, **more, **way)), way
    torch.manual_seed(0)
    sampled = model.generate(ids, do_sample=True, **more)
    torch.manual_seed(0)
    assert torch.equal(sampled, masked.generate(ids, do_sample=True, **more))
    with torch.no_grad():
        wanted = model(**kwargs).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(**kwargs).logits, wanted, rtol=1e-3, atol=1e-4)  # its softmax is in float32
    model.set_attn_implementation("sdpa")
    _, gradients = run_twice(model, (), kwargs)
    model.activation_checkpointing_enable()
    model.train()
    _, again = run_twice(model, (), kwargs)
    assert_same(gradients, again, 1e-9, "gradients")


def test_an_attribute_knows_its_place():
    root = nn.Module()
    root.inner = Config(3)
    root.sizes = [4, 5]
    root.child = nn.Module()
    root.child.number = 7
    assert Attribute("child", "number").read(root) == 7
    places = Attribute("child", "number"), Attribute("", "sizes", 1), Attribute("", "inner", "heads")
    assert [str(place) for place in places] == [
        "child.number", "sizes[1]", "inner.heads",
    ]  # fmt: skip
    Attribute("", "sizes", 1).write(root, 2)
    assert root.sizes == [4, 2]
    shared = root.inner
    Attribute("", "inner", "heads").write(root, 2)
    assert (root.inner.heads, shared.heads) == (2, 3) and isinstance(root.inner, Config)
    with pytest.raises(AttributeError, match=r"there is no child\.size"):
        Attribute("child", "size").read(root)


def test_a_field_of_its_own():
    config = Config()
    view = with_field(with_field(config, "heads", 3), "heads", 2)
    config.attention = "eager"
    assert (view.heads, view.attention, config.heads, type(view).__name__) == (2, "eager", HEADS, "Config")
    twin = pickle.loads(pickle.dumps(view))
    assert (twin.heads, twin.layers) == (2, 4) and isinstance(twin, Config)


class Viewing(nn.Module):
    """A projection that views its result by a number of its own."""

    def __init__(self, inputs, width):
        super().__init__()
        self.width, self.weight = width, nn.Parameter(torch.randn(inputs, width) / inputs**0.5)

    def forward(self, x):
        return (x.reshape(-1, x.shape[-1]) @ self.weight).view(*x.shape[:-1], self.width)


class Stream(nn.Module):
    """Blocks that add to one stream: each holds its width once more."""

    def __init__(self, width, depth=7):
        super().__init__()
        self.first, self.last = nn.Linear(5, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 9), nn.ReLU(), Viewing(9, width)) for _ in range(depth)
        )

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def test_as_many_integers_as_there_are_layers():
    torch.manual_seed(0)
    model, x = Stream(12), torch.randn(3, 4, 5)
    ecospa_fx.compile(model, example_inputs=(x,), execution="module", regions="root")
    stream = next(c for c in ecospa_fx.couplings(model) if c.kind == "residual")
    ecospa_fx.shrink(model, {stream: torch.arange(0, 12, 2)})
    assert [block[2].width for block in model.blocks] == [6] * 7
    smaller = Stream(6)
    smaller.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), smaller(x))


class Literal(nn.Module):
    """A block whose Python holds the size of its hidden axis as a literal, and reads an integer that equals it."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.most = nn.Linear(6, 10), nn.Linear(10, 6), 10

    def forward(self, x):
        h = self.up(x)[..., : self.most]
        return x + self.down(F.gelu(h).view(*x.shape[:-1], 10))


def test_a_search_that_fails_is_made_once_for_equal_blocks(monkeypatch):
    searched = []

    def searching(trial, coupling, *rest, search=follow._find_needed):
        searched.append(coupling.name)
        return search(trial, coupling, *rest)

    monkeypatch.setattr(follow, "_find_needed", searching)
    free = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6))
    model = nn.Sequential(Literal(), Literal(), free, Literal())
    ecospa_fx.compile(model, example_inputs=(torch.randn(2, 3, 6),), regions="root", execution="module")
    assert searched == ["0.ffn", "residual", "2.ffn"]
    (region,) = regions_of(model).values()
    assert {why.split("`")[1] for why in region.python_support.refused.values()} == {"0", "1", "3"}


class Registers(nn.Module):
    """A block that gives one of its modules a second name in its first call."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        self.again = self.up if hasattr(self, "up") else self.down
        return x + self.down(torch.tanh(self.up(x)))


def test_a_module_that_gets_submodules_in_its_first_call_is_not_tried():
    net = nn.Sequential(Registers(), Registers())
    net(torch.ones(2, 4))
    with pytest.raises(errors.NoCouplingError, match="cannot be tried: it has 3 modules, and had 4"):
        ecospa_fx.compile(net, example_inputs=(torch.ones(2, 4),), regions="blocks", execution="module")
    net(torch.ones(2, 4))


class Momentum(nn.Module):
    """A block with a slow copy of a weight, which follows in training only, where no graph can be captured."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.beside = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 6)
        self.slow = copy.deepcopy(self.down).requires_grad_(False)
        self.last = nn.Linear(6, 4)

    def forward(self, x):
        if self.training:
            x = x * (0.5 + random.random())
            with torch.no_grad():
                self.slow.weight.mul_(0.9).add_(self.down.weight, alpha=0.1)
        return x + self.down(torch.tanh(self.up(x))) + self.last(torch.tanh(self.beside(x)))


def test_what_only_the_other_mode_does_must_run_at_the_sizes_left():
    before = random.getstate()
    model = ecospa_fx.compile(
        nn.Sequential(Momentum()).eval(), example_inputs=(torch.ones(2, 4),), regions="root", execution="module"
    )
    assert random.getstate() == before
    (ffn,) = (coupling for coupling in ecospa_fx.couplings(model) if coupling.kind == "ffn")
    assert ffn.members[0].parameter == "0.beside.weight"
    (why,) = regions_of(model)[""].python_support.refused.values()
    assert why.startswith("fails in `0` (Momentum)") and why.endswith(", in training mode")
    ecospa_fx.shrink(model, {ffn: torch.arange(3)})
    model.train()(torch.ones(2, 4)).sum().backward()
