"""Save, load, resume: no pickle, equal to the bit, and clear refusals of what is broken."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ecospa_fx
from ecospa_fx import errors
from ecospa_fx.checkpoint import directory as saves
from ecospa_fx.checkpoint.directory import saving


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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory to copy."""
    model, optimizer, trainer = made()
    train(model, optimizer, trainer, 13)
    directory = tmp_path_factory.mktemp("whole") / "run"
    ecospa_fx.save(model, directory, optimizer=optimizer, trainer=trainer)
    return directory


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
    assert sorted(path.name for path in directory.iterdir()) == [".lock", "checkpoint.json", "save-1"]
    assert sorted(path.name for path in (directory / "save-1").iterdir()) == [
        "model.json", "model.safetensors", "optimizer.json", "optimizer.safetensors", "plan.json", "random.json",
        "random.safetensors", "trainer.json", "trainer.safetensors",
    ]  # fmt: skip
    for path in (directory / "save-1").iterdir():
        json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


def test_saving_again_replaces(saved):
    model, _, _, directory = saved
    (directory / "mine.txt").write_text("kept")
    ecospa_fx.save(model, directory)
    assert sorted(path.name for path in directory.iterdir()) == [".lock", "checkpoint.json", "mine.txt", "save-2"]
    with pytest.raises(errors.CheckpointError, match="holds no optimizer state: it was saved without optimizer="):
        ecospa_fx.resume(directory, model, optimizer=torch.optim.AdamW(model.parameters()))


def files_of(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_failed_save_leaves_the_old_one(saved, monkeypatch):
    model, _, _, directory = saved
    before = files_of(directory)
    monkeypatch.setattr(ecospa_fx.Plan, "to_json", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ecospa_fx.save(model, directory)
    assert files_of(directory) == before
    assert [path.name for path in directory.parent.iterdir()] == ["run"]


def test_two_processes_do_not_save_at_once(saved):
    model, _, _, directory = saved
    with saving(directory), pytest.raises(errors.CheckpointError) as caught:
        ecospa_fx.save(model, directory)
    assert str(caught.value) == f"another process is saving to {directory}; save from one process only"


def test_a_save_that_goes_while_it_is_read(saved, monkeypatch):
    """The reader has found out which save counts; before it opens the files, a new one takes its place."""
    model, _, _, directory = saved
    read, calls = saves._checked, []

    def late(*args):
        calls.append(args)
        if len(calls) == 1:
            ecospa_fx.save(model, directory)
        return read(*args)

    monkeypatch.setattr(saves, "_checked", late)
    loaded = ecospa_fx.load(directory, Net)
    assert len(calls) == 2 and torch.equal(loaded(TOKENS), model(TOKENS))


def test_state_and_model_of_two_saves_do_not_mix(saved):
    """The directory is saved to between `load` and `resume`, by a run that shrinks further."""
    model, optimizer, trainer, directory = saved
    loaded, optimizer2, trainer2 = made(ecospa_fx.load(directory, Net))
    train(model, optimizer, trainer, 6)
    ecospa_fx.save(model, directory, optimizer=optimizer, trainer=trainer)
    assert ecospa_fx.plan(loaded) != ecospa_fx.plan(model)
    ecospa_fx.resume(directory, loaded, optimizer=optimizer2, trainer=trainer2)
    assert ecospa_fx.plan(loaded) == ecospa_fx.plan(model) and torch.equal(loaded(TOKENS), model(TOKENS))


def test_a_model_that_was_loaded_keeps_its_dtype_on_resume(saved):
    model, *_, directory = saved
    loaded = ecospa_fx.load(directory, Net).double()
    ecospa_fx.resume(directory, loaded)
    assert loaded.head.weight.dtype == torch.float64 and torch.equal(loaded.head.weight.float(), model.head.weight)


def rewritten(directory, file, change):
    """Change a file of a save and write its new size and hash down, as one would who means harm."""
    manifest = json.loads((directory / "checkpoint.json").read_text())
    path = directory / manifest["save"] / file
    content = change(path.read_bytes())
    path.write_bytes(content)
    manifest["files"][file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (directory / "checkpoint.json").write_text(json.dumps(manifest))


def edited(change):
    """A change of a JSON file's object."""

    def edit(content):
        document = json.loads(content)
        change(document)
        return json.dumps(document).encode()

    return edit


def header(change):
    """A change of the header of a safetensors file."""

    def edit(content):
        size = int.from_bytes(content[:8], "little")
        document = json.loads(content[8 : 8 + size])
        change(document)
        new = json.dumps(document).encode()
        return len(new).to_bytes(8, "little") + new + content[8 + size :]

    return edit


def claims(name, **fields):
    return header(lambda h: h[name].update(fields))


def manifest(change):
    return lambda directory: (directory / "checkpoint.json").write_bytes(
        edited(change)((directory / "checkpoint.json").read_bytes())
    )


def hostile(file, change):
    return lambda directory: rewritten(directory, file, change)


def touched(file, change):
    path = lambda directory: directory / "save-1" / file  # noqa: E731
    return lambda directory: path(directory).write_bytes(change(path(directory).read_bytes()))


UP = "layers.0.0.weight"
NEW = "is not the file that was saved: "
ABOUT, WEIGHTS = "model.json", "model.safetensors"
DAMAGE = {
    "truncated": (touched(WEIGHTS, lambda b: b[:-50]), f"{WEIGHTS} {NEW}it has "),
    "one bit": (touched(WEIGHTS, lambda b: b[:-3] + bytes([b[-3] ^ 1]) + b[-2:]), f"{WEIGHTS} {NEW}it has been"),
    "plan edited": (touched("plan.json", lambda b: b.replace(b'"dim": 0', b'"dim": 1')), f"plan.json {NEW}it has been"),
    "about edited": (touched(ABOUT, lambda b: b.replace(b"true", b"false")), f"{ABOUT} {NEW}it has "),
    "missing file": (lambda d: (d / "save-1" / WEIGHTS).unlink(), f"is incomplete: {WEIGHTS} is missing"),
    "missing save": (lambda d: shutil.rmtree(d / "save-1"), "is incomplete: model.safetensors is missing"),
    "missing manifest": (lambda d: (d / "checkpoint.json").unlink(), "is not a saved model: it has no checkpoint.json"),
    "manifest cut": (
        lambda d: (d / "checkpoint.json").write_bytes((d / "checkpoint.json").read_bytes()[:100]),
        "checkpoint.json cannot be read: JSONDecodeError",
    ),
    "manifest of a gigabyte": (
        lambda d: os.truncate(d / "checkpoint.json", 2**30), "checkpoint.json is larger than 1048576 bytes",
    ),
    "manifest no text": (
        lambda d: (d / "checkpoint.json").write_bytes(bytes([255] * 9)), "checkpoint.json cannot be read: Unicode",
    ),
    "manifest no object": (lambda d: (d / "checkpoint.json").write_text("[]"), "checkpoint.json cannot be read: Type"),
    "nested without end": (
        lambda d: (d / "checkpoint.json").write_text("[" * 10**5), "checkpoint.json cannot be read: RecursionError",
    ),
    "other version": (manifest(lambda m: m.update(format=99)), "has format 99; this version of ecospa_fx reads 2"),
    "no version": (manifest(lambda m: m.pop("format")), "checkpoint.json cannot be read: KeyError: 'format'"),
    "save outside": (manifest(lambda m: m.update(save="../run")), "names no save: '../run' is not `save-`"),
    "file outside": (
        manifest(lambda m: m["files"].update({"../escape": {}})), "names a file outside its directory: '../escape'",
    ),
    "absolute file": (
        manifest(lambda m: m["files"].update({"/etc/passwd": {}})), "names a file outside its directory: '/etc/passwd'",
    ),
    "no plan listed": (manifest(lambda m: m["files"].pop("plan.json")), "has no plan.json"),
    "said twice": (
        lambda d: (d / "checkpoint.json").write_text('{"format": 2, "format": 3}'), "the key 'format' appears twice",
    ),
    "unknown region": (
        hostile(ABOUT, edited(lambda a: a["regions"].append("layers.9"))),
        "the saved model has a region `layers.9`, this Net has none",
    ),
    "region no name": (
        hostile(ABOUT, edited(lambda a: a["regions"].append(3))), ": `regions` holds something that is not a name",
    ),
    "no regions": (hostile(ABOUT, edited(lambda a: a.pop("regions"))), ": `regions` is missing or not a list"),
    "alias no name": (
        hostile(ABOUT, edited(lambda a: a.update(aliases={"head.weight": [1]}))),
        ": `aliases` holds something that is not a name",
    ),
    "state of no module": (
        hostile(ABOUT, edited(lambda a: a.update(extra={"layers.7": 1}))),
        "the saved model has state of a module `layers.7`, this Net has none",
    ),
    "alias of nothing": (
        hostile(ABOUT, edited(lambda a: a.update(aliases={"head.weight": "nothing"}))),
        "`head.weight` is saved as `nothing`, which is missing",
    ),
    "layout of another tensor": (
        hostile(ABOUT, edited(lambda a: a["layouts"].update({UP: {"order": [5, 5]}}))),
        f"gives `{UP}` a memory layout that does not fit: ",
    ),
    "header of exabytes": (
        hostile(WEIGHTS, lambda b: (2**62).to_bytes(8, "little") + b[8:]), f"{WEIGHTS} cannot be read: ",
    ),
    "header alone": (hostile(WEIGHTS, lambda b: b[:4]), f"{WEIGHTS} cannot be read: "),
    "tensor of exabytes": (hostile(WEIGHTS, claims(UP, shape=[2**31, 2**31])), f"{WEIGHTS} cannot be read: "),
    "tensor of more than a number": (hostile(WEIGHTS, claims(UP, shape=[2**63, 2**63])), f"{WEIGHTS} cannot be read: "),
    "negative size": (hostile(WEIGHTS, claims(UP, shape=[-1, 8])), f"{WEIGHTS} cannot be read: "),
    "beyond the file": (hostile(WEIGHTS, claims(UP, data_offsets=[0, 2**40])), f"{WEIGHTS} cannot be read: "),
    "huge and empty": (hostile(WEIGHTS, header(lambda h: h.update(odd={"dtype": "F32", "shape": [0, 2**62],
        "data_offsets": [0, 0]}))), "1 names are in one of them only, odd in the saved one"),
    "plan of exabytes": (
        hostile("plan.json", edited(lambda p: p["original_shapes"].update({UP: [2**40, 8]}))),
        f"`{UP}` was (1099511627776, 8) when saved and is (12, 8) in this model",
    ),
    "plan of another tensor": (
        hostile("plan.json", edited(lambda p: p["original_shapes"].update(odd=[2]))),
        "the plan shrinks `odd`, which is not saved",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_seen(whole, tmp_path, how):
    directory = shutil.copytree(whole, tmp_path / "run")
    do, words = DAMAGE[how]
    do(directory)
    with pytest.raises(errors.CheckpointError) as caught:
        ecospa_fx.load(directory, Net)
    assert words in str(caught.value)


def test_another_model_is_refused(saved):
    *_, directory = saved
    with pytest.raises(errors.CheckpointError, match=r"`layers.0.0.weight` was \(12, 8\) when saved and is \(14, 8\)"):
        ecospa_fx.load(directory, lambda: Net(hidden=14))
    with pytest.raises(errors.CheckpointError, match="the saved model is not a Linear like this one: "):
        ecospa_fx.load(directory, lambda: nn.Linear(2, 2))
    with pytest.raises(
        errors.ArgumentError, match=r"`factory` is a Net; .* such as its class .*`resume` takes a model"
    ):
        ecospa_fx.load(directory, Net())
    with pytest.raises(errors.CheckpointError, match="the factory made a str; it must make the original model"):
        ecospa_fx.load(directory, lambda: "Net")
    with pytest.raises(errors.CheckpointError, match=r"has no config.json to rebuild a Net from; pass a factory"):
        ecospa_fx.load(directory)


def test_a_resume_of_a_new_model_that_fails_leaves_it_as_it_was(saved):
    *_, directory = saved
    model = ecospa_fx.compile(Net(), example_inputs=(TOKENS,))
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(errors.CheckpointError, match="holds state of AdamW, not of SGD"):
        ecospa_fx.resume(directory, model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    after = dict(model.named_parameters())
    assert all(after[name] is p and torch.equal(p, value) for name, (p, value) in before.items())
    assert not ecospa_fx.plan(model).kept and torch.isfinite(model(TOKENS)).all()
    ecospa_fx.resume(directory, model, optimizer=torch.optim.AdamW(model.parameters()))
    loaded = ecospa_fx.load(directory, Net)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))
    assert torch.equal(model(TOKENS), loaded(TOKENS)) and ecospa_fx.plan(model) == ecospa_fx.plan(loaded)


def test_a_resume_that_fails_leaves_a_model_that_has_shrunk_as_it_was(saved):
    *_, directory = saved
    model = ecospa_fx.compile(Net(), example_inputs=(TOKENS,))
    coupling = ecospa_fx.couplings(model)[0]
    ecospa_fx.shrink(model, {coupling: torch.arange(coupling.size - 1)})
    expected, plan = model(TOKENS), ecospa_fx.plan(model)
    with pytest.raises(errors.CheckpointError, match="holds state of AdamW, not of SGD"):
        ecospa_fx.resume(directory, model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert plan.kept and ecospa_fx.plan(model) == plan and torch.equal(model(TOKENS), expected)
    ecospa_fx.shrink(model, {coupling.name: torch.arange(coupling.size - 2)})
    assert ecospa_fx.verify(model, example_inputs=(TOKENS,)).ok


def test_state_of_another_optimizer_is_refused(saved):
    model, _, _, directory = saved
    with pytest.raises(errors.CheckpointError, match="holds state of AdamW, not of SGD"):
        ecospa_fx.resume(directory, model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    groups = [{"params": [p]} for p in model.parameters()]
    with pytest.raises(errors.CheckpointError, match="groups parameters differently from the saved one"):
        ecospa_fx.resume(directory, model, optimizer=torch.optim.AdamW(groups))
