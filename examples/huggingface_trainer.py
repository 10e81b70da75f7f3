"""Trainer of transformers: a language model shrinks while it trains; the run can be interrupted and resumed.

    pip install 'ecospa-fx[hf]' accelerate
    python examples/huggingface_trainer.py

A small GPT-2 with random weights learns the source of Python's standard library as bytes; half of its parameters are
removed between steps 40 and 120. Stop it with Ctrl-C and run it again with --resume: it continues from the last
checkpoint.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import ecospa_fx
from ecospa_fx.integrations.huggingface import EcoSpaCallback


class Windows(torch.utils.data.Dataset):
    """Windows of bytes."""

    def __init__(self, length: int = 64) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = b"".join(file.read_bytes() for file in files)[:400_000]
        self.windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, length, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[i], "labels": self.windows[i]}


def main() -> None:
    """Train, shrink, load again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/huggingface")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=4, n_embd=64, vocab_size=256, n_positions=64, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    args = TrainingArguments(
        options.out, max_steps=160, per_device_train_batch_size=8, learning_rate=2e-3, save_steps=40, logging_steps=20,
        report_to=[], use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    callback = EcoSpaCallback(target=0.5, start=40, interval=20, end=120)
    trainer = Trainer(GPT2LMHeadModel(config), args, train_dataset=Windows(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=options.resume)

    print(ecospa_fx.diff(trainer.model))
    loaded = ecospa_fx.load(f"{options.out}/checkpoint-160/ecospa_fx")
    print(f"loaded again: {sum(p.numel() for p in loaded.parameters()):,} parameters")


if __name__ == "__main__":
    main()
