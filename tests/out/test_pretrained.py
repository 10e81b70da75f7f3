"""save_pretrained, from_pretrained: a shrunk model in the layout of transformers, and what plain transformers loads."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch import nn

import ecospa_fx
from ecospa_fx import errors


def llama(execution="module", layers=2):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=6, num_key_value_heads=3,
        head_dim=8, vocab_size=61, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(3, 60, (2, 7))
    return ecospa_fx.compile(model, example_kwargs={"input_ids": ids, "use_cache": False}, execution=execution), ids


def shrink(model, by=lambda c, i: c.size // 2 or 1):
    """Shrink all but the length of heads: a configuration has one, and not which entries of rotary tables go."""
    couplings = [c for c in ecospa_fx.couplings(model) if not c.in_step]
    ecospa_fx.shrink(model, {c: torch.arange(by(c, i)) for i, c in enumerate(couplings)})


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("execution", ["module", "graph"])
def test_layers_of_unequal_sizes_come_back(tmp_path, execution):
    model, ids = llama(execution)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    shrink(model, lambda c, i: 1 + (i * 7) % (c.size - 1))
    why = ecospa_fx.save_pretrained(model, tmp_path, max_shard_size="20KB")
    assert why is not None and "a LlamaConfig cannot express the sizes of this LlamaForCausalLM" in why
    loaded = ecospa_fx.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "LlamaForCausalLM" and ecospa_fx.plan(loaded) == ecospa_fx.plan(model)
    kwargs = {"input_ids": ids, "use_cache": False}
    torch.testing.assert_close(loaded(**kwargs).logits, model(**kwargs).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    if execution == "module":
        more = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(loaded.generate(ids, **more), model.generate(ids, **more))
    assert [(c.name, c.size) for c in ecospa_fx.couplings(loaded)] == [
        (c.name, c.size) for c in ecospa_fx.couplings(model)
    ]
    name = ecospa_fx.couplings(model)[-1].name
    for each in (model, loaded):
        ecospa_fx.shrink(each, {name: torch.tensor([0])})
    torch.testing.assert_close(loaded(**kwargs).logits, model(**kwargs).logits)


def test_graphs_of_equal_sizes_are_a_smaller_configuration(tmp_path):
    """The class at the sizes left is tried beside the graphs; what is loaded again captures at the original sizes."""
    model, ids = llama("graph")
    kwargs = {"input_ids": ids, "use_cache": False}
    glus = [c for c in ecospa_fx.couplings(model) if c.kind == "glu"]
    ecospa_fx.shrink(model, {c: torch.arange(1, c.size, 2) for c in glus})
    assert ecospa_fx.save_pretrained(model, tmp_path) is None
    assert json.loads((tmp_path / "config.json").read_text())["intermediate_size"] == glus[0].size // 2
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(**kwargs).logits, model(**kwargs).logits)
    loaded = ecospa_fx.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**kwargs).logits, model(**kwargs).logits)
    assert ecospa_fx.verify(loaded, example_kwargs=kwargs).ok  # a capture, at the original sizes
    assert "has not been called since" in ecospa_fx.save_pretrained(ecospa_fx.from_pretrained(tmp_path), tmp_path)
    shrink(loaded)  # heads, and their length, which differs between queries and values
    assert "cannot express the sizes" in ecospa_fx.save_pretrained(loaded, tmp_path / "heads")


def test_layers_of_equal_sizes_are_a_smaller_configuration(tmp_path):
    model, ids = llama()
    shrink(model)
    assert ecospa_fx.save_pretrained(model, tmp_path) is None
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_key_value_heads"], config["num_attention_heads"], config["intermediate_size"]) == (1, 1, 20)
    assert model.config.intermediate_size == 40
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(plain, ids), logits(model, ids))
    loaded = ecospa_fx.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.dtype == torch.float64
    torch.testing.assert_close(logits(loaded, ids).float(), logits(model, ids))


def test_a_configuration_of_parts_has_no_layers_of_its_own(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 2}
    image = {**sizes, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=12)
    model = transformers.CLIPModel(config).eval()
    call = {"input_ids": torch.randint(3, 40, (2, 5)), "pixel_values": torch.randn(2, 3, 8, 8)}
    ecospa_fx.compile(model, example_kwargs=call)
    shrink(model, lambda c, i: 1 + (i * 7) % (c.size - 1))
    why = ecospa_fx.save_pretrained(model, tmp_path)
    assert why is not None and "a CLIPConfig cannot express the sizes of this CLIPModel" in why
    assert "layer by layer (`per_layer_config`) CLIPModel of transformers" in why
    loaded = ecospa_fx.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**call).logits_per_image, model(**call).logits_per_image)


def test_what_has_not_shrunk(tmp_path):
    model, ids = llama()
    assert ecospa_fx.save_pretrained(model, tmp_path) is None
    torch.testing.assert_close(logits(ecospa_fx.from_pretrained(tmp_path), ids), logits(model, ids))


def test_errors(tmp_path):
    with pytest.raises(errors.EcoSpaError, match="Linear is not compiled"):
        ecospa_fx.save_pretrained(nn.Linear(2, 2), tmp_path)
    plain = ecospa_fx.compile(
        nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)), example_inputs=(torch.ones(1, 2),)
    )
    with pytest.raises(errors.EcoSpaError, match=r"Sequential is not a model of transformers.*use ecospa_fx\.save"):
        ecospa_fx.save_pretrained(plain, tmp_path)
    with pytest.raises(errors.CheckpointError, match=r"has no ecospa_fx\.json"):
        ecospa_fx.from_pretrained(tmp_path)
    model, _ = llama()
    shrink(model)
    ecospa_fx.save_pretrained(model, tmp_path)
    path = tmp_path / "ecospa_fx.json"
    about = json.loads(path.read_text())
    for change, message in (
        ({"format": 9}, "has format 9; this version of ecospa_fx reads 1"),
        ({"class": "os"}, "names a class os that transformers does not have"),
        ({"execution": "magic"}, ": `execution` is magic, not one of graph, module"),
        ({"regions": [3]}, ": `regions` holds something that is not a name"),
        ({"attributes": [[1, 2]]}, "has an attribute that is none"),
        ({"plan": {**about["plan"], "original_shapes": {"nothing": [3]}, "axes": []}}, "shrinks `nothing`, which a"),
    ):
        path.write_text(json.dumps({**about, **change}))
        with pytest.raises(errors.CheckpointError) as caught:
            ecospa_fx.from_pretrained(tmp_path)
        assert message in str(caught.value)
