"""PEFT adapters (LoRA) on a frozen model that shrinks while they are fine-tuned, and that absorbs them afterwards.

    pip install 'ecospa-fx[hf]' peft
    python examples/peft_adapters.py

A small LLaMA with random weights stands in for a trained one; adapters on all of its projections learn the source of
Python's standard library as bytes. Half of all parameters are removed between steps 20 and 80, in base and adapters
alike. The adapters are then merged into the shrunk base, and the result is saved and loaded again.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import ecospa_fx

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Adapt, shrink, merge, load again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/peft")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    before = sum(p.numel() for p in model.parameters())

    ecospa_fx.compile(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    trainer = ecospa_fx.EcoSpaTrainer(
        model,
        optimizer,
        target=0.5,
        start=options.steps // 5,
        end=4 * options.steps // 5,
        interval=options.steps // 10,
        frozen=["*_proj.ffn"],  # the ranks of the adapters, which PEFT takes to be one number
    )
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    corpus = torch.tensor(list(b"".join(path.read_bytes() for path in sources)))
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(corpus) - 64, (8,))
        tokens = torch.stack([corpus[start : start + 64] for start in starts])
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        trainer.step(loss=loss)
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {trainer.size:,} parameters")

    share = sum(p.numel() for p in model.parameters()) / before
    print(f"{before:,} -> {trainer.size:,} parameters (x {share:.3f})")
    tokens = corpus[None, :32]
    with torch.no_grad():
        adapted = model.eval()(input_ids=tokens).logits
        merged = ecospa_fx.rewire(model, lambda m: m.merge_and_unload())
        print(f"merged: logits differ by {(merged(input_ids=tokens).logits - adapted).abs().max().item():.1e}")
    ecospa_fx.save(merged, options.out)
    loaded = ecospa_fx.load(options.out).eval()
    with torch.no_grad():
        same = torch.allclose(loaded(input_ids=tokens).logits, merged(input_ids=tokens).logits, atol=1e-5)
    print(f"loaded again: {'the same' if same else 'NOT the same'}")


if __name__ == "__main__":
    main()
