"""Saves by all ranks, of which one is killed: the last whole save counts, and the next one goes on from there."""

import contextlib
import functools
import os
import shutil
import signal
import sys

import pytest
import torch
import torch.distributed.checkpoint.hf_storage
from crew import Crew, said
from tiny import GLU, SCHEDULE, batch, blocks_of, compiled, loss_of, made, share
from torch.distributed.fsdp import fully_shard

import ecospa_fx
from ecospa_fx.checkpoint.directory import saved_files


@functools.cache
def plain():
    """A compiled model, made once before processes are forked."""
    return compiled(made("glu"), "glu", lambda whole: share(whole, 0, 2))


@contextlib.contextmanager
def counted(at=None):
    """Count the calls within, those of C functions included, and be killed at one of them."""
    calls = [0]

    def count(frame, event, function):
        if event in ("call", "c_call"):
            calls[0] += 1
            if calls[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def saving(rank, world, directories, who=None, at=None):
    """Train and save, step by step, in each directory in turn; a rank may be killed in the last save."""
    model = plain()
    for block in blocks_of(model):
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, **SCHEDULE)
    texts, calls = [], [0]
    for number, directory in enumerate(directories, 1):
        loss_of(model, share(batch("glu", number), rank, world)).backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
        if directory is not None:
            last = number == len(directories) and rank == who
            with counted(at if last else None) as calls:
                texts.append(said(ecospa_fx.save, model, directory, optimizer=optimizer, trainer=trainer))
    return texts[-1], calls[0]


def held(directory):
    """Return the weights and the trainer of the save that counts, once it has been found whole."""
    model = ecospa_fx.load(directory, GLU)
    told = (saved_files(directory) / "trainer.json").read_text()
    return {name: p.tolist() for name, p in model.named_parameters()}, told


def everywhere(world, directory, moments):
    """Kill each rank at some moments of a save over an old one; which save counts after each."""
    plain()
    old, new = directory / "old", directory / "new"
    with Crew(world) as crew:
        crew.run(saving, [old])
    with Crew(world) as crew:
        calls = [count for _, count in crew.run(saving, [None, new])]
    states = {"old": held(old), "new": held(new)}
    assert states["old"] != states["new"] and min(calls) > 500
    found = []
    for who in range(world):
        for moment in moments:
            here = directory / f"{who} {moment}"
            shutil.copytree(old, here)
            with Crew(world) as crew:
                told = crew.outcomes(saving, [None, here], who, 1 + int(moment * calls[who]))
            (which,) = (name for name, state in states.items() if state == held(here))
            found.append((who, moment, which))
            own = told.pop(who)  # calls vary a little: the last moments may not come
            assert own == ("died", -signal.SIGKILL) or (moment > 0.9 and own[0] == "ok" and which == "new"), own
            for kind, text in told:
                assert kind == "ok" and (which == "new" or text[0].startswith("RanksError: ")), (found, text)
            if moment == moments[len(moments) // 2]:  # the next save needs nobody who cleans up
                with Crew(world) as crew:
                    crew.run(saving, [None, here])
                assert held(here) == states["new"]
                assert len([p.name for p in here.iterdir() if p.name != ".lock"]) == 2
            shutil.rmtree(here)
    return found


def test_a_rank_is_killed_while_all_save(tmp_path):
    found = everywhere(2, tmp_path, (0.4, 0.9))
    assert [which for *_, which in found[::2]] == ["old"] * 2


@pytest.mark.sweep
@pytest.mark.timeout(7200)
def test_every_rank_is_killed_at_many_moments_while_all_save(tmp_path):
    found = everywhere(3, tmp_path, [n / 40 for n in range(40)])
    for who in range(3):
        outcomes = [which for rank, _, which in found if rank == who]
        turn = outcomes.index("new") if "new" in outcomes else len(outcomes)
        assert turn > 10 and outcomes == ["old"] * turn + ["new"] * (len(outcomes) - turn)
