"""Odd calls of public functions: every error is one of ours, and then the model is bit for bit as before."""

import random

import numpy as np
import pytest
import torch
from odd_calls import CALLS, NAMES, STATES, Tiny, World, X, right
from odd_checks import Case, check, check_sequence, places_of, random_case, wrong_of
from odd_methods import METHODS
from torch import nn

import ecospa_fx
from ecospa_fx import errors

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # numbers that torch or numpy warn of are not what is tested
]


@pytest.fixture(autouse=True)
def quiet():
    """Take back what a call does to the logs."""
    yield
    ecospa_fx.logs.set_logs("")


OF_NO_MODEL = {"why", "why_not", "savings", "explanation.report", "constraints", "latency", "plan.from_json", "logs",
               "state_rule", "score_named", "from_pretrained", "cut_gguf", *METHODS}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "state"), [(f, s) for f in CALLS for s in STATES if s == "compiled" or f not in OF_NO_MODEL]
)
def test_a_right_call_and_a_few_odd_ones(function, state):
    generator = random.Random(f"{function} {state}")
    cases = [Case(function, state, ())]
    places = places_of(function, World(state))[:2]
    cases += [Case(function, state, ((place, generator.choice(NAMES)),)) for place in places]
    assert [f"{case}: {wrong}" for case in cases if (wrong := check(case))] == []


@pytest.mark.parametrize("seed", range(12))
def test_calls_in_odd_orders(seed):
    assert check_sequence(random.Random(seed)) is None


@pytest.mark.sweep
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("function", CALLS)
def test_every_odd_value_in_every_place(function):
    assert [*wrong_of(function)] == []


@pytest.mark.sweep
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(3))
def test_many_odd_calls_and_orders(seed):
    generator = random.Random(1000 + seed)
    cases = [random_case(generator) for _ in range(1500)]
    assert [f"{case}: {wrong}" for case in cases if (wrong := check(case))] == []
    assert [wrong for _ in range(300) if (wrong := check_sequence(generator))] == []


def test_the_check_can_fail(monkeypatch):
    """A function that raises another error, one that changes the model before it fails, one that draws a number."""
    real = ecospa_fx.summary

    def raw(model, **_):
        raise KeyError("raw")

    def half(model, **_):
        model.a.weight.data[0] = 0.0
        raise errors.ShrinkError("half done")

    def drawing(model, **options):
        torch.rand(1)
        return real(model)

    wrong = []
    for function in (raw, half, drawing):
        monkeypatch.setitem(CALLS, "summary", right(True, function, lambda w: w.model))
        wrong.append(check(Case("summary", "compiled", ())))
    assert wrong == ["raised KeyError: 'raw'", "after an error tensors differ", "it only looks, but generators differ"]


# What odd calls found, by name.


def test_a_selection_on_the_meta_device():
    model = ecospa_fx.compile(Tiny(), example_inputs=(X,))
    with pytest.raises(errors.ShrinkError) as caught:
        ecospa_fx.shrink(model, {"ffn": torch.arange(2, device="meta")})
    assert str(caught.value) == (
        "cannot shrink `ffn`: keep is on the meta device and has no values; keep is a sorted LongTensor of positions "
        "that stay"
    )


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (torch.ones(3), "the loss is a tensor of shape (3,), and it must be one number: pass its mean, loss.mean()"),
        ("0.5", "the loss is '0.5', and it must be one number: pass a float or a tensor of one entry"),
        (np.ones(2), "the loss is a ndarray, and it must be one number: pass a float or a tensor of one entry"),
    ],
)
def test_a_loss_that_is_no_number_is_refused_before_the_step_counts(loss, said):
    model = ecospa_fx.compile(Tiny(), example_inputs=(X,))
    trainer = ecospa_fx.EcoSpaTrainer(model, torch.optim.SGD(model.parameters(), 0.1), target=0.6)
    with pytest.raises(errors.TargetError) as caught:
        trainer.step(loss=loss)
    assert str(caught.value) == said
    assert trainer.steps == 0 and trainer.now == 0


@pytest.mark.parametrize("tokens", ["many", -1, float("nan"), float("inf")])
def test_amounts_that_are_none(tokens):
    model = ecospa_fx.compile(Tiny(), example_inputs=(X,))
    options = {"target": 0.6, "unit": "tokens", "interval": 10}
    trainer = ecospa_fx.EcoSpaTrainer(model, torch.optim.SGD(model.parameters(), 0.1), **options)
    with pytest.raises(errors.TargetError) as caught:
        trainer.step(tokens=tokens)
    assert str(caught.value) == f"tokens={tokens!r} of a step is out of range; it is a number, at least 0"
    assert trainer.steps == 0 and trainer.now == 0


def test_an_export_leaves_the_generators_alone():
    model = ecospa_fx.compile(Tiny(), example_inputs=(X,)).train()
    before = torch.get_rng_state()
    ecospa_fx.export(model, (X,), {"double": True})  # a new call, which is captured, and draws for its dropout
    with pytest.raises(errors.CaptureError) as caught:
        ecospa_fx.export(model, (X, X, X))
    assert str(caught.value).startswith("torch.export cannot export the Tiny with this call, it fails with TypeError: ")
    assert torch.equal(before, torch.get_rng_state())


def test_arguments_of_a_wrong_kind():
    model = ecospa_fx.compile(Tiny(), example_inputs=(X,))
    said = {
        "compile: `model` is None; it must be an nn.Module": lambda: ecospa_fx.compile(None),
        "explain: `example_inputs` is a tensor torch.float32 (5, 4); it must be the positional arguments of one call, "
        "(x,), or None": lambda: ecospa_fx.explain(model, example_inputs=X),
        "compile: `model` is the class Tiny; it must be an nn.Module": lambda: ecospa_fx.compile(Tiny),
        "shrink: `selection` is 3; it must be a mapping": lambda: ecospa_fx.shrink(model, 3),
        "Watch: `trainer` is a Linear; it must be an EcoSpaTrainer": lambda: ecospa_fx.Watch(nn.Linear(2, 2)),
        "EcoSpaTrainer: `state` has no 'steps'; it must be what state_dict() returned": lambda: (
            ecospa_fx.EcoSpaTrainer(model, torch.optim.SGD(model.parameters(), 0.1)).load_state_dict({})
        ),
    }  # fmt: skip
    for message, function in said.items():
        with pytest.raises(errors.ArgumentError) as caught:
            function()
        assert str(caught.value) == message
        assert isinstance(caught.value, TypeError) and isinstance(caught.value, errors.EcoSpaError)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_batches_of_any_size(rows):
    plain = Tiny().eval()
    model = ecospa_fx.compile(Tiny(), example_inputs=(X,)).eval()
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(X[:rows]), plain(X[:rows]))
    ecospa_fx.shrink(model, {"ffn": torch.arange(3)})
    plain.b.weight.data[:, 3:] = 0.0
    torch.testing.assert_close(model(X[:rows]), plain(X[:rows]))


@pytest.mark.parametrize("execution", ["graph", "module"])
def test_a_change_that_fails_half_way_is_taken_back(execution):
    model = ecospa_fx.compile(Tiny().eval(), example_inputs=(X,), execution=execution)
    ecospa_fx.shrink(model, {"ffn": torch.arange(3)})
    before, expected = [(m, type(m), dict(m.__dict__)) for m in model.modules()], model(X)

    def change(whole):
        whole.c = nn.Linear(8, 7)
        whole.a.weight = nn.Parameter(torch.zeros(1, 4))
        raise KeyError("in the middle")

    with pytest.raises(KeyError):
        ecospa_fx.rewire(model, change)
    assert before == [(m, type(m), dict(m.__dict__)) for m in model.modules()]
    assert torch.equal(model(X), expected)


def test_states_of_trainers_are_taken_as_a_whole_or_not_at_all():
    def trainer():
        torch.manual_seed(0)
        model = ecospa_fx.compile(Tiny(), example_inputs=(X,))
        made = ecospa_fx.EcoSpaTrainer(model, torch.optim.SGD(model.parameters(), 0.1), target=0.6)
        model(X).square().mean().backward()
        made.step(loss=1.0)
        return made

    right, taking = trainer().state_dict(), trainer()
    before, refused = str(taking.state_dict()), 0
    for key in right:
        for value in (None, 3, "x", [], [{}], {"a": 1}, float("nan")):
            try:
                taking.load_state_dict({**right, key: value})
            except errors.EcoSpaError:
                refused += 1
                assert str(taking.state_dict()) == before, (key, value)
            else:
                taking.step(loss=1.0)
                taking.load_state_dict(right)
                assert str(taking.state_dict()) == before, (key, value)
    assert refused > 70
    with pytest.raises(errors.ArgumentError) as caught:
        taking.load_state_dict({**right, "now": "x"})
    assert str(caught.value) == "EcoSpaTrainer: `state` has 'now' = 'x'; it must be what state_dict() returned"
    with pytest.raises(errors.ArgumentError) as caught:
        taking.load_state_dict({**right, "spikes": {}})
    assert str(caught.value) == (
        "EcoSpaTrainer: `state` cannot be read (KeyError: 'level'); it must be what state_dict() returned"
    )


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (3, "a batch is 3; it must be a mapping of keyword arguments, or a pair (inputs, targets)"),
        ((X, X, X), "a batch is a tuple of 3; it must be a mapping of keyword arguments, or a pair (inputs, targets)"),
        ({"x": X}, "the batch is a mapping, so the output of the model must have .loss, and it is a tensor "
                   "torch.float32 (5, 3); pass batches of (inputs, targets), and loss="),
    ],
)  # fmt: skip
def test_batches_of_a_wrong_kind(batch, said):
    model = ecospa_fx.compile(Tiny(), example_inputs=(X,))
    trainer = ecospa_fx.EcoSpaTrainer(model, torch.optim.SGD(model.parameters(), 0.1), target=0.6)
    with pytest.raises(errors.ArgumentError) as caught:
        trainer.fit([batch], loss=lambda outputs, targets: outputs.sum())
    assert str(caught.value) == f"EcoSpaTrainer.fit: {said}"
    assert trainer.steps == 0


def test_a_first_call_that_fails_leaves_the_model_waiting():
    model = ecospa_fx.compile(Tiny())
    with pytest.raises(errors.CaptureError):
        model(X[:, :3])
    with pytest.raises(errors.NoInputsError):
        ecospa_fx.couplings(model)
    model(X)
    assert [c.name for c in ecospa_fx.couplings(model)] == ["ffn", "ffn2"]


def test_layers_without_sizes_and_weights_without_gradients():
    lazy = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 3))
    for look in (ecospa_fx.explain, ecospa_fx.compile, ecospa_fx.summary):
        with pytest.raises(errors.CaptureError) as caught:
            look(lazy, example_inputs=(X,))
        assert str(caught.value) == (
            "`0.weight` of Sequential has no sizes before the first call of its lazy layer; call the model once before"
        )
    lazy(X)
    assert [c.name for c in ecospa_fx.couplings(ecospa_fx.compile(lazy, example_inputs=(X,)))] == ["ffn"]
    with torch.inference_mode():
        frozen = Tiny()
    with pytest.raises(errors.CaptureError, match=r"`a\.weight` of Tiny was made in torch.inference_mode, where"):
        ecospa_fx.compile(frozen, example_inputs=(X,))


def test_a_loaded_model_whose_own_python_runs_is_looked_at_with_inputs(tmp_path):
    model = ecospa_fx.compile(Tiny(), example_inputs=(X,), execution="module")
    ecospa_fx.shrink(model, {"ffn": torch.arange(3)})
    ecospa_fx.save(model, tmp_path / "save")
    for look in (ecospa_fx.verify, ecospa_fx.explain):
        loaded = ecospa_fx.load(tmp_path / "save", Tiny)
        result = look(loaded, example_inputs=(X,))
        assert [c.name for c in ecospa_fx.couplings(loaded)] == ["ffn", "ffn2"]
        assert getattr(result, "ok", True) and len(getattr(result, "couplings", (1, 2))) == 2


def test_nothing_compared_is_nothing_verified():
    empty = ecospa_fx.Verification({})
    assert not empty.ok and str(empty) == "NOT exact: nothing was compared"
    for check_it in (empty.raise_if_failed, lambda: empty.worst):
        with pytest.raises(errors.VerificationError, match="nothing was compared"):
            check_it()


@pytest.mark.parametrize(
    "case",
    [
        Case("latency.observe", "compiled", ((0, "plain layer"),)),
        Case("latency.observe", "meta", ((0, "other model"),)),
        Case("estimator.accumulate scaled", "compiled", (("found_inf", "huge"),)),
        Case("trainer", "compiled", (("cost", "array"),)),
        Case("compress", "plain", (("uniform", "a name"),)),
        Case("compress", "meta", ((1, "meta inputs"),)),
    ],
    ids=str,
)
def test_values_that_the_sweep_has_found(case):
    assert check(case) is None


def test_a_latency_says_which_call_fails():
    with pytest.raises(errors.TargetError) as caught:
        ecospa_fx.Latency((X,), repeats=1).measure(torch.nn.Linear(2, 2))
    assert str(caught.value) == (
        "Linear cannot be called with the inputs of this Latency, it fails with RuntimeError: mat1 and mat2 shapes "
        "cannot be multiplied (5x4 and 2x2); make one with inputs of the model"
    )
