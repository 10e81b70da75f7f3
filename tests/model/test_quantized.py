"""Weights that are quantized after a shrink: served at any size, and refused where entries would have to move."""

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx
from ecospa_fx.errors import CheckpointError, NoCouplingError, ShrinkError, TargetError

aten = torch.ops.aten


class Int8(Tensor):
    """A weight in eight bits, which like those of torchao runs what inference needs, and nothing else."""

    @staticmethod
    def __new__(cls, codes, scale):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, _, size, stride):
        return cls(inner["codes"], inner["scale"])

    def dequantize(self):
        return self.codes * self.scale

    def __repr__(self):
        return "Int8()"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        (weight,) = (each for each in args if isinstance(each, cls))
        if func is aten.detach.default:
            return cls(weight.codes, weight.scale)
        if func is aten.t.default:
            return weight.dequantize().t()
        raise NotImplementedError(f"Int8 has no {func}")


class ByRow(Int8):
    """One that multiplies codes, and scales the rows of the product."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, bias = args
            product = nn.functional.linear(x, weight.codes.to(x)) * weight.scale.flatten()
            return product if bias is None else product + bias
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def quantize(model, how=Int8):
    """Quantize the weights of linear layers, as a library does that knows nothing of this one."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            codes = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = nn.Parameter(how(codes, scale), requires_grad=False)


def feed_forward(hidden=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, hidden), nn.GELU(), nn.Linear(hidden, 6), nn.LayerNorm(6), nn.Linear(6, 4)).eval()


def halve(model):
    (hidden,) = (each for each in ecospa_fx.couplings(model) if each.original_size == 12)
    ecospa_fx.shrink(model, {hidden: torch.arange(0, hidden.size, 2)})


def shrunk(**how):
    """Return a shrunk model, and one of plain torch that was made at its sizes."""
    model = ecospa_fx.compile(feed_forward(), example_inputs=(torch.randn(2, 5, 6),), **how)
    halve(model)
    plain = feed_forward(6)
    plain.load_state_dict(model.state_dict())
    return model, plain


@pytest.mark.parametrize("kind", [Int8, ByRow])
@pytest.mark.parametrize("how", [{}, {"regions": "root"}, {"execution": "module"}], ids=str)
@torch.no_grad()
def test_served_at_sizes_not_seen_before(how, kind):
    model, plain = shrunk(**how)
    quantize(model, kind)
    quantize(plain, kind)
    for x in (torch.randn(2, 5, 6), torch.randn(1, 3, 6), torch.randn(7, 1, 6), torch.randn(4, 6)):
        assert torch.equal(model(x), plain(x))
    ecospa_fx.verify(model, example_inputs=(torch.randn(2, 5, 6),))


@torch.no_grad()
def test_compiled_by_torch_as_well():
    model, plain = shrunk()
    quantize(model)
    quantize(plain)
    x = torch.randn(1, 3, 6)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), plain(x))


def test_shrink_and_save_are_refused_in_words(tmp_path):
    model, _ = shrunk()
    quantize(model)
    x = torch.randn(2, 5, 6)
    before = model(x)
    with pytest.raises(ShrinkError, match=r"`0.weight` is quantized \(Int8\), and cannot lose entries: shrink first"):
        halve(model)
    with pytest.raises(CheckpointError, match=r"`0.weight` is quantized, which safetensors cannot hold; save before"):
        ecospa_fx.save(model, tmp_path / "save")
    assert torch.equal(model(x), before)


def test_quantized_before_it_was_compiled():
    model = feed_forward()
    quantize(model)
    ecospa_fx.compile(model, example_inputs=(torch.randn(2, 5, 6),))
    with pytest.raises(ShrinkError, match=r"`0.weight` is quantized \(Int8\), and cannot lose entries: shrink first"):
        halve(model)
    with pytest.raises(TargetError, match=r"`0.weight` holds Int8, quantised weights; de-quantise the model first"):
        ecospa_fx.compress(model, [(torch.randn(2, 5, 6),)], 0.7)
    model = feed_forward()
    quantize(model, ByRow)
    with pytest.raises(NoCouplingError, match=r"`0.weight` is quantized \(ByRow\): compile and shrink before that"):
        ecospa_fx.compile(model, example_inputs=(torch.randn(2, 5, 6),))


@torch.no_grad()
def test_restored_for_tools_that_look_for_the_class_itself():
    model, plain = shrunk()
    ecospa_fx.restore(model)
    assert type(model[0]) is nn.Linear
    quantize(model)
    quantize(plain)
    x = torch.randn(1, 3, 6)
    assert torch.equal(model(x), plain(x))
