"""Python around the blocks of a model, with numbers that a smaller configuration would change."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from transformers.modeling_outputs import CausalLMOutput

import ecospa_fx


class Plain(transformers.LlamaForCausalLM):
    """Its logits times a factor, which other classes take from somewhere else."""

    def forward(self, input_ids, **more):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids, **more).last_hidden_state) * self.factor())

    def factor(self):
        return len(self.config.architectures or "A") + self.config.hidden_size


class ByConfiguration(Plain):
    """Reads the width of its FFN where nothing of it is."""

    def factor(self):
        return self.config.intermediate_size**-0.5


class ByAttribute(Plain):
    """Keeps that width as an integer of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.width = config.intermediate_size

    def factor(self):
        return 1 / self.width


class ByBuffer(Plain):
    """Keeps a number that follows from it as a tensor that no save holds."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("scale_of_width", torch.tensor(config.intermediate_size**-0.5), persistent=False)

    def factor(self):
        return self.scale_of_width


def shrunk(cls, execution="graph"):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    model, ids = cls(transformers.LlamaConfig(**sizes, vocab_size=40)).eval(), torch.arange(9)[None]
    ecospa_fx.compile(model, example_kwargs={"input_ids": ids, "use_cache": False}, execution=execution)
    ecospa_fx.shrink(model, {c: torch.arange(16) for c in ecospa_fx.couplings(model) if c.kind == "glu"})
    return model, ids


@pytest.mark.parametrize("execution", ["graph", "module"])
@pytest.mark.parametrize(
    ("cls", "where"),
    [(ByConfiguration, "config.intermediate_size` would be 16 and is 24"), (ByAttribute, "`width` would be 16"),
     (ByBuffer, "the buffer `scale_of_width`")],
)  # fmt: skip
def test_what_would_change_is_not_written_as_if_it_did_not(cls, where, execution, tmp_path):
    model, ids = shrunk(cls, execution)
    why = ecospa_fx.save_pretrained(model, tmp_path)
    assert why is not None and where in why
    # The configuration that would be smaller computes something else indeed.
    small = cls(transformers.LlamaConfig(**{**model.config.to_dict(), "intermediate_size": 16})).eval()
    small.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert not torch.allclose(small(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_numbers_that_stay_are_no_reason(tmp_path):
    model, ids = shrunk(Plain)
    assert ecospa_fx.save_pretrained(model, tmp_path) is None
    plain = Plain.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_a_save_knows_them_too(tmp_path):
    """Its regions are captured from their own calls, so nobody would see the forward around them."""
    model, ids = shrunk(ByConfiguration)
    ecospa_fx.save(model, tmp_path)
    again = ecospa_fx.load(tmp_path, lambda: ByConfiguration(model.config).eval())
    with torch.no_grad():
        again(ids, use_cache=False)
    why = ecospa_fx.save_pretrained(again, tmp_path / "plain")
    assert why is not None and "config.intermediate_size` would be 16 and is 24" in why


def test_what_a_class_says_of_models_that_are_only_tried_is_not_heard(tmp_path, caplog):
    tried = []

    class Talking(Plain):
        def __init__(self, config):
            super().__init__(config)
            if config.intermediate_size != 24:
                tried.append(config.intermediate_size)
                logging.getLogger("of the class").warning("an odd width")

    model, _ = shrunk(Talking)
    assert ecospa_fx.save_pretrained(model, tmp_path) is None
    assert tried and "odd" not in caplog.text and logging.root.manager.disable < logging.WARNING
