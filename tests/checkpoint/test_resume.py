"""Resume: a run cut in two, the second half in a new process, is to the last bit the run that never stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from resuming import CUT, END, KINDS, Run


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A directory in which every kind of run has ended: in this process, gone back to, and gone on with in another."""
    directory = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        run = Run(kind)
        run.train(CUT)
        run.save(directory / kind)
        assert run.trainer.history and not run.trainer.done, kind  # in the middle of the schedule
        run.train(END)
        assert run.trainer.done and len(run.trainer.history) >= 4, kind
        run.save(directory / f"{kind} whole")
        run.go_back(directory / kind)
        assert run.step == CUT and not run.trainer.done, kind
        run.train(END)
        run.save(directory / f"{kind} resumed within the run")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "resuming.py"), str(directory)],
        capture_output=True, text=True, timeout=280, check=False, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


@pytest.mark.parametrize("how", ["with a loaded model", "with a new model", "within the run"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_run_that_never_stopped(ended, kind, how):
    """Weights, optimizer state, scores, schedules, history and random numbers: every file, byte by byte."""
    whole, resumed = ended / f"{kind} whole" / "save-1", ended / f"{kind} resumed {how}" / "save-1"
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in resumed.iterdir())
    assert {"model.safetensors", "optimizer.safetensors", "trainer.json", "random.json", "scheduler.json"} < {*names}
    differing = [name for name in names if (whole / name).read_bytes() != (resumed / name).read_bytes()]
    assert not differing
    cut = json.loads((ended / kind / "save-1" / "trainer.json").read_text())["trainer"]["state"]
    end = json.loads((whole / "trainer.json").read_text())["trainer"]["state"]
    assert not cut["done"] and end["done"] and len(end["history"]) > len(cut["history"]) > 0
