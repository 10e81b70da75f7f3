"""Averages of a model's weights shrink with it: averaging and shrinking commute, and the averaged model runs."""

import copy
import pickle

import pytest
import torch
from failing_assignments import fail_at
from test_errors import assert_untouched, snapshot
from test_training import Stack, one_step
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from twin import kept_positions, sliced, zeroed

import ecospa_fx
from ecospa_fx.errors import EcoSpaError, OptimizerError, ShrinkError

X = torch.randn(4, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def halves(model):
    return {c.name: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model)}


def timm_ema(name, **options):
    def make(model):
        from timm.utils import model_ema

        return getattr(model_ema, name)(model, decay=0.9, **options)

    return make


AVERAGES = {
    "swa": (AveragedModel, lambda a, m: a.update_parameters(m), lambda a: a.module),
    "swa_utils ema": (
        lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
        lambda a, m: a.update_parameters(m),
        lambda a: a.module,
    ),
    "timm": (timm_ema("ModelEma"), lambda a, m: a.update(m), lambda a: a.ema),
    "timm v2": (timm_ema("ModelEmaV2"), lambda a, m: a.update(m), lambda a: a.module),
    "timm v3": (timm_ema("ModelEmaV3"), lambda a, m: a.update(m), lambda a: a.module),
    "timm v3 one by one": (timm_ema("ModelEmaV3", foreach=False), lambda a, m: a.update(m), lambda a: a.module),
}


class Net(nn.Module):
    """Buffers that shrink too: those of a batch norm along the hidden width."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.norm(self.up(x).transpose(1, 2)).transpose(1, 2)))


def made(cls=Stack):
    torch.manual_seed(0)
    return cls().double()


WHEN = ["before compile", "before the first call", "captured"]


@pytest.mark.parametrize(
    ("kind", "cls", "when"),
    [(kind, Net, "captured") for kind in AVERAGES] + [("swa_utils ema", Stack, when) for when in WHEN],
)
def test_an_average_of_a_shrunk_model_is_the_shrunk_average(kind, cls, when):
    make, update, inside = AVERAGES[kind]
    plain = made(cls)
    model = made(cls)
    average = make(model) if when == "before compile" else None
    ecospa_fx.compile(model, **({"example_inputs": (X,)} if when == "captured" else {}))
    average = average or make(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    # The twin is not compiled at all; a mask takes the place of the shrink.
    twin, twin_average = plain, make(plain)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        one_step(model, optimizer, X)
        one_step(twin, twin_optimizer, X)
        update(average, model)
        update(twin_average, twin)
    keeps = {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model)}
    positions = kept_positions(twin, keeps)
    ecospa_fx.shrink(model, keeps, optimizer=optimizer, also=average)
    one_step(model, optimizer, X)
    update(average, model)
    with torch.no_grad():  # the twin takes what the small model has learnt, in its places
        for name, p in twin.named_parameters():
            small = model.get_parameter(name)
            index = [positions.get((name, dim), torch.arange(size)) for dim, size in enumerate(p.shape)]
            p[torch.meshgrid(*index, indexing="ij")] = small
        for name, b in twin.named_buffers():
            small = model.get_buffer(name)
            b[ecospa_fx.plan(model).kept[name, 0] if b.shape != small.shape else ...] = small
    update(twin_average, twin)
    kept = ecospa_fx.plan(model).kept
    for name, expected in inside(twin_average).state_dict().items():
        found = inside(average).state_dict()[name]
        for dim in range(expected.ndim):
            if (name, dim) in kept:
                expected = expected.index_select(dim, kept[name, dim])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14, msg=name)
    # And it runs, as its twin with zeros in place of what has gone does.
    expected = zeroed(inside(twin_average), positions).eval()(X)
    torch.testing.assert_close(inside(average).eval()(X), expected, rtol=1e-10, atol=1e-12)
    assert ecospa_fx.plan(inside(average)) == ecospa_fx.plan(model)


def test_an_average_follows_a_whole_run():
    model = ecospa_fx.compile(made(), example_inputs=(X,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, interval=2, end=12, also=[average])
    late = None
    for step in range(14):
        one_step(model, optimizer, X, trainer)
        average.update_parameters(model)
        if step == 6:  # averaging often begins late
            late = AveragedModel(model)
            trainer.also.append(late)
        if late is not None:
            late.update_parameters(model)
    assert trainer.done and len(trainer.history) > 2
    for each in (average, late):
        assert [p.shape for p in each.parameters()] == [p.shape for p in model.parameters()]
        assert ecospa_fx.verify(each.module, example_inputs=(X,)).ok
        with torch.no_grad():
            assert each(X).isfinite().all()


def test_an_average_can_be_saved_and_loaded(tmp_path):
    model = ecospa_fx.compile(made(), example_inputs=(X,))
    average = AveragedModel(model)
    ecospa_fx.shrink(model, halves(model), also=average)
    ecospa_fx.save(average.module, tmp_path / "average")
    loaded = ecospa_fx.load(tmp_path / "average", made)
    assert torch.equal(loaded(X), average(X))


def test_averages_of_another_dtype_in_a_dict_and_pickled():
    model = ecospa_fx.compile(made(), example_inputs=(X,))
    rough = timm_ema("ModelEmaV3", dtype=torch.float32)(model)
    pickled = pickle.loads(pickle.dumps(AveragedModel(model)))
    named = {name: p.detach().clone() for name, p in model.named_parameters() if "bias" not in name}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    held = dict(named)

    class Shadow:
        def __init__(self) -> None:
            self.decay, self.weights = 0.9, {name: p.clone() for name, p in named.items()}

    shadow = Shadow()
    ecospa_fx.shrink(model, halves(model), also=[rough, pickled, named, shadow])
    kept = ecospa_fx.plan(model).kept
    assert any(name.endswith("bias") for name, _ in kept)
    for name, tensor in named.items():
        assert tensor is held[name]  # the same tensors, as Parameters are
        assert torch.equal(tensor, sliced(before[name], name, kept)) and torch.equal(tensor, shadow.weights[name])
    torch.testing.assert_close(rough(X.float()), model(X).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(pickled(X), model(X))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.up = nn.Embedding(9, 6), nn.Linear(6, 12)
        self.down, self.head = nn.Linear(12, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.relu(self.up(self.words(x)))))


def test_tied_weights_in_an_average_and_in_a_state_dict():
    x = torch.tensor([[0, 3, 8]])
    model = ecospa_fx.compile(Tied(), example_inputs=(x,))
    average, named = AveragedModel(model), {name: t.clone() for name, t in model.state_dict().items()}
    residual = next(c for c in ecospa_fx.couplings(model) if any(m.parameter == "words.weight" for m in c.members))
    ecospa_fx.shrink(model, {residual: torch.tensor([0, 2, 5])}, also=[average, named])
    assert average.module.head.weight is average.module.words.weight
    assert named["head.weight"].shape == named["words.weight"].shape == (9, 3)
    assert torch.equal(average(x), model(x))


MISSED = (
    "`layers.0.qkv.weight` is (36, 12) in the AveragedModel in also= and (24, 12) in the model: it has missed a "
    "shrink, or is not a copy of this model. Name it in also= at every shrink, or copy the model anew"
)


def test_what_is_no_copy_is_refused_and_nothing_changes():
    model = ecospa_fx.compile(made(), example_inputs=(X,))
    average, other = AveragedModel(model), AveragedModel(made(Net))
    before, averages = snapshot(model), snapshot(average)
    keeps = halves(model)
    nothing = (
        "in also= holds no copy of this Stack: neither a module of its classes with tensors of the same names, nor a "
        "dict of such names and tensors. Pass an object that holds one"
    )
    for also, words in (
        ([average, other], f"the AveragedModel {nothing}"),
        ([average, 3], f"the int {nothing}"),
        ([average, list(model.parameters())], f"the list {nothing}"),
        ([average, {"layers.0": X}], f"the dict {nothing}"),
        ([average, nn.Sequential(model)], "the Sequential in also= holds this Stack itself, not a copy of it"),
    ):
        with pytest.raises(ShrinkError) as caught:
            ecospa_fx.shrink(model, keeps, also=also)
        assert str(caught.value) == words
        with pytest.raises(ShrinkError):
            ecospa_fx.EcoSpaTrainer(model, torch.optim.SGD(model.parameters()), also=also)
        assert_untouched(model, before)
        assert_untouched(average, averages)


def test_a_copy_that_missed_a_shrink_is_refused():
    model = ecospa_fx.compile(made(), example_inputs=(X,))
    average, elsewhere = AveragedModel(model), copy.deepcopy(model)
    (first, *_) = (c for c in ecospa_fx.couplings(model) if c.kind == "heads")
    ecospa_fx.shrink(model, {first: torch.tensor([0, 1])})
    ecospa_fx.shrink(elsewhere, {first.name: torch.tensor([1, 2])})
    before = snapshot(model)
    with pytest.raises(ShrinkError) as caught:
        ecospa_fx.shrink(model, halves(model), also=average)
    assert str(caught.value) == MISSED
    with pytest.raises(ShrinkError) as caught:
        ecospa_fx.shrink(model, halves(model), also=elsewhere)
    assert str(caught.value) == (
        "the Stack in also= keeps other rows and columns than the model: they have not shrunk together. Name it in "
        "also= at every shrink, or copy the model anew"
    )
    assert_untouched(model, before)


@pytest.mark.parametrize("failing", ["optimizer", "commit"])
def test_model_optimizer_and_copies_change_together_or_not_at_all(failing, monkeypatch):
    model = ecospa_fx.compile(made(), example_inputs=(X,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    late, plain = AveragedModel(model), made()
    one_step(model, optimizer, X)
    if failing == "optimizer":
        optimizer.state[model.layers[1].down.weight]["square"] = torch.zeros(3, 3)
    else:
        fail_at(monkeypatch, 30)
    everything = [snapshot(model, optimizer), snapshot(late), snapshot(plain)]
    plans = ecospa_fx.plan(model), ecospa_fx.plan(late.module)
    with pytest.raises(OptimizerError if failing == "optimizer" else MemoryError):
        ecospa_fx.shrink(model, halves(model), optimizer=optimizer, also=[late, plain])
    assert_untouched(model, everything[0], optimizer)
    assert_untouched(late, everything[1])
    assert_untouched(plain, everything[2])
    assert (ecospa_fx.plan(model), ecospa_fx.plan(late.module)) == plans
    with pytest.raises(EcoSpaError, match="is not compiled"):
        ecospa_fx.plan(plain)
    assert torch.isfinite(late(X)).all() and torch.isfinite(plain(X)).all()
