"""Calls with objects that a forward changes, caches of keys and values say, in graph execution."""

import contextvars
import copy

import pytest
import torch
from torch import nn

import ecospa_fx
from ecospa_fx import errors
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.routing import Routing

HEADS, DIM, WIDTH = 4, 6, 10


class Layer:
    """The part of a cache that belongs to one block."""

    def __init__(self):
        self.keys = self.values = None
        self.length = 0

    def update(self, keys, values):
        self.length += keys.shape[2]
        if self.keys is not None:
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.keys, self.values = keys, values
        return keys, values


class Fixed(Layer):
    """The same, with memory of full length from the first call on."""

    def update(self, keys, values):
        new = keys.shape[2]
        if self.keys is None:
            self.keys = torch.zeros(*keys.shape[:2], 16, keys.shape[3], dtype=keys.dtype)
            self.values = torch.zeros(*values.shape[:2], 16, values.shape[3], dtype=values.dtype)
            self.position = torch.tensor(0)
        at = torch.arange(new) + self.position
        self.keys.index_copy_(2, at, keys)
        self.values.index_copy_(2, at, values)
        self.position.add_(new)
        self.length += new
        return self.keys, self.values


class Cache:
    """The parts of all blocks."""

    def __init__(self, blocks=2, layer=Layer):
        self.layers = [layer() for _ in range(blocks)]
        self.done = {}
        self.noted = []

    def update(self, keys, values, number, more=None):
        return self.layers[number].update(keys, values)

    def note(self, x):
        self.noted.append(x)

    def reorder(self, order):
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[order], layer.values[order]


class Attention(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number = number
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * DIM) for _ in range(3))
        self.o = nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, x, mask, cache=None):
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if cache is not None:
            k, v = cache.update(k, v, self.number, more={"mask": mask})
        seen = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return self.o(seen.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.attention = Attention(number)
        self.up, self.down = nn.Linear(WIDTH, 14), nn.Linear(14, WIDTH)

    def forward(self, x, mask, cache=None):
        x = x + self.attention(x, mask, cache)
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, block=Block, blocks=2):
        super().__init__()
        self.blocks = nn.ModuleList(block(number) for number in range(blocks))

    def forward(self, x, cache=None):
        new, past = x.shape[1], cache.layers[0].length if cache is not None else 0
        mask = torch.ones(new, past + new, dtype=torch.bool).tril(past)
        if cache is not None and isinstance(cache.layers[0], Fixed):
            mask = nn.functional.pad(mask, (0, 16 - past - new))
        for block in self.blocks:
            x = block(x, mask, cache)
        return x


def sequence(length=9, batch=2):
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def made(block=Block, **options):
    torch.manual_seed(0)
    return Model(block, **options).double()


def compiled(model=None, **options):
    return ecospa_fx.compile(model or made(), example_inputs=(sequence(),), **options)


def halved(model):
    ecospa_fx.shrink(model, {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model)})
    return model


def stepwise(model, cache, x, first=3):
    """Run a sequence with a cache: the beginning at once, then token by token."""
    parts = [x[:, :first], *(x[:, i : i + 1] for i in range(first, x.shape[1]))]
    return torch.cat([model(part, cache) for part in parts], 1)


def graphs(model):
    return [each for region in model.__dict__[MODEL].regions.values() for each in region.specializations]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layer", [Layer, Fixed])
@pytest.mark.parametrize("order", ["shrunk first", "called first"])
def test_with_a_cache_as_without(layer, order):
    plain = made()
    model, x = compiled(copy.deepcopy(plain)), sequence()
    assert sorted({c.kind for c in ecospa_fx.couplings(model)}) == ["ffn", "heads", "qk", "vo"]
    with torch.no_grad():
        if order == "called first":
            cache, other = Cache(layer=layer), Cache(layer=layer)
            close(stepwise(model, cache, x), stepwise(plain, other, x))
            close(cache.layers[1].keys, other.layers[1].keys)
            assert [layer.length for layer in cache.layers] == [9, 9]
        assert sorted({c.kind for c in ecospa_fx.couplings(model)}) == ["ffn", "heads", "qk", "vo"]
        halved(model)
        cache = Cache(layer=layer)
        own = list(cache.layers)
        close(stepwise(model, cache, x), model(x))
        # It is the caller's own object that has changed, by its own code, at the sizes of now.
        assert cache.layers == own and [layer.length for layer in own] == [9, 9]
        assert own[1].keys.shape == (2, HEADS // 2, 9 if layer is Layer else 16, DIM // 2)
        before = len(graphs(model))
        longer = sequence(14)
        close(stepwise(model, Cache(layer=layer), longer), model(longer))
        assert len(graphs(model)) == before


def test_blocks_find_their_own_part_by_number_and_share_graphs():
    model = compiled(made(blocks=4))
    with torch.no_grad():
        stepwise(model, Cache(4), sequence())
    programs = [region.specializations for region in model.__dict__[MODEL].regions.values()]
    assert {len(own) for own in programs} == {3}  # without a cache, with an empty one, with a filled one
    assert all(len({program.captured.graph for program in same}) == 1 for same in zip(*programs, strict=True))
    places = [str(place) for own in programs for place in own[-1].captured.carried.state]
    assert places == [f"layers[{i}].{name}" for i in range(4) for name in ("keys", "values")]


def test_a_number_that_is_used_otherwise_keeps_blocks_apart():
    class Scaled(Block):
        def forward(self, x, mask, cache=None):
            return super().forward(x * (1 + self.attention.number), mask, cache)

    plain = made(Scaled)
    model, x = compiled(copy.deepcopy(plain)), sequence()
    with torch.no_grad():
        close(stepwise(model, Cache(), x), plain(x))
    one, other = (region.specializations[-1].captured.graph for region in model.__dict__[MODEL].regions.values())
    assert one is not other


def test_heads_that_keep_different_dims():
    model, x = compiled(), sequence()
    keep = {}
    for coupling in ecospa_fx.couplings(model):
        if coupling.context is not None:
            rows = [torch.randperm(coupling.size, generator=torch.Generator().manual_seed(i))[:3] for i in range(HEADS)]
            keep[coupling] = torch.stack(rows).sort(1).values
    assert len(keep) == 4
    with torch.no_grad():
        stepwise(model, Cache(), x)
        ecospa_fx.shrink(model, keep)
        close(stepwise(model, Cache(), x), model(x))
        ecospa_fx.shrink(model, {c: torch.tensor([0, 2]) for c in ecospa_fx.couplings(model) if c.kind == "heads"})
        # Captured after all that: what the cache holds is put back among zeros to do it.
        model(x[:, :2], cache := Cache())
        close(model(x[:, 2:5], cache), model(x[:, :5])[:, 2:])


SEEN: contextvars.ContextVar[list | None] = contextvars.ContextVar("SEEN", default=None)


def test_hooks_that_record_for_a_call_see_nothing_of_a_capture_in_it():
    def recorded(model):
        token = SEEN.set([])
        try:
            result = model(sequence(), Cache())
            return result, SEEN.get()
        finally:
            SEEN.reset(token)

    def record(module, args, result):
        if SEEN.get() is not None:
            SEEN.get().append(result)

    plain = made()
    model = compiled(copy.deepcopy(plain))
    for each in (plain, model):
        for block in each.blocks:
            block.up.register_forward_hook(record)
    for count in (1, 2):  # with a graph that the call itself makes, and with one that is there
        (result, seen), (expected, theirs) = recorded(model), recorded(plain)
        close(result, expected)
        assert len(seen) == len(theirs) == 2, count
        for mine, their in zip(seen, theirs, strict=True):
            close(mine, their)


def test_what_was_filled_before_a_shrink_is_refused():
    model, x, cache = compiled(), sequence(), Cache()
    with torch.no_grad():
        stepwise(model, cache, x)
        halved(model)
        with pytest.raises(errors.EcoSpaError) as caught:
            model(x[:, :1], cache)
    assert str(caught.value) == (
        "`layers[0].keys` of the Cache that `blocks.0` is called with has sizes (2, 4, 9, 6) and needs (2, 2, 9, 3): "
        "it was filled by another model, or by this one before its last shrink. Start with an empty one"
    )
    assert cache.layers[0].keys.shape == (2, HEADS, 9, DIM)


def test_batches_may_be_reordered_between_calls():
    plain = made()
    model, x = compiled(copy.deepcopy(plain)), sequence()
    caches, order, found = (Cache(), Cache()), torch.tensor([1, 1]), []
    with torch.no_grad():
        for each, cache in zip((model, plain), caches, strict=True):
            each(x[:, :4], cache)
            cache.reorder(order)
            found.append(each(x[:, 4:5], cache))
    close(*found)


def test_gradients_go_through_what_is_cached():
    plain = made()
    model, x = compiled(copy.deepcopy(plain)), sequence()
    for each in (model, plain):
        stepwise(each, Cache(), x).square().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        close(a.grad, b.grad)


def test_captured_with_a_cache_from_the_first_call_on():
    plain = made()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(x := sequence(), cache := Cache()))
    assert cache.layers[0].length == 0  # it was looked at, and not changed
    assert sorted({c.kind for c in ecospa_fx.couplings(model)}) == ["ffn", "heads", "qk", "vo"]
    assert ecospa_fx.verify(model.eval(), example_inputs=(x, Cache())).ok
    halved(model)
    filled = Cache()
    with torch.no_grad():
        close(stepwise(model, filled, x), model(x))
    assert ecospa_fx.verify(model, example_inputs=(x[:, :1], filled)).ok
    twin = copy.deepcopy(model)
    with torch.no_grad():
        close(stepwise(twin, Cache(), x), model(x))


class Crossing(Block):
    """A block that computes the keys of another sequence once, as encoder-decoders do."""

    def forward(self, x, mask, cache=None):
        own = self.attention
        q = own.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        if cache is not None and cache.done.get(own.number):
            k, v = cache.layers[own.number].keys, cache.layers[own.number].values
        else:
            k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (own.k, own.v))
            if cache is not None:
                k, v = cache.update(k, v, own.number)
                cache.done[own.number] = True
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + own.o(seen.transpose(1, 2).flatten(2))


def test_what_is_filled_once_and_read_ever_after():
    plain = made(Crossing)
    model, x = compiled(copy.deepcopy(plain)), sequence()
    with torch.no_grad():
        caches = Cache(), Cache()
        for part in (x[:, :5], x[:, 5:6], x[:, 6:7]):
            close(model(part, caches[0]), plain(part, caches[1]))
        assert caches[0].done == {0: True, 1: True}
        assert sorted({c.kind for c in ecospa_fx.couplings(model)}) == ["heads", "qk", "vo"]
        halved(model)
        cache = Cache()
        close(model(x[:, :5], cache), model(x[:, :5]))
        assert cache.layers[0].keys.shape == (2, HEADS // 2, 5, DIM // 2) and cache.done == {0: True, 1: True}
        assert model(x[:, 5:6], cache).shape == (2, 1, WIDTH)


def test_what_something_else_fills_stays_whole():
    class Borrowing(Crossing):
        """A block that reads the keys of the first one."""

        def forward(self, x, mask, cache=None):
            if self.attention.number == 0 or cache is None:
                return super().forward(x, mask, cache)
            own = self.attention
            q = own.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            seen = nn.functional.scaled_dot_product_attention(q, cache.layers[0].keys, cache.layers[0].values)
            return x + own.o(seen.transpose(1, 2).flatten(2))

    model = ecospa_fx.compile(
        made(Borrowing), example_inputs=(x := sequence(), Cache()), regions=["blocks.0", "blocks.1"]
    )
    refused = [str(refusal) for refusal in ecospa_fx.explain(model).refusals]
    assert any("it meets `layers[0].keys` of a Cache, which something else fills" in text for text in refused)
    assert {c.region for c in ecospa_fx.couplings(model)} == {"blocks.0"}
    # As one graph it is known who fills what.
    masked = made(Borrowing)
    model = ecospa_fx.compile(copy.deepcopy(masked), example_inputs=(x, Cache()))
    keep = {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model) if c.kind == "vo"}
    with torch.no_grad():
        for name, gone in (("0.attention.v", 0), ("0.attention.o", 1), ("1.attention.o", 1)):
            layer = masked.get_submodule(f"blocks.{name}")
            dims = layer.weight.unflatten(gone, (HEADS, DIM)).movedim(gone + 1, 0)
            dims[1::2] = 0
            if gone == 0:
                layer.bias.unflatten(0, (HEADS, DIM))[:, 1::2] = 0
        ecospa_fx.shrink(model, keep)
        close(model(x, Cache()), masked(x, Cache()))


class Counting(Block):
    def forward(self, x, mask, cache=None):
        if cache is not None:
            cache.layers[self.attention.number].length += 1
        return super().forward(x, mask)


class Appending(Block):
    def forward(self, x, mask, cache=None):
        if cache is not None:
            cache.layers.append(x)
        return super().forward(x, mask)


class Noting(Block):
    """A block that reads, in the object itself, what a method of it has put there in the same call."""

    def forward(self, x, mask, cache=None):
        if cache is None:
            return super().forward(x, mask)
        cache.note(x)
        return super().forward(cache.noted[0], mask)


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (Noting, "reads `noted[0]`, which the same call has put there, and no graph does that"),
        (
            Counting,
            "counts in `layers[0].length` of a Cache itself, not by one of its methods: no two calls would be alike",
        ),
        (Appending, "changes `layers` of a Cache itself, not by one of its methods"),
    ],
)
def test_what_no_graph_can_do_to_an_object(block, why, caplog):
    plain = made(block)
    model, cache, theirs = compiled(copy.deepcopy(plain)), Cache(), Cache()
    assert ecospa_fx.couplings(model)
    with caplog.at_level("WARNING", logger="ecospa_fx.recaptures"):
        close(model.blocks[0](sequence(), None, cache), plain.blocks[0](sequence(), None, theirs))
    said = (
        f"region `blocks.0` ({block.__name__}) is called with a Cache, and cannot be captured so: it {why}. "
        "Call it without one (for a cache, usually `use_cache=False`)"
    )
    own = [text for text in caplog.messages if "its own Python" in text]
    assert own == [f"region `blocks.0` runs its own Python from now on: {said}"]
    assert (cache.layers[0].length, len(cache.layers)) == (theirs.layers[0].length, len(theirs.layers))
    assert not any(c.region == "blocks.0" for c in ecospa_fx.couplings(model))
    reasons = [refusal.reasons for refusal in ecospa_fx.explain(model).refusals if refusal.region == "blocks.0"]
    assert reasons.count((f"a call has no graph: {said}",)) >= 3


def test_calls_of_a_kind_that_no_graph_serves_are_not_looked_up_again(monkeypatch):
    """Every token would cost the search for a graph."""
    plain = made(Counting)
    model, cache, theirs = compiled(copy.deepcopy(plain)), Cache(), Cache()
    searches, search = [], Routing.search
    monkeypatch.setattr(Routing, "search", lambda *args: searches.append(1) or search(*args))
    for _ in range(4):
        close(model.blocks[0](sequence(), None, cache), plain.blocks[0](sequence(), None, theirs))
    assert len(searches) == 1
    for block in (model.blocks[0], plain.blocks[0]):  # whatever changes meanwhile is followed
        block.train(not block.training)
        with torch.no_grad():
            block.get_parameter(next(name for name, _ in block.named_parameters())).mul_(2)
    close(model.blocks[0](sequence(), None, cache), plain.blocks[0](sequence(), None, theirs))
    assert len(searches) == 1 and len(graphs(model)) == 2


def test_its_own_python_needs_no_graph_for_a_cache():
    plain = made()
    model, x = compiled(copy.deepcopy(plain), execution="module"), sequence()
    with torch.no_grad():
        close(stepwise(model, Cache(), x), stepwise(plain, Cache(), x))
    assert len(graphs(model)) == 2


REFUSED = (
    "region `blocks.0` (Block) is called with a Cache, which cannot go in or out of a graph: pass None there, or turn "
    "off the option that makes it (for a cache, usually `use_cache=False`)"
)


@pytest.mark.parametrize("regions", ["auto", "root", "blocks", ["blocks.0"]])
def test_for_its_own_python_explain_refuses_the_calls_that_compile_refuses(regions):
    call = {"example_inputs": (sequence(), Cache()), "execution": "module", "regions": regions}
    said = []
    for ask in (ecospa_fx.compile, ecospa_fx.explain):
        with pytest.raises(errors.CaptureError) as caught:
            ask(made(), **call)
        said.append(str(caught.value))
    assert said[0] == said[1]
    if regions not in ("auto", "root"):
        assert said[0] == REFUSED


def test_a_model_that_waits_is_explained_as_it_was_compiled():
    model = ecospa_fx.compile(made(), execution="module")
    with pytest.raises(errors.CaptureError, match="is called with a Cache, which cannot go in or out of a graph"):
        ecospa_fx.explain(model, example_inputs=(sequence(), Cache()))
    assert ecospa_fx.explain(model, example_inputs=(sequence(),)).couplings


def test_verify_of_its_own_python_refuses_a_call_with_a_cache():
    model = compiled(execution="module").eval()
    assert ecospa_fx.verify(model, example_inputs=(sequence(),)).ok
    with pytest.raises(errors.CaptureError) as caught:
        ecospa_fx.verify(model, example_inputs=(sequence(), Cache()))
    assert str(caught.value) == REFUSED


class Table(nn.Module):
    """A table by device number, which is None on a CPU, made longer where a call needs it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH)
        self.tables, self.lengths = {}, {}

    def forward(self, x):
        device, length = x.device.index, x.shape[1]
        if self.lengths.get(device, 0) < length:
            self.lengths[device] = 64
            self.tables[device] = torch.arange(64)[:, None].to(x).sin()
        return self.down(self.up(x + self.tables[device][:length]).relu())


@pytest.mark.parametrize("execution", ["graph", "module"])
def test_what_is_filled_under_the_key_none(execution):
    plain = Table().double()
    model, x = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(sequence(),), execution=execution), sequence()
    assert model.lengths == {} == model.tables
    close(model(x), plain(x))
    assert model.lengths == {None: 64} == plain.lengths
    ecospa_fx.shrink(model, {"ffn": torch.arange(5)})
    assert ecospa_fx.verify(model, example_inputs=(x,)).ok
    assert model(x[:, :3]).shape == (2, 3, WIDTH)
