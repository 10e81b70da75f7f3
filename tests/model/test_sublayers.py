"""A sublayer without entries is gone: the model is the same class with that sublayer's output weight at zero.

The judge is the class of transformers or timm itself: it knows no graph. Which weight gives a sublayer's output is
written by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import ecospa_fx
from ecospa_fx.errors import ShrinkError, TargetError

NONE = torch.empty(0, dtype=torch.long)
ALL_MAY_GO = ecospa_fx.Constraints(min_keep=0)
WORDS = {"input_ids": torch.tensor([[3, 8, 5, 1, 9, 2], [7, 4, 4, 6, 3, 8]])}
GENERATING = {**WORDS, "use_cache": False}
IMAGES = {"pixel_values": torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
SIZES = {
    "vocab_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 16, "head_dim": 4, "hidden_size": 16,
    "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A class, a call of it, and per sublayer the end of its coupling's name and of its output weight's."""

    make: Callable[[], nn.Module]
    call: dict[str, Any]
    sublayers: tuple[tuple[str, str], ...] = (
        ("0.self_attn.heads", "0.self_attn.o_proj.weight"), ("1.mlp.glu", "1.mlp.down_proj.weight"),
    )  # fmt: skip
    dtype: torch.dtype = torch.float64
    generates: bool = False


def decoder(config: type, model: type, **more: Any) -> Callable[[], nn.Module]:
    return lambda: model(config(**{**SIZES, **more}))


def gpt2() -> nn.Module:
    config = hf.GPT2Config(
        n_embd=16, n_head=4, n_inner=24, n_layer=2, vocab_size=24, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return hf.GPT2LMHeadModel(config)


def opt() -> nn.Module:
    config = hf.OPTConfig(
        hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=24, pad_token_id=0,
        max_position_embeddings=16, word_embed_proj_dim=16, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return hf.OPTForCausalLM(config)


class T5(nn.Module):
    """T5 with all that it returns beside the logits left out."""

    def __init__(self) -> None:
        super().__init__()
        config = hf.T5Config(
            d_model=16, d_ff=24, num_heads=4, d_kv=4, num_layers=2, vocab_size=24, decoder_start_token_id=0
        )
        self.model = hf.T5ForConditionalGeneration(config)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        return self.model(input_ids=input_ids, decoder_input_ids=input_ids, use_cache=use_cache).logits


def encoder(config: type, model: type, **more: Any) -> Callable[[], nn.Module]:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    return lambda: model(config(**sizes, **more))


class Deit(nn.Module):
    """A vision transformer of timm, with layer scale."""

    def __init__(self) -> None:
        super().__init__()
        timm = pytest.importorskip("timm")
        self.model = timm.models.vision_transformer.VisionTransformer(
            img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=4, num_classes=3, init_values=0.5
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values)


FAMILIES = {
    "llama": Family(decoder(hf.LlamaConfig, hf.LlamaForCausalLM), GENERATING, generates=True),
    "mistral": Family(decoder(hf.MistralConfig, hf.MistralForCausalLM), GENERATING, generates=True),
    "qwen3": Family(decoder(hf.Qwen3Config, hf.Qwen3ForCausalLM), GENERATING, generates=True),
    "gemma2": Family(decoder(hf.Gemma2Config, hf.Gemma2ForCausalLM, query_pre_attn_scalar=4), GENERATING),
    "gemma3": Family(decoder(hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, query_pre_attn_scalar=4), GENERATING),
    "olmo2": Family(
        decoder(hf.Olmo2Config, hf.Olmo2ForCausalLM), GENERATING, (("1.mlp.glu", "1.mlp.down_proj.weight"),)
    ),
    "phi3": Family(decoder(hf.Phi3Config, hf.Phi3ForCausalLM, rope_scaling=None), GENERATING),
    "gpt2": Family(gpt2, GENERATING, (("0.attn.heads", "0.attn.c_proj.weight"), ("1.mlp.ffn", "1.mlp.c_proj.weight"))),
    "opt": Family(opt, GENERATING, (("0.self_attn.heads", "0.self_attn.out_proj.weight"), ("1.ffn", "1.fc2.weight"))),
    "t5": Family(
        T5, GENERATING,
        (
            ("encoder.block.0.layer.1.DenseReluDense.ffn", "encoder.block.0.layer.1.DenseReluDense.wo.weight"),
            ("decoder.block.1.layer.1.EncDecAttention.heads", "decoder.block.1.layer.1.EncDecAttention.o.weight"),
            ("decoder.block.1.layer.2.DenseReluDense.ffn", "decoder.block.1.layer.2.DenseReluDense.wo.weight"),
        ),
    ),
    "bert": Family(
        encoder(hf.BertConfig, hf.BertForSequenceClassification, vocab_size=24, max_position_embeddings=16), WORDS,
        (("0.attention.heads", "0.attention.output.dense.weight"), ("1.ffn", "1.output.dense.weight")),
    ),
    "vit": Family(
        encoder(hf.ViTConfig, hf.ViTForImageClassification, image_size=8, patch_size=4, num_labels=3), IMAGES,
        (("0.attention.heads", "0.attention.o_proj.weight"), ("1.mlp.ffn", "1.mlp.fc2.weight")),
    ),
    "timm": Family(Deit, IMAGES, (("0.attn.heads", "0.attn.proj.weight"), ("1.mlp.ffn", "1.mlp.fc2.weight"))),
    # Its experts are multiplied in single precision only.
    "mixtral": Family(
        decoder(hf.MixtralConfig, hf.MixtralForCausalLM, num_local_experts=4), GENERATING,
        (("0.self_attn.heads", "0.self_attn.o_proj.weight"),), torch.float32,
    ),
}  # fmt: skip


QUICK = ("llama", "gpt2")


def result(model: nn.Module, call: dict[str, Any]) -> Tensor:
    out = model(**call)
    return out if isinstance(out, Tensor) else out.logits


def built(family: Family) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = family.make().to(family.dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)  # biases begin at zero
    return model, copy.deepcopy(model)


def named(model: nn.Module, end: str) -> ecospa_fx.Coupling:
    found = [c for c in ecospa_fx.couplings(model) if c.name.endswith(end)]
    assert len(found) == 1, [c.name for c in ecospa_fx.couplings(model)]
    return found[0]


def zero_out(model: nn.Module, ends: Sequence[str]) -> None:
    with torch.no_grad():
        for end in ends:
            (weight,) = [p for name, p in model.named_parameters() if name.endswith(end)]
            weight.zero_()


def compare(model: nn.Module, judge: nn.Module, call: dict[str, Any], tolerance: float) -> None:
    """Compare outputs, and gradients of all weights that are left."""
    outputs = [result(each, call) for each in (model, judge)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=tolerance, atol=tolerance)
    for each, out in zip((model, judge), outputs, strict=True):
        each.zero_grad()
        out.square().sum().backward()
    wanted = dict(judge.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in wanted.values() if p.grad is not None)
    for name, parameter in model.named_parameters():
        other = wanted[name]
        if parameter.shape == other.shape and other.grad is not None:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, other.grad, rtol=tolerance, atol=tolerance * largest, msg=name)
        elif parameter.shape != other.shape:
            assert parameter.grad is None or parameter.grad.shape == parameter.shape


def check(family: Family, execution: str = "graph") -> None:
    model, judge = built(family)
    model = ecospa_fx.compile(model, execution=execution)
    result(model, family.call)
    if execution == "module":  # the sublayers that its own Python can do without; of the others it says why
        offered = {pair: c for pair in family.sublayers for c in ecospa_fx.couplings(model) if c.name.endswith(pair[0])}
        reasons = [c.last_stays for c in offered.values() if c.last_stays is not None]
        assert all("its own Python" in reason for reason in reasons)
        refused = [reason for each in ecospa_fx.explain(model).refusals for reason in each.reasons]
        assert len(offered) == len(family.sublayers) or any("its own Python" in reason for reason in refused)
        family = replace(family, sublayers=tuple(pair for pair, c in offered.items() if c.last_stays is None))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    result(model, family.call).square().sum().backward()
    optimizer.step()
    judge.load_state_dict(model.state_dict())
    same = torch.optim.AdamW(judge.parameters(), lr=0.02, weight_decay=0.1)
    same.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gone = {named(model, end).name: NONE for end, _ in family.sublayers}
    ecospa_fx.shrink(model, gone, constraints=ALL_MAY_GO, optimizer=optimizer)
    outputs = [weight for _, weight in family.sublayers]
    zero_out(judge, outputs)
    tolerance = 1e-9 if family.dtype is torch.float64 else 1e-4
    compare(model, judge, family.call, tolerance)
    for _ in range(2):
        for each, step in ((model, optimizer), (judge, same)):
            each.zero_grad()
            result(each, family.call).square().mean().backward()
            step.step()
        zero_out(judge, outputs)
        compare(model, judge, family.call, tolerance)
    if family.generates:
        tokens = [m.generate(**WORDS, max_new_tokens=5, do_sample=False) for m in (model, judge)]
        assert torch.equal(*tokens)


@pytest.mark.parametrize("name", QUICK)
def test_a_sublayer_of_some_families(name: str) -> None:
    check(FAMILIES[name])


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - set(QUICK)))
def test_a_sublayer_of_all_families(name: str) -> None:
    check(FAMILIES[name])


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_sublayer_in_its_own_python(name: str) -> None:
    check(FAMILIES[name], "module")


def test_what_cannot_be_without_an_entry_is_refused() -> None:
    model, _ = built(FAMILIES["llama"])
    model = ecospa_fx.compile(model)
    result(model, GENERATING)
    before = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(ShrinkError, match=r"to nothing: without any of it all scores are equal, so that its sublayer"):
        ecospa_fx.shrink(model, {named(model, "0.self_attn.qk").name: NONE}, constraints=ALL_MAY_GO)
    with pytest.raises(ShrinkError, match=r"unless constraints=Constraints\(min_keep=0\) lets the last one go"):
        ecospa_fx.shrink(model, {named(model, "0.mlp.glu").name: NONE})
    with pytest.raises(TargetError, match="min_keep=-1 is out of range; it is a whole number, at least 0"):
        ecospa_fx.Constraints(min_keep=-1)
    assert before == {name: p.shape for name, p in model.named_parameters()}


class Normed(nn.Module):
    """Hidden units that are normalised: their mean is over what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))  # type: ignore[no-any-return]


def test_an_average_needs_an_entry() -> None:
    model, x = Normed(), torch.randn(2, 6)
    model = ecospa_fx.compile(model, example_inputs=(x,))
    (coupling,) = ecospa_fx.couplings(model)
    with pytest.raises(ShrinkError, match="layer_norm takes what is left of it, and needs one entry"):
        ecospa_fx.shrink(model, {coupling: NONE}, constraints=ALL_MAY_GO)


def test_saves_and_programs_without_the_sublayer(tmp_path: Any) -> None:
    family = FAMILIES["llama"]
    model, _ = built(family)
    model = ecospa_fx.compile(model)
    result(model, family.call)
    gone = {named(model, end).name: NONE for end, _ in family.sublayers}
    ecospa_fx.shrink(model, gone, constraints=ALL_MAY_GO)
    expected = result(model, family.call)
    ecospa_fx.save(model, tmp_path)
    loaded = ecospa_fx.load(tmp_path, lambda: family.make().to(family.dtype).eval())
    assert torch.equal(result(loaded, family.call), expected)
    assert {c.name: c.size for c in ecospa_fx.couplings(loaded)} == {c.name: c.size for c in ecospa_fx.couplings(model)}
    assert ecospa_fx.verify(model, example_kwargs=family.call).ok
    call = _call_of_a_layer(model)
    with torch.profiler.profile() as seen, torch.no_grad():
        args, kwargs = call
        model.model.layers[0](*args, **kwargs)
    products = sum(
        event.count for event in seen.key_averages() if event.key in ("aten::mm", "aten::addmm", "aten::bmm")
    )
    assert products == 3 and not any("attention" in event.key for event in seen.key_averages())  # the MLP's alone


def _call_of_a_layer(model: nn.Module) -> tuple[Any, ...]:
    kept: list[tuple[Any, ...]] = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: kept.append((args, kwargs)), with_kwargs=True
    )
    result(model, GENERATING)
    handle.remove()
    ((args, kwargs),) = kept
    return args, kwargs


class Block(nn.Module):
    """A sublayer added to a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def stack(share: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3)))
    with torch.no_grad():
        model[1].down.weight.mul_(share)
        model[1].down.bias.zero_()
    model = ecospa_fx.compile(model, example_inputs=(torch.randn(4, 8),))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def trained(policy: str, **settings: Any) -> dict[str, int]:
    model, optimizer = stack(1e-4)
    trainer = ecospa_fx.EcoSpaTrainer(
        model, optimizer, policy=policy, interval=2, start=2, end=6, min_keep=0, **settings
    )
    for _ in range(12):
        optimizer.zero_grad()
        (model(torch.randn(16, 8)) - 1).square().mean().backward()
        optimizer.step()
        trainer.step()
    return {c.name: c.size for c in ecospa_fx.couplings(model)}


def test_a_sublayer_that_does_nothing_goes_as_a_whole() -> None:
    sizes = trained("adaptive", target=0.5)
    assert sizes["1.ffn"] == 0 and min(sizes["0.ffn"], sizes["2.ffn"]) > 8
    assert all(size for name, size in trained("paper", target=0.7).items())


def test_latency_sees_that_ops_go() -> None:
    """Time that no width saves, only depth: 1 ms a sublayer."""

    def milliseconds(model: nn.Module) -> float:
        return 1e-3 * sum(c.size > 0 for c in ecospa_fx.couplings(model)) + 1e-9 * sum(
            p.numel() for p in model.parameters()
        )

    cost = ecospa_fx.Latency(measure=milliseconds)
    sizes = trained("adaptive", target=0.6, cost=cost)
    assert cost.fixed["ffn"] == pytest.approx(1e-3, rel=0.05)
    assert sizes["1.ffn"] == 0 and sum(size > 0 for size in sizes.values()) == 2


def test_compression_weighs_sublayers_and_widths() -> None:
    model, _ = stack(1e-4)
    batches = [torch.randn(32, 8) for _ in range(8)]
    report = ecospa_fx.compress(model, batches, target=0.6, min_keep=0)
    assert report.removed["1.ffn"][1] == 0 and abs(report.rise) < 0.05


class Stream(nn.Module):
    """A sublayer that is added to what comes from outside, of which not all is read."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(8, 6), nn.Linear(6, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(x + self.down(self.up(x))), self.down(self.up(x))


def test_a_constant_is_a_result_and_depends_on_its_weights() -> None:
    torch.manual_seed(0)
    model, x = Stream(), torch.randn(2, 8)
    judge = copy.deepcopy(model)
    model = ecospa_fx.compile(model, example_inputs=(x,), regions="root")
    hidden = next(c for c in ecospa_fx.couplings(model) if c.size == 6)
    ecospa_fx.shrink(model, {hidden: NONE}, constraints=ALL_MAY_GO)
    zero_out(judge, ["down.weight"])
    found, wanted = model(x), judge(x)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
        assert a.requires_grad  # as in any model whose weights train
    found[1].add_(1)  # a result is nobody else's memory
    (found[0].sum() + found[1].sum()).backward()
    assert model.down.weight.grad is not None and model.down.weight.grad.shape == (8, 0)


class Kept(nn.Module):
    """A stream from outside, of which a weight sums over the entries."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(self.up(x)))  # type: ignore[no-any-return]


def test_what_is_left_of_a_stream_is_selected_where_nothing_is_added_to_it() -> None:
    torch.manual_seed(0)
    model, x = Kept(), torch.randn(2, 8)
    judge = copy.deepcopy(model)
    model = ecospa_fx.compile(model, example_inputs=(x,), regions="root")
    sizes = {c.size: c for c in ecospa_fx.couplings(model)}
    assert set(sizes) == {6, 8}
    keep = torch.tensor([0, 2, 3, 5, 6])
    ecospa_fx.shrink(model, {sizes[6]: NONE, sizes[8]: keep}, constraints=ALL_MAY_GO)
    torch.testing.assert_close(model(x), nn.functional.linear(x[:, keep], judge.head.weight[:, keep], judge.head.bias))


@pytest.mark.sweep
@pytest.mark.parametrize("how", [{"num_beams": 2}, {"cache_implementation": "static"}, {}], ids=str)
def test_blocks_that_add_nothing(how: dict[str, Any]) -> None:
    """All heads of the first block are gone, by which its cache counts tokens; of the second block those of queries."""
    model, judge = built(FAMILIES["llama"])
    model = ecospa_fx.compile(model)
    result(model, GENERATING)
    names = ("0.self_attn.heads", "0.mlp.glu", "1.self_attn.groups", "1.mlp.glu")
    ecospa_fx.shrink(model, {f"model.layers.{name}": NONE for name in names}, constraints=ALL_MAY_GO)
    zero_out(judge, [f"{i}.{name}.weight" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")])
    compare(model, judge, GENERATING, 1e-9)
    tokens = [m.generate(**WORDS, max_new_tokens=5, do_sample=False, **how) for m in (model, judge)]
    assert torch.equal(*tokens)


@pytest.mark.sweep
def test_later_draws_stay_the_same() -> None:
    """Dropout behind an FFN without units drops zeros, and draws as many numbers as before."""
    model, judge = built(FAMILIES["bert"])
    model = ecospa_fx.compile(model)
    for each in (model, judge):
        each.train()
    result(model, WORDS)
    ecospa_fx.shrink(model, {named(model, "1.ffn"): NONE}, constraints=ALL_MAY_GO)
    zero_out(judge, ["1.output.dense.weight"])
    found = []
    for each in (model, judge):
        torch.manual_seed(3)
        found.append((result(each, WORDS), torch.rand(3)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
