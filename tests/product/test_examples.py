"""The scripts in examples/ run, each in a process of its own, and end at their targets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from crew import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = """
import runpy, sys
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops
tolerate_missing_torchvision_ops()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


RANKS = {
    "fsdp2_torchrun": [(2, 1, ["--steps", "40"]), (1, 3, ["--resume"])],
    "fsdp2_accelerate": [(1, 2, [])],
    "fsdp2_huggingface": [(1, 2, ["--steps", "20"]), (1, 2, ["--resume"])],
}
"""Script -> its runs, one after the other: hosts (addresses of this one), ranks on each, and arguments."""


@pytest.mark.parametrize("script", sorted({path.stem for path in EXAMPLES.glob("*.py")} - RANKS.keys()))
def test_it_runs_and_ends_at_its_target(script, tmp_path):
    command = [sys.executable, "-c", RUN, str(EXAMPLES / f"{script}.py"), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    check(done)


@pytest.mark.parametrize("script", RANKS)
def test_ranks_end_at_the_target(script, tmp_path):
    (tmp_path / "begin.py").write_text(RUN)
    command = [str(tmp_path / "begin.py"), str(EXAMPLES / f"{script}.py"), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if Path("/sys/class/net/lo").exists():
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    for hosts, ranks, more in RANKS[script]:
        port, running = free_port(), []
        for host in range(hosts):
            torchrun = [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", str(hosts), "--node-rank", str(host),
                "--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1", "--master-port", str(port),
                "--local-addr", f"127.0.0.{1 + host}",
            ]  # fmt: skip
            running.append(
                subprocess.Popen(
                    [*torchrun, *command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                    env=environment, cwd=tmp_path,
                )
            )  # fmt: skip
        told = [each.communicate() for each in running]
        assert not any(each.returncode for each in running), "\n".join(errors[-3000:] for _, errors in told)
    check(subprocess.CompletedProcess([], 0, told[0][0], told[0][1]))


def check(done):
    assert done.returncode == 0, done.stderr
    (share,) = [line for line in done.stdout.splitlines() if "parameters (x 0." in line]
    assert float(share.split("(x ")[1].rstrip(")")) == pytest.approx(0.5, abs=0.03)
    assert "loaded again: " in done.stdout
