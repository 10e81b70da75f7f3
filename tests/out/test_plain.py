"""Uniform models without this library: plain transformers, plain timm and GGUF take them, and compute the same."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest
import torch
import transformers
from deployed import MODELS, built, trained
from torch import nn
from without_us import WITHOUT_US

import ecospa_fx
from ecospa_fx import errors

PLAIN = f"""{WITHOUT_US}
for directory in sys.argv[1:]:
    call, expected, name = torch.load(directory + "/expected.pt")
    model = getattr(transformers, name).from_pretrained(directory).eval()
    with torch.no_grad():
        result = model(**call).logits
    print(float((result - expected).abs().max() / expected.abs().max()))
print("ecospa_fx" in sys.modules)
"""


def saved(kind, directory, **settings):
    model, call = built(kind)
    trainer = trained(model, call, **settings)
    assert trainer.done and any(c.size < c.original_size for c in ecospa_fx.couplings(model))
    assert ecospa_fx.save_pretrained(model, directory) is None
    with torch.no_grad():
        torch.save((call, model(**call).logits, type(model).__name__), directory / "expected.pt")
    return model, trainer


def differences(*directories):
    """What a process that cannot import this library finds."""
    output = subprocess.run(
        [sys.executable, "-c", PLAIN, *map(str, directories)], capture_output=True, text=True, check=False
    )
    *numbers, imported = output.stdout.split() or [output.stderr]
    assert imported == "False", output.stderr
    return [float(number) for number in numbers]


def test_a_process_without_this_library_loads_them(tmp_path):
    llama, trainer = saved("llama", tmp_path / "llama", target=0.3)
    assert {c.kind for c in ecospa_fx.couplings(llama) if c.size < c.original_size} >= {"glu", "heads"}
    # Each layer would take other entries of the rotary tables, which are computed from one length of heads.
    lengths = {f"model.layers.{i}.self_attn.{kind}" for i in range(2) for kind in ("qk", "vo")}
    assert set(trainer.deployment.forbidden) == lengths
    gpt2, trainer = saved("gpt2", tmp_path / "gpt2", target=0.62)
    kinds = ("heads", "qk", "vo")  # a GPT2Config has one number for the widths of attention and of the stream
    assert set(trainer.deployment.forbidden) == {f"transformer.h.{i}.attn.{kind}" for i in range(2) for kind in kinds}
    config = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    assert config["n_inner"] == ecospa_fx.couplings(gpt2)[-1].size < 48 and config["n_head"] == 8
    assert max(differences(tmp_path / "llama", tmp_path / "gpt2")) < 1e-6


def test_gguf_of_one_needs_neither_lists_nor_zeros(tmp_path):
    """The converter of test_gguf.py takes the directory as it is: nothing was put back, and nothing has to be cut."""
    test_gguf = pytest.importorskip("test_gguf")
    model = test_gguf.llama(execution="module")
    trainer = trained(model, test_gguf.PARTS, target=0.5, multiple_of={"glu": 8, "heads": 2}, frozen=["*.groups"])
    assert trainer.done and ecospa_fx.save_pretrained(model, tmp_path) is None
    by_kind = {}
    for coupling in ecospa_fx.couplings(model):
        by_kind.setdefault(coupling.kind, set()).add(coupling.size)
    assert by_kind["heads"] == {2} and len(by_kind["glu"]) == 1 and by_kind["glu"].pop() % 8 == 0
    path = test_gguf.convert(tmp_path, tmp_path / "small.gguf")
    fields = test_gguf.fields_of(path)
    assert not any(isinstance(value, list) for key, value in fields.items() if key.startswith("llama."))
    assert fields["llama.attention.head_count"] == 4 and fields["llama.attention.head_count_kv"] == 2
    for tensor in test_gguf.gguf.GGUFReader(path).tensors:
        if not tensor.name.startswith("blk."):
            continue  # the embedding of the padding is zero
        rows = torch.from_numpy(tensor.data.copy()).reshape(-1, int(tensor.shape[0]))
        assert (rows != 0).any(0).all() and (rows != 0).any(1).all()
    with torch.no_grad():
        torch.testing.assert_close(test_gguf.loaded(path)(**test_gguf.PARTS).logits, test_gguf.logits(model))


@pytest.mark.sweep
@pytest.mark.timeout(1200)  # two minutes of one core where an encoder and a decoder have sizes of their own
@pytest.mark.parametrize("kind", MODELS)
def test_every_type(kind, tmp_path):
    saved(kind, tmp_path)
    assert max(differences(tmp_path)) < 1e-6


def test_a_length_of_heads_that_the_configuration_left_open(tmp_path):
    """Qwen2 computes it from two numbers of which one has changed; its class reads a field that was not set."""
    model, call = built("qwen2")
    ecospa_fx.shrink(model, {c: torch.arange(2) for c in ecospa_fx.couplings(model) if c.kind == "heads"})
    assert not hasattr(model.config, "head_dim") or model.config.head_dim is None
    assert ecospa_fx.save_pretrained(model, tmp_path) is None
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]) == (4, 4, 2)
    plain = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(plain(**call).logits, model(**call).logits)
    loaded = ecospa_fx.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**call).logits, model(**call).logits)
    ecospa_fx.shrink(loaded, {c: torch.arange(20) for c in ecospa_fx.couplings(loaded) if c.kind == "glu"})
    assert ecospa_fx.save_pretrained(loaded, tmp_path) is None  # from a configuration that is smaller already
    assert json.loads((tmp_path / "config.json").read_text())["intermediate_size"] == 20


@pytest.mark.sweep
def test_shapes_that_would_mean_something_else_are_not_written(tmp_path):
    """By hand: a scale that follows from a number in the configuration, and not from the weights."""

    class Scaled(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.model.layers:
                layer.self_attn.scaling = config.intermediate_size**-0.5

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=61
    )
    ids = torch.randint(3, 60, (2, 7))
    model = ecospa_fx.compile(
        Scaled(config).eval(), example_kwargs={"input_ids": ids, "use_cache": False}, execution="module"
    )
    ecospa_fx.shrink(model, {c: torch.arange(20) for c in ecospa_fx.couplings(model) if c.kind == "glu"})
    why = ecospa_fx.save_pretrained(model, tmp_path)
    assert "a LlamaConfig with intermediate_size=20 gives the shapes of this Scaled, but" in why
    assert "would give results that differ by" in why


def test_layers_of_their_own_sizes_where_the_class_reads_them(tmp_path):
    """Gemma 4 of transformers 5.24 reads the number of key heads layer by layer, those of one kind alike."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    config = transformers.Gemma4TextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, global_head_dim=8, vocab_size=61, vocab_size_per_layer_input=61, hidden_size_per_layer_input=8,
        num_kv_shared_layers=0, layer_types=kinds,
    )  # fmt: skip
    model, ids = transformers.Gemma4ForCausalLM(config).eval(), torch.randint(3, 60, (2, 7))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    ecospa_fx.compile(model, example_kwargs=call, execution="module")
    one = {f"model.layers.{i}.self_attn.{'groups' if i == 2 else 'heads'}": torch.arange(1) for i in range(3)}
    ecospa_fx.shrink(model, one)
    assert ecospa_fx.save_pretrained(model, tmp_path) is None
    written = json.loads((tmp_path / "config.json").read_text())
    by_layer = {int(i): numbers for i, numbers in written["per_layer_config"].items()}
    heads = [by_layer.get(i, {}).get("num_key_value_heads", written["num_key_value_heads"]) for i in range(3)]
    assert heads == [1, 1, 2] and written["num_attention_heads"] == 2
    plain = transformers.Gemma4ForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(plain(**call).logits, model(**call).logits)
    ecospa_fx.shrink(model, {"model.layers.0.mlp.glu": torch.arange(30)})
    why = ecospa_fx.save_pretrained(model, tmp_path)
    assert "layer by layer (`per_layer_config`) Gemma4ForCausalLM of transformers" in why
    assert "reads only" in why and "num_key_value_heads" in why.partition("reads only")[2]


class Mixer(nn.Module):
    """A net whose constructor has a whole number, a float, a tuple and a flag."""

    def __init__(self, width=8, ratio=2.0, heads=(3, 5), depth=2, scaled=False):
        super().__init__()
        self.scale = ratio if scaled else 1.0
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, int(width * ratio)), nn.GELU(), nn.Linear(int(width * ratio), width))
            for _ in range(depth)
        )
        self.ends = nn.ModuleList(
            nn.Sequential(nn.Linear(width, size), nn.Tanh(), nn.Linear(size, 2)) for size in heads
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + self.scale * block(x)
        return torch.cat([end(x) for end in self.ends], -1)


def mixer(**arguments):
    torch.manual_seed(0)
    x = torch.randn(3, arguments.get("width", 8))
    model = Mixer(**arguments)
    return ecospa_fx.compile(model, example_inputs=(x,), regions="root", execution="module"), x


@pytest.mark.parametrize("given", [{}, {"width": 6, "ratio": 3.0}], ids=str)
def test_arguments_of_a_constructor(given):
    model, x = mixer(**given)
    inner = [c for c in ecospa_fx.couplings(model) if c.name.startswith("blocks")]
    last = next(c for c in ecospa_fx.couplings(model) if c.size == 5)
    ecospa_fx.shrink(model, {**{c: torch.arange(1, c.size - 2) for c in inner}, last: torch.tensor([0, 2])})
    found = ecospa_fx.constructor_arguments(model, Mixer, **given)
    assert found == {**given, "ratio": (inner[0].size - 3) / given.get("width", 8), "heads": (3, 2)}
    plain = Mixer(**found)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), model(x))


def test_constructors_that_cannot():
    model, _ = mixer()
    names = [c.name for c in ecospa_fx.couplings(model) if c.name.startswith("blocks")]
    ecospa_fx.shrink(model, {names[0]: torch.arange(4)})
    with pytest.raises(errors.FormatError, match=r"Mixer\(\.\.\.\) cannot express the sizes of this Mixer: `blocks"):
        ecospa_fx.constructor_arguments(model, Mixer)
    with pytest.raises(errors.FormatError, match=r"with these arguments Mixer\(\.\.\.\) does not make the original of"):
        ecospa_fx.constructor_arguments(model, Mixer, width=10)
    with pytest.raises(errors.ArgumentError, match=r"constructor_arguments: `make` is 'vit'; it must be a function"):
        ecospa_fx.constructor_arguments(model, "vit")
    scaled, _ = mixer(scaled=True)
    ecospa_fx.shrink(scaled, {name: torch.arange(8) for name in names})
    with pytest.raises(
        errors.FormatError, match=r"Mixer\(\.\.\.\) with ratio=1\.0 gives the shapes of this Mixer, but"
    ):
        ecospa_fx.constructor_arguments(scaled, Mixer, scaled=True)


TIMM = {
    "vit_tiny_patch16_224": {"depth": 2, "img_size": 32, "num_classes": 5},
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 32, "num_classes": 5},
    "mixer_s32_224": {"img_size": 64, "num_classes": 5},
    "cait_xxs24_224": {"depth": 2, "img_size": 32, "num_classes": 5},
    "eva02_tiny_patch14_224": {"depth": 2, "img_size": 28, "num_classes": 5},
    "xcit_nano_12_p16_224": {"depth": 2, "img_size": 32, "num_classes": 5},
}


def made_by_timm(name):
    """Train a model of timm to three quarters, and compare it with what plain timm makes of the arguments found."""
    import timm

    given = TIMM[name]
    make = functools.partial(timm.create_model, name, **given)
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 3, given["img_size"], given["img_size"])
    ecospa_fx.compile(model, example_inputs=(x,), execution="module")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    trainer = ecospa_fx.EcoSpaTrainer(
        model, optimizer, target=0.75, among="prunable", interval=1, end=2, deployable=make, score="magnitude"
    )
    for _ in range(3):
        model(x).pow(2).mean().backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    assert trainer.done
    found = ecospa_fx.constructor_arguments(model, functools.partial(timm.create_model, name), **given)
    plain = timm.create_model(name, **found).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(plain(x), model(x)) and found != given


def test_arguments_of_timm():
    made_by_timm("vit_tiny_patch16_224")


@pytest.mark.sweep
@pytest.mark.parametrize("name", TIMM)
def test_arguments_of_every_family(name):
    made_by_timm(name)
