"""Modules of a compiled model that are wrapped, moved, replaced or removed, and wrappers that hide from names."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import ecospa_fx
from ecospa_fx.errors import RestoreError, ShrinkError

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Around(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Gated() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def checkpointed(model):
    apply_activation_checkpointing(model, check_fn=lambda each: isinstance(each, Gated))


def wrapped(model):
    model.blocks[0] = Around(model.blocks[0])


def wrapped_inside(model):
    model.blocks[0].gate = Around(model.blocks[0].gate)


def compiled_code(model):
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")


def swapped(model):
    model.blocks[0], model.blocks[1] = model.blocks[1], model.blocks[0]


def removed(model):
    del model.blocks[1]


def another(model):
    model.blocks[0] = Gated()


def changed(model, change):
    change(model)
    return model


def of_half(execution, regions="blocks"):
    model = ecospa_fx.compile(Net(), example_inputs=(X,), execution=execution, regions=regions)
    ecospa_fx.shrink(model, {"blocks.0.glu": torch.arange(5), "blocks.1.glu": torch.arange(3, 9)})
    return model


EXECUTIONS = pytest.mark.parametrize("execution", ["graph", "module"])
GONE = r"` of region `blocks\.\d` is not there any more: modules have been wrapped, moved or removed since .*\.rewire;"
REPLACED = r"`blocks\.0\.\w+\.weight` is \(\d+, 6\) and was \(5, 6\) when the model was captured: it has been replaced"


@EXECUTIONS
@pytest.mark.parametrize(
    ("change", "message"),
    [(checkpointed, GONE), (wrapped, GONE), (wrapped_inside, GONE), (compiled_code, GONE), (removed, GONE),
     (swapped, REPLACED), (another, REPLACED)],
)  # fmt: skip
def test_modules_that_are_not_where_they_were_are_named_and_nothing_shrinks(change, message, execution):
    model = of_half(execution)
    change(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters())
    for use in (
        lambda: ecospa_fx.couplings(model),
        lambda: ecospa_fx.shrink(model, {"blocks.1.glu": torch.arange(2)}),
        lambda: ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5),
    ):
        with pytest.raises(ShrinkError, match=message):
            use()
    assert all(p.equal(before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("change", [checkpointed, wrapped, wrapped_inside, compiled_code, swapped, removed])
def test_before_a_shrink_too(change):
    model = ecospa_fx.compile(Net(), example_inputs=(X,))
    change(model)
    with pytest.raises(ShrinkError, match=GONE if change is not swapped else "`blocks.1` lies at `blocks.0` since"):
        ecospa_fx.shrink(model, {"blocks.1.glu": torch.arange(2)})


@EXECUTIONS
@pytest.mark.parametrize("change", [checkpointed, wrapped, wrapped_inside, compiled_code])
def test_a_change_within_rewire_is_followed(change, execution):
    model, alike = of_half(execution), of_half(execution)
    model = ecospa_fx.rewire(model, lambda plain: changed(plain, change))
    assert model(X).equal(alike(X))
    sizes = [coupling.size for coupling in ecospa_fx.couplings(model)]
    assert sizes == [5, 6]
    for each in (model, alike):
        ecospa_fx.shrink(each, {coupling: torch.arange(1, 4) for coupling in ecospa_fx.couplings(each)})
    assert model(X).equal(alike(X))
    assert [p.shape for p in model.parameters()] == [p.shape for p in alike.parameters()]


@EXECUTIONS
@pytest.mark.parametrize("regions", ["blocks", "root"])
def test_checkpointed_blocks_train_and_shrink_as_blocks_do(execution, regions, tmp_path):
    """Their wrapper leaves itself out of the names of parameters below it, and out of those in a state_dict."""
    runs = []
    for wrap in (lambda model: None, checkpointed):
        model = Net()
        wrap(model)
        ecospa_fx.compile(model, example_inputs=(X,), execution=execution, regions=regions)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5, start=1, interval=2, end=5)
        for _ in range(7):
            model(X).square().mean().backward()
            optimizer.step()
            trainer.step()
            optimizer.zero_grad()
        runs.append((model, trainer))
    (plain, first), (model, second) = runs
    assert len(first.history) == len(second.history) == 3 and first.size == second.size < 220
    assert all(p.equal(q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))
    ecospa_fx.save(model, tmp_path)

    def again():
        made = Net()
        checkpointed(made)
        return made

    loaded = ecospa_fx.load(tmp_path, again)
    assert loaded(X).equal(model(X)) and loaded(X).equal(plain(X))
    ecospa_fx.shrink(loaded, {coupling: torch.arange(1) for coupling in ecospa_fx.couplings(loaded)})
    assert ecospa_fx.restore(copy.deepcopy(model))(X).allclose(plain(X), atol=1e-6)


def test_a_weight_normalised_by_rows_keeps_one():
    """torch divides by the number of rows: without any, a call ends the process."""
    model = Net()
    for block in model.blocks:
        parametrizations.weight_norm(block.gate)
    module = ecospa_fx.compile(copy.deepcopy(model), example_inputs=(X,), execution="module")
    with pytest.raises(ShrinkError, match="torch cannot normalise a weight without any rows"):
        ecospa_fx.shrink(module, {"blocks.0.glu": torch.arange(0)}, constraints=ecospa_fx.Constraints(min_keep=0))
    graph = ecospa_fx.compile(model, example_inputs=(X,))
    ecospa_fx.shrink(graph, {"blocks.0.glu": torch.arange(0)}, constraints=ecospa_fx.Constraints(min_keep=0))
    graph(X).sum().backward()
    with pytest.raises(RestoreError, match="torch cannot normalise a weight without any rows"):
        ecospa_fx.restore(graph)
