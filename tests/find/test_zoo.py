"""The zoo: the couplings found in each model are those written beside it, and shrinking any of them is exact."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twin import assert_equals_twin, assert_is_slice, half, kept_positions, selections, zeroed
from zoo import ZOO, Specimen

import ecospa_fx
from ecospa_fx.errors import NoCouplingError
from ecospa_fx.passes.find.analyse import Analysis, analyse
from ecospa_fx.passes.rules import OPS, OpInfo

DTYPES = (torch.float32, torch.float64)
SHRINKABLE = [name for name, specimen in ZOO.items() if specimen.couplings]

each = pytest.mark.parametrize("name", ZOO)
each_shrinkable = pytest.mark.parametrize("name", SHRINKABLE)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def made(specimen: Specimen, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = specimen.build().to(dtype)
    return model, cast(specimen.inputs(2, 5), dtype)


def cast(args: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(arg.to(dtype) if arg.is_floating_point() else arg for arg in args)


@functools.cache
def captured(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
    """A plain model, its compiled copy, and the arguments of a call. Not to be changed: copy the second."""
    plain, args = made(ZOO[name], dtype)
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=args, regions="root")
    return plain, model, args


def found(couplings: Any) -> set[tuple[str, int, frozenset[str]]]:
    return {(c.kind, c.size, frozenset(f"{m.parameter}[{m.dim}]" for m in c.members)) for c in couplings}


@functools.cache
def analysed(name: str) -> Analysis:
    model, args = made(ZOO[name])
    return analyse(model, "", (args, {}), check=False)


def keys_of(analysis: Analysis) -> set[tuple[str, int, frozenset[tuple[str, int]]]]:
    return {(f.kind, f.atom.size, frozenset(f.axes)) for f in analysis.discovery.couplings}


@each_shrinkable
def test_couplings_are_those_written_by_hand(name: str) -> None:
    _, model, _ = captured(name, torch.float32)
    assert found(ecospa_fx.couplings(model)) == ZOO[name].couplings


@each
def test_refusals_give_the_reason_written_by_hand(name: str) -> None:
    analysis = analysed(name)
    assert set(analysis.axis_facts.missing) == ZOO[name].missing
    for members, reason in ZOO[name].refusals:
        reasons = [text for r in analysis.discovery.refusals if members <= set(r.members) for text in r.reasons]
        assert any(reason in text for text in reasons), (sorted(members), reasons)


def test_a_model_without_couplings_is_left_as_it_was() -> None:
    model, args = made(ZOO["sorted_features"])
    before = type(model), {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(NoCouplingError, match="sort: entries along the axis are sorted"):
        ecospa_fx.compile(model, example_inputs=args, regions="root")
    assert type(model) is before[0] and all(torch.equal(p, before[1][n]) for n, p in model.named_parameters())


@each_dtype
@each_shrinkable
def test_shrunk_equals_masked(name: str, dtype: torch.dtype) -> None:
    _, model, args = captured(name, dtype)
    result = ecospa_fx.verify(model, example_inputs=args)
    assert len(result.by_coupling) == len(ecospa_fx.couplings(model)) + 1
    assert result.ok, result


def test_verify_sees_a_scale_that_follows_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention takes 1/sqrt(d) from what it sees; were that not written in before `d` shrinks, verify would say so."""
    op = torch.ops.aten.scaled_dot_product_attention.default
    plain, args = made(ZOO["attention"])
    monkeypatch.setitem(OPS, op, OpInfo(OPS[op].axes, None))
    result = ecospa_fx.verify(ecospa_fx.compile(plain, example_inputs=args, regions="root"), example_inputs=args)
    assert not result.ok
    assert {label for label, c in result.by_coupling.items() if c.ok} == {"vo", "heads"}


@each_dtype
@each_shrinkable
def test_shrunk_equals_zeroed(name: str, dtype: torch.dtype) -> None:
    if ZOO[name].zeroing:
        pytest.skip(f"zeroed weights are not removed weights here: {ZOO[name].zeroing}")
    plain, model, args = captured(name, dtype)
    for what, keeps in selections(ecospa_fx.couplings(model)):
        positions = kept_positions(plain, keeps)
        shrunk = copy.deepcopy(model)
        ecospa_fx.shrink(shrunk, keeps)
        assert_is_slice(shrunk, plain, positions)
        assert_equals_twin(shrunk, zeroed(plain, positions), positions, args, {}, what)


@each_dtype
@pytest.mark.parametrize("name", [name for name in SHRINKABLE if ZOO[name].zeroing])
def test_shrunk_equals_the_same_class_made_smaller(name: str, dtype: torch.dtype) -> None:
    """Where the zeroing twin cannot judge: a module that never had more than half of every coupling."""
    _, model, args = captured(name, dtype)
    shrunk = copy.deepcopy(model)
    ecospa_fx.shrink(shrunk, {c: half(c.size, i) for i, c in enumerate(ecospa_fx.couplings(model))})
    smaller = ZOO[name].smaller
    assert smaller is not None
    twin = smaller().to(dtype)
    twin.load_state_dict(shrunk.state_dict())
    assert_equals_twin(shrunk, twin, {}, args, {}, name)


@each_shrinkable
def test_batch_and_sequence_may_change_after_compile(name: str) -> None:
    plain, model, _ = captured(name, torch.float64)
    keeps = {c: half(c.size, i) for i, c in enumerate(ecospa_fx.couplings(model))}
    positions = kept_positions(plain, keeps)
    shrunk, twin = copy.deepcopy(model), zeroed(plain, positions)
    ecospa_fx.shrink(shrunk, keeps)
    for batch, sequence in ((3, 7), (1, 4), (4, 1)):
        args = cast(ZOO[name].inputs(batch, sequence), torch.float64)
        if ZOO[name].zeroing:
            assert shrunk(*args).shape == plain(*args).shape
        else:
            assert_equals_twin(shrunk, twin, positions, args, {}, f"batch {batch}, sequence {sequence}")


@each_shrinkable
def test_train_and_eval(name: str) -> None:
    plain, model, args = captured(name, torch.float64)
    keeps = {c: half(c.size, i) for i, c in enumerate(ecospa_fx.couplings(model))}
    positions = kept_positions(plain, keeps)
    shrunk, twin = copy.deepcopy(model), zeroed(plain, positions)
    ecospa_fx.shrink(shrunk, keeps)
    for mode in (True, False, True):
        shrunk.train(mode)
        twin.train(mode)
        if not ZOO[name].zeroing:
            assert_equals_twin(shrunk, twin, positions, args, {}, "train" if mode else "eval")
        assert mode or ecospa_fx.verify(shrunk, example_inputs=args).ok


@each_shrinkable
def test_shrinking_twice_is_shrinking_once(name: str) -> None:
    _, model, args = captured(name, torch.float64)
    first = {c: half(c.size, i) for i, c in enumerate(ecospa_fx.couplings(model))}
    second = {c: half(len(keep), 100 + i) for i, (c, keep) in enumerate(first.items())}
    twice, once = copy.deepcopy(model), copy.deepcopy(model)
    ecospa_fx.shrink(twice, first)
    assert ecospa_fx.verify(twice, example_inputs=args).ok
    ecospa_fx.shrink(twice, second)
    ecospa_fx.shrink(once, {c: first[c][second[c]] for c in first})
    assert {c.name: c.size for c in ecospa_fx.couplings(twice)} == {c.name: len(keep) for c, keep in second.items()}
    assert torch.equal(_flat(twice(*args)), _flat(once(*args)))
    a, b = ecospa_fx.plan(twice), ecospa_fx.plan(once)
    assert a.original_shapes == b.original_shapes and a.kept.keys() == b.kept.keys()
    assert all(torch.equal(a.kept[axis], b.kept[axis]) for axis in a.kept)
    mine, other = twice.state_dict(), once.state_dict()
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    assert [{str(m): m.index.tolist() for m in c.members} for c in ecospa_fx.couplings(twice)] == [
        {str(m): m.index.tolist() for m in c.members} for c in ecospa_fx.couplings(once)
    ]


def _flat(outputs: Any) -> Tensor:
    return torch.cat([out.flatten() for out in (outputs if isinstance(outputs, tuple) else (outputs,))])


# What a model is called, and what it does to its tensors without changing them, makes no difference.


def renamed(model: nn.Module, seed: int) -> Any:
    """Give parameters and submodules other names in another order; returns how a name now reads."""
    dice = random.Random(seed)
    tables: dict[nn.Module, dict[str, str]] = {}
    for module in list(model.modules()):
        if not type(module).__module__.startswith("zoo_"):
            continue
        held = [*module._modules, *module._parameters]
        # Numbered against the alphabet, so that no order of names survives.
        tables[module] = new = {name: f"n{len(held) - i}" for i, name in enumerate(sorted(held))}
        for store in (module._modules, module._parameters):
            entries = [(new[name], store.pop(name)) for name in list(store)]
            if not isinstance(module, nn.Sequential):
                dice.shuffle(entries)
            store.update(entries)

        own = type(module)

        def looked_up(self: nn.Module, name: str, new: dict[str, str] = new, own: type = own) -> Any:
            return super(own, self).__getattr__(new.get(name, name))

        module.__class__ = type(own.__name__, (own,), {"__getattr__": looked_up})
    children = {module: dict(module.named_children()) for module in model.modules()}

    def reads(name: str) -> str:
        module, parts = model, []
        for part in name.split("."):
            parts.append(tables.get(module, {}).get(part, part))
            module = children.get(module, {}).get(parts[-1])
        return ".".join(parts)

    return reads


@each
def test_names_and_order_make_no_difference(name: str) -> None:
    model, args = made(ZOO[name])
    reads = renamed(model, seed=1)
    named = dict(model.named_parameters(remove_duplicate=False))
    # A tied parameter goes by the name that comes first, which renaming may change.
    one_name = {name: min(other for other, p in named.items() if p is named[name]) for name in named}

    def by_one_name(found: set[Any], reads: Callable[[str], str]) -> set[Any]:
        return {
            (kind, size, frozenset((one_name.get(reads(p), reads(p)), dim) for p, dim in key))
            for kind, size, key in found
        }

    expected = by_one_name(keys_of(analysed(name)), reads)
    assert by_one_name(keys_of(analyse(model, "", (args, {}), check=False)), str) == expected


VIEWS = {
    "view": lambda x: x.view(x.shape),
    "one more dim": lambda x: x.unsqueeze(0).squeeze(0),
    "one more dim inside": lambda x: x.reshape(*x.shape[:-1], 1, x.shape[-1]).flatten(-2),
    "there and back": lambda x: x.transpose(-1, -2).transpose(-1, -2),
    "front to back": lambda x: x.movedim(0, -1).movedim(-1, 0),
    "flattened": lambda x: x.flatten(0, 1).unflatten(0, x.shape[:2]),
    "whole slice": lambda x: x[..., :],
    "copied": lambda x: x.contiguous().clone(),
    "one part": lambda x: torch.cat([x], dim=-1),
    "expanded to itself": lambda x: x.expand_as(x),
}


@each_shrinkable
@pytest.mark.filterwarnings("ignore:forward hooks on:UserWarning")
def test_views_of_the_whole_make_no_difference(name: str) -> None:
    viewed, args = made(ZOO[name], torch.float64)
    dice = random.Random(name)
    for module in viewed.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.RMSNorm)):
            after = VIEWS[dice.choice(list(VIEWS))]
            module.register_forward_hook(lambda module, args, out, after=after: after(out))
    ecospa_fx.compile(viewed, example_inputs=args, regions="root")
    assert found(ecospa_fx.couplings(viewed)) == found(ecospa_fx.couplings(captured(name, torch.float64)[1]))
    assert ecospa_fx.verify(viewed, example_inputs=args).ok


def test_hooks_run_once() -> None:
    """A hook that was there at capture is part of the graph; one that comes later is called."""
    plain, args = made(ZOO["mlp"])
    plain.up.register_forward_hook(lambda module, args, out: 3 * out)
    with pytest.warns(UserWarning, match="forward hooks on up are part of the captured graph from now on"):
        model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=args, regions="root")
    assert torch.equal(model(*args), plain(*args))
    for each_model in (plain, model):
        each_model.down.register_forward_hook(lambda module, args, out: out + 1)
    assert torch.equal(model(*args), plain(*args))


def test_a_copy_shrinks_and_the_original_does_not() -> None:
    plain, model, args = captured("transformer_block", torch.float64)
    before = model(*args)
    duplicate = copy.deepcopy(model)
    ecospa_fx.shrink(duplicate, {c.name: half(c.size, 0) for c in ecospa_fx.couplings(duplicate)})
    assert torch.equal(model(*args), before)
    assert {c.name: c.size for c in ecospa_fx.couplings(model)} == {
        c.name: c.original_size for c in ecospa_fx.couplings(model)
    }
    assert duplicate.attn.q.weight.shape != plain.attn.q.weight.shape


@each
def test_each_dim_of_each_matrix_is_on_a_coupling_or_has_a_reason(name):
    analysis = analysed(name)
    told = {f"{axis}[{dim}]" for coupling in analysis.discovery.couplings for axis, dim in coupling.axes}
    for left in (*analysis.discovery.refusals, *analysis.discovery.uncoupled):
        assert all(left.reasons)
        told.update(left.members)
    model, _ = made(ZOO[name])
    used = set(analysis.captured.tensors.values())
    for parameter, tensor in model.named_parameters():  # of tied ones, the first
        if tensor.ndim > 1 and parameter in used:
            assert {f"{parameter}[{dim}]" for dim, size in enumerate(tensor.shape) if size > 1} <= told
