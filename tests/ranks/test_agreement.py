"""Ranks decide as one: with one that fails, one that differs, one that dies, over one group and over two."""

import os

import pytest
import torch
import torch.distributed as dist
from crew import Crew, said

from ecospa_fx.ranks.agreement import Ranks


@pytest.fixture(scope="module")
def three():
    with Crew(3) as crew:
        yield crew


def one_fails(rank, world, who):
    def prepare():
        if rank in who:
            raise ValueError(f"full disk {rank}")
        return rank

    return said(Ranks([dist.group.WORLD]).together, "shrink", prepare)


def test_one_rank_fails_and_all_say_so(three):
    others = (
        "RanksError: shrink: rank 1 cannot take part (ValueError: full disk 1), so no rank does; the model is "
        "unchanged on every rank"
    )
    assert three.run(one_fails, [1]) == [others, "ValueError: full disk 1", others]
    assert three.run(one_fails, [1, 2]) == [others, "ValueError: full disk 1", "ValueError: full disk 2"]
    assert three.run(one_fails, []) == [None] * 3


def one_differs(rank, world, values):
    facts = {"steps": 3, "plans": values[rank]}
    return said(Ranks([dist.group.WORLD]).together, "shrink", lambda: facts, lambda result: result)


def test_one_rank_differs_and_all_say_so(three):
    text = (
        "RanksError: shrink: ranks differ in plans, {} on rank {} and {} on rank {}; the model is unchanged on "
        "every rank. All ranks must make the same model, call it in the same ways and use the same settings"
    )
    (error,) = set(three.run(one_differs, [[1, 2], [1, 2], [1, 3]]))
    assert error in {text.format("[1, 2]", 0, "[1, 3]", 2)}
    (error,) = set(three.run(one_differs, ["a", "b", "b"]))
    assert error == text.format('"a"', 0, '"b"', 1)
    assert three.run(one_differs, ["a", "a", "a"]) == [None] * 3


def one_dies(rank, world):
    if rank == 1:
        os._exit(7)
    return said(Ranks([dist.group.WORLD]).together, "shrink", lambda: None)


def test_one_rank_is_killed_and_the_others_say_so(three):
    found = three.outcomes(one_dies)
    assert found[1] == ("died", 7)
    for kind, text in (found[0], found[2]):
        assert kind == "ok" and text.startswith("RanksError: shrink: another rank does not answer ("), text
        assert text.endswith("unchanged on this one. It has failed, or runs other code: see its own output")


def elsewhere(rank, world):
    ranks = Ranks([dist.group.WORLD])
    return said(ranks.meet, "shrink" if rank < 2 else "rotate")


def test_ranks_at_different_places_say_so(three):
    (text,) = set(three.run(elsewhere))
    assert text in {
        f"RanksError: ranks are at different places, `shrink` on rank {rank} and `rotate` on rank 2; the model is "
        "unchanged on every rank. All ranks must make the same model, call it in the same ways, and shrink it in the "
        "same steps"
        for rank in (0, 1)
    }


def nested(rank, world, who):
    """An error between two meetings within a larger step is told at the next one, and once."""
    ranks = Ranks([dist.group.WORLD])

    def step():
        ranks.together("inner", lambda: rank)
        if rank == who:
            raise ValueError("between")
        return ranks.mean(float(rank), "a number")

    return said(ranks.together, "outer", step), ranks.any(False, "whether all go on")


def test_an_error_between_two_meetings_is_told_at_the_next(three):
    others = (
        "RanksError: a number: rank 2 cannot take part (ValueError: between), so no rank does; the model is unchanged "
        "on every rank"
    )
    assert three.run(nested, 2) == [(others, False), (others, False), ("ValueError: between", False)]
    assert three.run(nested, None) == [(None, False)] * 3


def told(rank, world):
    """Numbers, names, tensors and values that ranks tell each other; some have other ones."""
    ranks = Ranks([dist.group.WORLD])
    tensors = {"all": torch.ones(2) * rank, "whole": torch.tensor([rank]), "odd": torch.ones(2 + rank)}
    tensors |= {"two": torch.ones(2, 2, dtype=torch.float64)} if rank != 1 else {}
    totals = ranks.totals(tensors, "it")
    return (
        ranks.mean(float(rank) if rank else None, "it"),
        ranks.mean(None, "it"),
        ranks.any(rank == 2, "it"),
        ranks.common({"a", "b", f"c{rank % 2}"}, "it"),
        ranks.first([rank, 0.1], "it"),
        ranks.gathered({rank}, "it"),
        {name: (each.tolist(), each.dtype) for name, each in totals.items()},
    )


def test_what_ranks_tell_each_other(three):
    totals = {
        "all": ([3.0, 3.0], torch.float32),
        "whole": ([3], torch.int64),
        "two": ([[2.0, 2.0], [2.0, 2.0]], torch.float64),
    }
    expected = (1.5, None, True, ["a", "b"], [0, 0.1], {0: {0}, 1: {1}, 2: {2}}, totals)
    assert three.run(told) == [expected] * 3
    assert Ranks().gathered(3, "it") == {0: 3} and Ranks().first([3], "it") == [3]


def over_two_groups(rank, world):
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    ranks = Ranks([mesh.get_group("a"), mesh.get_group("b")])
    own = Ranks([mesh.get_group("a"), mesh.get_group("a")])
    return ranks.mean(float(rank), "it"), ranks.count, own.mean(float(rank), "it"), own.count


def test_groups_of_a_mesh_make_all_of_it():
    with Crew(4) as four:
        assert four.run(over_two_groups) == [(1.5, 4, 1.0, 2), (1.5, 4, 2.0, 2), (1.5, 4, 1.0, 2), (1.5, 4, 2.0, 2)]


def test_alone_nothing_is_asked():
    assert not Ranks() and Ranks().together("shrink", lambda: 3) == 3 and Ranks().count == 1
