"""The scripts in examples/ run, each in a process of its own, and end at their targets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = """
import runpy, sys
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops
tolerate_missing_torchvision_ops()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_it_runs_and_ends_at_its_target(script, tmp_path):
    command = [sys.executable, "-c", RUN, str(EXAMPLES / f"{script}.py"), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (share,) = [line for line in done.stdout.splitlines() if "parameters (x 0." in line]
    assert float(share.split("(x ")[1].rstrip(")")) == pytest.approx(0.5, abs=0.03)
    assert "loaded again: " in done.stdout
