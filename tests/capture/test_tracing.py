"""Other tools that trace or replay a model: torch.compile, torch.export, ONNX, activation checkpointing."""

from __future__ import annotations

import pytest
import torch
from living import Lives, before_and_after, each_way
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from twin import assert_same, sliced

import ecospa_fx
from ecospa_fx.model.region import Region


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@before_and_after
@each_way
def test_torch_compile(regions, shrunk):
    """One graph without a break, for blocks too, and one more after each shrink."""
    it, counter = Lives(regions=regions, shrunk=shrunk), CompileCounterWithBackend("eager")
    compiled = torch.compile(it.model, backend=counter, fullgraph=True)
    it.agree(model=compiled)
    assert counter.frame_count == 1
    for seed in range(2):
        torch.manual_seed(seed)
        it.agree(model=compiled, x=torch.randn(3, 5, 12))
    assert counter.frame_count == 1
    ecospa_fx.shrink(it.model, {"layers.0.ffn": torch.arange(4)})
    out = compiled(**it.kwargs)
    assert counter.frame_count == 2
    compiled(**it.kwargs)
    assert counter.frame_count == 2
    torch.testing.assert_close(out, it.model(**it.kwargs), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_torch_compile_of_a_call_that_must_be_captured():
    """The capture is a break in the graph, once; what is compiled after it is whole again."""
    it, counter = Lives(), CompileCounterWithBackend("eager")
    it.model.eval(), it.twin.eval()
    compiled = torch.compile(it.model, backend=counter)
    for _ in range(2):
        it.agree(model=compiled)
    before = counter.frame_count
    it.agree(model=compiled)
    assert counter.frame_count == before <= 3  # the frames that the break left, one per block and one around them
    torch._dynamo.reset()
    torch.compile(it.model, backend=counter, fullgraph=True)(**it.kwargs)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens).logits


@before_and_after
@each_way
def test_torch_export(regions, shrunk):
    it = Lives(regions=regions, shrunk=shrunk)
    it.model.eval(), it.twin.eval()
    with pytest.raises(
        ecospa_fx.errors.CaptureError, match="call the model once with the same arguments before exporting"
    ):
        torch.export.export(it.model, (), it.kwargs, strict=False)
    it.model(**it.kwargs)
    shapes = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    program = torch.export.export(it.model, (), it.kwargs, dynamic_shapes=shapes, strict=False)
    assert {n: p.shape for n, p in program.named_parameters()} == {n: p.shape for n, p in it.model.named_parameters()}
    for x in (it.kwargs["x"], torch.randn(2, 9, 12)):
        torch.testing.assert_close(program.module()(x=x), it.twin(x), rtol=1e-4, atol=1e-5)


@before_and_after
@each_way
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx(regions, shrunk, tmp_path):
    import onnxruntime

    it = Lives(regions=regions, shrunk=shrunk)
    it.model.eval(), it.twin.eval()
    it.model(it.kwargs["x"])
    torch.onnx.export(it.model, (it.kwargs["x"],), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: it.kwargs["x"].numpy()})
    torch.testing.assert_close(torch.from_numpy(out), it.twin(it.kwargs["x"]).detach(), rtol=1e-4, atol=1e-4)


@before_and_after
@each_way
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_a_region(reentrant, regions, shrunk):
    it = Lives(regions=regions, shrunk=shrunk)

    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
            self.layers, self.head = model.layers, model.head

        def forward(self, x):
            if regions == "root":
                return checkpoint(self.model, x, use_reentrant=reentrant)
            for layer in self.layers:
                x = checkpoint(layer, x, None, use_reentrant=reentrant)
            return self.head(x)

    it.model.eval(), it.twin.eval()  # a batch norm counts a recomputed forward twice
    wrapped = Checkpointed(it.model)
    x = it.kwargs["x"]
    out, expected = (model(x.clone().requires_grad_()) for model in (wrapped, it.twin))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    grads = []
    for model, y in ((it.model, out), (it.twin, expected)):
        y.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    wanted = {name: sliced(g, name, it.positions) for name, g in grads[1].items()}
    assert_same(wanted, grads[0], 1e-4, "gradients")


@before_and_after
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_checkpointing_in_transformers(reentrant, shrunk, monkeypatch):
    it = Lives("gpt2", "blocks", shrunk)
    for model in it.both:
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls, run = [], Region.__call__
    monkeypatch.setattr(Region, "__call__", lambda self, *args: calls.append(self.name) or run(self, *args))
    it.agree()
    assert sorted(calls) == 2 * ["transformer.h.0"] + 2 * ["transformer.h.1"]  # each once more to compute it again
