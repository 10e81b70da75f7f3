"""Lightning: a language model shrinks while it trains; the run can be interrupted and resumed.

    pip install 'ecospa-fx[lightning,hf]'
    python examples/lightning_callback.py

A small LLaMA with random weights learns the source of Python's standard library as bytes; half of its parameters are
removed between steps 40 and 120. Stop it with Ctrl-C and run it again with --resume: it continues from the last
checkpoint.
"""

import argparse
import sysconfig
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from transformers import LlamaConfig, LlamaForCausalLM

import ecospa_fx
from ecospa_fx.integrations.lightning import EcoSpaCallback, load_checkpoint


class Bytes(lightning.LightningModule):
    """A language model over bytes."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config)

    def training_step(self, tokens: torch.Tensor, index: int) -> torch.Tensor:
        """The loss of a batch."""
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> dict:
        """AdamW with a cosine schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 160)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    """Train, shrink, load again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/lightning")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)[: 160 * 16 * 64]
    windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(-1, 64)
    loader = torch.utils.data.DataLoader(windows, batch_size=8, shuffle=True)

    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        max_steps=160, accumulate_grad_batches=2, gradient_clip_val=1.0, default_root_dir=options.out,
        logger=CSVLogger(options.out), log_every_n_steps=20, enable_progress_bar=False,
        callbacks=[
            EcoSpaCallback(target=0.5, start=40, interval=20, end=120),
            ModelCheckpoint(options.out, save_last=True, every_n_train_steps=40),
        ],
    )  # fmt: skip
    module = Bytes()
    trainer.fit(module, loader, ckpt_path="last" if options.resume else None)

    print(ecospa_fx.diff(module.model))
    loaded = load_checkpoint(f"{options.out}/last.ckpt", Bytes())
    print(f"loaded again: {sum(p.numel() for p in loaded.parameters()):,} parameters")


if __name__ == "__main__":
    main()
