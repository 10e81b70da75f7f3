"""Real architectures, tiny and with random weights: the same couplings by blocks and by root, and exact either way."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from twin import (
    assert_equals_twin,
    assert_is_slice,
    half,
    kept_positions,
    run,
    selections,
    sliced,
    without_stream,
    zeroed,
)
from zoo import Pair, pair

import ecospa_fx

WORDS = 61


def words(batch: int, length: int) -> Tensor:
    return torch.randint(WORDS, (batch, length))


def padded(batch: int, length: int) -> Tensor:
    """An attention mask whose first row ends two positions early."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -2:] = 0
    return mask


# Each model, the arguments of a call, and what is coupled in it: by root the residual stream too; T5 differs by region.


def gpt2(**options: Any) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORDS, n_positions=32, n_embd=24, n_layer=2, n_head=3, n_inner=44, bos_token_id=0,
            eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, **options,
        )
    )  # fmt: skip


def gpt2_layer(i: int) -> set[Pair]:
    """Its Conv1D weights are `[in, out]`."""
    at = f"transformer.h.{i}"
    qkv = f"{at}.attn.c_attn.weight[1] {at}.attn.c_attn.bias[0]"
    return {
        pair("qk", 8, qkv),
        pair("vo", 8, f"{qkv} {at}.attn.c_proj.weight[0]"),
        pair("heads", 3, f"{qkv} {at}.attn.c_proj.weight[0]"),
        pair("ffn", 44, f"{at}.mlp.c_fc.weight[1] {at}.mlp.c_fc.bias[0] {at}.mlp.c_proj.weight[0]"),
    }


def gpt2_stream() -> set[Pair]:
    """What all layers read and add to: both embeddings, of which the first is the head too, and every norm."""
    at = [f"transformer.h.{i}" for i in range(2)]
    layers = " ".join(
        f"{h}.ln_1[0] {h}.attn.c_attn.weight[0] {h}.attn.c_proj.weight[1] {h}.attn.c_proj.bias[0] "
        f"{h}.ln_2[0] {h}.mlp.c_fc.weight[0] {h}.mlp.c_proj.weight[1] {h}.mlp.c_proj.bias[0]"
        for h in at
    )
    return {pair("residual", 24, f"transformer.wte.weight[1] transformer.wpe.weight[1] {layers} transformer.ln_f[0]")}


def llama(**options: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=WORDS, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=10, use_cache=False, **options,
        )
    )  # fmt: skip


def llama_layer(i: int) -> set[Pair]:
    """Two key heads, each shared by two query heads; 10 entries per head in 5 rotary pairs."""
    at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
    return {
        pair("qk", 5, f"{at}.q_proj.weight[0] {at}.k_proj.weight[0]"),
        pair("vo", 10, f"{at}.v_proj.weight[0] {at}.o_proj.weight[1]"),
        pair("heads", 2, f"{at}.q_proj.weight[0] {at}.k_proj.weight[0] {at}.v_proj.weight[0] {at}.o_proj.weight[1]"),
        pair("groups", 2, f"{at}.q_proj.weight[0] {at}.o_proj.weight[1]"),
        pair("glu", 44, f"{mlp}.gate_proj.weight[0] {mlp}.up_proj.weight[0] {mlp}.down_proj.weight[1]"),
    }


def llama_stream() -> set[Pair]:
    layers = " ".join(
        f"{h}.input_layernorm.weight[0] {h}.self_attn.q_proj.weight[1] {h}.self_attn.k_proj.weight[1] "
        f"{h}.self_attn.v_proj.weight[1] {h}.self_attn.o_proj.weight[0] {h}.post_attention_layernorm.weight[0] "
        f"{h}.mlp.gate_proj.weight[1] {h}.mlp.up_proj.weight[1] {h}.mlp.down_proj.weight[0]"
        for h in (f"model.layers.{i}" for i in range(2))
    )
    return {pair("residual", 32, f"model.embed_tokens.weight[1] {layers} model.norm.weight[0] lm_head.weight[1]")}


def bert(**options: Any) -> nn.Module:
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=WORDS, hidden_size=24, intermediate_size=44, num_hidden_layers=2, num_attention_heads=3,
            max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
        )
    )  # fmt: skip


def bert_layer(i: int) -> set[Pair]:
    at = f"encoder.layer.{i}"
    q, k, v = (f"{at}.attention.self.{name}[0]" for name in ("query", "key", "value"))
    o = f"{at}.attention.output.dense.weight[1]"
    return {
        pair("qk", 8, f"{q} {k}"),
        pair("vo", 8, f"{v} {o}"),
        pair("heads", 3, f"{q} {k} {v} {o}"),
        pair("ffn", 44, f"{at}.intermediate.dense[0] {at}.output.dense.weight[1]"),
    }


def t5(**options: Any) -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=WORDS, d_model=24, d_kv=6, d_ff=44, num_layers=2, num_decoder_layers=2, num_heads=3,
            dropout_rate=0.0, use_cache=False, decoder_start_token_id=0, **options,
        )
    )  # fmt: skip


def t5_attention(at: str, heads: bool = True) -> set[Pair]:
    q, k, v = (f"{at}.{name}.weight[0]" for name in "qkv")
    own = {pair("heads", 3, f"{q} {k} {v} {at}.o.weight[1]")} if heads else set()
    return own | {pair("qk", 6, f"{q} {k}"), pair("vo", 6, f"{v} {at}.o.weight[1]")}


def t5_couplings(root: bool) -> set[Pair]:
    """The first block makes the position bias, with a column per head, for all blocks of its stack.

    By blocks it leaves the first, whose heads stay whole, and is an input to the others. By root the heads of a stack
    are one coupling. Cross attention has no bias.
    """
    couplings = set()
    for stack, ffn in (("encoder", 1), ("decoder", 2)):
        for i in range(2):
            block = f"{stack}.block.{i}.layer"
            couplings |= t5_attention(f"{block}.0.SelfAttention", heads=i > 0 and not root)
            couplings.add(
                pair("ffn", 44, f"{block}.{ffn}.DenseReluDense.wi.weight[0] {block}.{ffn}.DenseReluDense.wo.weight[1]")
            )
            if stack == "decoder":
                couplings |= t5_attention(f"{block}.1.EncDecAttention")
        if root:
            attentions = [f"{stack}.block.{i}.layer.0.SelfAttention" for i in range(2)]
            members = " ".join(
                f"{at}.q.weight[0] {at}.k.weight[0] {at}.v.weight[0] {at}.o.weight[1]" for at in attentions
            )
            couplings.add(pair("heads", 3, f"{members} {attentions[0]}.relative_attention_bias.weight[1]"))
    return couplings


def vit(**options: Any) -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10, mlp_ratio=2.5, **options
    )


def vit_layer(i: int) -> set[Pair]:
    """Its fused projection is stacked, `(3 h d)`; Q with K, and V with O, come apart all the same."""
    at = f"blocks.{i}.attn"
    return {
        pair("qk", 16, f"{at}.qkv[0]"),
        pair("vo", 16, f"{at}.qkv[0] {at}.proj.weight[1]"),
        pair("heads", 3, f"{at}.qkv[0] {at}.proj.weight[1]"),
        pair("ffn", 120, f"blocks.{i}.mlp.fc1[0] blocks.{i}.mlp.fc2.weight[1]"),
    }


def vit_stream() -> set[Pair]:
    """The class token and the positions are part of it."""
    layers = " ".join(
        f"{b}.norm1[0] {b}.attn.qkv.weight[1] {b}.attn.proj[0] {b}.norm2[0] {b}.mlp.fc1.weight[1] {b}.mlp.fc2[0]"
        for b in (f"blocks.{i}" for i in range(2))
    )
    first = "cls_token[2] pos_embed[2] patch_embed.proj[0]"
    return {pair("residual", 48, f"{first} {layers} norm[0] head.weight[1]")}


Known = tuple[Callable[..., nn.Module], Callable[[int, int], dict[str, Tensor]], Callable[[bool], set[Pair]]]
MODELS: dict[str, Known] = {
    "gpt2": (
        gpt2,
        lambda batch, length: {"input_ids": words(batch, length)},
        lambda root: gpt2_layer(0) | gpt2_layer(1) | (gpt2_stream() if root else set()),
    ),
    "llama": (
        llama,
        lambda batch, length: {"input_ids": words(batch, length)},
        lambda root: llama_layer(0) | llama_layer(1) | (llama_stream() if root else set()),
    ),
    "bert": (
        bert,
        lambda batch, length: {"input_ids": words(batch, length), "attention_mask": padded(batch, length)},
        lambda root: bert_layer(0) | bert_layer(1),
    ),
    "t5": (
        t5,
        lambda batch, length: {
            "input_ids": words(batch, length), "attention_mask": padded(batch, length),
            "decoder_input_ids": words(batch, length - 2), "decoder_attention_mask": padded(batch, length - 2),
        },
        t5_couplings,
    ),
    "vit": (
        vit,
        lambda batch, _: {"x": torch.randn(batch, 3, 32, 32)},
        lambda root: vit_layer(0) | vit_layer(1) | (vit_stream() if root else set()),
    ),
}  # fmt: skip

each_model = pytest.mark.parametrize("name", MODELS)
each_way = pytest.mark.parametrize("regions", ["blocks", "root"])
DTYPES = [(name, torch.float64) for name in MODELS] + [("llama", torch.float32)]
each_dtype = pytest.mark.parametrize(("name", "dtype"), DTYPES, ids=lambda each: str(each).removeprefix("torch."))


def made(
    name: str, dtype: torch.dtype, batch: int = 2, length: int = 7, **options: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = MODELS[name][0](**options).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            # As they start out, biases are zero, norms one and attention is flat: much could go unseen.
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            elif parameter.std() < 0.05:
                parameter *= 8
    return model, arguments(name, dtype, batch, length)


def arguments(name: str, dtype: torch.dtype, batch: int, length: int) -> dict[str, Tensor]:
    return {key: x.to(dtype) if x.is_floating_point() else x for key, x in MODELS[name][1](batch, length).items()}


@functools.cache
def captured(name: str, dtype: torch.dtype, regions: str) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """A plain model, its compiled copy, and the arguments of a call. Not to be changed: copy the second."""
    plain, kwargs = made(name, dtype)
    return plain, ecospa_fx.compile(copy.deepcopy(plain), example_kwargs=kwargs, regions=regions), kwargs


def found(model: nn.Module) -> set[Pair]:
    return {
        (c.kind, c.size, frozenset(f"{m.parameter}[{m.dim}]" for m in c.members)) for c in ecospa_fx.couplings(model)
    }


@each_way
@each_model
def test_couplings_are_those_written_by_hand(name: str, regions: str) -> None:
    _, model, _ = captured(name, torch.float64, regions)
    assert found(model) == MODELS[name][2](regions == "root")
    assert len(ecospa_fx.couplings(model)) == len(MODELS[name][2](regions == "root"))


def test_llama_has_five_couplings_per_layer_either_way() -> None:
    ways = []
    for regions in ("blocks", "root"):
        _, model, _ = captured("llama", torch.float64, regions)
        couplings = ecospa_fx.couplings(model)
        for i in range(2):
            layer = [c for c in couplings if f"layers.{i}." in c.name]
            assert sorted(c.kind for c in layer) == ["glu", "groups", "heads", "qk", "vo"]
        beside = [c.kind for c in couplings if "layers." not in c.name]
        assert len(couplings) == 10 + len(beside) and beside == (["residual"] if regions == "root" else [])
        layers = without_stream(model)
        ways.append({c.name: (c.kind, {str(m): m.index.tolist() for m in c.members}) for c in layers})
    assert ways[0] == ways[1]


def test_llama_rotary_pairs_are_the_two_halves() -> None:
    _, model, _ = captured("llama", torch.float64, "blocks")
    (qk, *_) = (c for c in ecospa_fx.couplings(model) if c.kind == "qk")
    for member in qk.members:
        heads = member.index.view(-1, 10)
        assert torch.equal(heads, torch.arange(5).repeat(2).expand_as(heads))


@each_dtype
@each_way
def test_shrunk_equals_masked(name: str, regions: str, dtype: torch.dtype) -> None:
    _, model, kwargs = captured(name, dtype, regions)
    result = ecospa_fx.verify(model, example_kwargs=kwargs)
    together = 2 * (2 if name == "t5" else 1) if regions == "blocks" else 1
    assert len(result.by_coupling) == len(ecospa_fx.couplings(model)) + together
    assert result.ok, result


@each_dtype
@each_way
def test_shrunk_equals_zeroed(name: str, regions: str, dtype: torch.dtype) -> None:
    plain, model, kwargs = captured(name, dtype, regions)
    every = list(selections(without_stream(model)))
    some = every[len(every) // 2 :] if regions == "root" else every  # the second layer is like the first
    for what, keeps in some if dtype == torch.float64 else every[-2:]:  # entries do not depend on the dtype
        positions = kept_positions(plain, keeps)
        shrunk = copy.deepcopy(model)
        ecospa_fx.shrink(shrunk, keeps)
        assert_is_slice(shrunk, plain, positions)
        assert_equals_twin(shrunk, zeroed(plain, positions), positions, (), kwargs, what)


@each_way
@each_model
def test_batch_length_and_mode_may_change_after_a_shrink(name: str, regions: str) -> None:
    plain, model, _ = captured(name, torch.float64, regions)
    keeps = {c: half(c.size, i) for i, c in enumerate(without_stream(model))}
    positions = kept_positions(plain, keeps)
    shrunk, twin = copy.deepcopy(model), zeroed(plain, positions)
    ecospa_fx.shrink(shrunk, keeps)
    assert_equals_twin(shrunk, twin, positions, (), arguments(name, torch.float64, 3, 9), "another batch and length")
    kwargs = arguments(name, torch.float64, 3, 6)
    assert_equals_twin(shrunk.eval(), twin.eval(), positions, (), kwargs, "eval")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_eager_attention_has_the_same_couplings(name: str) -> None:
    plain, kwargs = made(name, torch.float64, attn_implementation="eager")
    model = ecospa_fx.compile(plain, example_kwargs=kwargs, regions="blocks")
    assert found(model) == MODELS[name][2](False)
    assert ecospa_fx.verify(model, example_kwargs=kwargs).ok


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda parameters: AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "sgd": lambda parameters: SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@each_way
@each_model
def test_a_step_equals_that_of_a_freshly_built_small_model(name: str, regions: str, optimizer: str) -> None:
    plain, model, kwargs = captured(name, torch.float64, regions)
    model = copy.deepcopy(model)
    mine = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(2):
        run(model, (), kwargs)
        mine.step()
    run(model, (), kwargs)
    parameters = {key: p.detach().clone() for key, p in model.named_parameters()}
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    states = {key: copy.deepcopy(mine.state[p]) for key, p in model.named_parameters() if p in mine.state}
    keeps = {c: half(c.size, i) for i, c in enumerate(ecospa_fx.couplings(model))}
    positions = kept_positions(plain, keeps)
    identities = {key: id(p) for key, p in model.named_parameters()}
    ecospa_fx.shrink(model, keeps, optimizer=mine)
    assert identities == {key: id(p) for key, p in model.named_parameters()}

    fresh = copy.deepcopy(model)
    other = OPTIMIZERS[optimizer](fresh.parameters())
    for key, parameter in fresh.named_parameters():
        with torch.no_grad():
            parameter.copy_(sliced(parameters[key], key, positions))
        parameter.grad = sliced(gradients[key], key, positions) if key in gradients else None
        if key in states:
            other.state[parameter] = {
                entry: sliced(value, key, positions) if value.numel() > 1 else value.clone()
                for entry, value in states[key].items()
                if isinstance(value, Tensor)
            }
    # The first step uses the gradient that the shrink sliced, the second one of the shrunk model itself.
    for step in range(2):
        if step:
            run(model, (), kwargs)
            run(fresh, (), kwargs)
        mine.step()
        other.step()
        expected = dict(fresh.named_parameters())
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(
                parameter, expected[key], rtol=1e-5, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}"
            )
    assert any(
        (parameter - sliced(parameters[key], key, positions)).abs().max() > 1e-4 for key, parameter in expected.items()
    )


class Twice(nn.Module):
    """One MLP under two names, of which forward uses the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x)


def test_verify_leaves_a_module_under_two_names_as_it_was() -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    model = ecospa_fx.compile(Twice().double(), example_inputs=(x,))
    weight, before = model.first[0].weight, model(x)
    found = ecospa_fx.verify(model, example_inputs=(x,))
    assert found.ok, str(found)
    assert model.first[0].weight is weight is model.second[0].weight
    assert torch.equal(model(x), before)


def test_a_shrunk_module_under_two_names_is_captured_anew_and_keeps_its_weights() -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    model = ecospa_fx.compile(Twice().double(), example_inputs=(x,))
    ecospa_fx.shrink(model, {c: torch.arange(c.size // 2) for c in ecospa_fx.couplings(model)})
    weight, before = model.first[0].weight, model(x)
    after = model.eval()(x)  # another signature: traced from stand-ins at original sizes
    assert model.first[0].weight is weight is model.second[0].weight
    torch.testing.assert_close(after, before)
