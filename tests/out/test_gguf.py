"""save_unshrunk, cut_gguf: a shrunk model at its original sizes, and as a GGUF file cut from that.

What llama.cpp does with such files is measured in bench/llamacpp.py. Here a converter of a few lines takes the place of
its converter, and transformers that of its loader.
"""

from __future__ import annotations

import copy
import functools
import json
import re

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import ecospa_fx
from ecospa_fx import errors

gguf = pytest.importorskip("gguf")

SIZES = {
    "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8,
    "num_hidden_layers": 3, "vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
PARTS = {"input_ids": IDS, "use_cache": False}
LLAMA = gguf.MODEL_ARCH.LLAMA


def llama(tied=False, execution="graph"):
    return copy.deepcopy(compiled(tied, execution))


@functools.cache
def compiled(tied, execution):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return ecospa_fx.compile(model, example_kwargs=PARTS, execution=execution)


def shrink(model, kinds, count=lambda c, layer: c.size // 2):
    """Keep some of each coupling of these kinds, drawn at random."""
    generator = torch.Generator().manual_seed(1)
    keep = {}
    for coupling in ecospa_fx.couplings(model):
        if coupling.kind in kinds:
            layer = int(re.search(r"\.(\d+)\.", coupling.name)[1])
            order = torch.randperm(coupling.size, generator=generator)
            keep[coupling] = order[: max(1, count(coupling, layer))].sort().values
    ecospa_fx.shrink(model, keep)
    return model


def logits(model):
    with torch.no_grad():
        return model(**PARTS).logits


def turned(weight, heads):
    """Rows of rotary pairs beside each other, as llama.cpp has them."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def turned_back(weight, heads):
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def convert(directory, path, dtype=torch.float32, **fields):
    """What a converter does with a LLaMA: other names, other rows, metadata."""
    config = json.loads((directory / "config.json").read_text())
    state = load_file(directory / "model.safetensors")
    layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(LLAMA, layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_string("general.name", "a model")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for key, value in fields.items():
        writer.add_uint32(f"llama.{key}", value)
    for name, weight in state.items():
        for kind, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if kind in name:
                weight = turned(weight, config[heads])
        weight = weight.to(dtype if weight.ndim > 1 else torch.float32)
        bits = weight.dtype == torch.bfloat16
        values = weight.view(torch.uint8).numpy() if bits else weight.numpy()
        kind = gguf.GGMLQuantizationType.BF16 if bits else None
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def fields_of(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def loaded(path):
    """The model that a GGUF file describes, by its metadata and tensors alone."""
    reader, fields = gguf.GGUFReader(path), fields_of(path)
    arch = fields["general.architecture"]
    layers = fields[f"{arch}.block_count"]
    said = {
        "intermediate_size": fields[f"{arch}.feed_forward_length"],
        "num_attention_heads": fields[f"{arch}.attention.head_count"],
        "num_key_value_heads": fields[f"{arch}.attention.head_count_kv"],
    }
    each = [{key: v[i] if isinstance(v, list) else v for key, v in said.items()} for i in range(layers)]
    configs = [transformers.LlamaConfig(**{**SIZES, **own}, tie_word_embeddings=False) for own in each]
    for config in configs:
        config._attn_implementation = "sdpa"
    model = transformers.LlamaForCausalLM(configs[0]).eval()
    layer = type(model.model.layers[0])
    model.model.layers = nn.ModuleList(layer(config, i) for i, config in enumerate(configs)).eval()
    names = gguf.get_tensor_name_map(LLAMA, layers)
    read = {tensor.name: tensor for tensor in reader.tensors}
    state = {}
    for name in model.state_dict():
        tensor = read[f"{names.get_name(name.removesuffix('.weight'))}.weight"]
        data = np.array(tensor.data)
        value = torch.from_numpy(data)
        value = (value.view(torch.bfloat16) if data.dtype == np.uint8 else value).float()
        number = re.search(r"layers\.(\d+)\.", name)
        for kind, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if kind in name:
                value = turned_back(value, each[int(number[1])][heads])
        state[name] = value
    model.load_state_dict(state)
    return model


def marked(tmp_path, kinds, count=lambda c, layer: c.size // 2, **options):
    model = shrink(llama(), kinds, count)
    ecospa_fx.save_unshrunk(model, tmp_path / "marked", mark=True)
    return model, convert(tmp_path / "marked", tmp_path / "marked.gguf", **options)


EVERYTHING = ("glu", "heads", "groups", "qk", "vo")


def uneven(coupling, layer):
    return coupling.size // 2 - (layer if coupling.size > 8 else 0) + (layer % 2 if coupling.size < 4 else 0)


@pytest.mark.parametrize("execution", ["graph", "module"])
def test_unshrunk_is_what_transformers_loads_and_computes_the_same(tmp_path, execution):
    model = shrink(llama(tied=True, execution=execution), EVERYTHING, uneven)
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "tokenizer.json").write_text("{}")
    ecospa_fx.save_unshrunk(model, tmp_path / "whole", max_shard_size="20KB")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert plain.model.layers[0].mlp.up_proj.weight.shape == (40, 24)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    torch.testing.assert_close(logits(plain), logits(model))
    assert (tmp_path / "whole" / "tokenizer.json").exists()
    assert len(list((tmp_path / "whole").glob("model-*.safetensors"))) > 1
    for size in ("1GB", "20KB"):  # over a save in parts, and over one in one
        with torch.no_grad():
            model.model.norm.weight.mul_(2)
        ecospa_fx.save_unshrunk(model, tmp_path / "whole", max_shard_size=size)
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
        torch.testing.assert_close(logits(plain), logits(model))
    assert not list(tmp_path.glob(".whole*"))


def test_marks_are_what_was_removed(tmp_path):
    model = shrink(llama(), EVERYTHING)
    ecospa_fx.save_unshrunk(model, tmp_path / "marked", mark=True)
    state = load_file(tmp_path / "marked" / "model.safetensors")
    plain = transformers.LlamaForCausalLM(model.config).state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {name: t.shape for name, t in plain.items()}
    assert sum(int(tensor.isnan().sum()) for tensor in state.values()) == sum(t.numel() for t in plain.values()) - sum(
        p.numel() for p in model.parameters()
    )


def test_unshrunk_errors(tmp_path):
    with pytest.raises(errors.EcoSpaError, match="Linear is not compiled"):
        ecospa_fx.save_unshrunk(nn.Linear(2, 2), tmp_path)
    plain = ecospa_fx.compile(
        nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)), example_inputs=(torch.ones(1, 2),)
    )
    with pytest.raises(errors.EcoSpaError, match="Sequential is not a model of transformers"):
        ecospa_fx.save_unshrunk(plain, tmp_path)
    model = shrink(llama(execution="module"), ("glu",))
    assert ecospa_fx.save_pretrained(model, tmp_path / "smaller") is None
    smaller = ecospa_fx.from_pretrained(tmp_path / "smaller")
    with pytest.raises(
        errors.FormatError, match=r"does not give `model.layers.0.mlp.down_proj.weight` its .* \(24, 40\)"
    ):
        ecospa_fx.save_unshrunk(smaller, tmp_path / "whole")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(errors.FormatError, match=r"`lm_head.weight` holds NaN, so NaN cannot mark"):
        ecospa_fx.save_unshrunk(model, tmp_path / "whole", mark=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["smaller"]


def test_zeros_do_not_stand_for_what_a_norm_no_longer_sees(tmp_path):
    config = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1})
    torch.manual_seed(0)
    model = ecospa_fx.compile(transformers.LlamaForCausalLM(config), example_kwargs=PARTS, regions="root")
    ecospa_fx.shrink(model, {"residual": torch.arange(3, 21)})
    with pytest.raises(errors.FormatError, match=r"aten\.mean \(model.layers.0.input_layernorm.*would count the zeros"):
        ecospa_fx.save_unshrunk(model, tmp_path / "whole")
    ecospa_fx.save_unshrunk(model, tmp_path / "marked", mark=True)
    path = convert(tmp_path / "marked", tmp_path / "marked.gguf")
    with pytest.raises(errors.FormatError, match=r"Nor do zeros compute the same, because `.*norm.weight` has lost"):
        ecospa_fx.cut_gguf(path, tmp_path / "small.gguf", zeros=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["marked", "marked.gguf"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    model = shrink(llama(), ("glu",))
    ecospa_fx.save_unshrunk(model, tmp_path / "whole")
    before = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}

    def fails(directory, **options):
        (directory / "config.json").write_text("half")
        raise OSError("full")

    monkeypatch.setattr(model, "save_pretrained", fails, raising=False)
    with pytest.raises(OSError, match="full"):
        ecospa_fx.save_unshrunk(model, tmp_path / "whole", mark=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_widths_that_all_layers_share_are_one_number(tmp_path):
    model, path = marked(tmp_path, ("glu", "heads"))
    cut = ecospa_fx.cut_gguf(path, tmp_path / "small.gguf", heads=True)
    assert cut.written == cut.left == sum(p.numel() for p in model.parameters())
    assert cut.metadata == {
        "llama.feed_forward_length": 20, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1,
        "llama.attention.key_length": 8, "llama.attention.value_length": 8,
    }  # fmt: skip
    fields = fields_of(tmp_path / "small.gguf")
    assert cut.metadata.items() <= fields.items()
    assert (fields["general.name"], fields["tokenizer.ggml.tokens"]) == ("a model", ["a", "b"])
    torch.testing.assert_close(logits(loaded(tmp_path / "small.gguf")), logits(model))
    assert str(cut).startswith(f"{cut.before:,} -> {cut.written:,} entries; llama.feed_forward_length = 20, ")


def test_layers_of_their_own_widths_are_a_list(tmp_path):
    model, path = marked(tmp_path, ("glu", "heads", "groups"), uneven)
    with pytest.raises(errors.FormatError) as caught:
        ecospa_fx.cut_gguf(path, tmp_path / "small.gguf", heads=True)
    assert "layers keep 18 to 20 of llama.feed_forward_length" in str(caught.value)
    assert "(and 1 more such). zeros=True puts zeros there" in str(caught.value)
    assert not (tmp_path / "small.gguf").exists()
    cut = ecospa_fx.cut_gguf(path, tmp_path / "small.gguf", heads=True, per_layer=True)
    assert cut.written == cut.left == sum(p.numel() for p in model.parameters())
    assert cut.metadata["llama.feed_forward_length"] == [20, 19, 18]
    assert cut.metadata["llama.attention.head_count"] == [1, 4, 1]
    assert cut.metadata["llama.attention.head_count_kv"] == [1, 2, 1]
    torch.testing.assert_close(logits(loaded(tmp_path / "small.gguf")), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_layer", [False, True])
def test_what_the_format_cannot_hold_is_zero(tmp_path, dtype, per_layer):
    model, path = marked(tmp_path, EVERYTHING, uneven, dtype=dtype)
    with pytest.raises(errors.FormatError) as caught:
        ecospa_fx.cut_gguf(path, tmp_path / "small.gguf", heads=True, per_layer=per_layer)
    assert "`blk.0.attn_k.weight`: heads keep 4 to 4 of 8 entries, and GGUF has one length" in str(caught.value)
    cut = ecospa_fx.cut_gguf(path, tmp_path / "small.gguf", zeros=True, heads=True, per_layer=per_layer)
    assert cut.left == sum(p.numel() for p in model.parameters()) < cut.written < cut.before
    assert "of them zeros" in str(cut)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.to(dtype))
    torch.testing.assert_close(logits(loaded(tmp_path / "small.gguf")), logits(model))


def test_heads_stay_unless_they_are_asked_for(tmp_path):
    model, path = marked(tmp_path, ("glu", "heads"))
    with pytest.raises(errors.FormatError, match=r"4 of the 6 heads of block 0 are removed, which heads=True cuts"):
        ecospa_fx.cut_gguf(path, tmp_path / "small.gguf")
    cut = ecospa_fx.cut_gguf(path, tmp_path / "small.gguf", zeros=True)
    assert cut.metadata == {"llama.feed_forward_length": 20}
    torch.testing.assert_close(logits(loaded(tmp_path / "small.gguf")), logits(model))


def test_widths_at_multiples(tmp_path):
    model, path = marked(tmp_path, ("glu",), lambda c, layer: 9 + 8 * layer)
    cut = ecospa_fx.cut_gguf(path, tmp_path / "small.gguf", round_to=16, per_layer=True)
    assert cut.metadata == {"llama.feed_forward_length": [16, 32, 32]}
    torch.testing.assert_close(logits(loaded(tmp_path / "small.gguf")), logits(model))
    cut = ecospa_fx.cut_gguf(path, tmp_path / "small.gguf", round_to=32, per_layer=True)
    assert cut.metadata == {"llama.feed_forward_length": 32}  # one number does
    with pytest.raises(errors.FormatError, match="round_to=0 is not a number of entries"):
        ecospa_fx.cut_gguf(path, tmp_path / "small.gguf", round_to=0)


def test_as_of_another_architecture(tmp_path):
    model, path = marked(tmp_path, ("glu",), uneven)
    cut = ecospa_fx.cut_gguf(path, tmp_path / "small.gguf", per_layer=True, architecture="deci")
    assert cut.metadata == {"deci.feed_forward_length": [20, 19, 18]}
    fields = fields_of(tmp_path / "small.gguf")
    assert (fields["general.architecture"], fields["deci.block_count"]) == ("deci", 3)
    assert not any(key.startswith("llama.") for key in fields)
    torch.testing.assert_close(logits(loaded(tmp_path / "small.gguf")), logits(model))
    with pytest.raises(errors.FormatError, match="architecture='lama' is not known to the gguf package"):
        ecospa_fx.cut_gguf(path, tmp_path / "small.gguf", architecture="lama")
    with pytest.raises(errors.FormatError, match=r"`blk\.0\.ffn_down\.weight` is not a tensor of 'mamba'"):
        ecospa_fx.cut_gguf(path, tmp_path / "small.gguf", architecture="mamba")
