"""PEFT: adapters on coupled layers shrink with them; to merge and to shrink can be done in either order."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import ecospa_fx
from ecospa_fx.errors import EcoSpaError
from ecospa_fx.model.full_size import unshrunk
from ecospa_fx.passes.graph.tensors import named_tensors

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
TOKENS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
CALL = {"example_kwargs": {"input_ids": TOKENS}}


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def gpt2():
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=16, use_cache=False, **ends)
    ).double()


LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "llama": (llama, {"target_modules": LLAMA}),
    "llama, some of them": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "lora_dropout": 0.1}),
    "dora": (llama, {"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"], "use_dora": True}),
}


def adapted(kind="llama", **options):
    make, settings = KINDS[kind]
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **{**settings, **options})
    return get_peft_model(make(), config).double().eval()


def of_base(coupling, prefix=""):
    """Where a coupling lies on the base's weights, by their names without adapters; nowhere, if it is a rank."""
    names = ((m.parameter.removeprefix(prefix).replace(".base_layer", ""), m.dim) for m in coupling.members)
    return frozenset((name, dim) for name, dim in names if "lora" not in name)


def shrunk_by(model, prefix=""):
    """Half of each coupling that the base has too goes; the same entries whatever the couplings are called."""
    keeps = {}
    for coupling in ecospa_fx.couplings(model):
        if where := of_base(coupling, prefix):
            generator = torch.Generator().manual_seed(sum(map(ord, str(sorted(where)))))
            rows = [torch.randperm(coupling.size, generator=generator) for _ in range(coupling.contexts)]
            keep = torch.stack([row[: max(1, coupling.size // 2)].sort().values for row in rows])
            keeps[coupling] = keep if coupling.context is not None else keep[0]
    ecospa_fx.shrink(model, keeps)
    return {of_base(coupling, prefix) for coupling in keeps}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dora"])
def test_merge_after_shrink_is_shrink_after_merge(kind):
    model = adapted(kind)
    other = copy.deepcopy(model)
    ecospa_fx.compile(model, **CALL)
    assert ecospa_fx.verify(model, **CALL).ok
    where = shrunk_by(model, "base_model.model.")
    with torch.no_grad():
        unmerged = model(input_ids=TOKENS).logits
        merged = ecospa_fx.rewire(model, lambda m: m.merge_and_unload())
        assert type(merged).__name__ in ("LlamaForCausalLM", "GPT2LMHeadModel")
        assert not any("lora" in name for name, _ in merged.named_parameters())

        other = ecospa_fx.compile(other.merge_and_unload(), **CALL)
        assert shrunk_by(other) == where
        torch.testing.assert_close(merged(input_ids=TOKENS).logits, unmerged, rtol=1e-10, atol=1e-12)
        for (name, p), q in zip(merged.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12, msg=name)
        torch.testing.assert_close(merged(input_ids=TOKENS).logits, other(input_ids=TOKENS).logits)
    # It goes on as a compiled model: what is left can be seen, checked and shrunk further.
    assert ecospa_fx.plan(merged) == ecospa_fx.plan(other)
    assert {c.name for c in ecospa_fx.couplings(merged)} == {c.name for c in ecospa_fx.couplings(other)}
    assert ecospa_fx.verify(merged, **CALL).ok


def test_the_norms_of_dora_stay_exact():
    model = ecospa_fx.compile(adapted("dora"), **CALL)
    assert ecospa_fx.verify(model, **CALL).ok
    shrunk_by(model)
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
        merged = ecospa_fx.rewire(model, lambda m: m.merge_and_unload())
        torch.testing.assert_close(merged(input_ids=TOKENS).logits, before, rtol=1e-10, atol=1e-12)


def test_training_adapters_shrinks_their_base_to_the_target(tmp_path):
    model = ecospa_fx.compile(adapted(lora_dropout=0.1).train())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    # Ranks stay: PEFT's own files name one rank for all layers.
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.8, interval=2, end=8, frozen=["*_proj.ffn"])
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(10):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    assert trainer.done
    kept = ecospa_fx.plan(model).kept
    for name, p in model.named_parameters():
        if "lora" not in name:  # the base is as it was, without what has gone
            for dim in range(p.ndim):
                if (name, dim) in kept:
                    whole[name] = whole[name].index_select(dim, kept[name, dim])
            assert torch.equal(p, whole[name]), name
        if "lora_A" in name:
            assert p.shape[0] == 4
    model.eval()
    logits = model(input_ids=TOKENS).logits
    # All of it, saved and loaded again; and the adapter alone, in PEFT's own file, into another copy of that model.
    ecospa_fx.save(model, tmp_path / "run")
    loaded = ecospa_fx.load(tmp_path / "run", adapted).eval()
    assert torch.equal(loaded(input_ids=TOKENS).logits, logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for a base model on a hub
        model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        for name, p in loaded.named_parameters():
            p.mul_(0 if "lora" in name else 1)
    assert not torch.equal(loaded(input_ids=TOKENS).logits, logits)
    set_peft_model_state_dict(loaded, load_peft_weights(str(tmp_path / "adapter"), device="cpu"))
    assert torch.equal(loaded(input_ids=TOKENS).logits, logits)
    assert get_peft_model_state_dict(model).keys() == get_peft_model_state_dict(loaded).keys()


def test_what_cannot_be_rewired_is_refused_and_the_model_is_as_before():
    model = ecospa_fx.compile(adapted(), **CALL)
    shrunk_by(model)
    logits = model(input_ids=TOKENS).logits
    plan = ecospa_fx.plan(model)

    def fail(inner):
        raise KeyError("no")

    for change, kind, words in (
        (fail, KeyError, "no"),
        (lambda m: None, EcoSpaError, "change returned a NoneType; it returns the model that it has made"),
        (lambda m: torch.nn.Linear(2, 2), EcoSpaError, r"ran as one graph and is not in the Linear that change return"),
    ):
        with pytest.raises(kind, match=words):
            ecospa_fx.rewire(model, change)
        assert torch.equal(model(input_ids=TOKENS).logits, logits) and ecospa_fx.plan(model) == plan
    with pytest.raises(EcoSpaError, match="is not compiled"):
        ecospa_fx.rewire(llama(), lambda m: m)


@pytest.mark.parametrize("shrunk", [False, True])
def test_adapters_that_are_switched_in_graph_execution(shrunk):
    plain = adapted()
    plain.add_adapter("other", LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=LLAMA))
    plain = plain.double().eval()
    model = ecospa_fx.compile(copy.deepcopy(plain), **CALL)
    if shrunk:
        ecospa_fx.shrink(model, {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model) if c.kind != "ffn"})
        plan, held = ecospa_fx.plan(model), named_tensors(model)
        with torch.no_grad():
            for name, tensor in named_tensors(plain).items():
                value = held[name].detach()
                tensor.copy_(unshrunk(value, plan, name) if name in plan.original_shapes else value)

    def same():
        with torch.no_grad():
            a, b = (each(input_ids=TOKENS).logits for each in (model, plain))
        torch.testing.assert_close(a, b)
        return a

    on = same()
    with model.disable_adapter(), plain.disable_adapter():
        off = same()
    assert not torch.allclose(on, off)
    torch.testing.assert_close(same(), on)
    regions = model.__dict__["_ecospa_model"].regions.values()
    assert {len(region.specializations) for region in regions} == {2}  # the first is met again
    if not shrunk:
        for each in (model, plain):
            each.set_adapter("other")
        other = same()
        assert not torch.allclose(on, other)
        for each in (model, plain):
            each.merge_adapter()
        torch.testing.assert_close(same(), other)
        for each in (model, plain):
            each.unmerge_adapter()
        torch.testing.assert_close(same(), other)


def test_adapters_of_a_model_that_is_small_already():
    model, batches = llama(), [{"input_ids": TOKENS}, {"input_ids": TOKENS.flip(1)}]
    ecospa_fx.compress(model, batches, 0.7, deployable="transformers")
    with torch.no_grad():
        before = model(**batches[0]).logits
    adapted = get_peft_model(ecospa_fx.restore(model), LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        torch.testing.assert_close(adapted(**batches[0]).logits, before)  # adapters begin at zero
    ecospa_fx.compile(adapted)
    adapted(**batches[0]).logits.sum().backward()
    widths = {c.original_size for c in ecospa_fx.couplings(adapted) if c.kind == "glu"}
    assert len(widths) == 1 and widths.pop() < 48
    assert ecospa_fx.verify(adapted, example_kwargs=batches[0]).ok
