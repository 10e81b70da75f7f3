"""Forwards that call what torch.compile made: helpers, modules, flex_attention, which compiles itself."""

import copy
import gc
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

import ecospa_fx
from ecospa_fx.errors import CaptureError
from ecospa_fx.passes.graph.uncompiled import uncompiled

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile of what is no leaf
EXECUTIONS = pytest.mark.parametrize("execution", ["graph", "module"])
graphs, runs = [], []


def counting(graph, inputs):
    graphs.append(graph)

    def run(*given):
        runs.append(graph)
        return graph.forward(*given)

    return run


def gated(gate, up):
    return F.silu(gate) * up


whole_frame = torch.compile(gated, backend=counting, fullgraph=True, dynamic=True)


class Gated(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)
        self.function = function

    def forward(self, x):
        return x + self.down(self.function(self.gate(x), self.up(x)))


class Net(nn.Module):
    def __init__(self, function=gated, last=lambda module: module):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Gated(function) for _ in range(2))
        self.last = last(nn.GELU())

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@EXECUTIONS
@pytest.mark.parametrize("regions", ["auto", "root"])
def test_compiled_helpers_are_captured_as_the_python_that_they_are_made_from(execution, regions):
    torch.compiler.reset()
    graphs.clear()
    model = Net(whole_frame, lambda module: torch.compile(module, backend=counting))
    plain = Net()
    assert model(X).allclose(plain(X), atol=1e-6)
    assert len(graphs) == 2
    runs.clear()
    for each in (model, plain):
        ecospa_fx.compile(each, example_inputs=(X,), execution=execution, regions=regions)
        ecospa_fx.shrink(each, {"blocks.0.glu": torch.arange(4), "blocks.1.glu": torch.arange(2, 9)})
    assert not runs and len(graphs) == 2  # nothing was compiled to be watched
    assert model(X).allclose(plain(X), atol=1e-6)
    assert bool(runs) == (execution == "module" or regions == "auto")  # where Python runs, it calls them as before
    assert ecospa_fx.verify(model, example_inputs=(X,)).ok
    for each in (model, plain):
        each(X).square().sum().backward()
    assert all(p.grad.allclose(q.grad, atol=1e-6) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert ecospa_fx.restore(copy.deepcopy(model))(X).allclose(plain(X), atol=1e-6)


def test_other_threads_go_on_with_compiled_code():
    torch.compiler.reset()
    graphs.clear()
    inside, seen = threading.Event(), threading.Event()

    def elsewhere():
        inside.wait(30)
        whole_frame(X, X)
        seen.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    with uncompiled():
        with uncompiled():
            assert whole_frame(X, X).equal(gated(X, X))
        assert whole_frame(X, X).equal(gated(X, X))
        assert not graphs
        inside.set()
        assert seen.wait(60)
        assert len(graphs) == 1
    thread.join()
    whole_frame(X[0], X[0])
    assert len(graphs) > 1


class Flex(nn.Module):
    """Attention through flex_attention, which no rule reads; on a CPU it has no backward."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        later = lambda score, b, h, i, j: torch.where(i >= j, score, -torch.inf)  # noqa: E731
        return self.o(flex_attention(q, k, v, score_mod=later).transpose(1, 2).flatten(-2))


@EXECUTIONS
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_what_lies_beside_flex_attention_shrinks(execution):
    torch.manual_seed(0)
    model = nn.Sequential(Flex(), Gated(gated))
    plain = copy.deepcopy(model)
    with torch.no_grad():
        ecospa_fx.compile(model, example_inputs=(X,), execution=execution)
        assert [coupling.name for coupling in ecospa_fx.couplings(model)] == ["1.glu"]
        told = str(ecospa_fx.explain(model))
        assert "0.q.weight" in told
        ecospa_fx.shrink(model, {"1.glu": torch.arange(5)})
        for layer in (plain[1].gate, plain[1].up):
            layer.weight[5:] = layer.bias[5:] = 0
        assert model(X).allclose(plain(X), atol=1e-6)


class Differentiated(nn.Module):
    """A forward that differentiates a network inside."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 1))

    def forward(self, x):
        return torch.func.grad(lambda x: self.energy(x).sum())(x)


def told(phase, info):
    """A callback of the garbage collector that leaves something in its module, as that of hypothesis does."""
    runs.append(phase)


def chosen(x):
    return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))


def test_transforms_and_branches_are_refused_in_words_or_stay_whole():
    torch.compiler.reset()  # a branch compiles itself, and other tests may have used up how often
    turned = Gated(lambda gate, up: torch.func.grad(lambda gate: gated(gate, up).sum())(gate))
    with pytest.raises(CaptureError, match=r"a tensor without values, which torch\.export has left in it"):
        ecospa_fx.compile(turned, example_inputs=(X,), regions="root")
    plain = copy.deepcopy(turned)  # what it differentiates lies between its layers, and is entry by entry
    ecospa_fx.compile(turned, example_inputs=(X,))
    ecospa_fx.shrink(turned, {"glu": torch.arange(5)})
    with torch.no_grad():
        plain.down.weight[:, 5:] = 0
    assert turned(X).allclose(plain(X), atol=1e-6)
    torch.manual_seed(0)
    inside, plain = Differentiated(), Differentiated()  # what it differentiates is captured by itself
    plain.load_state_dict(inside.state_dict())
    ecospa_fx.compile(inside, example_inputs=(X,))
    ecospa_fx.shrink(inside, {"energy.ffn": torch.arange(5)})
    with torch.no_grad():
        plain.energy[2].weight[:, 5:] = 0
    assert inside(X).allclose(plain(X), atol=1e-6)
    model = nn.Sequential(Gated(lambda gate, up: chosen(gate) * up), Gated(gated))
    plain = copy.deepcopy(model)
    gc.callbacks.append(told)
    try:
        ecospa_fx.compile(model, example_inputs=(X,), regions="root")
    finally:
        assert gc.callbacks.count(told) == 1
        gc.callbacks.remove(told)
    assert [coupling.name for coupling in ecospa_fx.couplings(model)] == ["1.glu"]
    for each in (model, plain):
        each(X).square().sum().backward()
    assert all(p.grad.allclose(q.grad, atol=1e-6) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
