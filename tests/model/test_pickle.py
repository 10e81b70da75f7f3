"""Pickled models: by pickle, by torch.save, into a process that is spawned; in both executions, at any time."""

import copy
import io
import pickle

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import ecospa_fx

X = torch.randn(4, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
EXECUTIONS = pytest.mark.parametrize("execution", ["graph", "module"])


class Block(nn.Module):
    """Attention, whose own Python holds a number of heads, and an MLP that one of its modes needs whole."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        hidden = self.up(x)
        return x + self.down(hidden.relu() if self.training else hidden.sort(-1).values)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def net(execution):
    torch.manual_seed(0)
    return ecospa_fx.compile(Net().double(), execution=execution)


def step(model):
    (model(X) - X.flip(-1)).square().mean().backward()


def train(model, steps=6):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.7, interval=2, end=6)
    for _ in range(steps):
        step(model)
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    return trainer.history


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def offered(model):
    return {c.name: (c.size, c.original_size, c.kind, c.changes) for c in ecospa_fx.couplings(model)}


def assert_alike(model, other):
    assert offered(model) == offered(other) and ecospa_fx.plan(model) == ecospa_fx.plan(other)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert torch.equal(model(X), other(X))


@EXECUTIONS
@pytest.mark.parametrize("when", ["before the first call", "after it", "after a shrink"])
def test_training_goes_on_as_that_of_the_model_itself(execution, when):
    model = net(execution)
    if when != "before the first call":
        step(model)
        model.zero_grad()
    if when == "after a shrink":
        wanted = ("ffn", "vo")
        ecospa_fx.shrink(model, {c: torch.arange(c.size - 1) for c in ecospa_fx.couplings(model) if c.kind in wanted})
    others = [pickle.loads(pickle.dumps(model)), saved_whole(model), copy.deepcopy(model)]
    again = saved_whole(others[0])  # a copy of a copy, which has not been called
    history = train(model)
    for other in (*others, again):
        assert type(other).__name__ == "Net" and isinstance(other, Net)
        assert train(other) == history
        assert_alike(model, other)
        if execution == "module":  # its own Python runs, without a detour
            assert type(other).forward is Net.forward


@EXECUTIONS
def test_what_a_call_has_withdrawn_stays_so(execution):
    model = net(execution)
    step(model)
    with torch.no_grad():
        model.eval()(X)
    model.train()
    other = pickle.loads(pickle.dumps(model))
    step(other)
    if execution == "graph":  # in module execution no program is made for calls without gradients
        assert not [name for name in offered(model) if name.endswith("ffn")]
    assert offered(other) == offered(model)


def trained_elsewhere(model, queue):
    history = train(model)
    queue.put((history, [p.detach().numpy() for p in model.parameters()]))


def test_a_process_that_is_spawned_trains_it_on():
    model = net("module")
    step(model)
    model.zero_grad()
    queue = mp.get_context("spawn").SimpleQueue()
    child = mp.get_context("spawn").Process(target=trained_elsewhere, args=(copy.deepcopy(model), queue))
    child.start()
    history, weights = queue.get()
    child.join()
    assert train(model) == history
    assert all(torch.equal(p, torch.from_numpy(w)) for p, w in zip(model.parameters(), weights, strict=True))
