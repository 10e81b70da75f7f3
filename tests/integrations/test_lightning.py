"""Lightning: shrinking in its loop, its checkpoints, going on from them to the bit."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from test_training import Stack
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import ecospa_fx
from ecospa_fx.errors import CheckpointError, EcoSpaError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its dependencies say while they are imported
    import lightning
    from lightning.pytorch.callbacks import (
        BackboneFinetuning,
        ModelCheckpoint,
        StochasticWeightAveraging,
        WeightAveraging,
    )
    from lightning.pytorch.strategies import FSDPStrategy

    from ecospa_fx.integrations.lightning import EcoSpaCallback, load_checkpoint

# What Lightning says of small runs, of runs that go on elsewhere and of callbacks that are left out.
SAID = (
    "does not have many workers", "The number of training batches", "You defined a `validation_step`",
    "The dirpath has changed", "Be aware that when using `ckpt_path`", "Checkpoint directory",
    "Using ModelCheckpoint with manual opt",
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings(*(f"ignore:.*{words}" for words in SAID))
X = torch.randn(24, 5, 16, generator=torch.Generator().manual_seed(0))
SETTINGS = {"target": 0.6, "interval": 2, "end": 10}


class Lit(lightning.LightningModule):
    def __init__(self, dropout=0.1):
        super().__init__()
        self.model, self.dropout = Stack(width=16, heads=2, hidden=32), nn.Dropout(dropout)
        self.strict_loading = True

    def training_step(self, batch, index):
        (x,) = batch
        return (self.dropout(self.model(x)) - x.flip(-1)).square().mean()

    def validation_step(self, batch, index):
        (x,) = batch
        self.log("val_loss", (self.model(x) - x.flip(-1)).square().mean())

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Stateful(torch.utils.data.DataLoader):
    """A loader that goes on within an epoch."""

    def __init__(self):
        super().__init__(torch.utils.data.TensorDataset(X), 4)
        self.given = self.start = 0

    def __iter__(self):
        start, self.start = self.start, 0
        for self.given in range(start + 1, 7):
            yield [X[4 * self.given - 4 : 4 * self.given]]

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.start = state["given"]


def loader_of(shuffle=False):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), 4, shuffle=shuffle)


def trainer_of(out, *callbacks, **options):
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "max_epochs": 3, **options}
    return lightning.Trainer(
        default_root_dir=out, enable_model_summary=False, callbacks=list(callbacks), num_sanity_val_steps=1, **options
    )


def run(out, loader, callback=None, made=Lit, ckpt_path=None, every=4, validate=True, **options):
    lightning.seed_everything(0, verbose=False)
    callback, model = callback or EcoSpaCallback(**SETTINGS), made()
    saver = ModelCheckpoint(out, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    trainer = trainer_of(out, saver, callback, **options)
    trainer.fit(model, loader, loader_of() if validate else None, ckpt_path=ckpt_path)
    return trainer, model, callback


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped: 6 batches an epoch, 3 epochs, a save every 4 steps."""
    out = tmp_path_factory.mktemp("whole")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return *run(out, Stateful()), out


@pytest.mark.parametrize(("epochs", "end"), [(1, 7), (1, 6), (2, 7)])
def test_a_schedule_that_is_longer_than_the_run_is_told_as_it_begins(epochs, end, tmp_path, caplog):
    run(tmp_path, loader_of(), EcoSpaCallback(**SETTINGS | {"end": end}), max_epochs=epochs)
    told = [record.getMessage() for record in caplog.records if "this run ends at step" in record.getMessage()]
    assert len(told) == (end > 6 * epochs)
    assert not told or f"step 6 of the schedule, and its end is at {end}" in told[0]


def test_its_loop_is_the_plain_loop(tmp_path):
    trainer, lit, callback = run(
        tmp_path, Stateful(), made=lambda: Lit(0.0), accumulate_grad_batches=2, gradient_clip_val=1.0, max_epochs=4
    )
    lightning.seed_everything(0, verbose=False)
    model = ecospa_fx.compile(Lit(0.0).model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
    eco = ecospa_fx.EcoSpaTrainer(model, optimizer, **SETTINGS)
    for _ in range(4):
        for pair in X.split(8):
            for x in pair.split(4):
                ((model(x) - x.flip(-1)).square().mean() / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            eco.step()
            optimizer.zero_grad()
            scheduler.step()
    assert eco.done and eco.history == callback.trainer.history
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), lit.parameters(), strict=True))
    logged = {name: int(trainer.logged_metrics[name]) for name in ("ecospa_parameters", "ecospa_shrinks")}
    assert logged == {"ecospa_parameters": eco.size, "ecospa_shrinks": len(eco.history)}


def assert_equal_runs(mine, theirs):
    (trainer, model, callback), (other, others, before) = mine, theirs
    assert callback.trainer.done and callback.trainer.history == before.trainer.history
    assert trainer.global_step == other.global_step
    for (name, p), q in zip(model.named_parameters(), others.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name
    states = [list(each.optimizers[0].state.values()) for each in (trainer, other)]
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("step", [4, 8])
def test_a_run_resumed_within_an_epoch_is_to_the_bit_the_run_that_never_stopped(whole, tmp_path, step):
    *parts, out = whole
    torch.randn(7)  # other random numbers than there
    again = run(tmp_path, Stateful(), ckpt_path=out / f"step={step}.ckpt")
    assert_equal_runs(again, parts)


def test_so_is_one_that_is_shuffled_and_resumed_between_epochs(tmp_path):
    options = {"every": 6, "validate": False}
    parts = run(tmp_path / "whole", loader_of(shuffle=True), **options)
    again = run(tmp_path / "again", loader_of(shuffle=True), ckpt_path=tmp_path / "whole" / "step=6.ckpt", **options)
    assert_equal_runs(again, parts)


def test_a_checkpoint_holds_plain_values_only(whole):
    out = whole[-1]
    held = torch.load(out / "step=8.ckpt", weights_only=True)
    assert "EcoSpaCallback{'module': None}" in held["callbacks"]
    # Sizes of the checkpoint are those of its step, not of a later one.
    sizes = [torch.load(out / f"step={n}.ckpt", weights_only=True)["state_dict"] for n in (4, 8, 12)]
    counted = [sum(t.numel() for t in size.values()) for size in sizes]
    assert counted[0] > counted[1] > counted[2]


def test_a_shrunk_model_comes_back_from_a_checkpoint(whole, tmp_path):
    _, model, _, out = whole
    loaded = load_checkpoint(out / "step=16.ckpt", Lit())
    early = load_checkpoint(out / "step=4.ckpt", Lit())
    assert ecospa_fx.plan(loaded.model) == ecospa_fx.plan(model.model) != ecospa_fx.plan(early.model)
    assert early.model(X).shape == X.shape
    # `test` takes one too: a model that is new, and one that has shrunk further since.
    before = {name: p.shape for name, p in model.named_parameters()}
    found = []
    for each in (Lit(), model):
        tester = trainer_of(tmp_path, EcoSpaCallback(**SETTINGS))
        found.append(tester.test(each, loader_of(), ckpt_path=out / "step=4.ckpt", verbose=False))
        assert sum(p.numel() for p in each.parameters()) == sum(p.numel() for p in early.parameters())
    assert found[0] == found[1]
    late = trainer_of(tmp_path, EcoSpaCallback(**SETTINGS))
    late.test(model, loader_of(), ckpt_path=out / "step=16.ckpt", verbose=False)
    assert {name: p.shape for name, p in model.named_parameters()} == before


class Forward(lightning.LightningModule):
    """Layers of its own and a forward, as in Lightning's first examples."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

    def training_step(self, batch, index):
        return (self(batch[0]) - batch[0].flip(-1)).square().mean()

    configure_optimizers = Lit.configure_optimizers


class Manual(Lit):
    """Steps by hand, and gradients that are gone when the batch ends."""

    def __init__(self):
        super().__init__(0.0)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("kind", "execution"), [(Forward, "graph"), (Manual, "graph"), (Forward, "module")])
def test_other_ways_to_write_a_module(kind, execution, tmp_path):
    callback = EcoSpaCallback(execution=execution, **SETTINGS)
    _, model, callback = run(tmp_path, Stateful(), callback, made=kind, validate=False, max_epochs=2)
    assert callback.trainer.done
    assert type(model).__name__ == kind.__name__ and sum(p.numel() for p in model.parameters()) == callback.trainer.size
    loaded = load_checkpoint(tmp_path / "step=12.ckpt", kind())
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))


def test_mixed_precision_epochs_and_averages(tmp_path):
    average = WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.5))
    callback = EcoSpaCallback("model", target=0.6, unit="epochs", interval=0.5, end=2, also=[average])
    lightning.seed_everything(0, verbose=False)
    model = Lit()
    saver = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=9)
    trainer = trainer_of(tmp_path, average, callback, saver, precision="bf16-mixed")
    trainer.fit(model, Stateful(), loader_of())
    assert [entry["step"] for entry in callback.trainer.history] == [3, 6, 9, 12]
    assert all(p.shape == q.shape for p, q in zip(model.parameters(), average._average_model.parameters(), strict=True))
    (saved,) = tmp_path.glob("last*.ckpt")
    again = EcoSpaCallback("model", target=0.6, unit="epochs", interval=0.5, end=2)
    with pytest.raises(CheckpointError, match="holds averaged weights"):
        trainer_of(tmp_path, again, WeightAveraging()).fit(Lit(), Stateful(), ckpt_path=saved)


def test_what_does_not_fit_is_refused(whole, tmp_path):
    out = whole[-1]
    weights = torch.load(out / "step=8.ckpt", weights_only=True)
    del weights["callbacks"]
    torch.save(weights, tmp_path / "weights.ckpt")
    with pytest.raises(CheckpointError, match=r"weights of this checkpoint have other sizes than the model's, the fir"):
        trainer_of(tmp_path, EcoSpaCallback(**SETTINGS)).fit(Lit(), Stateful(), ckpt_path=tmp_path / "weights.ckpt")
    with pytest.raises(
        CheckpointError, match=r"holds no state of EcoSpaCallback\{'module': 'other'\}; its own are Eco"
    ):
        load_checkpoint(out / "step=8.ckpt", Lit(), "other")
    with pytest.raises(CheckpointError, match=r"the trainer has theta=0.5 and the saved one theta=0.9"):
        run(tmp_path, Stateful(), EcoSpaCallback(theta=0.5, **SETTINGS), ckpt_path=out / "step=8.ckpt")
    with pytest.raises(EcoSpaError, match="Lit has no submodule `other`"):
        run(tmp_path, Stateful(), EcoSpaCallback("other"))
    with pytest.raises(EcoSpaError, match="Lightning runs backward"):
        run(tmp_path, Stateful(), EcoSpaCallback(gradients="optimizer"))

    class Two(Lit):
        def __init__(self):
            super().__init__()
            self.unused = Stack(width=16, heads=2, hidden=32)

    with pytest.raises(EcoSpaError, match=r"which module of Two is to shrink\? model, unused of its children have"):
        run(tmp_path, Stateful(), made=Two)
    with pytest.raises(EcoSpaError, match=r"training_step did not call unused, so nothing is known of it"):
        run(tmp_path, Stateful(), EcoSpaCallback("unused"), made=Two)
    spread = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(
        EcoSpaError, match=r'FSDPStrategy holds gradients of .* use Trainer\(strategy="ddp"\), or train'
    ):
        EcoSpaCallback().setup(spread, Lit(), "fit")


def test_without_lightning_the_error_says_what_to_install():
    code = "import sys; sys.modules['lightning'] = None; import ecospa_fx.integrations.lightning"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "this callback needs Lightning 2 (`import lightning`): pip install 'ecospa-fx[lightning]'" in done.stderr


class Gan(lightning.LightningModule):
    """Two networks of one class, an optimizer each; the generator steps at every third batch."""

    def __init__(self):
        super().__init__()
        self.g, self.d = Stack(width=16, heads=2, hidden=32), Stack(width=16, heads=2, hidden=32)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        (x,) = batch
        for_g, for_d = self.optimizers()
        for_d.zero_grad()
        self.manual_backward((self.d(self.g(x).detach()) - self.d(x)).mean() + self.d(x).square().mean())
        for_d.step()
        if index % 3 == 0:
            for_g.zero_grad()
            self.manual_backward(-self.d(self.g(x)).mean() + self.g(x).square().mean())
            for_g.step()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.g.parameters(), 1e-2), torch.optim.AdamW(self.d.parameters(), 1e-2)


@pytest.mark.parametrize("execution", ["graph", "module"])
def test_each_network_with_its_own_optimizer(tmp_path, execution):
    lightning.seed_everything(0, verbose=False)
    settings = {"target": 0.7, "interval": 2, "execution": execution}
    g, d, lit = EcoSpaCallback("g", end=6, **settings), EcoSpaCallback("d", end=10, **settings), Gan()
    trainer = trainer_of(tmp_path, g, d, max_epochs=3, enable_checkpointing=False)
    trainer.fit(lit, Stateful())
    assert [each.trainer.optimizers for each in (g, d)] == [trainer.optimizers[:1], trainer.optimizers[1:]]
    assert g.trainer.steps == 6 and d.trainer.steps == 18  # those of its own optimizer
    assert [entry["step"] for entry in g.trainer.history] == [2, 4, 6] and d.trainer.done
    assert g.trainer.size == sum(p.numel() for p in lit.g.parameters())
    for optimizer in trainer.optimizers:
        assert all(state["exp_avg"].shape == p.shape for p, state in optimizer.state.items())


class Tuned(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = Stack(width=16, heads=2, hidden=32), nn.Linear(16, 16)

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, index):
        return (self(batch[0]) - batch[0].flip(-1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


@pytest.mark.parametrize("name", ["backbone", ""])
def test_a_backbone_that_thaws(tmp_path, name, caplog):
    lightning.seed_everything(0, verbose=False)
    callback, lit = EcoSpaCallback(name, **{**SETTINGS, "end": 14}), Tuned()
    thaw = BackboneFinetuning(1, backbone_initial_ratio_lr=0.1)
    trainer = trainer_of(tmp_path, thaw, callback, max_epochs=4, enable_checkpointing=False)
    trainer.fit(lit, Stateful())
    assert callback.trainer.done and not callback.trainer.left_out
    said = [record.message for record in caplog.records if record.name == "ecospa_fx.shrink" and record.levelno > 20]
    if name:  # steps are counted from where an optimizer holds it
        assert callback.trainer.steps == 18 and callback.trainer.history[0]["step"] == 2
        assert said == ["backbone is frozen, and no optimizer holds its parameters: it shrinks once one does"]
    else:
        assert callback.trainer.steps == 24 and callback.trainer.history[0]["step"] == 7
        assert len(said) == 1 and "left out: its weights are frozen" in said[0]
    (optimizer,) = trainer.optimizers
    assert all(state["exp_avg"].shape == p.shape for p, state in optimizer.state.items())


def test_weights_of_other_sizes_are_refused_once_training_has_begun(tmp_path):
    class Loading(Lit):
        def on_train_batch_start(self, batch, index):
            wrong = {name: tensor[..., :3] for name, tensor in self.model.state_dict().items()}
            with pytest.raises(RuntimeError, match="size mismatch"):
                self.model.load_state_dict(wrong)

    trainer, _, _ = run(tmp_path, Stateful(), made=Loading, max_epochs=1, validate=False)
    callback = next(each for each in trainer.callbacks if isinstance(each, EcoSpaCallback))
    assert trainer.global_step == 6 and callback._hook is None


class Weights(lightning.Callback):
    """One weight of the backbone as each epoch begins, where its entries were before any shrink."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, lit):
        weight, plan = lit.backbone.layers[0].down.weight, ecospa_fx.plan(lit.backbone)
        whole = torch.zeros(16, 32)
        whole[:, plan.kept.get(("layers.0.down.weight", 1), torch.arange(32))] = weight.detach()
        self.seen.append(whole)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("execution", ["graph", "module"])
def test_averages_of_lightning_shrink_along_without_being_named(tmp_path, first, execution):
    lightning.seed_everything(0, verbose=False)
    callback, lit = EcoSpaCallback("backbone", execution=execution, **SETTINGS), Tuned()
    average = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    weights = Weights()
    callbacks = [weights, *([average, callback] if first else [callback, average])]
    saver = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=9)
    trainer_of(tmp_path, *callbacks, saver, max_epochs=3).fit(lit, Stateful())
    assert callback.trainer.done
    averaged = average._average_model
    assert all(p.shape == q.shape for p, q in zip(lit.parameters(), averaged.parameters(), strict=True))
    kept = ecospa_fx.plan(lit.backbone).kept["layers.0.down.weight", 1]
    assert len(weights.seen) == 3 and len(kept) < 32
    torch.testing.assert_close(averaged.backbone.layers[0].down.weight, sum(weights.seen)[:, kept] / 3)
    assert torch.equal(lit(X), averaged(X))  # which Lightning puts into the module in the end
    (saved,) = tmp_path.glob("last*.ckpt")
    again = [EcoSpaCallback("backbone", execution=execution, **SETTINGS), StochasticWeightAveraging(1e-3, 1)]
    with pytest.raises(CheckpointError, match="holds averaged weights"):
        trainer_of(tmp_path, *again).fit(Tuned(), Stateful(), ckpt_path=saved)
