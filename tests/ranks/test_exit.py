"""Processes end without an abort after collectives of gloo, though the workers of gloo are slow."""

import os
import subprocess
import sys

import pytest
from crew import free_port

SLOW = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

int pthread_mutex_lock(pthread_mutex_t *mutex) {
  char name[20] = {0};
  prctl(PR_GET_NAME, name);
  if (strncmp(name, "pt_gloo", 7) == 0) usleep(atoi(getenv("LATE")));
  return ((int (*)(pthread_mutex_t *))dlsym(RTLD_NEXT, "pthread_mutex_lock"))(mutex);
}
"""
"""A library to preload, with which gloo's workers take every lock `LATE` microseconds late, as on a busy machine."""

RANK = """
import sys
import torch, torch.distributed as dist
import torch.distributed._functional_collectives as functional
{importing}
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
print(functional.all_reduce(torch.ones(3), "sum", dist.group.WORLD).tolist())
for _ in range(2):
    dist.all_reduce(torch.ones(3))
{ending}
"""


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slow")
    (folder / "slow.c").write_text(SLOW)
    subprocess.run(["gcc", "-shared", "-fPIC", "slow.c", "-o", "slow.so", "-ldl"], cwd=folder, check=True)
    return folder / "slow.so"


def run(slow, late, **parts):
    """Run two ranks and return their exit codes."""
    environment = {"LD_PRELOAD": str(slow), "LATE": str(late), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command, port = [sys.executable, "-c", RANK.format(**parts)], str(free_port())
    ranks = [subprocess.Popen([*command, rank, port], env=os.environ | environment) for rank in "01"]
    return [rank.wait(120) for rank in ranks]


ENDINGS = ["", "dist.barrier()\ndist.destroy_process_group()"]


@pytest.mark.parametrize("ending", ENDINGS, ids=["none", "destroyed"])
def test_ranks_end(slow, ending):
    for late in (1000, 4000):
        assert run(slow, late, importing="from ecospa_fx import compile", ending=ending) == [0, 0]


def test_plain_torch_aborts(slow):
    """Where torch itself no longer aborts, the wait at the end can go."""
    tries = (3000, 1000, 2000, 5000) * 3  # one of them, as a rule the first
    assert any(any(run(slow, late, importing="", ending=ENDINGS[1])) for late in tries)
