"""Couplings across regions: a residual stream through blocks, judged by the root's graph and by smaller modules."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from deployed import plain
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from twin import half, kept_positions, zeroed

import ecospa_fx
from ecospa_fx.errors import CaptureError, EcoSpaError


class Block(nn.Module):
    """A residual block with a norm."""

    def __init__(self, width: int, inner: int, activation: str = "relu") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.activation = activation

    def forward(self, stream: Tensor) -> Tensor:
        """Add to the stream."""
        inner = self.up(self.norm(stream))
        return stream + self.down(inner.relu() if self.activation == "relu" else inner.tanh())


class Gated(Block):
    """Another class of block, with its argument by name and a tuple for a result."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(width, inner)
        self.gate = nn.Linear(width, inner)

    def forward(self, stream: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Add to the stream, and say by how much."""
        added = self.down(self.up(stream) * self.gate(stream).sigmoid())
        return stream + added, added.square().sum((0, 2))


class Stack(nn.Module):
    """Blocks between an embedding and a head; `between` changes what the loop does."""

    def __init__(self, width: int = 8, inner: int = 12, depth: int = 3, between: str = "", tied: bool = False) -> None:
        super().__init__()
        self.between, self.width = between, width
        self.embed = nn.Embedding(11, width)
        self.place = nn.Parameter(torch.randn(16, width) * 0.1)
        self.blocks = nn.ModuleList(self.block(i, width, inner) for i in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.seen: Tensor | None = None

    def block(self, number: int, width: int, inner: int) -> Block:
        """Make a block."""
        return Gated(width, inner) if self.between == "two classes" and number % 2 else Block(width, inner)

    def forward(self, tokens: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the blocks."""
        stream = self.embed(tokens) + self.place[: tokens.shape[1]]
        first, states = stream, []
        for number, block in enumerate(self.blocks):
            if self.between == "checkpoint" and self.training:
                stream = checkpoint(block, stream, use_reentrant=False)
            elif isinstance(block, Gated):
                stream, _ = block(stream=stream)
            else:
                stream = block(stream)
            match self.between:
                case "ops that follow":
                    stream = nn.functional.dropout(stream + first * 0.5, 0.5, self.training)
                    stream = stream.view(-1, stream.shape[-1]).view(*tokens.shape, -1)
                case "states":
                    states.append(stream)
                case "kept" if number == 0:
                    self.seen = stream
                case "scaled by its width":
                    stream = stream * stream.shape[-1] ** -0.5
                case "viewed by a number":
                    stream = stream.view(*tokens.shape, self.width)
                case "drop a block" if self.training and torch.rand(()) < 0.3:
                    stream = first
                case "a constant":
                    stream = stream + torch.ones(self.width).to(stream)
        logits = self.head(self.norm(stream))
        return (logits, *states) if states else logits


TOKENS = torch.arange(14).view(2, 7) % 11
FOLLOWED = ["ops that follow", "checkpoint", "two classes"]


def joined(model: nn.Module) -> nn.Module:
    """Compile by blocks, joined."""
    return ecospa_fx.compile(model, example_inputs=(TOKENS,), regions="joined")


def by_name(model: nn.Module) -> dict[str, ecospa_fx.Coupling]:
    """Return the couplings of a model by name."""
    return {coupling.name: coupling for coupling in ecospa_fx.couplings(model)}


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    """Return the first result."""
    result = model(tokens)
    return result if isinstance(result, Tensor) else result[0]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    """Train for a few steps."""
    for _ in range(steps):
        optimizer.zero_grad()
        logits(model).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(("between", "tied"), [(between, False) for between in FOLLOWED] + [("", True)])
def test_blocks_joined_are_as_the_root(between: str, tied: bool) -> None:
    """The same couplings, members and sizes; the same numbers after the same shrinks, and in training after them."""
    model = Stack(between=between, tied=tied).double().train(between == "checkpoint")
    root = copy.deepcopy(model).eval()
    ecospa_fx.compile(root, example_inputs=(TOKENS,), regions="root")
    mine, theirs = by_name(joined(model)), by_name(root)
    assert "residual" in mine and mine.keys() == theirs.keys()
    for name in mine:
        assert {str(m) for m in mine[name].members} == {str(m) for m in theirs[name].members}
        assert (mine[name].kind, mine[name].linear) == (theirs[name].kind, theirs[name].linear)
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, root)]
    for keep in (torch.tensor([0, 2, 3, 5, 7]), torch.tensor([1, 4])):
        for each, optimizer in zip((model, root), optimizers, strict=True):
            train(each, optimizer)
            ecospa_fx.shrink(each, {"residual": keep, "blocks.0.ffn": torch.arange(5)}, optimizer=optimizer)
            train(each, optimizer)
        assert model.embed.weight.shape == (11, len(keep)) and model.blocks[1].down.weight.shape[0] == len(keep)
        torch.testing.assert_close(logits(model), logits(root), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits(model, TOKENS[:1, :5]), logits(root, TOKENS[:1, :5]), rtol=1e-12, atol=1e-12)


def test_a_smaller_module_of_the_same_class_computes_the_same() -> None:
    """Plain Python with the weights that are left knows no graph, and no regions."""
    model = joined(Stack().double())
    keep = torch.tensor([0, 2, 3, 5, 7])
    ecospa_fx.shrink(model, {"residual": keep})
    plain = Stack(width=5).double()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-12, atol=1e-12)
    assert ecospa_fx.verify(model, example_inputs=(TOKENS,)).ok


def test_a_block_that_is_left_out_at_random_is_found() -> None:
    """Another forward calls it, and the stream that skips it is the same axis."""
    torch.manual_seed(0)
    model = Stack(between="drop a block").double().train()
    assert len(by_name(joined(model))["residual"].members) == 20
    ecospa_fx.shrink(model, {"residual": torch.arange(3)})
    for _ in range(4):
        assert logits(model).shape == (2, 7, 11)


REFUSED = {
    "states": "it leaves the model as output",
    "kept": "something keeps it after the forward: an attribute, a list, a hook",
    "scaled by its width": "does not follow: aten.mul (test_joined.py",
    "viewed by a number": "does not follow: RuntimeError: shape '[2, 7, 8]' is invalid",
    "a constant": "aten.add between the regions takes a tensor along it that does not shrink",
}


@pytest.mark.parametrize("between", REFUSED)
def test_what_else_reads_the_stream_pins_it(between: str) -> None:
    """The refusal names the members and the reason, and blocks offer what they did."""
    model = joined(Stack(between=between).double().eval())
    assert set(by_name(model)) == {f"blocks.{i}.ffn" for i in range(3)}
    refusals = ecospa_fx.explain(model).refusals
    (across,) = [refusal for refusal in refusals if "embed.weight[1]" in refusal.members and not refusal.region]
    assert REFUSED[between] in " ".join(across.reasons)
    before = logits(model)
    ecospa_fx.shrink(model, {"blocks.0.ffn": torch.arange(12)})
    torch.testing.assert_close(logits(model), before)


def test_a_hook_on_a_block_that_keeps_its_result_pins_the_stream() -> None:
    """Whoever keeps a tensor may read it."""
    model, seen = Stack().double(), []
    model.blocks[1].register_forward_hook(lambda _, __, result: seen.append(result))
    assert "residual" not in by_name(joined(model))


def test_a_tensor_of_another_size_is_refused_with_the_way_out() -> None:
    """A caller that runs a block by hand must pass what the one before it returns."""
    model = joined(Stack().double())
    ecospa_fx.shrink(model, {"residual": torch.arange(5)})
    states = model.blocks[0](model.embed(TOKENS))
    assert model.blocks[1](states).shape == (2, 7, 5)
    with pytest.raises(EcoSpaError) as raised:
        model.blocks[1](torch.randn(2, 7, 8).double())
    assert str(raised.value) == (
        "the argument `stream` of region `blocks.1` has sizes (2, 7, 8), and 5 of 8 entries are left along its dim 2, "
        "which has shrunk with the model around: pass what the module before it returns, or compile with "
        'regions="blocks", where arguments and results of blocks keep their sizes'
    )


def test_a_call_captured_after_a_shrink_is_as_one_before() -> None:
    """Training mode with dropout off is another signature; its graph gets the stream at its original size."""
    model, twin = Stack().double().eval(), Stack().double()
    twin.load_state_dict(model.state_dict())
    for each in (joined(model), joined(twin)):
        ecospa_fx.shrink(each, {"residual": torch.tensor([1, 2, 6])})
    torch.testing.assert_close(logits(model.train()), logits(twin), rtol=1e-12, atol=1e-12)
    ecospa_fx.shrink(model, {"residual": torch.tensor([0, 2])})
    ecospa_fx.shrink(twin, {"residual": torch.tensor([0, 2])})
    torch.testing.assert_close(logits(model.eval()), logits(twin), rtol=1e-12, atol=1e-12)


def test_copies_pickles_and_saves_go_on(tmp_path) -> None:
    """All that a copy knows of the couplings across its regions."""
    model = joined(Stack(tied=True).double())
    ecospa_fx.shrink(model, {"residual": torch.tensor([0, 2, 3, 5, 7])})
    ecospa_fx.save(model, tmp_path / "save")
    others = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        ecospa_fx.load(tmp_path / "save", lambda: Stack(tied=True).double()),
    ]
    for other in others:
        assert torch.equal(logits(other), logits(model))
        theirs, mine = (by_name(each)["residual"] for each in (other, model))
        assert {str(member) for member in theirs.members} == {str(member) for member in mine.members}
        ecospa_fx.shrink(other, {"residual": torch.tensor([0, 4])})
    assert model.embed.weight.shape == (11, 5)
    ecospa_fx.shrink(model, {"residual": torch.tensor([0, 4])})
    assert all(torch.equal(logits(other), logits(model)) for other in others)
    plain = ecospa_fx.restore(model)
    assert torch.equal(logits(plain), logits(others[0])) and plain.blocks[0].norm.normalized_shape == (2,)


def test_the_trainer_and_the_tables_know_it() -> None:
    """A run of both policies, with activations and absorption, ends at its target; costs add up over regions."""
    model = joined(Stack(depth=3, tied=True))
    savings = ecospa_fx.explain(model).savings()["residual"]
    # A column of the embedding and the places, three blocks' weights, biases and norms, the last norm.
    assert savings.parameters == 11 + 16 + 3 * (12 + 12 + 1 + 2) + 2
    for options in ({"policy": "paper", "index_score": "activation"}, {"policy": "adaptive"}):
        each = copy.deepcopy(model)
        before = sum(p.numel() for p in each.parameters())
        optimizer = torch.optim.AdamW(each.parameters(), 1e-2)
        trainer = ecospa_fx.EcoSpaTrainer(each, optimizer, target=0.5, interval=2, start=1, end=5, **options)
        for _ in range(7):
            optimizer.zero_grad()
            logits(each).square().mean().backward()
            optimizer.step()
            trainer.step()
        assert sum(p.numel() for p in each.parameters()) <= 0.55 * before, options
        assert each.embed.weight.shape[1] < 8 or options["policy"] == "adaptive"


class Chain(nn.Module):
    """Layers between repeated blocks, and a choice by value that no graph of the whole can hold."""

    class Repeated(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            """Add to the stream."""
            return x + self.second(self.first(x).relu())

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(3, width), nn.ModuleList(self.Repeated(width) for _ in range(2))
        self.wide, self.mix, self.head = nn.Linear(width, 10), nn.Linear(10, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Run all layers."""
        if x.sum().item() > 1e6:
            x = -x
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.mix(self.wide(x).relu()).relu())


def test_auto_joins_regions_where_the_root_covers_more_and_cannot_be_captured() -> None:
    model, x = Chain().double(), torch.randn(2, 3, dtype=torch.float64)
    assert {c.name for c in ecospa_fx.explain(model, example_inputs=(x,), regions="blocks").couplings} == {
        "blocks.0.ffn", "blocks.1.ffn",
    }  # fmt: skip
    own = ecospa_fx.explain(copy.deepcopy(model), example_inputs=(x,), execution="module")
    assert len(own.couplings) == 2 and "" in own.not_captured
    before = copy.deepcopy(model)
    ecospa_fx.compile(model, example_inputs=(x,))
    found = ecospa_fx.couplings(model)
    assert [c.size for c in found] == [6, 6, 6, 10, 10]
    keeps = {c: half(c.size, i) for i, c in enumerate(found)}
    positions = kept_positions(before, keeps)
    ecospa_fx.shrink(model, keeps)
    assert (model.stem.out_features, model.wide.in_features, model.head.in_features) == (3, 3, 5)
    torch.testing.assert_close(model(x), zeroed(before, positions)(x), rtol=1e-12, atol=1e-12)
    assert ecospa_fx.verify(model, example_inputs=(x,)).ok


class Graphs(nn.Module):
    """A network of graphs whose layers are single, pooled over as many graphs as the batch names."""

    def __init__(self, pool: str, width: int = 6, inner: int = 8) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, width), nn.Linear(width, inner), nn.Linear(inner, 2)
        self.pool = pool

    def forward(self, nodes: Tensor, graph: Tensor) -> Tensor:
        """Return a row for each graph."""
        number = int(graph.max()) + 1
        sent = torch.zeros(len(nodes), nodes.shape[1], dtype=nodes.dtype).index_add_(0, graph.flip(0), nodes)
        x = self.second(self.first(nodes + sent).relu()).tanh()
        match self.pool:
            case "sum":
                x = x.new_zeros(number, x.shape[1]).scatter_add_(0, graph[:, None].expand_as(x), x)
            case "max":
                lowest = torch.full((number, x.shape[1]), -2.0, dtype=x.dtype)
                x = lowest.scatter_reduce(0, graph[:, None].expand_as(x), x, "amax")
            case "loop":
                x = torch.stack([x[graph == i].mean(0) for i in graph.unique().tolist()])
            case "weighed":
                weights = torch.ones(number, x.shape[1], dtype=x.dtype)
                weights[:, 3] = 0.5
                x = torch.zeros(number, x.shape[1], dtype=x.dtype).index_add_(0, graph, x) * weights
            case "of one size":
                x = torch.zeros(number, 8, dtype=x.dtype).index_add_(0, graph, x)
        return self.head(x)


@pytest.mark.parametrize("pool", ["sum", "max", "loop", "weighed", "of one size"])
def test_single_layers_are_joined_where_the_forward_cannot_be_captured(pool: str) -> None:
    torch.manual_seed(0)
    model = Graphs(pool).double()
    nodes, graph = torch.randn(9, 3, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    before = copy.deepcopy(model)
    ecospa_fx.compile(model, example_inputs=(nodes, graph))
    found = {coupling.size: coupling for coupling in ecospa_fx.couplings(model)}
    follows = pool in ("sum", "max", "loop")
    assert found.keys() == ({6, 8} if follows else {6})
    if not follows:
        reasons = " ".join(r for refusal in ecospa_fx.explain(model).refusals for r in refusal.reasons)
        assert ("aten.mul between the regions takes" if pool == "weighed" else "does not follow") in reasons
    keeps = {coupling: half(coupling.size, 1) for coupling in found.values()}
    positions = kept_positions(before, keeps)
    ecospa_fx.shrink(model, keeps)
    expected = zeroed(before, positions)
    for call in ((nodes, graph), (nodes, torch.tensor([0, 1, 2, 3, 4, 4, 4, 4, 4]))):
        torch.testing.assert_close(model(*call), expected(*call), rtol=1e-12, atol=1e-12)


class Turned(torch.autograd.Function):
    """Leaves what comes in as it is, and turns gradients round."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override]
        """Copy."""
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        """Turn."""
        return gradient.flip(-1)


def test_a_backward_of_its_own_between_regions_keeps_an_axis_whole() -> None:
    class Net(nn.Module):
        """Two layers that no graph holds together."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            """Return two numbers a row."""
            return self.head(Turned.apply(self.first(x)) * int(x.abs().max() + 1))

    with pytest.raises(CaptureError, match=r"first.weight\[0\].* a torch.autograd.Function between the regions"):
        ecospa_fx.compile(Net(), example_inputs=(torch.randn(3, 4),))


class Forked(nn.Module):
    """Layers with something between them that one call in two does."""

    def __init__(self, when: str, what: str) -> None:
        super().__init__()
        self.first, self.other, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.shift = nn.Parameter(torch.randn(6))
        self.when, self.what = when, what

    def forward(self, x: Tensor) -> Tensor:
        """Return two numbers a row."""
        scale = int(x.abs().max()) + 1
        match self.when:
            case "training":
                does = self.training
            case "bool":
                does = bool((x < 0).all())
            case "item":
                does = x.mean().item() < 0
            case "equal":
                does = torch.equal(x, -x.abs())
            case "gradients":
                does = torch.is_grad_enabled()
            case "draws":
                does = random.random() < 0.5
            case "draws in training":
                does = self.training and np.random.rand() < 0.5  # noqa: NPY002
            case "while":
                does = False
                while x.max() < -1:  # and never ends if that is answered the other way round
                    does, x = True, x + 1
        y = self.first(x).tanh() * scale
        if does:
            match self.what:
                case "flip":
                    y = y.flip(-1)
                case "count":
                    y = y * torch.arange(y.shape[-1])
                case "shift":
                    y = y + self.shift
                case "other layer":
                    y = self.other(x).tanh()
                case "scale":
                    y = (y * 2).relu()
        return self.head(y)


@pytest.mark.parametrize(
    "when", ["training", "bool", "item", "equal", "while", "gradients", "draws", "draws in training"]
)
@pytest.mark.parametrize("what", ["flip", "count", "shift", "other layer", "scale"])
def test_what_another_call_runs_between_regions_counts(when: str, what: str) -> None:
    torch.manual_seed(0)
    model, x = Forked(when, what).double().eval(), torch.rand(5, 4, dtype=torch.float64)
    if what != "scale":
        path = {
            "training": "in training mode", "gradients": "with gradients", "draws": "(aten.*|with other draws)",
            "draws in training": "in training mode.*",
        }.get(when, r"where `.*` \(test_joined.py:\d+\) goes the other way")  # fmt: skip
        with pytest.raises(CaptureError, match=rf"Nor can what runs .*: {path}"):
            ecospa_fx.compile(model, example_inputs=(x,))
        return
    before = copy.deepcopy(model)
    ecospa_fx.compile(model, example_inputs=(x,))
    (coupling,) = ecospa_fx.couplings(model)
    keeps = {coupling: half(coupling.size, 1)}
    positions = kept_positions(before, keeps)
    ecospa_fx.shrink(model, keeps)
    expected = zeroed(before, positions)
    for training in (False, True):
        for call in (x, -x):
            results = []
            for each in (model, expected):
                random.seed(0)
                np.random.seed(0)  # noqa: NPY002
                results.append(each.train(training)(call))
            torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def places(model: nn.Module) -> dict[str, set[tuple[int, int]]]:
    """The members of each coupling, as numbers of parameters and dims: tied weights have several names."""
    numbers = {id(parameter): i for i, parameter in enumerate(model.parameters())}
    return {
        coupling.name: {(numbers[id(model.get_parameter(m.parameter))], m.dim) for m in coupling.members}
        for coupling in ecospa_fx.couplings(model)
    }


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit", "t5"])
def test_transformers_by_blocks_are_as_by_the_root(kind: str) -> None:
    class Logits(nn.Module):
        """Returns nothing of the stream, of which T5 returns that of its encoder."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, **call: object) -> Tensor:
            """Run the model."""
            return self.model(**call).logits

    model, call = plain(kind)
    model = Logits(model.double())
    call = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}
    root = copy.deepcopy(model)
    for each, regions in ((model, "joined"), (root, "root")):
        ecospa_fx.compile(each, example_kwargs=call, regions=regions)
    mine = by_name(model)
    assert "residual" in {c.kind for c in mine.values()}
    assert places(model) == places(root)
    keeps = {name: half(coupling.size, 0) for name, coupling in mine.items()}
    for each in (model, root):
        ecospa_fx.shrink(each, keeps)
    torch.testing.assert_close(model(**call), root(**call), rtol=1e-12, atol=1e-12)
