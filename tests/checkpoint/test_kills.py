"""Kill -9 while saving: the directory holds the old save or the new one, whole, and nothing else is lost."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from killed import END, Run

import ecospa_fx
from ecospa_fx import errors
from ecospa_fx.checkpoint import directory as saves


def run(*arguments):
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", str(Path(__file__).parent / "killed.py"), *arguments],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture
def memory(tmp_path):
    """A directory that is in memory where that is possible: waiting for a disk is not what is tested."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def test_killed_at_every_file_operation(memory):
    """First the old save counts (or none, if it is the first), then the new one, with nothing in between."""
    found = run("everywhere", str(memory))
    for how, before in (("over", "old"), ("first", "none")):
        outcomes = found[how]
        turn = outcomes.index("new")
        assert turn > 30 and outcomes == [before] * turn + ["new"] * (len(outcomes) - turn)
    assert found["over"].count("new") > 5  # also while the old one is deleted


def test_killed_at_random_moments(memory):
    steps = run("anywhen", str(memory), "5", "0")
    assert len(steps) == 5 and all(0 < step <= END for step in steps)


@pytest.mark.sweep
@pytest.mark.timeout(1800)
def test_killed_at_fifty_random_moments(tmp_path):
    assert len(run("anywhen", str(tmp_path), "50", "1")) == 50


def test_a_power_cut_loses_nothing_either(tmp_path, monkeypatch):
    """Every file, and then the directory that lists them, is on the disk before the manifest names them."""
    directory, log = tmp_path / "run", []
    job = Run(directory)
    job.model(torch.zeros(1, 6))
    fsync, replace, unlink = os.fsync, os.replace, os.unlink
    monkeypatch.setattr(os, "fsync", lambda fd: (log.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (log.append(("replace", str(b))), replace(a, b)))
    job.save()
    monkeypatch.setattr(os, "unlink", lambda *a, **k: (log.append(("unlink", str(a[0]))), unlink(*a, **k)))
    first, log[:] = list(log), []
    job.save()
    for operations, save in ((first, directory / "save-1"), (log, directory / "save-2")):
        turn = operations.index(("replace", str(directory / "checkpoint.json")))
        before = {what for what in operations[:turn] if what[0] == "fsync"}
        named = [*save.iterdir()] if save.exists() else []
        assert before >= {("fsync", str(path)) for path in (*named, save, directory, directory / "checkpoint.json.new")}
        assert operations[turn + 1] == ("fsync", str(directory))
        assert not [what for what in operations[:turn] if what[0] == "unlink"]
    assert len(list((directory / "save-2").iterdir())) > 5
    assert [what for what in log if what[0] == "unlink"]


@pytest.mark.parametrize("where", [saves, os])
def test_a_full_disk_leaves_the_old_save(tmp_path, monkeypatch, where):
    """No space for the tensors, or none for the manifest."""
    directory = tmp_path / "run"
    job = Run(directory)
    job.model(torch.zeros(1, 6))
    job.save()
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((saves, "save_file", full) if where is saves else (os, "replace", full)))
    with pytest.raises(OSError, match="No space left on device"):
        job.save()
    monkeypatch.undo()
    after = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    after.pop(directory / "checkpoint.json.new", None)
    assert after == before
    job.save()
    assert (directory / "save-2").exists() and not (directory / "save-1").exists()


def test_what_cannot_be_written_is_said(tmp_path):
    """The real thing: a limit on the size of a file."""
    resource = pytest.importorskip("resource")
    job = Run(tmp_path / "run")
    job.model(torch.zeros(1, 6))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(errors.CheckpointError, match=r"model\.safetensors cannot be written: "):
            job.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    with pytest.raises(errors.CheckpointError, match=r"is not a saved model: it has no checkpoint\.json"):
        ecospa_fx.load(tmp_path / "run")
