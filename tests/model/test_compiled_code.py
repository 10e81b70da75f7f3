"""Compiled code: torch.compile serves a model to the end of its schedule, with one graph for blocks of equal sizes."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ecospa_fx
from ecospa_fx.errors import CaptureError

# torch.compile looks at `.grad` of values that are no leaves.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self, depth=3, recomputed=False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.recomputed = nn.ModuleList(Block() for _ in range(depth)), recomputed

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputed else block(x)
        return x


class Backend:
    """A backend that runs graphs as they are, and counts those that it is given and their calls."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph, _):
        self.graphs += 1

        def run(*args):
            self.calls += 1
            return graph(*args)

        return run


def stepped(model, optimizer, trainer, forward):
    loss = forward(X).square().mean()
    loss.backward()
    optimizer.step()
    trainer.step(loss=loss)
    optimizer.zero_grad()
    return loss.item()


@pytest.fixture(autouse=True)
def anew():
    with torch._dynamo.config.patch(recompile_limit=3):
        yield
    torch.compiler.reset()


@pytest.mark.parametrize(("by_block", "score"), [(True, "fisher"), (True, "activation"), (False, "fisher")])
def test_a_run_of_many_shrinks_is_compiled_to_its_end(by_block, score):
    """More of them than torch.compile keeps graphs of one function, each with graphs for the new sizes alone."""
    losses = []
    for backend in (None, Backend()):
        model = ecospa_fx.compile(Net(), example_inputs=(X,), regions="blocks")
        forward = model
        if backend is not None and by_block:
            for block in model.blocks:
                block.compile(backend=backend)
        elif backend is not None:
            forward = torch.compile(model, backend=backend)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        trainer = ecospa_fx.EcoSpaTrainer(
            model, optimizer, target=0.6, start=1, interval=1, end=5, score=score, uniform="layers", index_score=score
        )
        losses.append([])
        for step in range(7):
            before = (backend.graphs, backend.calls) if backend else None
            losses[-1].append(stepped(model, optimizer, trainer, forward))
            if backend:
                each = 3 if by_block else 1
                assert backend.calls - before[1] == each, step
                # The first block has a graph of its own: its input asks for no gradient.
                assert backend.graphs - before[0] <= (2 if by_block else 1), step
        assert len(trainer.history) > torch._dynamo.config.recompile_limit
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_more_sizes_than_graphs_are_kept_is_said(caplog):
    depth = torch._dynamo.config.recompile_limit + 1
    model = ecospa_fx.compile(Net(depth), example_inputs=(X,), regions="blocks")
    for block in model.blocks:
        block.compile(backend="eager")
    couplings = ecospa_fx.couplings(model)
    with caplog.at_level(logging.WARNING, "ecospa_fx"):
        ecospa_fx.shrink(model, {c: torch.arange(10) for c in couplings})
        assert not caplog.records
        ecospa_fx.shrink(model, {c: torch.arange(10 - i) for i, c in enumerate(couplings)})
    assert [record.getMessage().partition(". ")[2] for record in caplog.records] == [
        "Set torch._dynamo.config.recompile_limit to 9 or more, or give blocks equal sizes, "
        "Constraints(uniform='layers')"
    ]


def test_a_call_of_a_new_kind_under_checkpointing_and_in_compiled_code_is_refused():
    model = ecospa_fx.compile(Net(2, recomputed=True), example_inputs=(X,), regions="blocks").double()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    with pytest.raises(CaptureError, match=r"Take the first step of each kind without torch\.compile"):
        model(X.double())
    with torch.compiler.set_stance("force_eager"):
        model(X.double()).sum().backward()
    gradient = model.blocks[0].up.weight.grad.clone()
    model.zero_grad()
    model(X.double()).sum().backward()
    assert torch.allclose(model.blocks[0].up.weight.grad, gradient)


class Recurrent(nn.Module):
    """A net with an operator at which torch.compile breaks, in the middle of its program."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.rnn, self.out = nn.Linear(8, 10), nn.GRU(10, 12, batch_first=True), nn.Linear(12, 8)

    def forward(self, x):
        return self.out(torch.tanh(self.rnn(torch.tanh(self.into(x)))[0]))


def test_a_program_that_breaks_under_compilation_finds_what_is_compiled_of_it_after_shrinks():
    losses = []
    for compiled in (False, True):
        model = ecospa_fx.compile(Recurrent(), example_inputs=(X,))
        forward = torch.compile(model, backend="eager") if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, start=1, interval=1, end=4)
        losses.append([stepped(model, optimizer, trainer, forward) for _ in range(6)])
        assert len(trainer.history) >= 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class Scaled(nn.Module):
    """A block that reads a number and a way to go from attributes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.scale, self.plus = nn.Linear(8, 32), nn.Linear(32, 8), 2.0, True

    def forward(self, x):
        y = self.scale * self.down(F.gelu(self.up(x)))
        return x + y if self.plus else x - y


@pytest.mark.parametrize("change", [{"scale": 5.0}, {"plus": False}], ids=str)
@pytest.mark.parametrize("first", ["never", "plain", "compiled"])
@pytest.mark.parametrize("shrunk", [False, True])
def test_constants_that_change_are_seen_by_compiled_code(shrunk, first, change):
    """A graph holds what a forward reads in Python; torch.compile, which traces programs, reads none of that."""
    torch._dynamo.reset()
    model = ecospa_fx.compile(nn.Sequential(Scaled(), Scaled()), example_inputs=(X,), regions=["0", "1"])
    kept = torch.arange(0, 32, 2)
    plain = nn.Sequential(Scaled(), Scaled())
    if shrunk:
        ecospa_fx.shrink(model, dict.fromkeys(ecospa_fx.couplings(model), kept))
        for block in plain:
            with torch.no_grad():
                block.down.weight[:, 1::2] = 0.0
    compiled = torch.compile(model, backend="eager")
    if first != "never":
        (model if first == "plain" else compiled)(X)
    for name, value in change.items():
        setattr(model[0], name, value)
        setattr(plain[0], name, value)
    for _ in range(2):
        torch.testing.assert_close(compiled(X), plain(X))
    torch.testing.assert_close(model(X), plain(X))
