"""In root graphs attention gets its fast path back: provably causal masks, key heads that are not repeated."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from twin import assert_equals_twin, half, kept_positions, without_stream, zeroed

import ecospa_fx
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.passes.find.analyse import analyse

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


def grid(s):
    at = torch.arange(s)
    return at[:, None], at[None, :]


def from_positions(s):
    """As transformers does it, packed sequences looked for."""
    at = (torch.arange(s) + 0)[None].expand(2, -1)
    document = (torch.diff(at, prepend=at[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    batch, q, k = (
        torch.arange(2)[:, None, None, None],
        torch.arange(s)[None, None, :, None],
        torch.arange(s)[None, None, None],
    )
    return (
        torch.ones((), dtype=torch.bool) & (at[batch, k] <= at[batch, q]) & (document[batch, q] == document[batch, k])
    )


CAUSAL = {
    "tril": lambda s: torch.ones(s, s, dtype=torch.bool).tril(),
    "not triu": lambda s: ~torch.ones(s, s, dtype=torch.bool).triu(1),
    "-inf above": lambda s: torch.full((s, s), float("-inf")).triu(1),
    "lowest": lambda s: torch.where(grid(s)[1] > grid(s)[0], torch.finfo(torch.float32).min, 0.0),
    "filled": lambda s: torch.zeros(s, s).masked_fill(grid(s)[1] > grid(s)[0], float("-inf")),
    "k <= q": lambda s: grid(s)[1] <= grid(s)[0],
    "k < q + 1": lambda s: (grid(s)[1] < grid(s)[0] + 1)[None, None],
    "q - k >= 0, k >= 0": lambda s: (grid(s)[0] - grid(s)[1] >= 0) & (grid(s)[1] >= 0),
    "transposed": lambda s: (grid(s)[0] <= grid(s)[1]).transpose(0, 1),
    "shifted": lambda s: torch.arange(1, s + 1)[:, None] > grid(s)[1],
    "sliced": lambda s: torch.arange(s + 3)[3:][:, None] - 3 >= grid(s)[1],
    "from positions": from_positions,
}
OTHER = {
    "k < q, and the first": lambda s: (grid(s)[1] < grid(s)[0]) | (grid(s)[1] == 0),
    "one ahead": lambda s: grid(s)[1] <= grid(s)[0] + 1,
    "upside down": lambda s: grid(s)[1] >= grid(s)[0],
    "a window of 4096": lambda s: (grid(s)[1] <= grid(s)[0]) & (grid(s)[1] > grid(s)[0] - 4096),
    "prefix": lambda s: (grid(s)[1] <= grid(s)[0]) | (grid(s)[1] < 2),
    "everything": lambda s: torch.ones(s, s, dtype=torch.bool),
    "mild": lambda s: torch.full((s, s), -100.0).triu(1),
    "inverted": lambda s: torch.where(grid(s)[1] > grid(s)[0], 0.0, -100.0),
    "written to": lambda s: (
        torch.ones(s, s, dtype=torch.bool).tril().index_fill_(1, torch.zeros(1, dtype=torch.long), True)
    ),
}


class Attending(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = scaled_dot_product_attention(q, k, v, self.make(x.shape[1]))
        return self.o(out.transpose(1, 2).flatten(2))


def attentions(model):
    """Of each attention in the graph: whether it has a mask, is causal and takes fewer key heads."""
    (region,) = model.__dict__[MODEL].regions.values()
    nodes = [node for node in region.naming_graph.captured.graph.nodes if node.target is SDPA]
    return {(*((*n.args, None, 0.0, False)[3:6:2]), n.kwargs.get("enable_gqa", False)) for n in nodes}


@pytest.mark.parametrize("name", [*CAUSAL, *OTHER])
def test_a_mask_goes_where_it_is_causal_at_every_size(name):
    module = Attending((CAUSAL | OTHER)[name])
    analysis = analyse(module, "", ((torch.randn(2, 6, 8),), {}))
    (node,) = (node for node in analysis.captured.graph.nodes if node.target is SDPA)
    if name in CAUSAL:
        assert node.args[3:] == (None, 0.0, True)
        assert not any(node.target is aten.arange.default for node in analysis.captured.graph.nodes)
        # What was concluded from symbols, in numbers.
        for size in (1, 2, 3, 17):
            seen = (CAUSAL[name](size) if name != "from positions" else from_positions(size)).expand(2, 1, size, size)
            seen = seen if seen.dtype == torch.bool else seen == 0
            assert torch.equal(seen, torch.ones(size, size, dtype=torch.bool).tril().expand(2, 1, size, size))
    else:
        assert isinstance(node.args[3], torch.fx.Node)


def test_a_mask_of_a_fixed_size_within_a_window_is_causal():
    module = Attending(lambda s: (grid(6)[1] <= grid(6)[0]) & (grid(6)[1] > grid(6)[0] - 6))
    analysis = analyse(module, "", ((torch.randn(2, 6, 8),), {}))
    (node,) = (node for node in analysis.captured.graph.nodes if node.target is SDPA)
    assert node.args[3:] == (None, 0.0, True)


TINY = {"vocab_size": 31, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = {
    **TINY, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **TINY, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "windowed": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=3)),
}
WAYS = {  # (mask, is_causal, enable_gqa)
    "gpt2": {(None, True, False)}, "llama": {(None, True, True)},
}  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "llama", "windowed"])
def test_models_of_transformers_by_root(name):
    torch.manual_seed(0)
    plain = MODELS[name]()
    model = copy.deepcopy(plain)
    words = lambda batch, length: torch.randint(31, (batch, length))  # noqa: E731
    x = words(2, 7)
    ecospa_fx.compile(model, example_inputs=(x,), regions="root")
    if name in WAYS:
        assert attentions(model) == WAYS[name]
    else:
        assert all(mask is not None and not causal for mask, causal, _ in attentions(model))
    by_blocks = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(x,), regions="blocks")
    kinds = [{(c.name, c.kind, c.size) for c in without_stream(m)} for m in (model, by_blocks)]
    assert kinds[0] == kinds[1]
    ecospa_fx.verify(model, example_inputs=(x,)).raise_if_failed()
    keeps = {c: half(c.size, i) for i, c in enumerate(without_stream(model))}
    positions = kept_positions(plain, keeps)
    ecospa_fx.shrink(model, keeps)
    twin = zeroed(plain, positions)
    for batch, length in ((2, 7), (3, 12), (1, 2)):
        assert_equals_twin(model, twin, positions, (words(batch, length),), {}, f"{batch} x {length}")
    # A mask that is given is an input: it stays and is honoured.
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    assert_equals_twin(model, twin, positions, (x,), {"attention_mask": mask}, "padded")


def test_repeated_interleaved_keys_need_no_copies():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 8)

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
            out = scaled_dot_product_attention(q, *(t.repeat_interleave(2, dim=1) for t in (k, v)), is_causal=True)
            return self.o(out.transpose(1, 2).flatten(2))

    plain, x = Grouped(), torch.randn(2, 5, 8)
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(x,))
    assert attentions(model) == {(None, True, True)}
    assert {(c.kind, c.size) for c in ecospa_fx.couplings(model)} == {("qk", 4), ("vo", 4), ("heads", 2), ("groups", 2)}
    keeps = {c: half(c.size, i) for i, c in enumerate(ecospa_fx.couplings(model))}
    positions = kept_positions(plain, keeps)
    ecospa_fx.shrink(model, keeps)
    assert_equals_twin(model, zeroed(plain, positions), positions, (x,), {}, "all together")
