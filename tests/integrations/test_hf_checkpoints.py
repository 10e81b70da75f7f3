"""Checkpoints of other sizes in the Trainer of transformers: the best one, mixed precision, many models per Trainer."""

from contextlib import suppress
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import HPSearchBackend

import ecospa_fx
from ecospa_fx.errors import CheckpointError
from ecospa_fx.integrations.huggingface import EcoSpaCallback

TOKENS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(9))
ROWS = [torch.randint(0, 50, (12,), generator=torch.Generator().manual_seed(i)) for i in range(16)]
DATA = [{"input_ids": row, "labels": row} for row in ROWS]
EXECUTIONS = pytest.mark.parametrize("execution", ["graph", pytest.param("module", marks=pytest.mark.sweep)])


def make():
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=16, use_cache=False, **ends)
    )


class BestAt(Trainer):
    """Finds the loss least at one step."""

    best = 2

    def evaluate(self, *args, **kwargs):
        measured = super().evaluate(*args, **kwargs)
        measured["eval_loss"] = float(self.state.global_step != self.best)
        return measured


def trainer_of(out, model=None, model_init=None, callback=None, execution="graph", made=Trainer, **options):
    set_seed(0)
    args = TrainingArguments(
        str(out), per_device_train_batch_size=4, max_steps=6, learning_rate=1e-2, save_steps=2, logging_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    callback = callback or EcoSpaCallback(target=0.6, interval=2, start=1, end=5, execution=execution)
    model = None if model_init else model or make()
    trainer = made(model, args, train_dataset=DATA, eval_dataset=DATA[:4], model_init=model_init, callbacks=[callback])
    return trainer, callback


def best_of(out, **options):
    return trainer_of(out, made=BestAt, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, **options)


def said(caplog):
    return [record.message for record in caplog.records if record.name == "ecospa_fx.shrink" and record.levelno > 20]


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@EXECUTIONS
def test_a_best_checkpoint_of_other_sizes_is_the_model_in_the_end(tmp_path, execution, caplog):
    trainer, callback = best_of(tmp_path, execution=execution, save_total_limit=1)
    trainer.train()
    saved = ecospa_fx.load(tmp_path / "checkpoint-2" / "ecospa_fx")
    last = [entry["ecospa_parameters"] for entry in trainer.state.log_history if "loss" in entry][-1]
    assert callback.trainer.size == sum(p.numel() for p in trainer.model.parameters()) > last
    assert len(callback.trainer.history) == 1 and not callback.trainer.done
    assert said(caplog) == [
        f"the best checkpoint is {tmp_path}/checkpoint-2: the model has its sizes again, {callback.trainer.size:,} "
        "parameters, after 1 of 3 shrinks"
    ]
    assert ecospa_fx.plan(trainer.model) == ecospa_fx.plan(saved)
    state = saved.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in trainer.model.state_dict().items())
    assert torch.equal(logits(trainer.model), logits(saved))
    # Weights of other sizes that are none of a checkpoint are refused, as torch refuses them.
    with pytest.raises(RuntimeError, match="size mismatch for"):
        trainer.model.load_state_dict(make().state_dict())
    trainer.model.load_state_dict(state)
    # And training can go on from it, with the optimizer that had followed the later shrinks.
    trainer.args.load_best_model_at_end = False
    trainer.train()
    assert callback.trainer.done and callback.trainer.steps == 8
    assert callback.trainer.size == pytest.approx(last, rel=0.01)  # to an entry of some coupling


@pytest.mark.sweep
def test_the_last_checkpoint_may_be_the_best(tmp_path, caplog):
    trainer, callback = best_of(tmp_path)
    trainer.best = 6
    trainer.train()
    assert len(callback.trainer.history) == 3 and not said(caplog)
    saved = ecospa_fx.load(tmp_path / "checkpoint-6" / "ecospa_fx")
    assert torch.equal(logits(trainer.model), logits(saved))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_of_the_best_checkpoint_come_with_its_base(tmp_path):
    def adapted():
        set_seed(0)
        return peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))

    trainer, callback = best_of(tmp_path, model=adapted())
    trainer.train()
    saved = ecospa_fx.load(tmp_path / "checkpoint-2" / "ecospa_fx", adapted)
    assert len(callback.trainer.history) == 1
    assert ecospa_fx.plan(trainer.model) == ecospa_fx.plan(saved)
    assert torch.equal(logits(trainer.model), logits(saved))


def test_a_best_checkpoint_that_lost_its_plan_is_refused(tmp_path):
    class Losing(BestAt):
        def _load_best_model(self):
            (tmp_path / "checkpoint-2" / "ecospa_fx").rename(tmp_path / "elsewhere")
            super()._load_best_model()

    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    trainer, _ = trainer_of(tmp_path, made=Losing, **options)
    with pytest.raises(CheckpointError, match=r"resumes at step 2, but .*checkpoint-2/ecospa_fx is missing, without"):
        trainer.train()


class MakesAnother(BestAt):
    """Makes a new model from a checkpoint, as the Trainer of sentence-transformers does, and passes over failures."""

    def _load_from_checkpoint(self, directory):
        self.model.load_state_dict(GPT2LMHeadModel.from_pretrained(directory).state_dict())

    def _load_best_model(self):
        with suppress(RuntimeError):
            self._load_from_checkpoint(self.state.best_model_checkpoint)


@pytest.mark.parametrize("best", [2, 6])
def test_a_trainer_that_makes_another_model_of_a_checkpoint_goes_on_from_it(tmp_path, best):
    options = {"made": MakesAnother, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    trainer, callback = trainer_of(tmp_path, **options)
    trainer.best = best
    trainer.train()
    saved = ecospa_fx.load(tmp_path / f"checkpoint-{best}" / "ecospa_fx")
    assert ecospa_fx.plan(trainer.model) == ecospa_fx.plan(saved)
    assert torch.equal(logits(trainer.model), logits(saved))
    again, resumed = trainer_of(tmp_path, **options)
    again.best = best
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(resumed.trainer.history) == len(callback.trainer.history)
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), again.model.parameters(), strict=True))
    # What is no checkpoint of ours is left to them.
    with pytest.raises(OSError, match="nowhere"):
        again._load_from_checkpoint(str(tmp_path / "nowhere"))


@EXECUTIONS
def test_a_run_in_mixed_precision_resumes_to_the_bit(tmp_path, execution):
    trainer, callback = trainer_of(tmp_path, execution=execution, bf16=True)
    trainer.train()
    again, resumed = trainer_of(tmp_path, execution=execution, bf16=True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.trainer.done and resumed.trainer.history == callback.trainer.history
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), again.model.parameters(), strict=True))


@EXECUTIONS
def test_a_run_that_has_ended_resumes_in_the_same_process(tmp_path, execution):
    trainer, callback = trainer_of(tmp_path, execution=execution)
    trainer.train()
    whole = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    history = callback.trainer.history
    for step in (2, 4):
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert callback.trainer.done and callback.trainer.history == history
        assert all(torch.equal(tensor, whole[name]) for name, tensor in trainer.model.state_dict().items())


def test_weights_of_no_checkpoint_are_left_to_torch(tmp_path):
    trainer, _ = trainer_of(tmp_path)
    trainer.train()
    late = {name: tensor + 1 for name, tensor in trainer.model.state_dict().items()}
    again, _ = trainer_of(tmp_path)
    before = {name: tensor.clone() for name, tensor in again.model.state_dict().items()}
    with pytest.raises(RuntimeError) as caught:
        again.model.load_state_dict(late)
    assert "size mismatch for transformer.h.0" in str(caught.value)
    assert (
        "A compiled model takes other sizes with the weights of a checkpoint of EcoSpaCallback only, and in "
        f"{tmp_path} is none that holds these; ecospa_fx.load makes a model from one that lies elsewhere"
    ) in str(caught.value)
    assert all(tensor.shape == before[name].shape for name, tensor in again.model.state_dict().items())
    # Those of a checkpoint bring their sizes, before training begins too.
    again.model.load_state_dict(trainer.model.state_dict())
    assert ecospa_fx.plan(again.model) == ecospa_fx.plan(trainer.model)
    assert torch.equal(logits(again.model), logits(trainer.model))


def test_every_train_call_may_begin_with_another_model(tmp_path):
    trainer, callback = trainer_of(tmp_path, model_init=make)
    trainer.train()
    model, first = trainer.model, callback.trainer
    trainer.train()
    assert trainer.model is not model and callback.trainer.model is trainer.model
    assert callback.trainer.history == first.history and callback.trainer.done
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), model.parameters(), strict=True))


def test_a_model_that_is_made_late_trains_in_mixed_precision_whether_it_is_prepared_or_not(tmp_path):
    trainer, callback = trainer_of(tmp_path / "unprepared", model_init=make, bf16=True)
    trainer.train()
    unprepared, steps = trainer.model, callback.trainer.history
    callback = EcoSpaCallback(target=0.6, interval=2, start=1, end=5)
    options = {"callback": callback, "model_init": lambda: callback.prepare(make()), "bf16": True}
    trainer, _ = trainer_of(tmp_path, **options)
    trainer.train()
    whole, history = trainer.model, callback.trainer.history
    assert steps == history
    assert all(torch.equal(p, q) for p, q in zip(unprepared.parameters(), whole.parameters(), strict=True))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.model is not whole and callback.trainer.history == history
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), whole.parameters(), strict=True))


def test_a_search_for_hyperparameters_saves_into_the_checkpoint_of_its_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers.integrations.integration_utils.hp_params", lambda trial: trial.params
    )  # of optuna's class only
    trainer, callback = trainer_of(tmp_path, model_init=make)
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    for number, rate in enumerate((1e-2, 1e-3)):
        trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": rate}))
        saved = ecospa_fx.load(tmp_path / f"run-{number}" / "checkpoint-6" / "ecospa_fx")
        assert callback.trainer.done and callback.trainer.model is trainer.model
        assert torch.equal(logits(saved), logits(trainer.model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-0", "run-1"]
