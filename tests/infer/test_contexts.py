"""Contexts: heads keep different dims where that is exact, and only there."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twin import assert_equals_twin, halves, kept_positions, zeroed
from zoo import ZOO

import ecospa_fx
from ecospa_fx.errors import PinnedAxisError, ShrinkError
from ecospa_fx.passes.find.analyse import analyse

B, S, D, H, E = 2, 5, 12, 3, 4


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:-1], H, -1).transpose(1, 2)


class Attention(nn.Module):
    """Attention with somewhere for a subclass to do more to the queries, the values or the result."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def queries(self, q: Tensor) -> Tensor:
        return q

    def values(self, v: Tensor) -> Tensor:
        return v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.queries(heads(self.q(x))), self.queries(heads(self.k(x))), self.values(heads(self.v(x)))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SharedScale(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(E))

    def queries(self, q: Tensor) -> Tensor:
        return q * self.scale


class HeadsScaled(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(H, 1, E))

    def values(self, v: Tensor) -> Tensor:
        return v * self.scale


class TalkingValues(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(H, H))

    def values(self, v: Tensor) -> Tensor:
        return torch.einsum("bhsd,hg->bgsd", v, self.mix)


class SoftmaxOverHeads(Attention):
    def values(self, v: Tensor) -> Tensor:
        return v.softmax(1)


class RolledHeads(Attention):
    def values(self, v: Tensor) -> Tensor:
        return v.roll(1, 1)


class Table(Attention):
    """A table without heads, in as few dims as it has."""

    def queries(self, q: Tensor) -> Tensor:
        table = torch.arange(q.shape[-2])[:, None] * torch.arange(1, 1 + E).to(q)
        return q * table.cos() + q.sin() * table[0]


class TurnedPairs(Attention):
    """Two heads of three pairs, turned by a table [s, pairs, 2, 2] without heads: pairs may differ by head, and the two
    of a pair by pair, or by head."""

    def turned(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (2, -1)).transpose(1, 2)
        angles = torch.arange(x.shape[-2])[:, None] * torch.arange(1, 4).to(x)
        table = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).unflatten(-1, (2, 2))
        return (table * x.unflatten(-1, (-1, 2)).unsqueeze(-2)).sum(-1).flatten(-2).view_as(x)

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x).unflatten(-1, (2, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(self.turned(self.q(x)), self.turned(self.k(x)), v)
        return self.o(y.transpose(1, 2).flatten(2))


class TableOfHeads(Attention):
    """A table that has heads itself."""

    def queries(self, q: Tensor) -> Tensor:
        return q + torch.arange(H * E, dtype=q.dtype).view(H, 1, E).sin()


class Rotated(Attention):
    """A fixed change of basis: the dims are contracted with a table that has no heads."""

    def values(self, v: Tensor) -> Tensor:
        return v @ torch.arange(E * E, dtype=v.dtype).view(E, E).sin()


def contexts_of(model: nn.Module) -> dict[str, str | None]:
    compiled = ecospa_fx.compile(copy.deepcopy(model), example_inputs=(torch.randn(B, S, D),), regions="root")
    return {c.name: c.context for c in ecospa_fx.couplings(compiled)}


@pytest.mark.parametrize(
    ("build", "contexts"),
    [
        (Attention, {"qk": "heads", "vo": "heads", "heads": None}),
        (SharedScale, {"qk": None, "vo": "heads"}),  # one scale per dim, whatever the head
        (HeadsScaled, {"qk": "heads", "vo": None}),  # a parameter [h, 1, e] cannot lose an e per h
        (TalkingValues, {"qk": "heads", "vo": None}),  # the values of a head go to others; its scores do not
        (SoftmaxOverHeads, {"vo": None}),
        (RolledHeads, {"vo": None}),
        (Table, {"qk": "heads", "vo": "heads"}),
        (TurnedPairs, {"qk": "heads", "qk2": "heads", "vo": "heads"}),
        (TableOfHeads, {"qk": "heads", "vo": "heads"}),
        (Rotated, {"qk": "heads"}),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_where_heads_may_differ(build, contexts):
    torch.manual_seed(0)
    found = contexts_of(build())
    for name, context in contexts.items():
        assert found[name] is None if context is None else found[name] is not None, (name, found)


@pytest.mark.parametrize(
    "build",
    [
        Attention,
        SharedScale,
        HeadsScaled,
        TalkingValues,
        SoftmaxOverHeads,
        RolledHeads,
        Table,
        TurnedPairs,
        TableOfHeads,
        Rotated,
    ],
)
def test_differing_heads_are_exact(build):
    torch.manual_seed(0)
    plain = build().double()
    args = (torch.randn(B, S, D, dtype=torch.float64),)
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=args, regions="root")
    assert ecospa_fx.verify(model, example_inputs=args).ok
    keeps = {c: halves(c, i) for i, c in enumerate(ecospa_fx.couplings(model))}
    positions = kept_positions(plain, keeps)
    ecospa_fx.shrink(model, keeps)
    # exp(0) is 1; and what is turned into an entry comes from the other of its pair, too.
    zeroing_is_removal = build not in (SoftmaxOverHeads, TurnedPairs)
    if zeroing_is_removal:
        assert_equals_twin(model, zeroed(plain, positions), positions, args, {}, build.__name__)
    assert ecospa_fx.verify(model, example_inputs=args).ok


def test_every_attention_of_the_zoo_says_whether_heads_may_differ():
    """Not fewer than now: a rule that loses the heads on the way would be seen here."""
    differing = set()
    for name, specimen in ZOO.items():
        torch.manual_seed(0)
        analysis = analyse(specimen.build(), "", (specimen.inputs(2, 5), {}), check=False)
        if any(f.context is not None for f in analysis.discovery.couplings if f.kind in ("qk", "vo")):
            differing.add(name)
    assert differing >= {"attention", "fused_attention", "grouped_attention", "rotary_attention"} & set(ZOO)
    assert len(differing) >= 8


def attention() -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    plain = Table().double()
    args = (torch.randn(B, S, D, dtype=torch.float64),)
    return plain, ecospa_fx.compile(copy.deepcopy(plain), example_inputs=args, regions="root"), args


def named(model: nn.Module, name: str) -> ecospa_fx.Coupling:
    return next(c for c in ecospa_fx.couplings(model) if c.name == name)


def test_shrinking_heads_apart_then_together_then_whole_heads():
    plain, model, args = attention()
    ecospa_fx.shrink(model, {"vo": torch.tensor([[0, 1, 2], [1, 2, 3], [0, 2, 3]])})
    ecospa_fx.shrink(model, {"vo": torch.tensor([1, 2])})  # the second and third of what each has left
    ecospa_fx.shrink(model, {"heads": torch.tensor([0, 2])})
    ecospa_fx.shrink(model, {"vo": torch.tensor([[0], [1]]), "qk": torch.tensor([[0, 1], [2, 3]])})
    assert ecospa_fx.plan(model).kept["v.weight", 0].tolist() == [1, 11]
    assert ecospa_fx.plan(model).kept["q.weight", 0].tolist() == [0, 1, 10, 11]
    assert (named(model, "vo").size, named(model, "vo").contexts) == (1, 2)
    positions = ecospa_fx.plan(model).kept
    assert_equals_twin(model, zeroed(plain, positions), positions, args, {}, "four shrinks")
    again = copy.deepcopy(model)
    assert torch.equal(again.eval()(*args), model(*args))


def test_members_say_which_head_and_which_of_its_dims():
    _, model, _ = attention()
    ecospa_fx.shrink(model, {"vo": torch.tensor([[0, 3], [1, 2], [2, 3]])})
    vo = named(model, "vo")
    assert (vo.context, vo.contexts, vo.size) == ("heads", 3, 2)
    for member in vo.members:
        assert member.index.tolist() == [0, 1] * 3
        assert member.context.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_plan_with_differing_heads_survives_json_and_a_new_signature():
    _, model, args = attention()
    ecospa_fx.shrink(model, {"vo": torch.tensor([[0, 3], [1, 2], [2, 3]])})
    before = model(*args)
    assert ecospa_fx.Plan.from_json(ecospa_fx.plan(model).to_json()) == ecospa_fx.plan(model)
    model.eval()  # another signature: captured anew at original sizes, the plan replayed
    torch.testing.assert_close(model(*args), before, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (
            torch.tensor([[0, 1], [0, 1]]),
            "cannot shrink `vo`: keep has 2 rows; it has 3 contexts now",
        ),
        (
            torch.tensor([[0, 1], [1, 0], [0, 1]]),
            "cannot shrink `vo`: keep is not increasing; keep is a sorted LongTensor of positions that stay, or one "
            "row of them for each of its 3 contexts, sort it and drop repeats",
        ),
        (
            torch.tensor([[0, 1], [1, 4], [0, 1]]),
            "cannot shrink `vo`: keep reaches from 0 to 4, and it has entries 0 to 3 now",
        ),
        (
            torch.zeros(3, 0, dtype=torch.long),
            "cannot shrink `vo` to nothing; at least one of its 4 entries must stay, unless "
            "constraints=Constraints(min_keep=0) lets the last one go",
        ),
    ],
)
def test_bad_selections(keep, words):
    _, model, args = attention()
    before = model(*args)
    with pytest.raises(ShrinkError) as caught:
        ecospa_fx.shrink(model, {"vo": keep})
    assert str(caught.value) == words
    assert torch.equal(model(*args), before)


def test_rows_for_a_coupling_that_cannot_differ():
    _, model, _ = attention()
    with pytest.raises(ShrinkError, match="keep has 3 rows, but this coupling keeps the same entries in every context"):
        ecospa_fx.shrink(model, {"heads": torch.zeros(3, 1, dtype=torch.long)})


def test_a_plan_that_keeps_unequal_heads_is_refused():
    _, model, _ = attention()
    plan = model.__dict__["_ecospa_model"].plan
    for name, dim in (("v.weight", 0), ("v.bias", 0), ("o.weight", 1)):
        plan.original_shapes[name] = tuple(model.get_parameter(name).shape)
        plan.kept[name, dim] = torch.tensor([0, 1, 4, 8])
    region = model.__dict__["_ecospa_model"].regions[""]
    with pytest.raises(PinnedAxisError, match="keeps 1 entries of an axis of 4 in one context, 2 in another"):
        region.kept(region.naming_graph.program)
