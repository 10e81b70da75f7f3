"""Wrappers that compute what the model in them computes: every function takes them for the model."""

import copy

import pytest
import torch
from torch import nn

import ecospa_fx
from ecospa_fx.errors import EcoSpaError
from ecospa_fx.ranks.wrappers import unwrapped

X = torch.linspace(-1, 1, 24).reshape(4, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def eager(model):
    return torch.compile(model, backend="eager")


WRAPPERS = pytest.mark.parametrize("wrap", [eager, nn.DataParallel, lambda model: nn.DataParallel(eager(model))])


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def told(trainer):
    """The history, without what flows, which is not read in compiled code."""
    return [{key: value for key, value in entry.items() if key != "flow"} for entry in trainer.history]


def trained(model, wrapped):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = ecospa_fx.EcoSpaTrainer(wrapped, optimizer, target=0.6, interval=1, end=4)
    trainer.fit([(X, X.flip(-1))] * 4, loss=nn.functional.mse_loss)
    return trainer


@WRAPPERS
@pytest.mark.parametrize("execution", ["graph", "module"])
def test_training_in_a_wrapper_is_training_the_model(wrap, execution):
    model = Net()
    twin = ecospa_fx.compile(copy.deepcopy(model), execution=execution)
    wrapped = wrap(model)
    assert unwrapped(wrapped) is model
    assert ecospa_fx.compile(wrapped, execution=execution) is wrapped  # the wrapper, with the model in it compiled
    trainer = trained(model, wrapped)
    assert trainer.done and trainer.model is model and told(trainer) == told(trained(twin, twin))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert torch.equal(wrapped(X), twin(X))


# torch.compile looks at `.grad` of values that are no leaves, where a block is broken off for its Gram matrices.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@WRAPPERS
def test_every_function_looks_inside(wrap, tmp_path):
    model = Net()
    wrapped = ecospa_fx.compile(wrap(model), example_inputs=(X,))
    (coupling,) = ecospa_fx.couplings(wrapped)
    assert coupling.members[0].parameter == "up.weight"
    assert ecospa_fx.explain(wrapped).model == "Net"
    assert "up" in str(ecospa_fx.summary(wrapped)) and "module" not in str(ecospa_fx.summary(wrapped))
    assert ecospa_fx.verify(wrapped, example_inputs=(X,)).ok
    grams = ecospa_fx.Grams(wrapped)
    wrapped(X)
    ecospa_fx.shrink(wrapped, {coupling: torch.arange(7)}, absorb=grams)
    assert model.up.weight.shape == (7, 6) and ecospa_fx.plan(wrapped).shape("up.weight") == (7, 6)
    assert ecospa_fx.diff(wrapped).headline() == ecospa_fx.diff(model).headline()
    ecospa_fx.save(wrapped, tmp_path)
    assert torch.equal(ecospa_fx.load(tmp_path, Net)(X), model(X))
    assert ecospa_fx.export(wrapped, (X,)).module()(X).shape == X.shape
    assert ecospa_fx.restore(wrapped) is model and type(model) is Net


def test_what_is_no_wrapper_is_named_with_what_to_pass():
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ecospa_fx.compile(Net(), example_inputs=(X,), regions="root")
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.net(x))

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Net() for _ in range(2))

        def forward(self, x):
            return self.blocks[1](self.blocks[0](x))

    holder, blocks = Holder(), ecospa_fx.compile(Blocks(), example_inputs=(X,), regions="blocks")
    optimizer = torch.optim.SGD(holder.parameters(), 0.1)
    for call in (ecospa_fx.couplings, ecospa_fx.plan, lambda model: ecospa_fx.EcoSpaTrainer(model, optimizer)):
        with pytest.raises(EcoSpaError) as caught:
            call(holder)
        assert str(caught.value) == (
            "Holder is not compiled, but `net` (Net) in it is: pass that, model.get_submodule('net'), and not the "
            "Holder around it"
        )
        with pytest.raises(EcoSpaError) as caught:
            call(blocks.blocks[1])
        assert str(caught.value) == "Net is `blocks.1` of a compiled model: pass that model, and not a part of it"
    with pytest.raises(EcoSpaError) as caught:
        ecospa_fx.compile(holder)
    assert str(caught.value) == (
        "`net` (Net) in this Holder is compiled already, and what it has lost would be unknown to the Holder; use "
        "model.get_submodule('net'), or ecospa_fx.restore it first"
    )
    with pytest.raises(EcoSpaError, match=r"Net is a part of a model that is compiled already; use that model"):
        ecospa_fx.compile(blocks.blocks[0])
    assert len(ecospa_fx.couplings(holder.net)) == 1 and len(ecospa_fx.couplings(blocks)) == 2
