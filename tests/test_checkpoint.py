"""Save, load, resume: no pickle, equal to the bit, and clear refusals of what is broken."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ecospa_fx
from ecospa_fx import errors


class Net(nn.Module):
    def __init__(self, width=8, hidden=12):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + self.scale * layer(x)
        return self.head(self.norm(x))


TOKENS = torch.arange(12).reshape(2, 6)


def train(model, optimizer, trainer, steps):
    for _ in range(steps):
        logits = model(TOKENS)
        nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.roll(1, -1).flatten()).backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()


def made(model=None):
    if model is None:
        torch.manual_seed(0)
        model = ecospa_fx.compile(Net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, interval=3, end=24)
    return model, optimizer, trainer


@pytest.fixture
def saved(tmp_path):
    model, optimizer, trainer = made()
    train(model, optimizer, trainer, 13)
    ecospa_fx.save(model, tmp_path / "run", optimizer=optimizer, trainer=trainer)
    assert len(trainer.history) > 0 and not trainer.done  # in the middle of the schedule
    return model, optimizer, trainer, tmp_path / "run"


def test_the_model_comes_back(saved):
    model, _, _, directory = saved
    loaded = ecospa_fx.load(directory, Net)
    assert type(loaded).__name__ == "Net" and loaded.head.weight is loaded.embed.weight
    assert ecospa_fx.plan(loaded) == ecospa_fx.plan(model)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert [str(c) for c in ecospa_fx.couplings(loaded)] == [str(c) for c in ecospa_fx.couplings(model)]
    ecospa_fx.verify(loaded, example_inputs=(TOKENS,)).raise_if_failed()


def test_training_goes_on_as_if_it_had_never_stopped(saved):
    model, optimizer, trainer, directory = saved
    train(model, optimizer, trainer, 15)
    loaded, optimizer2, trainer2 = made(ecospa_fx.load(directory, Net))
    ecospa_fx.resume(directory, loaded, optimizer=optimizer2, trainer=trainer2)
    train(loaded, optimizer2, trainer2, 15)
    assert trainer.done and trainer2.done and trainer2.history == trainer.history
    for (name, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_nothing_is_pickled(saved):
    *_, directory = saved
    assert sorted(path.name for path in directory.iterdir()) == [
        "checkpoint.json", "model.safetensors", "optimizer.safetensors", "plan.json", "trainer.safetensors",
    ]  # fmt: skip
    json.loads((directory / "checkpoint.json").read_text())
    load_file(directory / "model.safetensors")
    assert not any(path.name.startswith(".run") for path in directory.parent.iterdir())


def test_saving_again_replaces(saved):
    model, _, _, directory = saved
    ecospa_fx.save(model, directory)
    assert not (directory / "optimizer.safetensors").exists()
    with pytest.raises(errors.CheckpointError, match="holds no optimizer state; it was saved without optimizer="):
        ecospa_fx.resume(directory, model, optimizer=torch.optim.AdamW(model.parameters()))


def test_a_failed_save_leaves_the_old_one(saved, monkeypatch):
    model, _, _, directory = saved
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    monkeypatch.setattr(ecospa_fx.Plan, "to_json", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ecospa_fx.save(model, directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert [path.name for path in directory.parent.iterdir()] == ["run"]


def damaged(directory, how):
    """Damage a saved model in one way; returns the words that the error must hold."""
    weights = directory / "model.safetensors"
    manifest = directory / "checkpoint.json"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-50])
        return "model.safetensors is not the file that was saved: truncated or changed since"
    if how == "one bit":
        content = bytearray(weights.read_bytes())
        content[-3] ^= 1
        weights.write_bytes(content)
        return "model.safetensors is not the file that was saved: truncated or changed since"
    if how == "plan edited":
        (directory / "plan.json").write_text((directory / "plan.json").read_text().replace('"dim": 0', '"dim": 1'))
        return "plan.json is not the file that was saved"
    if how == "missing file":
        weights.unlink()
        return "is incomplete: model.safetensors is missing"
    if how == "missing manifest":
        manifest.unlink()
        return "is no saved model: it has no checkpoint.json"
    if how == "manifest cut":
        manifest.write_text(manifest.read_text()[:100])
        return "checkpoint.json cannot be read: JSONDecodeError"
    document = json.loads(manifest.read_text())
    if how == "other version":
        document["format"] = 99
        words = "has format 99; this version of ecospa_fx reads 1"
    elif how == "path outside":
        document["sha256"]["../escape"] = ""
        words = "names a file outside its directory: ../escape"
    elif how == "unknown region":
        document["regions"].append("layers.9")
        words = "the saved model has a region `layers.9`, this Net has none"
    manifest.write_text(json.dumps(document))
    return words


@pytest.mark.parametrize(
    "how",
    ["truncated", "one bit", "plan edited", "missing file", "missing manifest", "manifest cut", "other version",
     "path outside", "unknown region"],
)  # fmt: skip
def test_damage_is_seen(saved, how):
    *_, directory = saved
    words = damaged(directory, how)
    with pytest.raises(errors.CheckpointError) as caught:
        ecospa_fx.load(directory, Net)
    assert words in str(caught.value)


def test_another_model_is_refused(saved):
    *_, directory = saved
    with pytest.raises(errors.CheckpointError, match=r"`layers.0.0.weight` was \(12, 8\) when saved and is \(14, 8\)"):
        ecospa_fx.load(directory, lambda: Net(hidden=14))
    with pytest.raises(errors.CheckpointError, match="the saved model is not a Linear like this one: "):
        ecospa_fx.load(directory, lambda: nn.Linear(2, 2))
    with pytest.raises(errors.CheckpointError, match=r"has no config.json to rebuild a Net from; pass a factory"):
        ecospa_fx.load(directory)


def test_plan_is_readable_and_comes_back(saved):
    model, *_ = saved
    plan = ecospa_fx.plan(model)
    text = plan.to_json()
    assert ecospa_fx.Plan.from_json(text) == plan
    document = json.loads(text)
    assert document["original_shapes"]["layers.0.0.weight"] == [12, 8]
    with pytest.raises(
        errors.CheckpointError, match=r"positions of `layers.0.0.weight` dim 0 are not increasing within 0..11"
    ):
        ecospa_fx.Plan.from_json(
            '{"format": 1, "original_shapes": {"layers.0.0.weight": [12, 8]}, '
            '"axes": [{"parameter": "layers.0.0.weight", "dim": 0, "kept": [3, 12]}]}'
        )
    with pytest.raises(errors.CheckpointError, match="this is no plan"):
        ecospa_fx.Plan.from_json("[]")


def test_state_of_another_optimizer_is_refused(saved):
    model, _, _, directory = saved
    with pytest.raises(errors.CheckpointError, match="holds state of AdamW, not of SGD"):
        ecospa_fx.resume(directory, model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    groups = [{"params": [p]} for p in model.parameters()]
    with pytest.raises(errors.CheckpointError, match="groups parameters in another way than the saved one"):
        ecospa_fx.resume(directory, model, optimizer=torch.optim.AdamW(groups))


SCRIPT = """
import sys, torch, ecospa_fx
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops
from safetensors.torch import load_file
tolerate_missing_torchvision_ops()
torch.set_num_threads(1)
check = load_file(sys.argv[1] + "/check.safetensors")
model = ecospa_fx.load(sys.argv[1] + "/run")
assert torch.equal(model(check["tokens"]).logits, check["logits"])
print(type(model).__name__, sum(p.numel() for p in model.parameters()))
"""


def test_a_hugging_face_model_comes_back_in_a_new_process_from_its_config(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=24,
        n_layer=2,
        n_head=2,
        vocab_size=50,
        n_positions=16,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = ecospa_fx.compile(GPT2LMHeadModel(config), example_kwargs={"input_ids": TOKENS}).eval()
    ecospa_fx.shrink(model, {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model)})
    ecospa_fx.save(model, tmp_path / "run")
    save_file({"tokens": TOKENS, "logits": model(TOKENS).logits.detach()}, tmp_path / "check.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"GPT2LMHeadModel {sum(p.numel() for p in model.parameters())}"
    shutil.rmtree(tmp_path / "run")
