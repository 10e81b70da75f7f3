"""The loops of other libraries on two ranks: the Trainer of transformers, Accelerate, Lightning, as under torchrun."""

import os
import shutil
import warnings

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from crew import Crew, differ
from rank_models import GatedNet, gated
from test_huggingface import Data
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

import ecospa_fx
from ecospa_fx.integrations.huggingface import EcoSpaCallback

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its dependencies say while they are imported
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from ecospa_fx.integrations.lightning import EcoSpaCallback as LightningCallback


@pytest.fixture(scope="module")
def two():
    with Crew(2) as crew:
        yield crew


def hugging_face(rank, world, out, stopped):
    """Default arguments; a second run that goes on at a checkpoint in the middle."""
    apart = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **given):
            apart.append(differ(list(model.parameters())))

    def run(directory, **more):
        set_seed(0)
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=16, use_cache=False, **ends)
        args = TrainingArguments(
            str(directory), max_steps=8, save_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        callback = EcoSpaCallback(target=0.7, start=2, interval=2, end=6)
        trainer = Trainer(GPT2LMHeadModel(config), args, train_dataset=Data(), callbacks=[callback, Look()])
        trainer.train(**more)
        return trainer, callback.trainer

    whole, eco = run(out)
    wrapper = whole.model_wrapped
    assert type(wrapper) is DDP and wrapper.find_unused_parameters  # which the Trainer sets by itself
    if rank == 0:
        shutil.copytree(f"{out}/checkpoint-4", f"{stopped}/checkpoint-4")
    dist.barrier()
    again, eco_again = run(stopped, resume_from_checkpoint=True)
    same = all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), again.model.parameters()))
    return apart, same and eco.history == eco_again.history, len(eco.history), eco.done


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_trainer_of_transformers_with_default_arguments(two, tmp_path):
    for apart, same, shrinks, done in two.run(hugging_face, tmp_path / "whole", tmp_path / "stopped"):
        assert apart == [0.0] * 12 and same and shrinks == 3 and done


def accelerate(rank, world, find_unused):
    """The loop of the README."""
    data = torch.randn(48, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keywords = DistributedDataParallelKwargs(find_unused_parameters=find_unused)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[keywords], gradient_accumulation_steps=2)
    model = ecospa_fx.compile(gated())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=2)
    )
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.7, start=2, interval=2, end=8)
    apart = []
    for _ in range(2):
        for (x,) in loader:
            with accelerator.accumulate(model):
                loss = model(x).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                if accelerator.sync_gradients:
                    trainer.step(loss=loss)
                    apart.append(differ(list(model.parameters())))
                optimizer.zero_grad()
    assert type(model) is DDP and accelerator.num_processes == world
    return apart, len(trainer.history), trainer.done


@pytest.mark.parametrize("find_unused", [False, True])
def test_accelerate(two, find_unused):
    for apart, shrinks, done in two.run(accelerate, find_unused):
        assert len(apart) > 8 and set(apart) == {0.0} and shrinks == 4 and done


def lightning_ddp(rank, world, out):
    """Its strategy for several devices, with dropout of each rank's own, and a run that goes on in the middle."""
    os.environ.update(TORCHELASTIC_RUN_ID="1", GROUP_RANK="0", LOCAL_WORLD_SIZE=str(world))
    warnings.simplefilter("ignore")  # of a run so small

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model, self.drop = GatedNet(), nn.Dropout(0.2)

        def training_step(self, given, number):
            return self.drop(self.model(given)).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    data = torch.randn(32, 4, 5, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    apart = []

    class Look(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *given):
            apart.append(differ(list(module.parameters())))

    def run(directory, **more):
        torch.manual_seed(100 + rank)  # other dropout on each rank
        callback, module = LightningCallback(target=0.7, interval=2, start=2, end=6, wait_for_loss=True), Module()
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", devices=world, strategy="ddp", logger=False, default_root_dir=out,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=True,
            callbacks=[callback, Look(), ModelCheckpoint(directory, save_top_k=-1, filename="{epoch}")],
        )  # fmt: skip
        trainer.fit(module, loader, **more)
        return module, callback.trainer

    whole, eco = run(f"{out}/whole")
    dist.barrier()
    again, eco_again = run(f"{out}/again", ckpt_path=f"{out}/whole/epoch=0.ckpt")
    same = all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters()))
    return apart, same, eco.history == eco_again.history, len(eco.history), eco.done


def test_lightning(two, tmp_path):
    for apart, same, history, shrinks, done in two.run(lightning_ddp, tmp_path):
        assert len(apart) == 12 and set(apart) == {0.0} and same and history and shrinks == 3 and done
