"""Distillation: its loss is the formula's, in any loop, at the entries that are left; the teacher is left alone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

import ecospa_fx
from ecospa_fx.errors import ArgumentError, EcoSpaError

IDS = torch.randint(0, 40, (2, 10), generator=torch.Generator().manual_seed(1))
MASK = torch.ones(2, 10, dtype=torch.long)
MASK[1, :3] = 0
LABELS = IDS.masked_fill(MASK == 0, -100)
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}


def llama(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Classes from a stream, with nothing that names its result."""

    def __init__(self, recomputed=False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.blocks, self.head = nn.Linear(6, 8), nn.ModuleList(Block() for _ in range(3)), nn.Linear(8, 5)
        self.drop, self.unused, self.recomputed = nn.Dropout(0.1), nn.Identity(), recomputed

    def forward(self, x):
        x = self.into(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputed else block(x)
        return self.head(self.drop(x))


X = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def pair():
    """A student that has lost entries of all kinds, and its teacher."""
    student = llama()
    teacher = copy.deepcopy(student)
    ecospa_fx.compile(student, example_kwargs=BATCH)
    ecospa_fx.shrink(student, {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(student) if c.kind == "glu"})
    return student.train(), teacher.train()


def divergence(mine, theirs, temperature):
    """Hinton's, over positions that are no padding, from probabilities."""
    rows = MASK.bool()
    p, q = (F.softmax(logits.double()[rows] / temperature, -1) for logits in (theirs, mine))
    return temperature**2 * (p * (p / q).log()).sum(-1).mean()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_is_that_of_the_task_and_the_divergence_from_the_teacher(pair, temperature):
    student, teacher = pair
    with ecospa_fx.Distiller(student, teacher, temperature=temperature, task=0.5, logits=2.0) as distiller:
        outputs = student(**BATCH)
        loss = distiller.loss(outputs.loss)
    with torch.no_grad():
        wanted = 0.5 * outputs.loss + 2 * divergence(outputs.logits, teacher(**BATCH).logits, temperature)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not student._forward_hooks
    assert not student._forward_pre_hooks


def test_batches_whose_gradients_are_added_up_weigh_as_one(pair):
    """As the Trainer of transformers asks for it: sums over the positions of all of them."""
    student, teacher = pair
    items = (LABELS != -100).sum()
    with ecospa_fx.Distiller(student, teacher) as distiller:
        parts = []
        for at in (slice(0, 1), slice(1, 2)):
            batch = {name: value[at] for name, value in BATCH.items()}
            outputs = student(**batch, num_items_in_batch=items)
            parts.append(distiller.loss())
        student(**BATCH)
        whole = distiller.loss()
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)
    assert outputs.loss is not None


def test_the_trainer_of_transformers_takes_it_from_the_result(tmp_path):
    student = llama()
    teacher = copy.deepcopy(student)
    ecospa_fx.compile(student, example_kwargs=BATCH)
    ecospa_fx.shrink(student, {c: torch.arange(6) for c in ecospa_fx.couplings(student) if c.kind == "glu"})
    nn.init.normal_(teacher.lm_head.weight)
    ecospa_fx.Distiller(student, teacher, in_result=True, task=0.0)
    data = [{"input_ids": ids, "labels": ids} for ids in IDS.repeat(2, 1)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, learning_rate=1e-2,
        report_to=[], use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(student, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    outputs = student(**BATCH)
    assert outputs.loss.item() == pytest.approx(
        divergence(outputs.logits, teacher(**BATCH).logits, 1.0).item(), rel=1e-4
    )
    plain = student.eval()(IDS, labels=IDS).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("recomputed", [False, True], ids=["", "checkpointing"])
def test_hidden_states_are_compared_at_the_entries_left(recomputed):
    student = Net(recomputed)
    teacher = copy.deepcopy(student)
    ecospa_fx.compile(student, example_inputs=(X,), regions="joined")
    (stream,) = [c for c in ecospa_fx.couplings(student) if c.size == 8]
    kept = torch.tensor([0, 2, 3, 5, 7])
    ecospa_fx.shrink(student, {stream: kept})
    with ecospa_fx.Distiller(student, teacher, logits=0.0, hidden={"blocks.1": 2.0, "blocks.2": 1.0}) as distiller:
        seen = {}
        handles = [
            model.blocks[at].register_forward_hook(lambda m, a, r, key=(name, at): seen.setdefault(key, r))
            for name, model in (("student", student), ("teacher", teacher))
            for at in (1, 2)
        ]
        student(X)
        loss = distiller.loss()
        for handle in handles:
            handle.remove()
    wanted = 0
    for at, weight in ((1, 2.0), (2, 1.0)):
        theirs = seen["teacher", at][..., kept]
        wanted += weight * F.mse_loss(seen["student", at], theirs) / theirs.square().mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    loss.backward()
    assert student.into.weight.grad.abs().sum() > 0


def test_hidden_states_inside_a_region_are_seen_and_compared_as_long_as_they_are_whole():
    student = Net()
    student.drop.p = 0.0
    teacher = copy.deepcopy(student)
    nn.init.normal_(teacher.blocks[0].down.weight)
    plain = copy.deepcopy(student)
    gradients = []
    for model in (plain, ecospa_fx.compile(student, example_inputs=(X,), regions="root")):
        with ecospa_fx.Distiller(model, teacher, logits=0.0, hidden={"blocks.1": 1.0}) as distiller:
            model(X)
            distiller.loss().backward()
        gradients.append(model.blocks[0].down.weight.grad)
    assert torch.allclose(*gradients)
    assert gradients[0].abs().sum() > 0
    (stream,) = [c for c in ecospa_fx.couplings(student) if c.size == 8]
    ecospa_fx.shrink(student, {stream: torch.arange(5)})
    with ecospa_fx.Distiller(student, teacher, hidden={"blocks.1": 1.0}) as distiller:
        student(X)
        with pytest.raises(EcoSpaError, match=r"is \(4, 3, 5\) in the student and \(4, 3, 8\) in the teacher"):
            distiller.loss()


def test_a_result_without_logits_is_compared_by_its_error():
    student, teacher = Net(), Net()
    nn.init.normal_(teacher.head.weight)
    with ecospa_fx.Distiller(student, teacher) as distiller:
        outputs = student(X)
        loss = distiller.loss()
    with torch.no_grad():
        taught = teacher.eval()(X)
    assert loss.item() == pytest.approx((F.mse_loss(outputs, taught) / taught.square().mean()).item(), rel=1e-5)


# torch.compile looks at `.grad` of values that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_and_copies(backend):
    student, teacher = Net(), Net()
    student.drop.p = teacher.drop.p = 0.0
    nn.init.normal_(teacher.head.weight, generator=torch.Generator().manual_seed(3))
    distiller = ecospa_fx.Distiller(student, teacher)
    student(X)
    wanted = distiller.loss().item()
    compiled = torch.compile(student, backend=backend)
    compiled(X)
    assert distiller.loss().item() == pytest.approx(wanted, rel=1e-5)
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert torch.equal(other(X), student(X))
        distiller.loss()
        other(X)
        with pytest.raises(EcoSpaError, match="has not been called in training mode"):
            distiller.loss()
    student.eval()(X)
    with pytest.raises(EcoSpaError, match="has not been called in training mode"):
        distiller.loss()
    torch.compiler.reset()


def test_frozen_weights_are_held_once_until_the_student_shrinks():
    student = Net()
    teacher = copy.deepcopy(student)
    ecospa_fx.compile(student, example_inputs=(X,))
    student.requires_grad_(False)
    student.head.requires_grad_(True)
    wanted = teacher.eval()(X)
    teacher = nn.Sequential(teacher)  # other names, as adapters give them
    with ecospa_fx.Distiller(student, teacher) as distiller:
        saved = distiller.share_frozen()
        assert saved == 4 * sum(p.numel() for p in student.parameters() if not p.requires_grad)
        assert distiller.share_frozen() == 0
    ecospa_fx.shrink(student, {c: torch.arange(c.size // 2, c.size) for c in ecospa_fx.couplings(student)})
    assert torch.equal(teacher.eval()(X), wanted)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0}, "temperature=0 is out of range"),
        ({"task": -1.0}, "the weight of `task` is -1.0"),
        ({"hidden": {"layers.*": 1.0}}, "matches no module of the student"),
        ({"hidden": {"blocks.0": -2}}, "the weight of `blocks.0` is -2"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    student = Net()
    with pytest.raises(ArgumentError, match=words):
        ecospa_fx.Distiller(student, Net(), **settings)
    with pytest.raises(ArgumentError, match="are one module"):
        ecospa_fx.Distiller(student, student)
    assert not student._forward_hooks


def test_results_that_cannot_be_compared_are_refused():
    student, teacher = Net(), Net()
    teacher.head = nn.Linear(8, 7)
    distiller = ecospa_fx.Distiller(student, teacher)
    student(X)
    with pytest.raises(EcoSpaError, match="must have one vocabulary, or as many classes"):
        distiller.loss()
    distiller.detach()
    with ecospa_fx.Distiller(student, Net(), in_result=True), pytest.raises(EcoSpaError, match="needs a `loss`"):
        student(X)
    with ecospa_fx.Distiller(student, Net(), hidden={"unused": 1.0}) as distiller:
        student(X)
        with pytest.raises(EcoSpaError, match="the student has not called `unused` as a module"):
            distiller.loss()
