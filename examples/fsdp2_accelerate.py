"""Accelerate with FSDP2: a LLaMA is sharded over ranks by `prepare`, shrinks while it trains, and is saved by all.

    pip install 'ecospa-fx[hf]' accelerate
    torchrun --standalone --nproc-per-node 2 examples/fsdp2_accelerate.py

A small LLaMA with random weights learns the source of Python's standard library as bytes, in bfloat16 with gradient
accumulation and clipping; half of its parameters are removed between optimizer steps 10 and 30. `accelerate launch`
with a config of FSDP2 starts it as well.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType
from transformers import LlamaConfig, LlamaForCausalLM

import ecospa_fx

CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
)  # fmt: skip


def main() -> None:
    """Train, shrink, save, load again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/fsdp2_accelerate")
    options = parser.parse_args()

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)[: 40 * 2 * 8 * 64]
    windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(-1, 64)

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        reshard_after_forward=True, cpu_ram_efficient_loading=False, state_dict_type="SHARDED_STATE_DICT",
    )  # fmt: skip
    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="bf16", gradient_accumulation_steps=2, fsdp_plugin=plugin)
    if cpu:  # Accelerate shards on GPUs alone; to try it out, it is told by hand
        plugin.set_mixed_precision("bf16")
        AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)

    torch.manual_seed(0)
    example = {"input_ids": windows[:4], "labels": windows[:4]}
    model = ecospa_fx.compile(LlamaForCausalLM(CONFIG), example_kwargs=example)  # before prepare, which shards it
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = torch.utils.data.DataLoader(windows, batch_size=4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5, start=10, interval=5, end=30)

    for tokens in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if accelerator.sync_gradients:  # the optimizer has taken a step
                trainer.step(loss=loss)  # before zero_grad
                if trainer.steps % 10 == 0:
                    accelerator.print(f"step {trainer.steps}: loss {loss:.3f}, {trainer.size:,} parameters")
            optimizer.zero_grad()

    ecospa_fx.save(model, options.out, optimizer=optimizer, trainer=trainer)  # all ranks together
    change = ecospa_fx.diff(model)
    if accelerator.is_main_process:
        print(change)
        alone = ecospa_fx.load(options.out)  # one process reads what all have written
        print(f"loaded again: {sum(p.numel() for p in alone.parameters()):,} parameters")
    accelerator.end_training()


if __name__ == "__main__":
    main()
