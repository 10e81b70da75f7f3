"""A trained model with massive activations: a few entries carry nearly all that flows, by small weights.

Its weights are built, not learned: one dim of the stream is far out at every position, and in each block one entry of
the feed-forward network reads only that, with small weights. What it says is the same everywhere, and matters.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import ecospa_fx
from ecospa_fx.train.flow import warn_of_flow

WIDTH, HIDDEN, HEADS, WORDS, OUT = 16, 24, 2, 12, 6.0
MASSIVE = 5
"""The entry that carries nearly everything."""


class Trained(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = (
            nn.Embedding(WORDS, WIDTH), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False),
        )  # fmt: skip
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        with torch.no_grad():
            self.embed.weight.mul_(0.7)[:, 0] = OUT
            self.head.weight.normal_()[:, 0] = 0.0

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.gate = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        with torch.no_grad():
            for weight in (self.up.weight, self.gate.weight):
                weight.normal_(std=0.8)[:, 0] = 0.0
                weight[MASSIVE] = 0.0
                weight[MASSIVE, 0] = 0.8
            for weight in (self.down.weight, self.out.weight):
                weight.normal_(std=0.25)[0] = 0.0  # the far dim stays what it is

    def hidden(self, x):
        return self.up(x) * functional.silu(self.gate(x))

    def forward(self, x):
        y = self.norms[0](x)
        q, k, v = (each(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.down(self.hidden(self.norms[1](x)))


@pytest.fixture(scope="module")
def dense():
    plain = Trained()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, WORDS, (40, 4, 12), generator=generator)
    with torch.no_grad():  # what the model says is what is true: it has been trained
        words = [torch.multinomial(plain(x).flatten(0, 1).softmax(-1), 1, generator=generator).view_as(x) for x in ids]
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(ids[0],))
    return plain, model, ids, words


STEPS = 24


def trained_on(dense, *, target=0.8, **settings):
    """Fine-tune while shrinking; return the trainer and how far the model is from the dense one after each shrink."""
    plain, model, ids, words = dense[0], copy.deepcopy(dense[1]), *dense[2:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    schedule = {"start": 6, "end": 18, "shrinks": 3} if "interval" not in settings else {}
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=target, **schedule, **settings)
    far, size = [], trainer.size
    for x, y in zip(ids[:STEPS], words, strict=False):
        loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
        if trainer.size < size:
            size = trainer.size
            far.append(distance(plain, model, ids[30:]))
    return trainer, [*far, distance(plain, model, ids[30:])]


@torch.no_grad()
def distance(plain, model, ids):
    """Mean KL divergence from the dense model, on batches held out."""
    ids = ids.flatten(0, 1)
    expected, found = (each(ids).flatten(0, 1).log_softmax(-1) for each in (plain, model))
    return float(functional.kl_div(found, expected, log_target=True, reduction="batchmean"))


@pytest.fixture(scope="module")
def at_random(dense):
    runs = [trained_on(dense, score="random", index_score="random", top_k=1.0, theta=0.9, seed=i) for i in range(3)]
    assert len({tuple(len(far) for _, far in runs)}) == 1
    return torch.tensor([far for _, far in runs])


def test_one_entry_carries_nearly_all(dense):
    for block in dense[0].blocks:
        x = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.7
        x[:, 0] = OUT
        flows = block.hidden(block.norms[1](x)).square().mean(0) * block.down.weight.square().sum(0)
        norms = block.up.weight.norm(dim=1) * block.gate.weight.norm(dim=1) * block.down.weight.norm(dim=0)
        assert flows[MASSIVE] > 0.5 * flows.sum() and norms[MASSIVE] <= norms.sort().values[HIDDEN // 5]


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "finetune"},
        {"preset": "finetune", "absorb": False, "rotate": False},
        {"preset": "finetune", "policy": "paper"},
        {"policy": "adaptive"},
    ],
    ids=["default", "removed", "paper's shares", "adaptive"],
)
def test_shrinking_a_trained_model_is_never_worse_than_at_random(dense, at_random, settings):
    trainer, far = trained_on(dense, **settings)
    assert trainer.done and trainer.size < 0.82 * sum(p.numel() for p in dense[0].parameters())
    mean = at_random.mean(0)
    assert len(far) == len(mean)
    for here, there in zip(far, mean, strict=True):
        assert here < float(there), (far, mean.tolist())


def test_the_rule_of_the_paper_says_what_flows_through_the_entries_it_removes(dense, caplog):
    plain, _, ids, _ = dense
    kept = []
    with caplog.at_level("WARNING", logger="ecospa_fx"):
        trainer, _ = trained_on(
            dense, preset="finetune", score="fisher", index_score="norms", top_k=1.0, theta=0.9,
            before_shrink=lambda model, keeps, optimizer: kept.append(dict(keeps)),
        )  # fmt: skip
    flow, keeps = trainer.history[0]["flow"], kept[0]
    glu = next(c for c in keeps if c.kind == "glu" and ".0." in f".{c.name}")
    seen = []
    handle = plain.blocks[0].down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        plain(ids[trainer.history[0]["step"] - 1])
    handle.remove()
    flows = seen[0].square().flatten(0, 1).mean(0) * plain.blocks[0].down.weight.detach().square().sum(0)
    gone = torch.ones(HIDDEN, dtype=torch.bool)
    gone[keeps[glu]] = False
    assert flow[glu.name] == pytest.approx(float(flows[gone].sum() / flows.sum()), rel=0.05)  # five small steps later
    assert bool(gone[MASSIVE]) and flow[glu.name] > 0.5
    said = [record.getMessage() for record in caplog.records if "of what flows there" in record.getMessage()]
    assert said and f"the {int(gone.sum())} of {HIDDEN} entries that `{glu.name}` loses carry" in " ".join(said)
    assert "index_score='norms' does not see that" in said[0]


def test_what_carries_little_goes_without_a_word(dense, caplog):
    with caplog.at_level("WARNING", logger="ecospa_fx"):
        trainer, _ = trained_on(dense, preset="finetune")
    assert not [record for record in caplog.records if "of what flows there" in record.getMessage()]
    shares = [share for entry in trainer.history for name, share in entry["flow"].items() if name.endswith("glu")]
    assert shares and all(0 <= share < 0.2 for share in shares)


@pytest.mark.parametrize(
    ("described", "advised"),
    [
        ({"policy": "paper", "index_score": "norms"}, True),
        ({"policy": "paper", "index_score": "taylor_positions"}, False),
        ({"policy": "adaptive", "index_score": "saliency"}, False),
    ],
)
def test_nobody_is_advised_to_take_the_rule_that_is_at_work(described, advised, caplog):
    model = ecospa_fx.compile(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), example_inputs=(torch.ones(1, 4),)
    )
    (coupling,) = ecospa_fx.couplings(model)
    with caplog.at_level("WARNING", logger="ecospa_fx"):
        warn_of_flow({coupling.name: 0.9}, {coupling: torch.arange(6)}, 3, described)
    (said,) = caplog.messages
    assert said.startswith("step 3: the 2 of 8 entries that `ffn` loses carry 90% of what flows there; ")
    assert ('policy="adaptive"' in said) is advised
