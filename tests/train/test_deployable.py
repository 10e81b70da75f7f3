"""EcoSpaTrainer(deployable=...): what it ties, what it forbids, what that costs, and whom it refuses."""

from __future__ import annotations

import copy
import functools
import logging

import pytest
import torch
from torch import nn

import ecospa_fx
from ecospa_fx.errors import EcoSpaError, FormatError, TargetError
from ecospa_fx.train.deployable import deployment


class Twin(nn.Module):
    """Two towers with one number for the widths of both, one that must be even, and a width that no number gives."""

    def __init__(self, hidden=12, even=8):
        super().__init__()
        if even % 2:
            raise ValueError("even is odd")
        self.left = nn.ModuleList(nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 6)) for _ in "ab")
        self.right = nn.Sequential(nn.Linear(6, hidden), nn.GELU(), nn.Linear(hidden, 6))
        self.pair = nn.Sequential(nn.Linear(6, even), nn.Tanh(), nn.Linear(even, 6))
        self.given = nn.Sequential(nn.Linear(6, 10), nn.Sigmoid(), nn.Linear(10, 6))

    def forward(self, x):
        for block in self.left:
            x = x + block(x)
        return x + self.right(x) + self.pair(x) + self.given(x)


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


@functools.cache
def original():
    torch.manual_seed(0)
    return ecospa_fx.compile(Twin(), example_inputs=(X,), regions="root", execution="module")


def trained(model, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, interval=1, end=3, **settings)
    for _ in range(4):
        model(X).pow(2).mean().backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    return trainer


def test_one_number_ties_some_and_no_number_forbids_others():
    found = deployment(copy.deepcopy(original()), Twin, ecospa_fx.Constraints())
    assert list(found.forbidden) == ["given.ffn"]
    assert found.forbidden["given.ffn"].startswith("Twin(...) cannot express the sizes of this Twin: `given.")
    assert [sorted(group) for group in found.tied] == [["left.0.ffn", "left.1.ffn", "right.ffn"]]
    assert {name: sorted(sizes) for name, sizes in found.constraints.allowed.items()} == {"pair.ffn": [2, 4, 6]}


@pytest.mark.parametrize("policy", ["paper", "adaptive"])
def test_the_constructor_makes_what_was_trained(policy, caplog):
    model = copy.deepcopy(original())
    with caplog.at_level(logging.WARNING, "ecospa_fx.shrink"):
        trainer = trained(model, policy=policy, target=0.6, deployable=Twin, absorb=False, rotate=False)
    assert trainer.done and trainer.size >= 0.6 * sum(p.numel() for p in Twin().parameters())
    arguments = ecospa_fx.constructor_arguments(model, Twin)
    assert arguments["hidden"] < 12 and arguments.get("even", 8) % 2 == 0
    plain = Twin(**arguments)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(X), model(X))
    within, without = trainer.deployment.reachable
    assert without < within < 0.6
    said = caplog.messages[0]
    assert said == str(trainer.deployment)
    assert f"targets down to {within:.3g} can be reached, and {without:.3g} without it" in said
    assert "`given.ffn` stay whole: Twin(...) cannot express" in said and "keep the same share" in said
    assert trainer.state_dict()["settings"]["deployable"] == "a function"


def test_whom_it_refuses():
    model = copy.deepcopy(original())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    make = functools.partial(ecospa_fx.EcoSpaTrainer, model, optimizer, target=0.9)
    with pytest.raises(TargetError) as caught:
        make(deployable="timm")
    assert str(caught.value) == (
        "deployable='timm' is neither 'transformers' nor a function that makes the model, such as "
        "functools.partial(timm.create_model, name, **arguments)"
    )
    with pytest.raises(EcoSpaError, match=r"deployable='transformers': Twin is not a model of transformers"):
        make(deployable="transformers")
    with pytest.raises(FormatError, match=r"does not make the original of this Twin, `left\.0\.0\.bias` dim 0 was 12"):
        make(deployable=functools.partial(Twin, hidden=4))
    with pytest.raises(
        TargetError, match=r"the smallest reachable target is 0\..* with min_keep=1, uniform='layers', 1"
    ):
        ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.05, deployable=Twin)
    assert ecospa_fx.plan(model) == ecospa_fx.Plan()


def test_graphs_are_deployed_as_well(tmp_path):
    """Half of the value heads' sizes have no number in the configuration; `compress` keeps them whole and says so."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, pad_token_id=0,
    )  # fmt: skip
    ids = torch.randint(1, 40, (2, 9))
    model = LlamaForCausalLM(config).eval()
    calls = [{"input_ids": ids, "use_cache": False}] * 2
    report = ecospa_fx.compress(model, calls, 0.6, among="prunable", deployable="transformers")
    assert {name.rpartition(".")[2] for name in report.removed} <= {"glu", "heads", "groups"}
    assert any("`model.layers.0.self_attn.vo`" in note and "stay whole" in note for note in report.notes)
    assert ecospa_fx.save_pretrained(model, tmp_path) is None
    plain = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert sum(p.numel() for p in plain.parameters()) == report.parameters[1] < report.parameters[0]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids, use_cache=False).logits)


def test_an_axis_through_several_regions_is_left_to_the_root(tmp_path):
    """Between them its own Python may compute with the new numbers: here it scales by the width."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_outputs import CausalLMOutput

    class Scaled(LlamaForCausalLM):
        def forward(self, input_ids, **more):
            x = self.model.embed_tokens(input_ids) * self.config.hidden_size**0.5
            return CausalLMOutput(logits=self.lm_head(self.model(inputs_embeds=x, **more).last_hidden_state))

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Scaled(LlamaConfig(**sizes, vocab_size=40, head_dim=4)).eval()
    ids = torch.arange(9)[None]
    ecospa_fx.compile(model, example_kwargs={"input_ids": ids, "use_cache": False}, regions="joined")
    ecospa_fx.shrink(model, {c: torch.arange(8) for c in ecospa_fx.couplings(model) if c.kind == "residual"})
    why = ecospa_fx.save_pretrained(model, tmp_path)
    assert why is not None and "runs through several regions" in why and "regions='root'" in why
