"""What can be asked of an explanation, and graphs of it, word for word."""

import json
import shutil

import networkx as nx
import pytest
import torch
from expecttest import assert_expected_inline
from test_explain import Model, X, without_lines
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ecospa_fx
from ecospa_fx import errors
from ecospa_fx.see import graphs

# ruff: noqa: E501 (what is printed is as wide as it is)


@pytest.fixture(scope="module")
def explanation():
    return ecospa_fx.explain(Model(), example_inputs=(X,))


def test_savings_word_for_word(explanation):
    assert_expected_inline(
        str(explanation.savings()),
        """\
2,064 parameters, 8.3 kB; 49.9k FLOPs in one forward of the regions

                  an entry:         all but one:
coupling  times  parameters  FLOPs    parameters  share  FLOPs
layers.*
  heads       3         192  5,440           576  27.9%  16.3k
  groups      3         128  4,160           384  18.6%  12.5k
  qk          3          96  2,720           288  14.0%  8,160
  vo          3          48  1,360           432  20.9%  12.2k
  glu         3          24    480           792  38.4%  15.8k""",
    )


def test_savings_are_what_a_shrink_saves(explanation):
    model = ecospa_fx.compile(Model(), example_inputs=(X,))
    savings = ecospa_fx.explain(model).savings()
    assert savings.parameters == sum(p.numel() for p in model.parameters())
    assert savings.bytes == 4 * savings.parameters
    for name in ("layers.0.heads", "layers.1.qk", "layers.2.vo", "layers.0.glu", "layers.1.groups"):
        before, flops = sum(p.numel() for p in model.parameters()), counted(model)
        saving = ecospa_fx.explain(model).savings()[name]
        (coupling,) = [c for c in ecospa_fx.couplings(model) if c.name == name]
        assert saving.entries == coupling.size - 1
        ecospa_fx.shrink(model, {name: torch.arange(1)})
        assert before - sum(p.numel() for p in model.parameters()) == saving.most_parameters
        assert flops - counted(model) == saving.most_flops
    assert len(savings) == 15 and {s.coupling for s in savings} == set(savings.by_coupling)
    assert json.loads(savings.to_json())["by_coupling"]["layers.0.glu"]["parameters"] == 24


def counted(model):
    """FLOPs as torch counts them, attention written out: its fused kernel is counted on some devices only."""
    written_out = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), written_out:
        model(X)
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts(explanation):
    assert explanation.savings().flops == counted(Model())


def test_flops_of_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 1))
    x = torch.randn(2, 3, 12, 12)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert ecospa_fx.explain(model, example_inputs=(x,)).savings().flops == counter.get_total_flops()


def test_why_not_word_for_word(explanation):
    assert_expected_inline(
        without_lines(str(explanation.why_not("layers.1.gate"))),
        """\
layers.1.gate.weight[0] can shrink along its axis of 12: layers.1.glu may lose all but one of its 12 entries.
layers.1.gate.weight[1] cannot shrink along its axis of 8, which it shares with layers.1.o.weight[0], layers.1.norm.weight[0], layers.1.norm.bias[0], layers.1.up.weight[1] and 1 more, because
  it leaves the region as output 0.""",
    )
    assert_expected_inline(
        str(explanation.why_not("layers.1.q.weight")),
        """\
layers.1.q.weight[0] can shrink along its axis of 2 (of 16 in all): layers.1.heads may lose all but one of its 2 entries.
layers.1.q.weight[0] can shrink along its axis of 2 (of 16 in all): layers.1.groups may lose all but one of its 2 entries.
layers.1.q.weight[0] can shrink along its axis of 2 (of 16 in all): layers.1.qk may lose all but one of its 2 entries.
layers.1.q.weight[1] has no partner along its axis of 8: no weight of the region sums over entries that another one produces along it.""",
    )


def test_why_not_names_the_op_between():
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
            self.q_norm = nn.LayerNorm(8)

        def forward(self, x):
            return self.q_norm(self.q(x)).cumsum(-1) @ self.k(x).transpose(1, 2)

    explanation = ecospa_fx.explain(Between(), example_inputs=(X,))
    assert_expected_inline(
        without_lines(str(explanation.why_not("q.weight"))),
        """\
q.weight[0] cannot shrink along its axis of 8, which it shares with q.bias[0], k.weight[0], k.bias[0], q_norm.weight[0] and 1 more, because
  aten.cumsum: results along the axis depend on other entries along it (test_seeing.py).
q.weight[1] has no partner along its axis of 8: no weight of the region sums over entries that another one produces along it.""",
    )
    assert_expected_inline(
        without_lines(str(explanation.why("q", "k"))),
        """\
q.weight[0] meets k.weight[0] along an axis of 8, which cannot shrink because
  aten.cumsum: results along the axis depend on other entries along it (test_seeing.py)
They meet so:
   1. aten.linear takes it to linear[2]: brought into a product by one side (q, linear.py).
   2. aten.layer_norm takes it to layer_norm[2]: reduced over what is left of it (q_norm, normalization.py).
   3. aten.cumsum takes it to cumsum[2]: results along the axis depend on other entries along it (test_seeing.py).
   4. aten.matmul takes it to transpose[1]: multiplied entry by entry and summed over (test_seeing.py).
   5. aten.transpose takes it to linear_1[2]: two dims change places (test_seeing.py).
   6. aten.linear takes it to k.weight[0]: brought into a product by one side (k, linear.py).""",
    )


def test_why_by_ends_of_names(explanation):
    why = explanation.why("layers.2.gate", "layers.2.down.weight")
    assert list(why.paths) == ["layers.2.glu", "an axis of 8"] and (why.a, why.b) == (
        "layers.2.gate.weight",
        "layers.2.down.weight",
    )
    assert_expected_inline(
        without_lines(str(why)),
        """\
layers.2.glu: layers.2.gate.weight[0] is coupled with layers.2.down.weight[1]:
   1. aten.linear takes it to linear_4[2]: brought into a product by one side (layers.2.gate, linear.py).
   2. aten.silu takes it to silu[2]: entries meet only entries at the same position (layers.2, test_explain.py).
   3. aten.mul takes it to mul_4[2]: entries of a product meet only entries at the same position (layers.2, test_explain.py).
   4. aten.linear takes it to layers.2.down.weight[1]: multiplied entry by entry and summed over (layers.2.down, linear.py).

layers.2.gate.weight[1] meets layers.2.down.weight[0] along an axis of 8, which cannot shrink because
  it leaves the region as output 0
They meet so:
   1. aten.linear takes it to layer_norm[2]: multiplied entry by entry and summed over (layers.2.gate, linear.py).
   2. aten.layer_norm takes it to add_2[2]: reduced over what is left of it (layers.2.norm, normalization.py).
   3. aten.add takes it to linear_6[2]: entries of a sum meet only entries at the same position (layers.2, test_explain.py).
   4. aten.linear takes it to layers.2.down.weight[0]: brought into a product by one side (layers.2.down, linear.py).""",
    )
    assert all(step.code for step in why.paths["layers.2.glu"].steps)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (lambda e: e.why("layers.0.q", "layers.1.k"), "`layers.0.q.weight` and `layers.1.k.weight` share no axis along which weights meet; why_not(name) says what lies along each of their dims"),
        (lambda e: e.why_not("gate"), "3 names end with `gate`: layers.0.gate, layers.1.gate, layers.2.gate; write one in full"),
        (lambda e: e.why_not("layers.0.gat"), "the model has no parameter or module `layers.0.gat`; similar names: layers.0.gate, layers.2.gate, layers.1.gate"),
        (lambda e: e.why_not("layers.0"), "`layers.0` holds no parameters itself; name one of its submodules: layers.0.q, layers.0.k, layers.0.v, layers.0.o, layers.0.norm, layers.0.gate, layers.0.up, layers.0.down"),
    ],
)  # fmt: skip
def test_questions_without_an_answer(explanation, question, message):
    with pytest.raises(errors.NoCouplingError) as caught:
        question(explanation)
    assert str(caught.value) == message


def test_what_lies_outside_the_regions_is_said_to():
    class Headed(Model):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            return self.head(super().forward(x))

    explanation = ecospa_fx.explain(Headed(), example_inputs=(X,))
    assert str(explanation.why_not("head.weight")) == (
        "head.weight stays whole: it lies outside the captured regions (layers.0, layers.1, ...), and only these "
        'are analysed; regions="root" captures the whole model.'
    )


def test_by_module(explanation):
    by_module = explanation.by_module()
    assert [c.kind for c in by_module["layers.1.q"]] == ["heads", "groups", "qk"]
    assert "layers.1.norm" not in by_module and next(iter(by_module)) == "layers.0.q"


def test_markdown_and_json(explanation):
    assert_expected_inline(
        without_lines(explanation.to_markdown()),
        """\
## Model: 15 couplings in 3 regions

### `layers.*`

| coupling | size | times | between | members |
|---|---:|---:|---|---|
| heads | 2 | 3 | pointwise | `q.weight[0]`, `k.weight[0]`, `v.weight[0]`, `o.weight[1]` |
| groups | 2 x 2 | 3 | pointwise | `q.weight[0]`, `o.weight[1]` |
| qk | 2 x 2 | 3 | pointwise | `q.weight[0]`, `k.weight[0]` |
| vo | 4 x 2 | 3 | linear | `v.weight[0]`, `o.weight[1]` |
| glu | 12 | 3 | pointwise | `gate.weight[0]`, `up.weight[0]`, `down.weight[1]` |

### Refused, and why

- layers.0.o.weight[0], layers.0.norm.weight[0], layers.0.norm.bias[0], layers.0.gate.weight[1], layers.0.up.weight[1], layers.0.down.weight[0] (size 8, 3 times)
  - it leaves the region as output 0

### On no coupling, and why

- no weight of the region produces the entries that it sums over: layers.0.q.weight[1] and 8 more
""",
    )
    document = json.loads(explanation.to_json())
    assert document["couplings"][1]["members"][0] == {"parameter": "layers.0.q.weight", "dim": 0, "part": None}
    assert len(document["refusals"]) == 3


def test_the_terminal_shows_the_same_words(explanation):
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(explanation)
    console.file.close()
    printed = console.export_text()
    assert set(str(explanation).split()) == set(printed.split())
    assert max(map(len, printed.splitlines())) <= 80


def test_mermaid_and_dot_word_for_word(explanation):
    graph = graphs.block_graph(explanation)
    assert_expected_inline(
        without_lines(graphs.to_mermaid(graph)),
        """\
flowchart LR
  subgraph b0["layers.* x3"]
    n0(["heads 2"]):::heads
    n1["q"]
    n2["k"]
    n3["v"]
    n4["o"]
    n5(["groups 2 x 2"]):::groups
    n6(["qk 2 x 2"]):::qk
    n7(["vo 4 x 2"]):::vo
    n8(["glu 12"]):::glu
    n9["gate"]
    n10["up"]
    n11["down"]
    n12(["refused, 8"]):::refused
    n13["norm"]
  end
  subgraph b1["layers.*.norm"]
    n14["bias"]
  end
  n0 -- "[0]" -- n1
  n0 -- "[0]" -- n2
  n0 -- "[0]" -- n3
  n0 -- "[1]" -- n4
  n1 -- "[0]" -- n5
  n1 -- "[0]" -- n6
  n2 -- "[0]" -- n6
  n3 -- "[0]" -- n7
  n4 -- "[1]" -- n5
  n4 -- "[1]" -- n7
  n4 -- "[0]" -- n12
  n8 -- "[0]" -- n9
  n8 -- "[0]" -- n10
  n8 -- "[1]" -- n11
  n9 -- "[1]" -- n12
  n10 -- "[1]" -- n12
  n11 -- "[0]" -- n12
  n12 -- "[0]" -- n13
  n12 -- "[0]" -- n14
  classDef qk fill:#4269d0,color:#fff,stroke:none
  classDef vo fill:#2a9d8f,color:#fff,stroke:none
  classDef heads fill:#8e6bbf,color:#fff,stroke:none
  classDef groups fill:#c26fb0,color:#fff,stroke:none
  classDef glu fill:#d1652c,color:#fff,stroke:none
  classDef refused fill:none,color:#c0392b,stroke:#c0392b,stroke-dasharray:4
""",
    )
    assert_expected_inline(
        without_lines(graphs.to_dot(graph)),
        """\
graph "Model" {
  rankdir=LR; ranksep=0.7; nodesep=0.12;
  node [fontname="Helvetica", fontsize=11, height=0.3, margin="0.12,0.05"];
  edge [fontname="Helvetica", fontsize=8, color="#999999"];
  subgraph cluster_0 {
    label="layers.* x3"; fontname="Helvetica"; fontsize=10; color="#bbbbbb";
    n0 [label="heads 2", shape=ellipse, style=filled, fontcolor=white, color="#8e6bbf"];
    n1 [label="q", shape=box, style="rounded"];
    n2 [label="k", shape=box, style="rounded"];
    n3 [label="v", shape=box, style="rounded"];
    n4 [label="o", shape=box, style="rounded"];
    n5 [label="groups 2 x 2", shape=ellipse, style=filled, fontcolor=white, color="#c26fb0"];
    n6 [label="qk 2 x 2", shape=ellipse, style=filled, fontcolor=white, color="#4269d0"];
    n7 [label="vo 4 x 2", shape=ellipse, style=filled, fontcolor=white, color="#2a9d8f"];
    n8 [label="glu 12", shape=ellipse, style=filled, fontcolor=white, color="#d1652c"];
    n9 [label="gate", shape=box, style="rounded"];
    n10 [label="up", shape=box, style="rounded"];
    n11 [label="down", shape=box, style="rounded"];
    n12 [label="refused, 8", shape=ellipse, style=dashed, color="#c0392b", fontcolor="#c0392b"];
    n13 [label="norm", shape=box, style="rounded"];
  }
  subgraph cluster_1 {
    label="layers.*.norm"; fontname="Helvetica"; fontsize=10; color="#bbbbbb";
    n14 [label="bias", shape=box, style="rounded"];
  }
  n1 -- n0 [label="[0]"];
  n2 -- n0 [label="[0]"];
  n3 -- n0 [label="[0]"];
  n4 -- n0 [label="[1]"];
  n1 -- n5 [label="[0]"];
  n1 -- n6 [label="[0]"];
  n2 -- n6 [label="[0]"];
  n3 -- n7 [label="[0]"];
  n4 -- n5 [label="[1]"];
  n4 -- n7 [label="[1]"];
  n4 -- n12 [label="[0]"];
  n9 -- n8 [label="[0]"];
  n10 -- n8 [label="[0]"];
  n11 -- n8 [label="[1]"];
  n9 -- n12 [label="[1]"];
  n10 -- n12 [label="[1]"];
  n11 -- n12 [label="[0]"];
  n13 -- n12 [label="[0]"];
  n14 -- n12 [label="[0]"];
}
""",
    )


def test_graphs_hold_what_was_found(explanation):
    graph = graphs.coupling_graph(explanation)
    couplings = {key for key, kind in graph.nodes(data="kind") if kind == "coupling"}
    assert couplings == {c.name for c in explanation.couplings}
    for coupling in explanation.couplings:
        weights = {m.parameter.removesuffix(".weight") for m in coupling.members if m.matrix}
        assert set(graph.neighbors(coupling.name)) == weights
    full = graphs.full_graph(explanation)
    assert len(full) == len(explanation.graph)
    for drawn in (graphs.block_graph(explanation), graph, full):
        linked = nx.node_link_graph(json.loads(graphs.to_json(drawn)), edges="edges")
        for read in (linked, nx.parse_graphml(graphs.to_graphml(drawn))):
            assert set(read) == set(drawn) and read.number_of_edges() == drawn.number_of_edges()


def test_the_block_graph_stays_small_however_deep_the_model_is():
    deep = Model()
    deep.layers = nn.ModuleList(type(deep.layers[0])() for _ in range(24))
    explanation = ecospa_fx.explain(deep, example_inputs=(X,))
    graph = graphs.block_graph(explanation)
    assert len(graph) == len(graphs.block_graph(ecospa_fx.explain(Model(), example_inputs=(X,)))) < 20
    assert "layers.* x24" in graphs.to_dot(graph)


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")
def test_svg(explanation):
    svg = graphs.to_svg(graphs.block_graph(explanation))
    assert svg.startswith("<?xml") and "layers.* x3" in svg and "glu 12" in svg


def test_svg_without_graphviz_says_what_to_do(explanation, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(errors.EcoSpaError) as caught:
        graphs.to_svg(graphs.block_graph(explanation))
    assert str(caught.value) == (
        "SVG needs the program `dot` of graphviz, which is not installed (apt install graphviz, brew install "
        "graphviz); DOT, Mermaid, GraphML and JSON need no program"
    )
