"""The Trainer of transformers: shrinking in its loop, its checkpoints, going on from them."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerState, TrainingArguments, set_seed

import ecospa_fx
from ecospa_fx.errors import WrapperError
from ecospa_fx.integrations.huggingface import EcoSpaCallback


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        tokens = torch.randint(0, 50, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": tokens}


def trainer_of(out, **settings):
    set_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=50, n_positions=16, use_cache=False, **ends)
    args = TrainingArguments(
        str(out), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=20, learning_rate=1e-2,
        save_steps=8, logging_steps=4, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    callback = EcoSpaCallback(**{"target": 0.6, "interval": 3, "start": 3, "end": 18, **settings})
    return Trainer(GPT2LMHeadModel(config), args, train_dataset=Data(), callbacks=[callback]), callback


@pytest.fixture(scope="module", params=["graph", "module"])
def execution(request):
    return request.param


@pytest.fixture(scope="module")
def whole(tmp_path_factory, execution):
    """A run that was never stopped."""
    out = tmp_path_factory.mktemp("whole")
    trainer, callback = trainer_of(out, execution=execution)
    trainer.train()
    return trainer, callback.trainer, out


def test_it_shrinks_in_the_loop_and_says_so_in_the_logs(whole):
    trainer, eco, _ = whole
    assert eco.done and [entry["step"] for entry in eco.history] == [3, 6, 9, 12, 15, 18]
    assert sum(p.numel() for p in trainer.model.parameters()) == eco.size
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["ecospa_shrinks"] for entry in logged] == [1, 2, 4, 5, 6]
    assert logged[-1]["ecospa_parameters"] == eco.size
    held = trainer.optimizer.state  # moments at the sizes of the weights
    assert all(state["exp_avg"].shape == p.shape for p, state in held.items())


def test_a_schedule_that_is_longer_than_the_run_is_told_as_it_begins(tmp_path, caplog):
    """Steps are those of the optimizer, fewer than batches; the model stayed whole and nothing was said."""
    for settings, said in (({"start": 21, "end": 30}, "at 21"), ({"end": 21}, "its end is at 21"), ({"end": 20}, None)):
        trainer, callback = trainer_of(tmp_path, **settings)
        caplog.clear()
        callback.on_train_begin(
            trainer.args, TrainerState(max_steps=20), None, model=trainer.model, optimizer=trainer.create_optimizer()
        )
        told = [record.getMessage() for record in caplog.records if "this run ends at step 20" in record.getMessage()]
        assert len(told) == (said is not None)
        assert said is None or said in told[0]


def test_a_resumed_run_is_to_the_bit_the_run_that_never_stopped(whole, tmp_path, execution):
    trainer, eco, out = whole
    shutil.copytree(out / "checkpoint-8", tmp_path / "checkpoint-8")
    again, callback = trainer_of(tmp_path, execution=execution)
    again.train(resume_from_checkpoint=True)
    assert callback.trainer.history == eco.history
    for (name, p), q in zip(trainer.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_checkpoint_holds_a_model_that_loads_from_its_config_alone(whole):
    trainer, _, out = whole
    loaded = ecospa_fx.load(out / "checkpoint-20" / "ecospa_fx").eval()
    tokens = torch.randint(0, 50, (2, 12))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, trainer.model.eval()(tokens).logits)


def test_a_checkpoint_of_another_callback_is_refused(whole, tmp_path):
    _, _, out = whole
    shutil.copytree(out / "checkpoint-8", tmp_path / "checkpoint-8")
    shutil.rmtree(tmp_path / "checkpoint-8" / "ecospa_fx")
    again, _ = trainer_of(tmp_path)
    with pytest.raises(ecospa_fx.errors.CheckpointError, match=r"resumes at step 8, but .*ecospa_fx is missing"):
        again.train(resume_from_checkpoint=True)


def test_a_checkpoint_with_other_settings_is_refused(whole, tmp_path):
    _, _, out = whole
    shutil.copytree(out / "checkpoint-8", tmp_path / "checkpoint-8")
    again, _ = trainer_of(tmp_path, theta=0.5)
    with pytest.raises(
        ecospa_fx.errors.CheckpointError, match=r"the trainer has theta=0.5 and the saved one theta=0.9"
    ):
        again.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("given", "wrapper"),
    [({"n_gpu": 2}, "DataParallel"), ({"fsdp": [True]}, "FSDP1"), ({"deepspeed": "config.json"}, "DeepSpeed")],
)
def test_wrappers_that_cannot_follow_are_refused_before_the_model_is_touched(given, wrapper):
    args = SimpleNamespace(**{"n_gpu": 1, "fsdp": [], "deepspeed": None, "world_size": 2, **given})
    model = torch.nn.Linear(2, 2)
    with pytest.raises(WrapperError, match=f"wraps the model in {wrapper} .* ranks would drift apart. Train under"):
        EcoSpaCallback().on_init_end(args, None, None, model=model)
    assert type(model) is torch.nn.Linear and "_ecospa_model" not in vars(model)
