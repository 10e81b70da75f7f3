"""Accelerate: a language model shrinks in a loop with prepare, gradient accumulation, mixed precision, clipping.

    pip install 'ecospa-fx[hf]' accelerate
    python examples/accelerate_loop.py

A small LLaMA with random weights learns the source of Python's standard library as bytes, in bfloat16 autocast; half
of its parameters are removed between optimizer steps 20 and 60.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

import ecospa_fx

CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
)  # fmt: skip


def main() -> None:
    """Train, shrink, load again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/accelerate")
    options = parser.parse_args()

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)[: 160 * 8 * 64]
    windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(-1, 64)

    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
    model = ecospa_fx.compile(LlamaForCausalLM(CONFIG))  # before prepare, which wraps its forward
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80)
    loader = torch.utils.data.DataLoader(windows, batch_size=8, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5, start=20, interval=10, end=60)

    for tokens in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            if accelerator.sync_gradients:  # the optimizer has taken a step
                trainer.step(loss=loss)  # before zero_grad
                if trainer.steps % 20 == 0:
                    accelerator.print(f"step {trainer.steps}: loss {loss:.3f}, {trainer.size:,} parameters")
            optimizer.zero_grad()

    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    print(ecospa_fx.diff(model))
    ecospa_fx.save(model, options.out)
    loaded = ecospa_fx.load(options.out)  # a Hugging Face model comes back from its config
    print(f"loaded again: {sum(p.numel() for p in loaded.parameters()):,} parameters")


if __name__ == "__main__":
    main()
