"""Weights that somebody else holds too, another compiled model or another process: they shrink for none or for both."""

import copy

import pytest
import torch
from torch import nn

import ecospa_fx
from ecospa_fx.errors import EcoSpaError

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Head(nn.Module):
    """An actor or a critic, over a trunk."""

    def __init__(self, trunk, size):
        super().__init__()
        self.trunk, self.out = trunk, nn.Linear(8, size)

    def forward(self, x):
        return self.out(self.trunk(x))


class Both(nn.Module):
    def __init__(self, actor, critic):
        super().__init__()
        self.actor, self.critic = actor, critic

    def forward(self, x):
        return self.actor(x), self.critic(x)


def actor_and_critic():
    torch.manual_seed(0)
    trunk = nn.Sequential(Block(), Block())
    return Head(trunk, 4), Head(trunk, 1)


@pytest.mark.parametrize("regions", ["auto", "root", "blocks"])
@pytest.mark.parametrize("late", [False, True])
def test_two_compiled_models_do_not_share_what_shrinks(regions, late):
    actor, critic = actor_and_critic()
    ecospa_fx.compile(actor, example_inputs=(X,), regions=regions)
    before = critic(X)
    with pytest.raises(EcoSpaError, match=r"`trunk\.0\.up\.weight` of this Head is `trunk\.0\.up\.weight` of a Head"):
        ecospa_fx.compile(critic, example_inputs=None if late else (X,), regions=regions)(X)
    if not late:  # one that waits goes on to wait
        assert torch.equal(critic(X), before)
    ecospa_fx.restore(actor)
    ecospa_fx.compile(critic, example_inputs=(X,), regions=regions)
    assert torch.allclose(critic(X), before)
    ecospa_fx.shrink(critic, {c: torch.arange(8) for c in ecospa_fx.couplings(critic) if c.kind == "ffn"})
    assert critic(X).shape == (3, 1)


def test_weights_are_shared_by_whatever_modules():
    """A tied encoder: two modules with the same parameters."""
    (first, _), (second, _) = actor_and_critic(), actor_and_critic()
    for name, parameter in first.trunk.named_parameters():
        path, _, attribute = name.rpartition(".")
        setattr(second.trunk.get_submodule(path), attribute, parameter)
    ecospa_fx.compile(first, example_inputs=(X,))
    with pytest.raises(EcoSpaError, match=r"of a Head that is compiled already, and each would shrink it without"):
        ecospa_fx.compile(second, example_inputs=(X,))


def test_what_both_leave_whole_may_be_shared():
    """Embeddings, say, of which no coupling speaks."""
    table = nn.Embedding(10, 8)
    models = [nn.Sequential(table, Block(), Block(), nn.Linear(8, 3)) for _ in range(2)]
    ids = torch.tensor([[1, 2]])
    for model in models:
        ecospa_fx.compile(model, example_inputs=(ids,), regions="blocks")
    for model in models:
        ecospa_fx.shrink(model, {coupling: torch.arange(4) for coupling in ecospa_fx.couplings(model)})
        assert model(ids).shape == (1, 2, 3)


def test_a_module_that_holds_both_shrinks_for_both():
    model = ecospa_fx.compile(Both(*actor_and_critic()), example_inputs=(X,))
    ecospa_fx.shrink(model, {c: torch.arange(8) for c in ecospa_fx.couplings(model) if c.kind == "ffn"})
    assert model.actor.trunk is model.critic.trunk and model.actor.trunk[0].up.weight.shape == (8, 8)
    actor, critic = model(X)
    assert torch.equal(model.actor(X), actor) and torch.equal(model.critic(X), critic)


def test_a_part_of_a_compiled_model_is_not_compiled():
    actor, _ = actor_and_critic()
    ecospa_fx.compile(actor, example_inputs=(X,), regions="blocks")
    with pytest.raises(EcoSpaError, match=r"`0\.up\.weight` of this Sequential is `trunk\.0\.up\.weight` of a Head"):
        ecospa_fx.compile(actor.trunk, example_inputs=(X,))


def test_memory_of_several_processes_stays_as_it_is(caplog):
    """As where a model is sent to another process, or several train one: nobody sees weights move."""
    actor, _ = actor_and_critic()
    ecospa_fx.compile(actor, example_inputs=(X,))
    actor.share_memory()
    others = {name: p.detach() for name, p in actor.named_parameters()}  # in the same memory
    before = copy.deepcopy(others)
    kept = torch.arange(0, 16, 2)
    ecospa_fx.shrink(actor, {c.name: kept for c in ecospa_fx.couplings(actor) if c.kind == "ffn"})
    torch.testing.assert_close(others, before, rtol=0, atol=0)
    assert torch.equal(actor.trunk[0].up.weight, before["trunk.0.up.weight"][kept])
    assert not actor.trunk[0].up.weight.is_shared() and actor.out.weight.is_shared()
    (record,) = [each for each in caplog.records if "memory" in each.getMessage()]
    assert record.getMessage().startswith("6 weights, the first is `trunk.0.up.weight`, lie in memory that other proc")
