"""Tiny models and batches for several ranks, and the judge: one process that trains on the whole batch."""

import torch
import torch.nn.functional as F
from crew import differ
from torch import nn

import ecospa_fx


class Gated(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class GatedNet(nn.Module):
    """Three gated blocks; the loss is a mean over the batch, so that ranks with equal parts make up the whole."""

    def __init__(self, width=12, hidden=20, blocks=3):
        super().__init__()
        self.inp = nn.Linear(5, width)
        self.blocks = nn.ModuleList(Gated(width, hidden) for _ in range(blocks))
        self.head = nn.Linear(width, 4)

    def forward(self, x, labels=None):
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        y = self.head(x)
        return y if labels is None else F.cross_entropy(y.flatten(0, -2), labels.flatten())


def gated():
    torch.manual_seed(0)
    return GatedNet().double()


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=16, use_cache=False, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double()


MODELS = {"gated": gated, "llama": llama, "gpt2": gpt2}


def batch(kind, step, rows=12, length=4):
    generator = torch.Generator().manual_seed(1000 + step)
    if kind == "gated":
        x = torch.randn(rows, length, 5, generator=generator, dtype=torch.float64)
        return {"x": x, "labels": torch.randint(0, 4, (rows, length), generator=generator)}
    tokens = torch.randint(0, 32, (rows, length), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def part(whole, rank, world):
    rows = len(next(iter(whole.values()))) // world
    return {name: value[rank * rows : (rank + 1) * rows] for name, value in whole.items()}


def loss_of(model, given):
    out = model(**given)
    return out if isinstance(out, torch.Tensor) else out.loss


SCHEDULE = {"target": 0.7, "start": 2, "interval": 3, "end": 6}


class Run:
    """A model in training, with AdamW and a trainer.

    Args:
        kind: a model of `MODELS`.
        execution: see `ecospa_fx.compile`.
        wrap: makes the wrapper of the compiled model.
        of: `(rank, world)`, whose part of every batch it trains on.
    """

    def __init__(self, kind="gated", execution="graph", wrap=None, of=(0, 1), lazily=False, optimizer=None, **settings):
        self.kind, self.of = kind, of
        given = {} if lazily else {"example_kwargs": part(batch(kind, 0), *of)}
        self.model = ecospa_fx.compile(MODELS[kind](), execution=execution, **given)
        self.called = self.model if wrap is None else wrap(self.model)
        self.objects = [id(p) for p in self.model.parameters()]
        make = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
        self.optimizer = make(self.called.parameters())
        self.trainer = ecospa_fx.EcoSpaTrainer(self.called, self.optimizer, **{**SCHEDULE, **settings})

    def step(self, step, told=False, parts=1):
        """Train on a batch; `parts`: as the calls that so many ranks make of it."""
        mine = part(batch(self.kind, step), *self.of)
        for number in range(parts):
            loss = loss_of(self.called, part(mine, number, parts)) / parts
            loss.backward()
        self.optimizer.step()
        self.trainer.step(loss=loss if told else None)
        self.optimizer.zero_grad()

    def train(self, steps=10, told=False, parts=1):
        for step in range(steps):
            self.step(step, told, parts)
        return self

    def kept(self):
        return {key: each.tolist() for key, each in ecospa_fx.plan(self.model).kept.items()}

    def state(self):
        """The weights, then Adam's moments, whole, on this rank."""
        states = [self.optimizer.state.get(p, {}) for p in self.model.parameters()]
        moments = [s[key] for s in states for key in ("exp_avg", "exp_avg_sq") if key in s]
        return [each.detach() for each in (*self.model.parameters(), *moments)]


def compared(run, alone):
    """Compare a run with that of one process on the whole batch: how far apart, and how far ranks are."""
    assert [h["step"] for h in run.trainer.history] == [h["step"] for h in alone.trainer.history]
    assert run.kept() == alone.kept() and len(run.trainer.history) == 2
    assert run.objects == [id(p) for p in run.model.parameters()]
    mine, theirs = run.state(), alone.state()
    assert len(mine) == len(theirs)
    return max(float((a - b).abs().max()) for a, b in zip(mine, theirs)), differ(run.state())
