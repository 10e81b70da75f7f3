"""What people do to a model while it trains, before and after a shrink: it goes on being the masked model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from living import Block, Lives, Net, before_and_after, each_way
from torch import nn
from twin import run, sliced

import ecospa_fx
from ecospa_fx import errors
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.full_size import FullSizeTensors
from ecospa_fx.model.region import MOST_PROGRAMS


@before_and_after
@each_way
@pytest.mark.parametrize("name", ["net", "llama"])
def test_every_mode_and_precision(name, regions, shrunk):
    """(train, eval) x (float32, bfloat16 autocast) x (root, blocks) x (before, after a shrink)."""
    it = Lives(name, regions, shrunk)
    whole = it.plain(**it.kwargs)
    for training in (True, False):
        for precision in (torch.float32, torch.bfloat16):
            for model in it.both:
                model.train(training)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                it.agree(precision)
    if shrunk:  # what it is compared with is something else than what it came from, by more than rounding
        out, was = (y if isinstance(y, torch.Tensor) else y.logits for y in (it.twin.train()(**it.kwargs), whole))
        assert (out - was).abs().max() > 0.1 * was.abs().max()


MOVES = {
    "to": lambda model: model.to(torch.float64),
    "double": lambda model: model.double(),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "there and back": lambda model: model.double().float(),
}


@before_and_after
@pytest.mark.parametrize("move", MOVES)
def test_dtypes(move, shrunk):
    it = Lives(shrunk=shrunk)
    identities = [id(p) for p in it.model.parameters()]
    for model in it.both:
        MOVES[move](model)
    assert identities == [id(p) for p in it.model.parameters()]
    dtype = next(it.model.parameters()).dtype
    it.agree(dtype, x=it.kwargs["x"].to(dtype))


@before_and_after
@each_way
@pytest.mark.parametrize("device", ["meta", *(["cuda"] if torch.cuda.is_available() else [])])
def test_devices(device, regions, shrunk):
    it = Lives(regions=regions, shrunk=shrunk)
    for model in it.both:
        model.to(device)
    x = it.kwargs["x"].to(device)
    if device == "meta":
        out = it.model(x)
        assert out.is_meta and out.shape == it.twin(x).shape
        out.sum().backward()
        assert all(p.grad.shape == p.shape for p in it.model.parameters())
    else:
        it.agree(x=x)
        assert it.model.cpu()(it.kwargs["x"]).device.type == "cpu"


@before_and_after
def test_autocast_in_float16(shrunk):
    it = Lives(shrunk=shrunk)
    with torch.autocast("cpu", torch.float16):
        it.agree(torch.float16)
    it.agree()


@each_way
def test_the_first_call_may_be_under_autocast(regions):
    """Casts made while the model was looked at have no gradients and must not stay in autocast's cache."""
    torch.manual_seed(0)
    plain, x = Net(), torch.randn(3, 5, 12)
    model = ecospa_fx.compile(copy.deepcopy(plain), regions=regions)
    grads = []
    for each in (plain, model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = each(x).square().mean()
        loss.backward()
        grads.append({name: p.grad for name, p in each.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


class Two(nn.Module):
    """Two convolutions; between equal blocks autocast hands on what it has cast."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.down(torch.relu(self.norm(self.up(x))))


@pytest.mark.parametrize("first", [False, True])
@each_way
def test_blocks_that_get_what_autocast_has_cast(regions, first):
    """Their inputs are bfloat16 and their weights float32, so that eager runs under autocast only."""
    torch.manual_seed(0)
    plain, x = nn.Sequential(Two(), Two(), Two()), torch.randn(2, 4, 6, 6)
    model = ecospa_fx.compile(copy.deepcopy(plain), regions=regions, example_inputs=None if first else (x,))
    with torch.autocast("cpu", torch.bfloat16):
        for training in (True, False):
            assert torch.equal(model.train(training)(x), plain.train(training)(x))
    (coupling,) = [c for c in ecospa_fx.couplings(model) if c.name == "1.conv"]
    keep = torch.tensor([0, 2, 3, 7])
    twin = copy.deepcopy(plain)
    removed = [i for i in range(8) if i not in keep]
    with torch.no_grad():
        twin[1].down.weight[:, removed] = 0
    ecospa_fx.shrink(model, {coupling: keep})
    with torch.autocast("cpu", torch.bfloat16):
        out, masked = model(x), twin.eval()(x)
    assert out.dtype == torch.bfloat16 and model[1].up.weight.shape[0] == 4
    torch.testing.assert_close(out, masked, atol=0.02, rtol=0.02)


class Curious(Block):
    """Its Python takes another path under autocast."""

    def forward(self, x, mask=None):
        return super().forward(x) * (2.0 if torch.is_autocast_enabled("cpu") else 1.0)


def test_python_that_looks_at_autocast_has_a_graph_for_each():
    plain, x = Curious(), torch.randn(2, 3, 12)
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(x,))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x), plain(x))
    ecospa_fx.shrink(model, {c: torch.arange(max(1, c.size // 2)) for c in ecospa_fx.couplings(model)})
    without = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), 2 * without, rtol=0.05, atol=0.05)


@before_and_after
@each_way
def test_copies(regions, shrunk):
    it = Lives(regions=regions, shrunk=shrunk)
    for twice in (copy.deepcopy(it.model), copy.copy(it.model)):
        assert type(twice) is type(it.model)
        it.agree(model=twice)
    duplicate = copy.deepcopy(it.model)
    names = {c.name: torch.arange(max(1, c.size // 2)) for c in ecospa_fx.couplings(duplicate)}
    ecospa_fx.shrink(duplicate, names)
    it.agree()
    assert [c.size for c in ecospa_fx.couplings(duplicate)] == [len(keep) for keep in names.values()]


@before_and_after
@each_way
def test_averaged_copies_shrink_by_the_names_of_couplings(regions, shrunk):
    it = Lives(regions=regions, shrunk=shrunk)
    average = torch.optim.swa_utils.AveragedModel(
        it.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    average.update_parameters(it.model)
    it.agree(model=average.module)
    keeps = {c.name: torch.arange(max(1, c.size // 2)) for c in ecospa_fx.couplings(it.model)}
    for each in (it.model, average.module):
        ecospa_fx.shrink(each, keeps)
    average.update_parameters(it.model)
    assert ecospa_fx.plan(it.model) == ecospa_fx.plan(average.module)
    assert torch.equal(average(**it.kwargs), it.model(**it.kwargs))


@before_and_after
def test_state_dicts(shrunk):
    it = Lives(shrunk=shrunk)
    assert list(it.model.state_dict()) == list(it.twin.state_dict())
    file = io.BytesIO()
    torch.save(it.model.state_dict(), file)
    file.seek(0)
    other = Lives(shrunk=shrunk)
    with torch.no_grad():
        for p in other.model.parameters():
            p.zero_()
    assert str(other.model.load_state_dict(torch.load(file, weights_only=True))) == "<All keys matched successfully>"
    it.agree(model=other.model)
    if shrunk:
        with pytest.raises(
            RuntimeError, match=r"size mismatch for layers.0.qkv.weight: copying a param with shape torch"
        ):
            it.model.load_state_dict(it.plain.state_dict())
        it.agree()


@before_and_after
@each_way
def test_whole_models_can_be_pickled(regions, shrunk):
    it = Lives(regions=regions, shrunk=shrunk)
    file = io.BytesIO()
    torch.save(it.model, file)
    file.seek(0)
    for loaded in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(it.model))):
        assert isinstance(loaded, Net) and type(loaded).__name__ == "Net"
        it.agree(model=loaded)
        assert ecospa_fx.plan(loaded) == ecospa_fx.plan(it.model)
        assert [str(c) for c in ecospa_fx.couplings(loaded)] == [str(c) for c in ecospa_fx.couplings(it.model)]
    waiting = pickle.loads(pickle.dumps(ecospa_fx.compile(Net(), regions=regions)))
    waiting(**it.kwargs)
    assert len(ecospa_fx.couplings(waiting)) == len(ecospa_fx.couplings(it.model))


@before_and_after
def test_gradients_accumulate_and_are_clipped(shrunk):
    it = Lives(shrunk=shrunk)
    batches = [torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for model in it.both:
        model.eval()
        for x in batches:
            model(x).square().mean().backward()
    expected = {name: sliced(p.grad, name, it.positions) for name, p in it.twin.named_parameters()}
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    clipped = float(torch.nn.utils.clip_grad_norm_(it.model.parameters(), 0.01))
    assert clipped == pytest.approx(float(total), rel=1e-4)
    for name, p in it.model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name] * (0.01 / (total + 1e-6)), rtol=1e-3, atol=1e-7, msg=name)


@before_and_after
@each_way
def test_functional_call(regions, shrunk):
    it = Lives(regions=regions, shrunk=shrunk, dtype=torch.float64)
    x = it.kwargs["x"]

    def loss(parameters, model):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    # Other weights than its own: the generated code reads those that are given.
    mine, twins = ({name: p.detach() * 0.9 for name, p in model.named_parameters()} for model in it.both)
    buffers = [{name: b.clone() for name, b in model.named_buffers()} for model in it.both]
    value = loss(mine | buffers[0], it.model)
    torch.testing.assert_close(value, loss(twins | buffers[1], it.twin))
    it.model.eval(), it.twin.eval()
    if shrunk:
        with pytest.raises(errors.CaptureError, match=r"a transform of torch.func, where nothing can be captured; "):
            torch.func.grad(loss)(mine, it.model)
        loss(mine, it.model)
    gradient, expected = torch.func.grad(loss)(mine, it.model), torch.func.grad(loss)(twins, it.twin)
    for name, g in gradient.items():
        torch.testing.assert_close(g, sliced(expected[name], name, it.positions), msg=name)


@each_way
@pytest.mark.parametrize("when", ["before compile", "before a shrink", "after it"])
def test_a_part_may_be_frozen(when, regions):
    it = Lives(regions=regions, shrunk=when == "after it")

    def freeze(model):
        model.layers[0].up.requires_grad_(False)
        model.layers[1].requires_grad_(False)

    if when == "before compile":
        freeze(it.plain)
        it.model = ecospa_fx.compile(copy.deepcopy(it.plain), example_kwargs=it.kwargs, regions=regions)
        it.twin = copy.deepcopy(it.plain)
    else:
        freeze(it.model), freeze(it.twin)
    gradients = it.agree()
    assert "layers.0.down.weight" in gradients
    assert not any(name.startswith(("layers.1.", "layers.0.up")) for name in gradients)
    if when == "before a shrink":
        ecospa_fx.shrink(it.model, {"layers.0.ffn": torch.arange(5), "layers.1.ffn": torch.arange(5)})
        _, gradients = run(it.model, (), it.kwargs)
        assert it.model.layers[1].up.weight.shape == (5, 12)
        assert not any(name.startswith(("layers.1.", "layers.0.up")) for name in gradients)


@before_and_after
@each_way
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_inference(mode, regions, shrunk):
    it = Lives(regions=regions, shrunk=shrunk)
    for model in it.both:
        model.eval()
    with mode():
        # A call that must be captured, and others of the same signature.
        outs = [it.model(**it.kwargs), it.model(**it.kwargs), it.model(torch.zeros(2, 4, 12))]
        expected = it.twin(**it.kwargs)
    assert not any(out.requires_grad for out in outs) and outs[2].shape == (2, 4, 7)
    assert torch.equal(outs[0], outs[1])
    torch.testing.assert_close(outs[0], expected)
    it.agree()  # training goes on


@before_and_after
@each_way
def test_masks_or_none(regions, shrunk):
    it = Lives(regions=regions, shrunk=shrunk)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    it.agree(mask=mask)
    it.agree(mask=mask.to(torch.float32).log())
    it.agree(mask=None)
    it.agree()


@before_and_after
@pytest.mark.parametrize(("name", "regions"), [("gpt2", "root"), ("llama", "blocks")])
def test_labels_masks_and_generation(name, regions, shrunk):
    it = Lives(name, regions, shrunk)
    tokens = it.kwargs["input_ids"]
    it.model.config.loss_type = it.twin.config.loss_type = "ForCausalLM"
    padding = torch.ones_like(tokens)
    padding[0, -2:] = 0
    it.agree(attention_mask=padding, labels=tokens)
    options = {"max_new_tokens": 3, "do_sample": False, "use_cache": False, "pad_token_id": 0}
    written = [model.eval().generate(tokens, attention_mask=padding, **options) for model in it.both]
    assert torch.equal(*written)
    assert written[0].shape == (2, 10)


class Tied(nn.Module):
    """Two blocks with a bias-free pair each."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 10, bias=False), nn.ReLU(), nn.Linear(10, 6, bias=False)) for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


X = torch.linspace(-1, 1, 24).reshape(4, 6)


def test_weights_tied_after_compile_by_root_become_one_coupling():
    torch.manual_seed(0)
    model = ecospa_fx.compile(Tied(), example_inputs=(X,), regions="root")
    assert [c.name for c in ecospa_fx.couplings(model)] == ["layers.0.ffn", "layers.1.ffn"]
    model.layers[1][0].weight = model.layers[0][0].weight
    (coupling,) = ecospa_fx.couplings(model)
    assert {str(m) for m in coupling.members} >= {
        "layers.0.0.weight[0]",
        "layers.0.2.weight[1]",
        "layers.1.2.weight[1]",
    }
    ecospa_fx.shrink(model, {coupling: torch.arange(3)})
    assert model.layers[1][0].weight is model.layers[0][0].weight and model.layers[1][2].weight.shape == (6, 3)
    ecospa_fx.verify(model, example_inputs=(X,)).raise_if_failed()


def test_weights_tied_after_compile_across_blocks_are_refused():
    model = ecospa_fx.compile(Tied(), example_inputs=(X,), regions="blocks")
    model.layers[1][0].weight = model.layers[0][0].weight
    with pytest.raises(errors.NoCouplingError, match=r"the model has no coupling `layers.0.ffn`; it has none"):
        ecospa_fx.shrink(model, {"layers.0.ffn": torch.arange(3)})
    refusals = [str(r) for r in ecospa_fx.explain(model).refusals]
    assert any("used outside the region too, as `layers.1.0.weight`" in text for text in refusals)
    model.layers[1][0].weight = nn.Parameter(model.layers[0][0].weight.detach().clone())  # and untied again
    assert [c.name for c in ecospa_fx.couplings(model)] == ["layers.0.ffn", "layers.1.ffn"]


@each_way
def test_weights_tied_after_they_shrank_apart(regions):
    model = ecospa_fx.compile(Tied(), example_inputs=(X,), regions=regions)
    ecospa_fx.shrink(model, {"layers.0.ffn": torch.arange(3), "layers.1.ffn": torch.arange(1, 4)})
    model.layers[1][0].weight = model.layers[0][0].weight
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(errors.EcoSpaError) as caught:
        ecospa_fx.shrink(model, {"layers.0.ffn": torch.arange(2)})
    assert str(caught.value).startswith("weights have been tied since they shrank, `layers.")
    assert str(caught.value).endswith("Untie them, or tie them before the first shrink")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_weights_replaced_after_compile():
    model = ecospa_fx.compile(Tied(), example_inputs=(X,))
    model.layers[1][0].weight = nn.Parameter(torch.zeros(11, 6))
    with pytest.raises(errors.ShrinkError) as caught:
        ecospa_fx.shrink(model, {"layers.0.ffn": torch.arange(3)})
    assert str(caught.value) == (
        "`layers.1.0.weight` is (11, 6) and was (10, 6) when the model was captured: it has been replaced since. "
        "Do that before ecospa_fx.compile, or within ecospa_fx.rewire"
    )
    assert model.layers[0][0].weight.shape == (10, 6)


def test_too_many_ways_to_call():
    class Scaled(nn.Sequential):
        def forward(self, x, scale):
            return super().forward(x) * scale

    model = Scaled(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6))
    ecospa_fx.compile(model, example_inputs=(X, 0))
    ecospa_fx.shrink(model, {"ffn": torch.arange(5)})  # before, its own Python could serve any call
    for scale in range(1, MOST_PROGRAMS):
        model(X, scale)
    with pytest.raises(errors.EcoSpaError) as caught:
        model(X, MOST_PROGRAMS)
    assert str(caught.value) == (
        "the model has been called in 16 different ways, each with its own graph; this call differs from the last: "
        "the constant argument 16 was 15. Call it in fewer ways (pad to common lengths, pass the same arguments; put a "
        "number that changes from call to call into a tensor, an argument or a buffer, whose values are not part of a "
        "graph)"
    )
    assert torch.equal(model(X, 3), 3 * model(X, 1))


def test_a_new_call_of_a_shrunk_model_is_traced_with_stand_ins():
    it = Lives()
    region = it.model.__dict__[MODEL].regions["layers.0"]
    stand_ins = FullSizeTensors(it.model.layers[0], "layers.0", ecospa_fx.plan(it.model))
    shapes, values = stand_ins.shapes(), stand_ins.values()
    plain = dict(it.plain.layers[0].named_parameters()) | dict(it.plain.layers[0].named_buffers())
    assert shapes.keys() == values.keys() and "qkv.weight" in shapes and "norm.running_mean" in shapes
    for name, stand_in in shapes.items():
        assert stand_in.shape == values[name].shape == plain[name].shape
        assert stand_in.stride() == plain[name].stride()  # a forward may ask for their order in memory
    before = len(region.specializations)
    it.model.eval(), it.twin.eval()
    it.agree()
    assert len(region.specializations) == before + 1


def test_a_new_call_of_a_shrunk_model_is_compared_with_eager_too():
    class Lying(Tied):
        def forward(self, x):
            return super().forward(x) * (2.0 if torch.compiler.is_exporting() and not self.training else 1.0)

    model = ecospa_fx.compile(Lying(), example_inputs=(X,), regions="root")
    ecospa_fx.shrink(model, {"layers.0.ffn": torch.arange(3)})
    out = model(X)
    with pytest.raises(errors.CaptureError, match="was captured, but output 0 of the graph differs from eager"):
        model.eval()(X)
    assert torch.equal(model.train()(X), out)
