"""Accelerate: its loop with gradient accumulation and mixed precision, compiled before prepare and after."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_training import Stack

import ecospa_fx

X = torch.randn(24, 5, 16, generator=torch.Generator().manual_seed(0))


def prepared(precision="no", compile_first=True, **settings):
    AcceleratorState._reset_state(True)  # its state is one per process
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    torch.manual_seed(0)
    model = Stack(width=16, heads=2, hidden=32)
    if compile_first:
        ecospa_fx.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=4)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    if not compile_first:
        ecospa_fx.compile(model, example_inputs=(X[:4],))
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, interval=2, end=8, **settings)
    return accelerator, model, optimizer, loader, scheduler, trainer


def train(accelerator, model, optimizer, loader, scheduler, trainer, epochs=3):
    for _ in range(epochs):
        for (x,) in loader:
            with accelerator.accumulate(model):
                loss = (model(x) - x.flip(-1)).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                if accelerator.sync_gradients:
                    trainer.step(loss=loss)
                optimizer.zero_grad()


@pytest.mark.parametrize("gradients", ["step", "optimizer"])
def test_its_loop_is_the_plain_loop(gradients):
    parts = prepared(gradients=gradients)
    train(*parts)
    torch.manual_seed(0)
    model = ecospa_fx.compile(Stack(width=16, heads=2, hidden=32))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, interval=2, end=8)
    for _ in range(3):
        for pair in X.split(8):
            for x in pair.split(4):
                ((model(x) - x.flip(-1)).square().mean() / 2).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            trainer.step()
            optimizer.zero_grad()
    assert trainer.done and trainer.history == parts[-1].history
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), parts[1].parameters(), strict=True))


@pytest.mark.parametrize("compile_first", [True, False])
def test_mixed_precision(compile_first, tmp_path):
    accelerator, model, *rest = prepared("bf16", compile_first)
    train(accelerator, model, *rest)
    assert rest[-1].done
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    ecospa_fx.save(model, tmp_path / "run")
    loaded = ecospa_fx.load(tmp_path / "run", lambda: Stack(width=16, heads=2, hidden=32))
    torch.testing.assert_close(loaded(X), model(X))


def test_compiled_after_prepare_the_first_call_is_seen():
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    torch.manual_seed(0)
    model = accelerator.prepare(Stack(width=16, heads=2, hidden=32))
    plain = model(X[:4])
    ecospa_fx.compile(model)
    assert torch.equal(model(X[:4]), plain) and len(ecospa_fx.couplings(model)) > 2
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, interval=2, end=8)
    for _ in range(10):
        accelerator.backward((model(X[:4]) - X[:4].flip(-1)).square().mean())
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    assert trainer.done
    with pytest.raises(ecospa_fx.errors.CaptureError, match="the model has a forward on the instance"):
        ecospa_fx.compile(accelerator.prepare(Stack()), example_inputs=(torch.randn(2, 3, 12),), regions="root")
