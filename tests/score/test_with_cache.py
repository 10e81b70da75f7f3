"""Calls that fill a cache, as causal language models of transformers do by default: they tell what others tell."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import ecospa_fx
from ecospa_fx.compensate.grams import Grams
from ecospa_fx.score.saliency import Saliency

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
MODELS = {
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, bos_token_id=0, eos_token_id=0)
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=60, decoder_start_token_id=0)
    ),
}


def made(name, use_cache):
    torch.manual_seed(0)
    model, ids = MODELS[name]().double().eval(), torch.randint(60, (3, 7))
    call = {"input_ids": ids, "labels": ids, "use_cache": use_cache}
    ecospa_fx.compile(model, example_kwargs=call)
    return model, call


@pytest.mark.parametrize("shrunk", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_scores_and_moments_are_those_without_a_cache(name, shrunk):
    told = []
    for use_cache in (True, False):
        model, call = made(name, use_cache)
        if shrunk:
            ecospa_fx.shrink(model, {c: torch.arange(c.size - 1) for c in ecospa_fx.couplings(model)})
        saliency, activation = Saliency(model), ecospa_fx.CoupledEstimator(model, "activation")
        saliency.reader.computes_again = True
        with Grams(model) as grams:
            result = model(**call)
            assert (result.past_key_values is not None) == use_cache
            result.loss.backward()
        for each in (saliency, activation):
            each.accumulate()
        entries = {c.name: [each.entries(c) for each in (saliency, activation)] for c in ecospa_fx.couplings(model)}
        ecospa_fx.shrink(model, {c: torch.arange(c.size // 2 or 1) for c in ecospa_fx.couplings(model)}, absorb=grams)
        told.append((entries, [p.detach() for p in model.parameters()]))
    (cached, weights), (plain, others) = told
    assert cached and cached.keys() == plain.keys()
    for coupling, scores in cached.items():
        for mine, theirs in zip(scores, plain[coupling], strict=True):
            assert mine.abs().max() > 0
            torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(weights, others, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_a_run_with_the_adaptive_policy_is_that_without_a_cache(name):
    ends = []
    for use_cache in (True, False):
        model, call = made(name, use_cache)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, policy="adaptive", target=0.9, start=2, interval=2, end=4)
        for _ in range(5):
            loss = model(**call).loss
            loss.backward()
            optimizer.step()
            trainer.step(loss=loss)
            optimizer.zero_grad()
        assert trainer.done
        ends.append([p.detach() for p in model.parameters()])
    for mine, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(mine, theirs)
