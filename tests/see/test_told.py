"""The diff of a shrink, the summary of a model, and logs, word for word."""

import logging
import subprocess
import sys

import pytest
import torch
from expecttest import assert_expected_inline
from test_explain import Model, X
from torch import nn

import ecospa_fx
from ecospa_fx import errors, logs

# ruff: noqa: E501 (what is printed is as wide as it is)


def test_a_shrink_tells_the_sizes_of_every_layer():
    model = ecospa_fx.compile(Model(), example_inputs=(X,))
    change = ecospa_fx.shrink(model, {"layers.1.glu": torch.arange(5), "layers.2.glu": torch.arange(5)})
    assert_expected_inline(
        str(change),
        """\
2,064 -> 1,728 parameters (x 0.837)
layer          times  class             before  after
layers.*.gate      2  ShrinkableLinear  12 x 8  5 x 8
layers.*.up        2  ShrinkableLinear  12 x 8  5 x 8
layers.*.down      2  ShrinkableLinear  8 x 12  8 x 5""",
    )
    assert repr(change) == "<ModuleDiff of 6 parameters: 2,064 -> 1,728 parameters (x 0.837)>"
    ecospa_fx.shrink(model, {"layers.1.glu": torch.arange(3), "layers.0.vo": torch.arange(2)})
    whole = ecospa_fx.diff(model)
    assert whole.before["layers.1.up.weight"] == (12, 8) and whole.after["layers.1.up.weight"] == (3, 8)
    assert whole.parameters_before == 2064 and whole.parameters_after == sum(p.numel() for p in model.parameters())


def test_the_trainer_keeps_the_diff_of_its_last_shrink():
    torch.manual_seed(0)
    model = ecospa_fx.compile(Model(), example_inputs=(X,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.8, interval=1)
    assert trainer.last_shrink is None
    model(X).sum().backward()
    trainer.step()
    assert trainer.last_shrink.parameters_after == trainer.history[-1]["size"]
    assert set(trainer.history[-1]["importance"]) == {c.name for c in ecospa_fx.couplings(model)}


def test_summary_word_for_word():
    model = ecospa_fx.compile(Model(), example_inputs=(X,))
    ecospa_fx.shrink(model, {"layers.1.glu": torch.arange(5), "layers.2.glu": torch.arange(5)})
    assert_expected_inline(
        str(ecospa_fx.summary(model)),
        """\
layer                        weight           parameters  shrinks along
Model                                              1,728
  layers ModuleList                                1,728
    0 Block                                          688
      q ShrinkableLinear     16 x 8                  128  heads groups qk
      k ShrinkableLinear     8 x 8                    64  heads qk
      v ShrinkableLinear     8 x 8                    64  heads vo
      o ShrinkableLinear     8 x 16                  128  heads groups vo
      norm LayerNorm         8                        16
      gate ShrinkableLinear  12 x 8                   96  glu
      up ShrinkableLinear    12 x 8                   96  glu
      down ShrinkableLinear  8 x 12                   96  glu
    1-2 x2 Block                                   1,040
      q ShrinkableLinear     16 x 8                  128  heads groups qk
      k ShrinkableLinear     8 x 8                    64  heads qk
      v ShrinkableLinear     8 x 8                    64  heads vo
      o ShrinkableLinear     8 x 16                  128  heads groups vo
      norm LayerNorm         8                        16
      gate ShrinkableLinear  5 x 8 of 12 x 8          40  glu
      up ShrinkableLinear    5 x 8 of 12 x 8          40  glu
      down ShrinkableLinear  8 x 5 of 8 x 12          40  glu

1,728 of 2,064 parameters, 1,728 trainable, 6.9 kB""",
    )
    assert_expected_inline(
        str(ecospa_fx.summary(Model(), example_inputs=(X,), depth=3)),
        """\
layer                 weight  output      parameters
Model                         2 x 5 x 8        2,064
  layers ModuleList                            2,064
    0-2 x3 Block              2 x 5 x 8        2,064
      q Linear        16 x 8  2 x 5 x 16         128
      k Linear        8 x 8   2 x 5 x 8           64
      v Linear        8 x 8   2 x 5 x 8           64
      o Linear        8 x 16  2 x 5 x 8          128
      norm LayerNorm  8       2 x 5 x 8           16
      gate Linear     12 x 8  2 x 5 x 12          96
      up Linear       12 x 8  2 x 5 x 12          96
      down Linear     8 x 12  2 x 5 x 8           96

2,064 parameters, 2,064 trainable, 8.3 kB""",
    )


def test_summary_counts_what_is_tied_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    summary = ecospa_fx.summary(model)
    assert summary.parameters == 24 == summary.layers[0].parameters
    assert sum(layer.parameters for layer in summary.layers[1:]) == 24
    assert repr(summary) == "<Summary of Sequential: 24 parameters>"


@pytest.fixture
def log_lines(capsys):
    yield lambda: [line for line in capsys.readouterr().err.splitlines() if line.startswith("[ecospa_fx.")]
    logs.set_logs("")


def test_logs_of_every_part(log_lines):
    import re

    logs.set_logs("capture,axes,discover,+shrink,recaptures")
    model = ecospa_fx.compile(Model(), example_inputs=(X,))
    ecospa_fx.shrink(model, {"layers.1.glu": torch.arange(5)})
    model.eval()(X)
    lines = "\n".join(re.sub(r"\d+\.\d+ s", "N s", re.sub(r"\d+ nodes", "N nodes", line)) for line in log_lines())
    assert_expected_inline(
        lines,
        """\
[ecospa_fx.capture] layers.0: N nodes in N s
[ecospa_fx.axes] layers.0: axes of 44 values in N s, ops without a rule: none
[ecospa_fx.discover] layers.0: couplings heads (2), groups (2), qk (2), vo (4), glu (12); 1 refused
[ecospa_fx.discover] 3 blocks bring 100% of the entries of matrices onto couplings, the root at most 100%
[ecospa_fx.shrink] 2,064 -> 1,896 parameters (x 0.919)
[ecospa_fx.shrink] layers.1.glu: 12 -> 5
[ecospa_fx.capture] layers.0: N nodes in N s
[ecospa_fx.axes] layers.0: axes of 44 values in N s, ops without a rule: none
[ecospa_fx.discover] layers.0: couplings heads (2), groups (2), qk (2), vo (4), glu (12); 1 refused
[ecospa_fx.recaptures] layers.0, graph 2: train and eval mode differ
[ecospa_fx.recaptures] layers.1, graph 2: train and eval mode differ
[ecospa_fx.recaptures] layers.2, graph 2: train and eval mode differ""",
    )


def test_logs_are_silent_unless_asked_for(log_lines, caplog):
    ecospa_fx.explain(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), example_inputs=(torch.randn(1, 2),))
    assert log_lines() == []
    with caplog.at_level(logging.INFO, "ecospa_fx.discover"):  # but a program's own handlers see them
        ecospa_fx.explain(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), example_inputs=(torch.randn(1, 2),))
    assert "couplings ffn (3)" in caplog.text


def test_a_log_that_does_not_exist_is_named():
    with pytest.raises(errors.EcoSpaError) as caught:
        logs.set_logs("capture,shirnk")
    assert str(caught.value) == (
        "ECOSPA_LOGS: there is no log `shirnk`; the logs are capture, axes, discover, shrink, recaptures, and `all`"
    )


def test_the_environment_turns_logs_on():
    code = "import torch, ecospa_fx; ecospa_fx.explain(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)), example_inputs=(torch.randn(1, 2),))"
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**__import__("os").environ, "ECOSPA_LOGS": "discover"}
    )  # fmt: skip
    assert finished.stderr.strip() == "[ecospa_fx.discover] the model: couplings ffn (3); 0 refused"
