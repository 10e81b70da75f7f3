"""Hooks on modules inside a region fire as they would without a graph, or the call is refused; none is dropped."""

from __future__ import annotations

import copy

import pytest
import torch
from living import Lives, before_and_after, each_way
from test_models import made
from torch._subclasses.fake_tensor import FakeTensor
from twin import half, kept_positions, zeroed

import ecospa_fx
from ecospa_fx import errors


def recording(seen, name):
    def hook(module, args, result):
        seen.append((name, type(module).__name__, args[0].detach().clone(), result.detach().clone()))

    return hook


def kept(tensor, positions, name, parameter_dim, dim):
    left = positions.get((name, parameter_dim))
    return tensor if left is None else tensor.index_select(dim, left)


@each_way
@pytest.mark.parametrize("when", ["before compile", "after compile", "after a shrink"])
@pytest.mark.parametrize("path", ["up", "norm"])
def test_hooks_that_look(path, when, regions):
    """On an nn.Linear, which the graph calls, and on a batch norm, which it does not."""
    it, seen, twins = Lives(regions=regions, shrunk=when == "after a shrink"), [], []
    if when == "before compile":
        it.plain.layers[1].get_submodule(path).register_forward_hook(recording(seen, path))
        it.model = ecospa_fx.compile(it.plain, example_kwargs=it.kwargs, regions=regions)
        assert not any(isinstance(t, FakeTensor) for _, _, *tensors in seen for t in tensors)
        seen.clear()
    else:
        it.model.layers[1].get_submodule(path).register_forward_hook(recording(seen, path))
    it.twin.layers[1].get_submodule(path).register_forward_hook(recording(twins, path))
    it.agree()
    it.agree()
    assert len(seen) == len(twins) == 2
    for (*_, a_in, a_out), (*_, b_in, b_out) in zip(seen, twins):
        if path == "up":
            b_in, b_out = (kept(b, it.positions, "layers.1.up.weight", dim, 2) for b, dim in ((b_in, 1), (b_out, 0)))
        else:
            b_in, b_out = (kept(b, it.positions, "layers.1.up.weight", 0, 1) for b in (b_in, b_out))
        torch.testing.assert_close(a_in, b_in, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a_out, b_out, rtol=1e-4, atol=1e-5)
    it.model.layers[1].get_submodule(path)._forward_hooks.clear()
    it.agree()
    assert len(seen) == 2


@before_and_after
@each_way
def test_a_hook_on_a_linear_may_change_what_it_gives(regions, shrunk):
    it = Lives(regions=regions, shrunk=shrunk)
    for model in it.both:
        model.layers[0].up.register_forward_hook(lambda module, args, result: 2 * result)
        model.layers[1].out.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    it.agree()


@each_way
def test_a_hook_elsewhere_that_changes_what_it_gets(regions):
    it = Lives(regions=regions, shrunk=False)
    for model in it.both:
        model.layers[0].norm.register_forward_hook(lambda module, args, result: 2 * result)
    it.agree()  # nothing has shrunk: the model's own Python runs
    it = Lives(regions=regions)
    it.model.layers[0].norm.register_forward_hook(lambda module, args, result: 2 * result)
    with pytest.warns(UserWarning, match=r"forward hooks on (layers.0.)?norm are part of the captured graph from now"):
        it.model(**it.kwargs)
    it.twin.layers[0].norm.register_forward_hook(lambda module, args, result: 2 * result)
    it.agree()


def test_a_hook_that_changes_things_only_later_is_refused():
    it, change = Lives(regions="blocks"), []
    it.model.layers[0].norm.register_forward_hook(lambda module, args, result: 2 * result if change else None)
    it.agree()
    change.append(True)
    with pytest.raises(errors.EcoSpaError) as caught:
        it.model(**it.kwargs)
    assert str(caught.value) == (
        "a forward hook on `layers.0.norm` changes what goes through it, but `layers.0` has shrunk and runs as one "
        "graph, whose values a hook can only look at. Register it before the first call, or put it on an nn.Linear"
    )


@each_way
def test_backward_hooks(regions):
    it, seen = Lives(regions=regions, shrunk=False), []
    handle = it.model.layers[0].norm.register_full_backward_hook(lambda *_: seen.append("norm"))
    it.model.layers[0].up.register_full_backward_hook(lambda *_: seen.append("up"))
    it.agree()
    assert seen == ["norm", "up"]
    ecospa_fx.shrink(it.model, {"layers.0.ffn": torch.arange(4)})
    with pytest.raises(errors.EcoSpaError) as caught:
        it.model(**it.kwargs)
    where = "layers.0" if regions == "blocks" else "the model"
    assert str(caught.value) == (
        f"`layers.0.norm` has a backward hook, but `{where}` has shrunk and runs as one graph, in which it would not "
        "be called. Remove it, put it on an nn.Linear, on a parameter or on the region, or compile with "
        "execution='module', whose own Python calls it"
    )
    handle.remove()
    it.model(**it.kwargs).sum().backward()
    assert seen == ["norm", "up", "up"]


def test_hooks_that_a_graph_holds_are_noticed_when_they_go():
    it = Lives(shrunk=False)
    handle = it.plain.layers[0].norm.register_forward_hook(lambda module, args, result: 2 * result)
    with pytest.warns(UserWarning, match="forward hooks on layers.0.norm are part of the captured graph from now on"):
        model = ecospa_fx.compile(it.plain, example_kwargs=it.kwargs, regions="root")
    with pytest.raises(AssertionError):
        it.agree(model=model)
    handle.remove()
    it.agree(model=model)


@before_and_after
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_hidden_states_and_attentions_of_blocks(name, shrunk):
    """transformers records both by hooks, on the blocks and inside them, which stay once they have been asked for."""
    torch.manual_seed(0)
    plain, kwargs = made(name, torch.float32, attn_implementation="eager")
    it = Lives(name, "blocks", shrunk=False)
    it.plain, it.twin, it.kwargs = plain, copy.deepcopy(plain), kwargs
    it.model = ecospa_fx.compile(copy.deepcopy(plain), example_kwargs=kwargs, regions="blocks")
    if shrunk:
        keeps = {c: half(c.size, i) for i, c in enumerate(ecospa_fx.couplings(it.model)) if c.kind != "groups"}
        it.positions = kept_positions(plain, keeps)
        it.twin = zeroed(plain, it.positions)
        ecospa_fx.shrink(it.model, keeps)
    asked = {"output_hidden_states": True, "output_attentions": True}
    got, expected = it.model(**kwargs, **asked), it.twin(**kwargs, **asked)
    assert len(got.hidden_states) == len(expected.hidden_states) == 3
    for a, b in zip(got.hidden_states, expected.hidden_states):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(got.attentions) == len(expected.attentions) == 2
    for i, (a, b) in enumerate(zip(got.attentions, expected.attentions)):
        if shrunk:  # heads that are gone are not there to be seen
            heads = next(c for c in ecospa_fx.couplings(it.model) if c.kind == "heads" and f".{i}." in c.name)
            groups = b.shape[1] // heads.original_size
            left = next(k for c, k in keeps.items() if c.name == heads.name)
            b = b.unflatten(1, (heads.original_size, groups))[:, left].flatten(1, 2)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    it.agree()  # the hooks are still there, and have nothing to do


def test_hidden_states_of_a_root():
    it = Lives("gpt2", "root")
    got, expected = (model(**it.kwargs, output_hidden_states=True).hidden_states for model in it.both)
    assert len(got) == len(expected) == 3
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    it.agree()


def test_hidden_states_need_the_residual_stream_whole():
    it = Lives("gpt2", "root", shrunk=False)
    (stream,) = (c for c in ecospa_fx.couplings(it.model) if c.kind == "residual")
    ecospa_fx.shrink(it.model, {stream: half(stream.size, 0)})
    with pytest.raises(errors.PinnedAxisError, match=r"all 24 entries of an axis that has shrunk to 12 .* output 1"):
        it.model(**it.kwargs, output_hidden_states=True)
    assert it.model(**it.kwargs).logits.shape == it.twin(**it.kwargs).logits.shape
