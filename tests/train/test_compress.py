"""Compression in one call: what goes, what it costs, bad input; and a model with sinks, where weights tell nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax, silu

import ecospa_fx
from ecospa_fx.errors import ArgumentError, EcoSpaError, TargetError

WIDTH, HIDDEN, WORDS, LENGTH = 12, 32, 20, 10


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in "gu")
        self.down, self.mix = nn.Linear(HIDDEN, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x, before):
        x = x + self.mix(before @ x)
        return x + self.down(silu(self.gate(x)) * self.up(x))


class Sinks(nn.Module):
    """A language model whose first position holds massive activations that all later ones read, by small weights.

    Word 0 has a large entry. One hidden unit of the first block, with the smallest weights of all, turns it into
    another one, which the mean over earlier positions takes to every position.
    """

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(0, p.shape[-1] ** -0.5)
            self.embed.weight[:, :2] = 0
            self.embed.weight[0, 0] = 40
            for block in self.blocks:
                for weight in (block.gate.weight, block.up.weight):
                    weight[:, :2] *= 0.01
                block.down.weight[:2] = 0
                block.mix.weight[:, :2] = 0
            unit = self.blocks[0]
            for weight in (unit.gate.weight, unit.up.weight):
                weight[7] = 0
                weight[7, 0] = 0.2
            unit.down.weight[:, 7] = 0
            unit.down.weight[1, 7] = 0.2
            self.blocks[1].mix.weight[2:, 1] = torch.randn(WIDTH - 2)
        self.register_buffer("before", torch.ones(LENGTH, LENGTH).tril() / torch.arange(1, LENGTH + 1)[:, None])

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.before)
        return self.head(x)


def sinks(seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(1, WORDS, (9, 4, LENGTH))
    ids[:, :, 0] = 0
    return Sinks().eval(), list(ids[:8]), ids[8]


@torch.no_grad()
def apart(model, dense, ids):
    """Mean divergence of the model's words from those of the dense one."""
    p, q = log_softmax(dense(ids), -1), log_softmax(model(ids), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def at_random(dense, ids, target, seeds=range(5)):
    """The mean divergence where hidden units are removed at random, as many in each block."""
    results = []
    for seed in seeds:
        model = ecospa_fx.compile(copy.deepcopy(dense), example_inputs=(ids,))
        draw = torch.Generator().manual_seed(seed)
        keep = {c: torch.randperm(c.size, generator=draw)[: round(target * c.size)].sort().values
                for c in ecospa_fx.couplings(model)}  # fmt: skip
        ecospa_fx.shrink(model, keep)
        results.append(apart(model, dense, ids))
    return sum(results) / len(results)


@pytest.mark.parametrize("target", [0.8, 0.5])
def test_no_default_does_worse_than_chance(target):
    dense, batches, ids = sinks()
    chance = at_random(dense, ids, target)
    model = copy.deepcopy(dense)
    report = ecospa_fx.compress(model, batches, target, among="prunable")
    assert apart(model, dense, ids) < 0.5 * chance
    share = sum(c.size for c in ecospa_fx.couplings(model)) / (2 * HIDDEN)
    assert target <= share < target + 2 / HIDDEN and report.rise > 0


def test_the_papers_order_does():
    """The trap is one: the unit that everything depends on has the smallest weights."""
    dense, _, ids = sinks()
    model = ecospa_fx.compile(copy.deepcopy(dense), example_inputs=(ids,))
    sparsifier = ecospa_fx.CoupledSparsifier(model, target=0.8, among="prunable")
    ecospa_fx.shrink(model, sparsifier.decide(dict.fromkeys(ecospa_fx.couplings(model), 1.0), 0))
    assert apart(model, dense, ids) > at_random(dense, ids, 0.8)


def test_it_says_what_went_and_leaves_the_rest_alone():
    dense, batches, _ = sinks()
    model = copy.deepcopy(dense).train()
    model.embed.weight.requires_grad = False
    model.head.weight.grad = torch.ones_like(model.head.weight)
    report = ecospa_fx.compress(model, batches, 0.8)
    numel = sum(p.numel() for p in model.parameters())
    assert report.parameters == (sum(p.numel() for p in dense.parameters()), numel)
    assert 0.8 <= numel / report.parameters[0] < 0.83
    widths = {c.name: c.size for c in ecospa_fx.couplings(model)}
    assert report.removed == {name: (HIDDEN, size) for name, size in widths.items() if size < HIDDEN}
    assert report.removed.keys() == report.expected.keys() and report.left
    assert all(0 <= share <= 1 for share in report.left.values())
    assert model.training and not model.embed.weight.requires_grad and model.blocks[0].up.weight.requires_grad
    assert model.head.weight.grad.equal(torch.ones_like(model.head.weight)) and model.blocks[0].up.weight.grad is None
    lines = str(report).splitlines()
    assert lines[0].startswith(f"{report.parameters[0]:,} -> {numel:,} parameters (8") and "2 couplings" in lines[0]


def test_strokes_have_their_own_statistics_and_can_be_healed():
    dense, batches, ids = sinks()
    model, sizes = copy.deepcopy(dense), []
    heal = lambda model: sizes.append(sum(p.numel() for p in model.parameters()))  # noqa: E731
    ecospa_fx.compress(model, batches, 0.6, steps=3, heal=heal)
    whole = sum(p.numel() for p in dense.parameters())
    assert [round(size / whole, 1) for size in sizes] == [0.8, 0.7, 0.6]
    assert apart(model, dense, ids) < at_random(dense, ids, 0.5)


def test_the_order_of_gradients_of_all_batches_together():
    """`taylor` beside plain autograd: |weight times gradient| of the summed loss, over all slices of a unit."""
    dense, batches, _ = sinks()

    def loss(model, ids):
        return torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    seen = [batch for number, batch in enumerate(batches) if number != 7]  # which is held out
    sum(loss(dense, ids) for ids in seen).backward()
    model = copy.deepcopy(dense)
    model.zero_grad()
    ecospa_fx.compress(model, batches, 0.7, kinds=["glu"], loss=loss, scores={"glu": "taylor"})
    for plain, small in zip(dense.blocks, model.blocks, strict=True):
        terms = {name: (p * p.grad).abs() for name, p in plain.named_parameters()}
        worth = terms["gate.weight"].sum(1) + terms["up.weight"].sum(1) + terms["down.weight"].sum(0)
        kept = worth.argsort()[HIDDEN - len(small.gate.weight) :].sort().values
        assert 0 < len(kept) < HIDDEN
        assert torch.equal(small.gate.weight, plain.gate.weight[kept])
        assert small.gate.weight.grad is None


class Recurrent(nn.Module):
    """Its hidden units have no place in a graph; its loss alone knows how it is called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cells, self.up, self.down = nn.LSTM(6, 12, batch_first=True), nn.Linear(12, 24), nn.Linear(24, 4)

    def forward(self, *, x):
        return self.down(torch.relu(self.up(self.cells(x)[0])))


def test_what_has_no_place_in_a_graph_is_judged_by_its_weights():
    batches = [torch.randn(3, 7, 6) for _ in range(3)]
    model, grads = Recurrent(), []

    def loss(model, x):
        grads.append([name for name, p in model.named_parameters() if p.requires_grad])
        return model(x=x).square().mean()

    report = ecospa_fx.compress(model, batches, 0.6, loss=loss)
    sizes = dict(report.removed)
    assert sizes["recurrent"][1] < 12 and len(sizes) == 2
    # Measured with all weights training, read with none, then again with those that must.
    assert [] in grads and any(names and all(n.startswith(("cells", "up")) for n in names) for names in grads)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_mapping_its_mask_and_its_own_loss():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 24), nn.Linear(24, 5)

        def forward(self, x, attention_mask=None):
            return {"logits": self.b(torch.relu(self.a(x)))}

    x, mask = torch.randn(8, 4, 7, 6), torch.ones(8, 4, 7, dtype=torch.long)
    mask[:, :, 4:] = 0
    rubbish = x.clone()
    rubbish[:, :, 4:] = 1e3
    results = []
    for given in (x, rubbish):
        model = Masked()
        ecospa_fx.compress(model, [{"x": a, "attention_mask": m} for a, m in zip(given, mask, strict=True)], 0.6)
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pack", [lambda loss, y: loss, lambda loss, y: (loss, y)], ids=["alone", "first"])
def test_a_scalar_that_a_model_returns_is_its_loss(pack):
    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

        def forward(self, x):
            y = self.down(silu(self.up(x)))
            return pack((y - x).square().mean(), y)

    torch.manual_seed(0)
    model, batches = Denoiser(), [torch.randn(8, WIDTH) for _ in range(4)]
    with torch.no_grad():
        results = [model(x) for x in batches]
    losses = [float(result if isinstance(result, torch.Tensor) else result[0]) for result in results]
    report = ecospa_fx.compress(model, batches, 0.8)
    assert report.parameters[1] < 0.82 * report.parameters[0]
    assert report.loss[0] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "batches is empty; pass a few batches of the data that the model is for"),
        (
            [torch.full((1, LENGTH), WORDS)],
            {},
            "batch 0 does not fit the model: .* of another vocabulary",
        ),
        ([{"x": torch.zeros(1, LENGTH)}], {}, r"passed by name, model\(\*\*batch\); pass \(batch,\) to a model that"),
        (None, {"target": 1.5}, "target=1.5 is out of range"),
        (None, {"target": 0.01}, "the smallest reachable target is"),
        (None, {"steps": 0}, "steps=0 is out of range"),
        (None, {"kinds": "glu"}, "kinds='glu' is one string"),
        (None, {"kinds": ["glue"]}, "kinds='glue' is none of"),
        (None, {"kinds": []}, "kinds is empty, so that nothing may shrink; pass some, or None for all"),
        ([torch.zeros(0, LENGTH, dtype=torch.long)], {}, "batch 0 has no entries; leave it out"),
        (None, {"loss": lambda model, ids: model(ids).sum() * torch.nan}, "the loss of batch 0 is nan"),
        (None, {"loss": lambda model, ids: model(ids)}, "loss returns Tensor and not a scalar"),
    ],
)
def test_bad_input_changes_nothing(batches, options, message):
    model, good, _ = sinks()
    before, classes = {name: p.detach().clone() for name, p in model.named_parameters()}, [*map(type, model.modules())]
    with pytest.raises(TargetError, match=message):
        ecospa_fx.compress(model, good if batches is None else batches, **options)
    assert all(p.equal(before[name]) and p.grad is None for name, p in model.named_parameters())
    assert [*map(type, model.modules())] == classes  # compiled for nothing, it is plain again


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("batches", 3, "several, in a list or a tuple"),
        ("batches", torch.zeros(2, LENGTH), "several, in a list or a tuple"),
        ("kinds", torch.ones(2), "several names, or a text, or None"),
        ("kinds", 2.0, "several names, or a text, or None"),
    ],
)
def test_arguments_of_a_wrong_kind(name, value, kind):
    model, batches, _ = sinks()
    with pytest.raises(ArgumentError, match=f"compress: `{name}` is .*; it must be {kind}"):
        ecospa_fx.compress(**{"model": model, "batches": batches, name: value})


def test_uniform_is_checked_before_anything_runs():
    model, batches, _ = sinks()
    with pytest.raises(EcoSpaError, match="uniform='rows' is none of"):
        ecospa_fx.compress(model, batches, uniform="rows")
    assert "_ecospa_model" not in vars(model)


def test_quantised_weights_are_refused_by_name():
    model, batches, _ = sinks()
    model.head.weight = nn.Parameter(torch.zeros(WORDS, WIDTH, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"`head.weight` holds torch.int8, quantised weights; de-quantise the model"):
        ecospa_fx.compress(model, batches)


def test_a_model_without_values():
    with torch.device("meta"):
        model, batches, _ = sinks()
    with pytest.raises(EcoSpaError, match="is on the meta device and has no values to compress"):
        ecospa_fx.compress(model, batches)
