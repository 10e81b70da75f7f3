"""Tiny models of four kinds, their batches, and a training run of one, by one process or by many."""

import torch
from torch import nn
from torch.nn import functional as F

import ecospa_fx

SCHEDULE = {"target": 0.7, "start": 2, "interval": 3, "end": 6}


class GLUBlock(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, h), nn.Linear(d, h), nn.Linear(h, d)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class GLU(nn.Module):
    """Two blocks of width 40 that three ranks share unevenly: 14, 14 and 12 rows."""

    def __init__(self, d=12, h=40):
        super().__init__()
        self.inp, self.head = nn.Linear(5, d), nn.Linear(d, 7)
        self.blocks = nn.ModuleList(GLUBlock(d, h) for _ in range(2))

    def forward(self, x, labels=None):
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        y = self.head(x)
        return y if labels is None else F.cross_entropy(y.flatten(0, -2), labels.flatten())


def glu():
    return GLU()


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=16, use_cache=False,
        )
    )  # fmt: skip


def gpt2():
    """Its embedding is its head too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=16, use_cache=False, **none)
    )


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(
        ViTConfig(
            image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=24, num_labels=5, **none,
        )
    )  # fmt: skip


KINDS = {each.__name__: each for each in (glu, llama, gpt2, vit)}


def made(kind, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return KINDS[kind]().to(dtype)


def batch(kind, seed, dtype=torch.float64, size=12):
    generator = torch.Generator().manual_seed(1000 + seed)
    if kind == "glu":
        x = torch.randn(size, 4, 5, generator=generator, dtype=torch.float64).to(dtype)
        return {"x": x, "labels": torch.randint(0, 7, (size, 4), generator=generator)}
    if kind == "vit":
        x = torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
        return {"pixel_values": x, "labels": torch.randint(0, 5, (size,), generator=generator)}
    tokens = torch.randint(0, 32, (size, 8), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def share(whole, rank, world):
    each = len(whole["labels"]) // world
    return {name: value[rank * each : (rank + 1) * each] for name, value in whole.items()}


def loss_of(model, inputs):
    out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out.loss


def blocks_of(model):
    if hasattr(model, "blocks"):
        return list(model.blocks)
    found = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2]
    return found[0]


def compiled(model, kind, part=lambda whole: whole, **options):
    return ecospa_fx.compile(model, example_kwargs=part(batch(kind, 0, next(model.parameters()).dtype)), **options)


def trained(model, optimizer, trainer, kind, part=lambda whole: whole, steps=10, first=0, clip=None, evals=()):
    """Train for some steps; the losses of each."""
    losses, dtype = [], next(model.parameters()).dtype
    for step in range(first, first + steps):
        loss = loss_of(model, part(batch(kind, step, dtype)))
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step in evals:
            model.eval()
            with torch.no_grad():
                losses.append(loss_of(model, part(batch(kind, 99, dtype))).item())
            model.train()
    return losses
