"""Regions: the submodules that are captured, where that fails, and the reasons given."""

import copy

import pytest
import torch
from torch import nn
from twin import assert_equals_twin, half, kept_positions, zeroed

import ecospa_fx
from ecospa_fx import errors
from ecospa_fx.model.compiled import MODEL

WIDTH = 6


class MLP(nn.Module):
    def __init__(self, hidden=10, slope=0.1):
        super().__init__()
        self.up, self.down, self.slope = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH), slope

    def forward(self, x):
        return self.down(nn.functional.leaky_relu(self.up(x), self.slope))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, mask=None):
        q, k, v = (f(x).unflatten(-1, (2, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return self.o(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """`branching`: on the value of a tensor, which no graph can hold."""

    def __init__(self, branching=False):
        super().__init__()
        self.attention, self.mlp, self.branching = Attention(), MLP(), branching

    def forward(self, x):
        x = x + self.attention(x)
        if self.branching and x.sum().item() > 1e6:
            x = -x
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, *blocks, branching=False):
        super().__init__()
        self.blocks, self.head, self.branching = nn.ModuleList(blocks), MLP(14), branching

    def forward(self, x):
        if self.branching and x.sum().item() > 1e6:
            x = -x
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def regions_of(model):
    return set(model.__dict__[MODEL].regions)


def not_captured(model):
    return model.__dict__[MODEL].not_captured


def checked(model, *args, regions="auto", **kwargs):
    """Compile, and check all couplings at once against zeroed weights; the names of the couplings."""
    plain, args = copy.deepcopy(model), args or (torch.randn(2, 5, WIDTH),)
    ecospa_fx.compile(model, example_inputs=args, example_kwargs=kwargs, regions=regions)
    ecospa_fx.verify(model, example_inputs=args, example_kwargs=kwargs).raise_if_failed()
    couplings = ecospa_fx.couplings(model)
    keeps = {c: half(c.size, i) for i, c in enumerate(couplings)}
    positions = kept_positions(plain, keeps)
    shrunk = copy.deepcopy(model)
    ecospa_fx.shrink(shrunk, keeps)
    assert_equals_twin(shrunk, zeroed(plain, positions), positions, args, kwargs, "all together")
    return {c.name for c in couplings}


IN_BLOCK = {"attention.heads", "attention.qk", "attention.vo", "mlp.ffn"}


def of_blocks(*numbers):
    return {f"blocks.{i}.{name}" for i in numbers for name in IN_BLOCK}


def test_blocks_are_regions_where_couplings_close_inside_them():
    model = Model(Block(), Block())
    assert checked(model) == of_blocks(0, 1)
    assert regions_of(model) == {"blocks.0", "blocks.1"} and not_captured(model) == {}


def test_a_branch_in_a_block_leaves_its_attention_and_mlp(capfd):
    model = Model(Block(), Block(branching=True))
    assert checked(model) == of_blocks(0, 1) | {"head.ffn"}
    assert capfd.readouterr() == ("", "")  # torch.export would print the graphs that it gave up
    assert regions_of(model) == {"blocks.0", "blocks.1.attention", "blocks.1.mlp", "head"}
    assert set(not_captured(model)) == {"", "blocks.1"}
    assert not_captured(model)["blocks.1"].startswith("torch.export cannot capture region `blocks.1` (Block): ")
    assert not_captured(model)[""].startswith("torch.export cannot capture the model (Model): ")


def test_blocks_only_leaves_the_head_alone():
    model = Model(Block(branching=True), Block())
    assert checked(model, regions="blocks") == of_blocks(0, 1)
    assert regions_of(model) == {"blocks.0.attention", "blocks.0.mlp", "blocks.1"}
    assert set(not_captured(model)) == {"blocks.0"}


def test_a_branch_at_the_root_of_a_model_without_blocks_leaves_what_is_largest_below():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Block(), nn.Sequential(Block(branching=True), nn.Tanh())

        def forward(self, x):
            return self.second(self.first(x) if x.sum().item() < 1e6 else x)

    model = Two()
    assert checked(model) == {f"{at}.{name}" for at in ("first", "second.0") for name in IN_BLOCK}
    assert regions_of(model) == {"first", "second.0.attention", "second.0.mlp"}
    assert list(not_captured(model)) == ["", "second", "second.0"]


def test_the_root_where_a_block_has_nothing_to_couple():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2))
            self.out = nn.Linear(WIDTH, 3)

        def forward(self, x):
            return self.out(self.up[1](self.up[0](x)))

    model = Pooled()
    assert checked(model, regions="root") > checked(Pooled(), regions="blocks")


def test_root_is_the_root_or_an_error():
    model = Model(Block(), Block())
    assert checked(model, regions="root") == of_blocks(0, 1) | {"head.ffn", "residual"}
    assert regions_of(model) == {""}
    with pytest.raises(errors.CaptureError, match=r"torch.export cannot capture the model \(Model\): "):
        checked(Model(Block(branching=True)), regions="root")


def test_regions_by_name():
    model = Model(Block(branching=True), Block())
    assert checked(model, regions=["blocks.0.mlp", "head"]) == {"blocks.0.mlp.ffn", "head.ffn"}
    assert regions_of(model) == {"blocks.0.mlp", "head"}


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        (["blocks.7"], "regions: Model has no submodule `blocks.7`; see model.named_modules()"),
        (["blocks"], "regions: `blocks` is not called in a forward of the model; name another"),
        (
            ["head", "blocks.0", "blocks.0.mlp"],
            "regions: `blocks.0.mlp` lies inside `blocks.0`, whose graph has no call of it left; name one of them",
        ),
        (["", "head"], "regions: `head` lies inside the model, whose graph has no call of it left; name one of them"),
        ("block", "regions='block' is none of 'auto', 'blocks', 'joined', 'root' or a list of submodule names"),
    ],
)
def test_regions_that_cannot_be(regions, message):
    model = Model(Block(), Block())
    before = copy.deepcopy(model.__dict__)
    with pytest.raises(errors.CaptureError) as raised:
        ecospa_fx.compile(model, example_inputs=(torch.randn(2, 5, WIDTH),), regions=regions)
    assert str(raised.value) == message
    assert type(model) is Model and model.__dict__.keys() == before.keys()


def test_nothing_captured_says_why_inside_too():
    class Leaf(MLP):
        def forward(self, x):
            return super().forward(x) if x.sum().item() < 1e6 else self.down(self.up(x).flip(-1))

    model = nn.Sequential(Leaf(), nn.Tanh())
    why = r"capture the model .*\. Nor can a submodule: .* `0` \(Leaf\): .*\. Nor can .* shrink: 0.up.weight\[0\].*flip"
    with pytest.raises(errors.CaptureError, match=why):
        ecospa_fx.compile(model, example_inputs=(torch.randn(2, 5, WIDTH),))


class Recurrent(nn.Module):
    """One block, called again and again; the last time in another way."""

    def __init__(self, branching=True):
        super().__init__()
        self.attention, self.branching = Attention(), branching

    def forward(self, x, mask):
        for _ in range(3):
            x = x + self.attention(x)
        if self.branching and x.sum().item() > 1e6:
            return x
        return x + self.attention(x[:, :4], mask=mask).sum(1, keepdim=True)


def test_a_block_called_several_times_follows_every_call():
    model, mask = Recurrent(), torch.rand(4, 4) > 0.3
    mask.fill_diagonal_(True)
    assert checked(model, torch.randn(2, 5, WIDTH), mask) == IN_BLOCK - {"mlp.ffn"} | {"attention.qk"}
    (region,) = model.__dict__[MODEL].regions.values()
    assert len(region.specializations) >= 2  # with and without a mask; both known before anything shrinks


def test_a_second_way_to_call_a_block_can_keep_an_axis_whole():
    class Twice(nn.Module):
        """The second call hands out the hidden entries, so they must stay."""

        def __init__(self):
            super().__init__()
            self.mlp, self.other = Told(), MLP()

        def forward(self, x):
            y = self.mlp(x) + self.other(x)
            return y if x.sum().item() > 1e6 else self.mlp(y, hidden=True).sum(-1)

    class Told(MLP):
        def forward(self, x, hidden=False):
            h = self.up(x).relu()
            return h if hidden else self.down(h)

    model = Twice()
    assert checked(model) == {"other.ffn"}


def test_a_block_that_is_not_called_is_said_to_stay_whole():
    class Skipping(Model):
        def forward(self, x):
            return self.blocks[2](self.blocks[0](x))

    model = Skipping(Block(), Block(), Block())
    assert checked(model) == of_blocks(0, 2)
    assert not_captured(model) == {
        "blocks.1": "it is not called in this forward of the model, so its computation is unknown; it stays whole"
    }


class Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Model(Block(), Block()), Model(Block(), Block())

    def forward(self, x, read=None):
        return self.decoder(x + (self.encoder(x) if read is None else read))


def test_blocks_that_the_first_call_leaves_out_are_named_aloud(caplog):
    """An encoder that has run by itself is not a part of the first call of the model."""
    model, x = Reading(), torch.randn(2, 3, WIDTH)
    ecospa_fx.compile(model)
    with caplog.at_level("WARNING", "ecospa_fx"):
        model(x, model.encoder(x))
    assert [record.getMessage() for record in caplog.records] == [
        "Reading: `encoder.blocks.0` and 1 other block are not called in the forward that is captured, and will stay "
        "whole (compile with example_inputs or example_kwargs of a forward that calls all blocks, as in training)"
    ]
    caplog.clear()
    with caplog.at_level("WARNING", "ecospa_fx"):
        ecospa_fx.compile(Reading(), example_inputs=(x,))
    assert not caplog.records


@pytest.mark.parametrize("execution", ["graph", "module"])
def test_the_first_call_with_gradients_adds_the_blocks_that_generation_has_left_out(execution, caplog):
    torch.manual_seed(0)
    plain, x = Reading(), torch.randn(2, 3, WIDTH)
    model = ecospa_fx.compile(copy.deepcopy(plain), execution=execution)
    with caplog.at_level("WARNING", "ecospa_fx"), torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(x, model.encoder(x)), plain(x))
    left_in = ecospa_fx.couplings(model)
    assert left_in and all(coupling.name.startswith("decoder.") for coupling in left_in)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.87, interval=1, end=4)  # knows the decoder's alone
    for _ in range(6):
        model(x).square().mean().backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    assert trainer.done and not caplog.records
    assert len(ecospa_fx.couplings(model)) == 2 * len(left_in)
    small = {
        coupling.name.split(".")[0] for coupling in ecospa_fx.couplings(model) if coupling.size < coupling.original_size
    }
    assert small == {"encoder", "decoder"}
    with torch.no_grad():
        torch.testing.assert_close(model(x, model.encoder(x)), model(x))


def test_an_error_while_blocks_are_added_leaves_the_model_as_it_was(monkeypatch):
    model, x = ecospa_fx.compile(Reading()), torch.randn(2, 3, WIDTH)
    with torch.no_grad():
        model(x, model.encoder(x))
    left_in = ecospa_fx.couplings(model)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ecospa_fx.model.compiled.choose_regions", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(x)
    assert ecospa_fx.couplings(model) == left_in
    ecospa_fx.shrink(model, {c: torch.arange(1) for c in left_in})
    assert torch.isfinite(model(x)).all()


def test_what_has_shrunk_before_the_first_call_with_gradients_stays_as_it_is():
    model, x = ecospa_fx.compile(Reading()), torch.randn(2, 3, WIDTH)
    with torch.no_grad():
        model(x, model.encoder(x))
    ecospa_fx.shrink(model, {c: torch.arange(1) for c in ecospa_fx.couplings(model)})
    model(x).sum().backward()
    assert {(c.name.split(".")[0], c.size) for c in ecospa_fx.couplings(model)} == {("decoder", 1)}


class Cache:
    """No graph can hold one."""

    def __init__(self):
        self.calls = 0


def test_blocks_called_with_an_object_leave_what_is_below():
    class Caching(Block):
        def forward(self, x, cache):
            cache.calls += 1
            return super().forward(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Caching() for _ in range(2))

        def forward(self, x):
            cache = Cache()
            for block in self.blocks:
                x = block(x, cache)
            return x + cache.calls

    model = Model()
    # The root makes the cache itself: all of it is one graph.
    assert checked(model) == of_blocks(0, 1) and regions_of(model) == {""}
    assert "is called with a Cache" in not_captured(model)["blocks.0"]
    model = Model()
    assert checked(model, regions="blocks") == of_blocks(0, 1)
    assert regions_of(model) == {f"blocks.{i}.{name}" for i in (0, 1) for name in ("attention", "mlp")}


def test_equal_parts_of_failed_blocks_share_graphs_and_others_do_not():
    model = Model(Block(branching=True), Block(branching=True), Block(branching=True))
    model.blocks[1].mlp.slope = 0.5
    checked(model)
    regions = model.__dict__[MODEL].regions
    graphs = {name: region.naming_graph.captured.graph for name, region in regions.items()}
    assert graphs["blocks.0.attention"] is graphs["blocks.1.attention"] is graphs["blocks.2.attention"]
    assert graphs["blocks.0.mlp"] is graphs["blocks.2.mlp"] is not graphs["blocks.1.mlp"]


def test_a_graph_that_differs_from_eager_gives_way_to_those_below():
    class Lying(nn.Module):
        """Takes another path when traced, as some real models do."""

        def __init__(self):
            super().__init__()
            self.mlp = MLP()

        def forward(self, x):
            return self.mlp(x) * (2.0 if torch.compiler.is_exporting() else 1.0)

    model = Lying()
    assert checked(model) == {"mlp.ffn"} and regions_of(model) == {"mlp"}
    assert not_captured(model) == {
        "": "the model was captured, but output 0 of the graph differs from eager by 1.0e+00; it is left as it is"
    }


class Penalised(Model):
    """The model's own Python reads a weight of a block, of which the block's graph knows nothing."""

    def use(self, weight):
        return 0.1 * weight.cumsum(0).sum()

    def forward(self, x):
        assert self.blocks[1].mlp.up.weight.dtype == x.dtype  # no use of its entries
        return super().forward(x) + self.use(self.blocks[0].mlp.up.weight)


def test_a_weight_used_outside_of_its_block_is_seen():
    model = Penalised(Block(), Block())
    names = checked(model)
    assert regions_of(model) == {""}  # the root's graph has all of its uses
    assert "blocks.0.mlp.ffn" not in names and "blocks.1.mlp.ffn" in names
    assert not_captured(model) == {
        "blocks.0": "region `blocks.0` cannot be captured by itself: `blocks.0.mlp.up.weight` is used outside of it "
        "too, by torch.Tensor.cumsum"
    }
    model = Penalised(Block(), Block())
    assert checked(model, regions="blocks") == of_blocks(0, 1) - {"blocks.0.mlp.ffn"}
    with pytest.raises(errors.CaptureError, match=r"region `blocks\.0` cannot be captured by itself: "):
        checked(Penalised(Block(), Block()), regions=["blocks.0"])


class Averaged(Penalised):
    def use(self, weight):
        return weight.mean()


def test_an_average_outside_of_a_block_is_of_what_is_left():
    plain, x = Averaged(Block(), Block()), torch.randn(2, 5, WIDTH)
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(x,))
    assert set(not_captured(model)) == {"blocks.0"}
    (ffn,) = (c for c in ecospa_fx.couplings(model) if c.name == "blocks.0.mlp.ffn")
    ecospa_fx.shrink(model, {ffn: half(ffn.size, 0)})
    with torch.no_grad():  # plain Python on the weights of a smaller block
        mlp, left = plain.blocks[0].mlp, half(ffn.size, 0)
        mlp.up.weight, mlp.up.bias = nn.Parameter(mlp.up.weight[left]), nn.Parameter(mlp.up.bias[left])
        mlp.down.weight = nn.Parameter(mlp.down.weight[:, left])
    torch.testing.assert_close(model(x), plain(x))
    assert model.blocks[0].mlp.up.weight.shape == mlp.up.weight.shape


def test_explain_lists_what_could_not_be_captured():
    model = Model(Block(branching=True), Block())
    text = str(ecospa_fx.explain(model, example_inputs=(torch.randn(2, 5, WIDTH),)))
    assert "Not captured:\n  blocks.0: torch.export cannot capture region `blocks.0` (Block): " in text
