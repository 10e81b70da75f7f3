"""Sparse tensors: buffers, weights and gradients without one piece of memory behind them."""

import copy

import pytest
import torch
from torch import nn
from twin import kept_positions, sliced, zeroed

import ecospa_fx
from ecospa_fx import errors

LAYOUTS = {"coo": lambda t: t.to_sparse(), "csr": lambda t: t.to_sparse_csr(), "weight": lambda t: t.to_sparse()}


class Mixing(nn.Module):
    """A fixed sparse matrix behind an MLP, in use or not."""

    def __init__(self, layout, used):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 5)
        matrix = LAYOUTS[layout](torch.randn(5, 5).relu())
        self.mix = nn.Parameter(matrix) if layout == "weight" else nn.Buffer(matrix, persistent=False)
        self.used = used

    def forward(self, x):
        y = self.b(self.a(x).relu())
        return torch.sparse.mm(self.mix, y.t()).t() if self.used else y


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("execution", ["graph", "module"])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sparse_tensor_is_left_as_it_is(layout, used, execution):
    x, plain, model = torch.randn(3, 6), Mixing(layout, used), Mixing(layout, used)
    explanation = ecospa_fx.explain(plain, example_inputs=(x,))
    assert [c.name for c in explanation.couplings] == ["ffn"]
    assert explanation.savings().parameters == explanation.savings()["ffn"].most_parameters + sum(
        p.numel() for p in plain.parameters()
    ) - 11 * (6 + 1 + 5)
    ecospa_fx.compile(model, example_inputs=(x,), execution=execution)
    assert ecospa_fx.verify(model, example_inputs=(x,)).ok
    model.a.weight.grad = torch.ones_like(model.a.weight)
    ecospa_fx.shrink(model, {"ffn": torch.arange(0, 12, 2)})
    with torch.no_grad():
        plain.b.weight[:, 1::2] = 0.0
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(x), plain(x))
    assert model.mix.layout == plain.mix.layout and torch.equal(model.mix.to_dense(), plain.mix.to_dense())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_saved(layout, tmp_path):
    x, model = torch.randn(3, 6), Mixing(layout, True)
    ecospa_fx.compile(model, example_inputs=(x,))
    ecospa_fx.shrink(model, {"ffn": torch.arange(0, 12, 2)})
    ecospa_fx.save(model, tmp_path / "run")
    loaded = ecospa_fx.load(tmp_path / "run", lambda: Mixing(layout, True))
    assert loaded.mix.layout == model.mix.layout and type(loaded.mix) is type(model.mix)
    assert torch.equal(loaded.mix.to_dense(), model.mix.to_dense()) and torch.equal(loaded(x), model(x))


def test_one_that_its_dense_form_does_not_give_is_not(tmp_path):
    model = ecospa_fx.compile(Mixing("coo", True), example_inputs=(torch.randn(3, 6),))
    model.mix = torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (5, 5), check_invariants=True)  # one place twice
    with pytest.raises(errors.CheckpointError, match="and as a dense tensor does not come back"):
        ecospa_fx.save(model, tmp_path / "run")
    assert not [path for path in (tmp_path / "run").iterdir() if path.name[0] != "."]


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(9, 6, sparse=True), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, tokens):
        return self.b(self.a(self.words(tokens)).relu())


def test_sparse_gradients_are_scored_compared_and_shrunk():
    torch.manual_seed(0)
    tokens, plain = torch.randint(0, 9, (4, 5)), Words().double()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(tokens,))
    assert ecospa_fx.verify(model, example_inputs=(tokens,)).ok
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, start=2, interval=2, end=6)
    for _ in range(8):
        model(tokens).square().sum().backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    assert trainer.done and len(trainer.history) >= 2
    # A gradient that is there when its weight shrinks shrinks with it, and stays sparse.
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(tokens,))
    keeps = {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model)}
    model(tokens).sum().backward()
    whole = model.words.weight.grad.to_dense()
    ecospa_fx.shrink(model, keeps)
    positions = kept_positions(plain, keeps)
    assert model.words.weight.grad.is_sparse
    assert torch.equal(model.words.weight.grad.to_dense(), sliced(whole, "words.weight", positions))
    torch.testing.assert_close(model(tokens), zeroed(plain, positions)(tokens))
