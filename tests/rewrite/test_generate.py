"""Generated code does what the graph says, to the bit."""

import torch
from expecttest import assert_expected_inline
from torch import nn

from ecospa_fx.passes.capture.capture import capture
from ecospa_fx.passes.capture.compare_eager import run
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.passes.infer.infer import infer_axes
from ecospa_fx.passes.rewrite.rewrite import rewrite
from ecospa_fx.passes.rewrite.spelling import spelling
from ecospa_fx.passes.rules import OPS

aten = torch.ops.aten


class Odd(nn.Module):
    """Ops with arguments in every place, and names that Python does not allow or that are taken."""

    def __init__(self):
        super().__init__()
        self.torch = nn.ModuleDict({"0": nn.Linear(6, 8), "class": nn.Linear(8, 6)})
        self.self = nn.Parameter(torch.randn(6))
        self.scale = nn.ParameterDict({"1": torch.randn(6)})

    def forward(self, x, *, y):
        h = self.torch["class"](nn.functional.gelu(self.torch["0"](x), approximate="tanh"))
        h = torch.add(h, x, alpha=3) * self.self - torch.rsub(h, 2.0)
        h = h + h[..., 1:-1].sum(-1, keepdim=True) + h[:, ::2, :].mean((0, 1)) + h[:, -3:].amax()
        h = torch.where(h > 0, h, float("-inf")).clamp(min=-4.0) + torch.div(h, 3, rounding_mode="floor")
        h = h.masked_fill(h.isnan(), float("inf")).clamp_max(9.0).to(torch.float64, copy=True).to(x)
        a, b = h.unflatten(-1, (2, 3)).unbind(2)
        h = torch.cat([a, b.flip(0)], dim=-1).view(x.shape[0], -1, 6).expand(x.shape[0], x.shape[1], 6)
        h = h.softmax(-1, dtype=torch.float64).float() + torch.arange(x.shape[1], device=x.device)[:, None]
        top, at = h.topk(2, dim=-1, largest=False)
        var = h.var(1, correction=0, keepdim=True) * self.scale["1"] + torch.zeros_like(y)
        return {"out": h + var, "top": top, "at": at.repeat(1, 1, 2)}


def test_it_runs_to_the_bit_as_the_graph_does():
    torch.manual_seed(0)
    module, x, y = Odd(), torch.randn(3, 5, 6, requires_grad=True), torch.randn(3, 1, 6)
    captured = capture(module, (x,), {"y": y})
    program = rewrite(infer_axes(captured), {}, module)
    for size in (5, 7):
        x, y = torch.randn(2, size, 6, requires_grad=True), torch.randn(2, 1, 6)
        expected = run(captured, named_tensors(module), [x, y])
        out = program(module, [x, y])
        eager = module(x, y=y)
        assert out.keys() == eager.keys()
        for a, b, c in zip(expected, out.values(), eager.values()):
            assert torch.equal(a, b) and torch.equal(b, c)
        gradients = [torch.autograd.grad(o.sum(), [x, *module.parameters()]) for o in (expected[0], out["out"])]
        assert all(map(torch.equal, *gradients))


def test_the_code_reads_like_code():
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 4))
    program = rewrite(infer_axes(capture(module, (torch.randn(2, 4),), {})), {}, module)
    assert_expected_inline(
        program.source,
        """\
def forward(self, tensors_0):
    _0_1 = getattr(self, '0')
    _0 = _0_1(tensors_0)
    relu = torch.relu(_0);  _0 = None
    _2 = getattr(self, '2')
    _2_weight = _2.weight
    _2_bias = _2.bias
    layer_norm = torch.layer_norm(relu, [6], _2_weight, _2_bias, 1e-05, False);  relu = _2_weight = _2_bias = None
    _3_1 = getattr(self, '3')
    _3 = _3_1(layer_norm);  layer_norm = None
    return (_3,)
""",
    )


def test_every_spelling_is_generated_by_torch_from_the_schema_of_the_op():
    """Functions and methods that are written by hand take their arguments as they like."""
    kinds = {"torch": [], "nn": [], "method": []}
    for op in OPS:
        kind, name = spelling(op) or (None, None)
        if kind is not None:
            owner = {"torch": torch, "nn": torch._C._nn, "method": torch.Tensor}[kind]
            called = getattr(owner, name)
            assert name == op._opname
            assert type(called).__name__ == ("method_descriptor" if kind == "method" else "builtin_function_or_method")
            kinds[kind].append(name)
    assert {"add", "softmax", "layer_norm", "var"} <= set(kinds["torch"])
    assert {"gelu", "linear", "scaled_dot_product_attention"} <= set(kinds["nn"])
    assert {"view", "expand", "to", "type_as"} <= set(kinds["method"])
    for written_by_hand in (aten.split.Tensor, aten.arange.start, aten.einsum.default, aten.full.default):
        assert spelling(written_by_hand) is None


def test_a_spelling_comes_and_goes_with_the_rule(monkeypatch):
    with monkeypatch.context() as without:
        without.delitem(OPS, aten.mish.default)
        assert spelling(aten.mish.default) is None
    assert spelling(aten.mish.default) == ("nn", "mish")


def test_equal_code_is_compiled_once():
    blocks = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(2)]
    programs = [rewrite(infer_axes(capture(b, (torch.randn(2, 4),), {})), {}, b) for b in blocks]
    assert programs[0].run.__code__ is programs[1].run.__code__
