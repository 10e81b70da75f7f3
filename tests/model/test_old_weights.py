"""States of before a shrink, given to the model and the optimizer of after it: refused in words that lead back."""

import copy
import pickle

import pytest
import torch
from torch import nn

import ecospa_fx
from ecospa_fx import errors

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def halved(make_optimizer=torch.optim.AdamW):
    """A model and its optimizer after a step and a shrink, and their states of before."""
    torch.manual_seed(0)
    model = ecospa_fx.compile(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), example_inputs=(X,))
    optimizer = make_optimizer(model.parameters(), 1e-2)
    step(model, optimizer)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    (coupling,) = ecospa_fx.couplings(model)
    ecospa_fx.shrink(model, {coupling: torch.arange(8)}, optimizer=optimizer)
    return model, optimizer, *before


def step(model, optimizer):
    model(X).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


WORDS = (
    "3 weights have other sizes than this model, which has shrunk: `0.weight` is (16, 8) there and (8, 8) here. A "
    "state_dict does not say which rows and columns are left."
)


@pytest.mark.parametrize("inside", [False, True])
def test_old_weights_are_refused_in_words(inside):
    model, _, weights, _ = halved()
    now = copy.deepcopy(model.state_dict())
    target = nn.ModuleDict({"a": model}) if inside else model
    with pytest.raises(RuntimeError) as caught:
        target.load_state_dict({f"a.{name}" if inside else name: tensor for name, tensor in weights.items()})
    assert WORDS in str(caught.value) and "ecospa_fx.resume(directory" in str(caught.value)
    model.load_state_dict(now)
    # A state with other names is none of a shrink.
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict({f"b.{name}": tensor for name, tensor in weights.items()})
    assert "shrunk" not in str(caught.value)


def test_a_loaded_model_says_it_and_a_plain_one_holds_nothing_of_it(tmp_path):
    model, _, weights, _ = halved()
    ecospa_fx.save(model, tmp_path)
    make = lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))  # noqa: E731
    for each in (ecospa_fx.load(tmp_path, make), copy.deepcopy(model)):
        with pytest.raises(RuntimeError) as caught:
            each.load_state_dict(weights)
        assert WORDS in str(caught.value)
    plain = ecospa_fx.restore(model)
    assert not plain._load_state_dict_pre_hooks and b"ecospa_fx" not in pickle.dumps(plain)


def test_old_state_of_an_optimizer_is_refused_before_anything_is_taken():
    model, optimizer, _, state = halved()
    now = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(errors.OptimizerError) as caught:
        optimizer.load_state_dict(state)
    assert str(caught.value).startswith(
        "this state of AdamW is of before a shrink: `exp_avg` of `0.weight` is (16, 8) in it, and `0.weight` is "
        "(8, 8) now. "
    )
    torch.testing.assert_close(optimizer.state_dict(), now, rtol=0, atol=0)
    step(model, optimizer)


def test_state_that_is_larger_for_a_reason_is_taken():
    """A preconditioner may have the sizes that the weight had before."""

    class Preconditioned(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                state.setdefault("momentum", torch.zeros_like(p)).add_(p.grad)
                state["square"] = torch.eye(p.shape[0]) if p.ndim > 1 else torch.ones(1)
            return super().step(closure)

    model = ecospa_fx.compile(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16)), example_inputs=(X,))
    optimizer = Preconditioned(model.parameters(), 1e-2)
    (coupling,) = ecospa_fx.couplings(model)
    ecospa_fx.shrink(model, {coupling: torch.arange(8)}, optimizer=optimizer)  # the second weight: (16, 16) -> (16, 8)
    step(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())


def test_an_undone_shrink_leaves_no_words_behind(monkeypatch):
    torch.manual_seed(0)
    model = ecospa_fx.compile(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), example_inputs=(X,))
    (coupling,) = ecospa_fx.couplings(model)
    monkeypatch.setattr("ecospa_fx.model.shrinking.forget_code", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ecospa_fx.shrink(model, {coupling: torch.arange(8)})
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict({"0.weight": torch.zeros(3, 3)}, strict=False)
    assert "shrunk" not in str(caught.value) and ecospa_fx.couplings(model)[0].size == 16
