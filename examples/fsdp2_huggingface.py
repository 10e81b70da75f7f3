"""Trainer of transformers with FSDP2: a LLaMA is sharded over ranks, shrinks while it trains, and goes on later.

    pip install 'ecospa-fx[hf]' accelerate
    torchrun --standalone --nproc-per-node 2 examples/fsdp2_huggingface.py --steps 20
    torchrun --standalone --nproc-per-node 2 examples/fsdp2_huggingface.py --resume

A small LLaMA with random weights learns the source of Python's standard library as bytes; half of its parameters are
removed between steps 10 and 30. Each checkpoint of the Trainer holds a directory `ecospa_fx` that all ranks have
written. A run that goes on makes the model at the sizes in it, before the Trainer shards the model.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, PartialState
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ecospa_fx
from ecospa_fx.integrations.huggingface import EcoSpaCallback

CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
)  # fmt: skip


class Windows(torch.utils.data.Dataset):
    """Windows of bytes."""

    def __init__(self, length: int = 64) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = b"".join(file.read_bytes() for file in files)[:200_000]
        self.windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, length, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[i], "labels": self.windows[i]}


def shard_on_cpu(args: TrainingArguments) -> None:
    """Let Accelerate shard on a CPU, which it does on GPUs alone: to try this out."""
    print(f"rank {args.process_index} shards on {args.device}")
    Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # whose values the Trainer's state takes over
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def main() -> None:
    """Train, shrink, go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/fsdp2_huggingface")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(0)
    args = TrainingArguments(
        options.out, max_steps=options.steps, per_device_train_batch_size=8, learning_rate=2e-3, save_steps=20,
        logging_steps=10, lr_scheduler_type="constant", report_to=[], use_cpu=not torch.cuda.is_available(), fsdp=True,
        fsdp_config={"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "SHARDED_STATE_DICT"},
    )  # fmt: skip
    if args.use_cpu:
        shard_on_cpu(args)
    # A checkpoint of half of the run has other sizes than a new model.
    model = ecospa_fx.load(f"{options.out}/checkpoint-20/ecospa_fx") if options.resume else LlamaForCausalLM(CONFIG)
    callback = EcoSpaCallback(target=0.5, start=10, interval=5, end=30)
    trainer = Trainer(model, args, train_dataset=Windows(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=options.resume or None)

    change = ecospa_fx.diff(trainer.model)
    if trainer.is_world_process_zero():
        print(change)
        loaded = ecospa_fx.load(f"{options.out}/checkpoint-{options.steps}/ecospa_fx")  # by one process
        print(f"loaded again: {sum(p.numel() for p in loaded.parameters()):,} parameters")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
