"""What explain prints, word for word, on a small model; the graph behind it; the path between two weights."""

import copy

import networkx as nx
import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from zoo import ZOO

import ecospa_fx
from ecospa_fx import errors


class Block(nn.Module):
    """Attention with two query heads to a key head, rotary halves, and a gated MLP."""

    def __init__(self, width=8, heads=4, kv_heads=2, dim=4, hidden=12):
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.q, self.k = nn.Linear(width, heads * dim, bias=False), nn.Linear(width, kv_heads * dim, bias=False)
        self.v, self.o = nn.Linear(width, kv_heads * dim, bias=False), nn.Linear(heads * dim, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x, cos, sin):
        b, s, _ = x.shape
        q, k, v = (f(x).view(b, s, -1, self.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (t * cos + torch.cat([-t[..., self.dim // 2 :], t[..., : self.dim // 2]], -1) * sin for t in (q, k))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, s, -1))
        n = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(n)) * self.up(n))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        angle = torch.arange(x.shape[1], device=x.device)[:, None] / torch.ones(self.layers[0].dim, device=x.device)
        for layer in self.layers:
            x = layer(x, angle.cos(), angle.sin())
        return x


X = torch.randn(2, 5, 8)
# ruff: noqa: E501 (what is printed is as wide as it is)


def without_lines(text):
    """Paths name lines of this file, which edits move."""
    import re

    return re.sub(r"(test_explain\.py|\w+\.py):\d+", r"\1", text)


def test_explain_word_for_word():
    model = Model()
    before = {name: t.clone() for name, t in model.state_dict().items()}, [type(m) for m in model.modules()]
    explanation = ecospa_fx.explain(model, example_inputs=(X,))
    assert_expected_inline(
        repr(explanation), """<Explanation of Model: 15 couplings in 3 regions, 3 refused, 0 ops without a rule>"""
    )
    assert_expected_inline(
        without_lines(str(explanation)),
        """\
Model: 15 couplings in 3 regions

layers.*
  coupling   size  times  between    members
  heads         2      3  pointwise  q.weight[0] k.weight[0] v.weight[0]
                                     o.weight[1]
  groups    2 x 2      3  pointwise  q.weight[0] o.weight[1]
  qk        2 x 2      3  pointwise  q.weight[0] k.weight[0]
  vo        4 x 2      3  linear     v.weight[0] o.weight[1]
  glu          12      3  pointwise  gate.weight[0] up.weight[0] down.weight[1]

Refused, and why:
  layers.0.o.weight[0], layers.0.norm.weight[0], layers.0.norm.bias[0],
    layers.0.gate.weight[1], layers.0.up.weight[1], layers.0.down.weight[0]
    (size 8, 3 times)
    - it leaves the region as output 0

On no coupling, and why:
  no weight of the region produces the entries that it sums over:
    layers.0.q.weight[1] and 8 more""",
    )
    assert [type(m) for m in model.modules()] == before[1]
    assert all(torch.equal(t, before[0][name]) for name, t in model.state_dict().items())
    assert set(explanation.seconds) == {"export", "infer", "discover"}


def test_why_word_for_word():
    model = ecospa_fx.compile(Model(), example_inputs=(X,))
    coupling = next(c for c in ecospa_fx.couplings(model) if c.kind == "groups")
    assert_expected_inline(
        without_lines(str(coupling.why("layers.0.q.weight", "layers.0.o.weight"))),
        """\
layers.0.q.weight[0] is coupled with layers.0.o.weight[1]:
   1. aten.linear takes it to linear[2]: brought into a product by one side (layers.0.q, linear.py).
   2. aten.reshape takes it to view[2]: entries keep their order, in other dims (layers.0, test_explain.py).
   3. aten.transpose takes it to transpose[1]: two dims change places (layers.0, test_explain.py).
   4. aten.mul takes it to mul[1]: entries of a product meet only entries at the same position (layers.0, test_explain.py).
   5. aten.add takes it to add[1]: entries of a sum meet only entries at the same position (layers.0, test_explain.py).
   6. aten.scaled_dot_product_attention takes it to scaled_dot_product_attention[1]: brought into a product by one side (layers.0, test_explain.py).
   7. aten.transpose takes it to transpose_3[2]: two dims change places (layers.0, test_explain.py).
   8. aten.reshape takes it to reshape[2]: entries keep their order, in other dims (layers.0, test_explain.py).
   9. aten.linear takes it to layers.0.o.weight[1]: multiplied entry by entry and summed over (layers.0.o, linear.py).""",
    )
    with pytest.raises(errors.NoCouplingError) as caught:
        coupling.why("layers.0.q.weight", "layers.0.k.weight")
    assert str(caught.value) == (
        "`layers.0.k.weight` is not a member of this coupling; its members are layers.0.o.weight, layers.0.q.weight"
    )


def test_why_a_fused_projection_meets_itself():
    specimen = ZOO["fused_segments"]
    model = ecospa_fx.compile(specimen.build(), example_inputs=specimen.inputs(2, 5))
    coupling = next(c for c in ecospa_fx.couplings(model) if c.kind == "qk")
    name = coupling.members[0].parameter
    ops = [step.op for step in coupling.why(name, name).steps]
    assert ops[0] == ops[-1] == "aten.linear" and "aten.scaled_dot_product_attention" in ops


def test_the_graph_is_the_proof():
    explanation = ecospa_fx.explain(Model(), example_inputs=(X,), regions="root")
    graph = explanation.graph
    assert isinstance(graph, nx.Graph)
    assert {kind for _, kind in graph.nodes(data="kind")} == {"parameter", "atom", "axis", "source", "op"}
    for _, _, edge in graph.edges(data=True):
        assert edge["kind"] == "lies on" or (edge["rule"] and edge["node"].op == "call_function")
    by_label = {label: node for node, label in graph.nodes(data="label")}
    for coupling in explanation.couplings:
        members = [by_label[f"{m.parameter}[{m.dim}]"] for m in coupling.members]
        assert all(nx.has_path(graph, members[0], member) for member in members)
    # Layers are joined by the residual stream, which the norms pin, and by nothing else.
    kinds = {c.name: c.kind for c in explanation.couplings}
    assert sorted(kinds.values()) == sorted(["heads", "groups", "qk", "vo", "glu"] * 3)


def test_ops_without_a_rule_are_listed_with_their_place():
    specimen = ZOO["unknown_op"]
    explanation = ecospa_fx.explain(specimen.build(), example_inputs=specimen.inputs(2, 5))
    assert {op: without_lines(where) for op, where in explanation.missing_rules.items()} == {
        "specimens.centred": "1 use, first in zoo_refused.py",
    }
    for op, where in explanation.missing_rules.items():
        assert f"  {op}: {where}" in str(explanation)


def test_a_compiled_model_needs_no_inputs():
    model = ecospa_fx.compile(Model(), example_inputs=(X,))
    ecospa_fx.shrink(model, {"layers.1.glu": torch.arange(5)})
    text = str(ecospa_fx.explain(model))
    assert (
        any(line.split()[:4] == ["glu", "5", "of", "12"] for line in text.splitlines())
        and "\nlayers.1\n" in text
        and "\nlayers.*\n" in text
    )


def test_a_model_that_waits_for_its_first_call_goes_on_waiting():
    model = ecospa_fx.compile(Model())
    waiting = type(model)
    assert len(ecospa_fx.explain(model, example_inputs=(X,)).couplings) == 15
    assert type(model) is waiting
    with pytest.raises(errors.NoInputsError):
        ecospa_fx.couplings(model)
    assert ecospa_fx.verify(model, example_inputs=(X,)).ok


def test_a_loaded_model_is_explained_at_its_sizes(tmp_path):
    model = ecospa_fx.compile(Model(), example_inputs=(X,))
    ecospa_fx.shrink(model, {"layers.1.glu": torch.arange(5)})
    ecospa_fx.save(model, tmp_path / "run")
    assert "5 of 12" in str(ecospa_fx.explain(ecospa_fx.load(tmp_path / "run", Model), example_inputs=(X,)))


def test_inputs_the_model_offers_itself():
    model = Model()
    model.example_input_array = X
    assert len(ecospa_fx.explain(model).couplings) == 15


def test_meta_device():
    with torch.device("meta"):
        model = Model()
    explanation = ecospa_fx.explain(model, example_inputs=(X.to("meta"),))
    assert [str(c) for c in explanation.couplings] == [
        str(c) for c in ecospa_fx.explain(copy.deepcopy(Model()), example_inputs=(X,)).couplings
    ]
