"""A stream with norms on it takes another orthonormal basis: nothing that is computed changes, and few entries do."""

import copy
import math

import pytest
import torch
import transformers as hf
from test_absorb import gathered
from test_norm_weights import NORMS, WIDTH, Block, Stream
from torch import nn, optim

import ecospa_fx

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 24, "tie_word_embeddings": False,
}  # fmt: skip
DECODER = SIZES | {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 16}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS = {
    "rms": "by_hand",
    "one": "counted_from_one",
    "mean": "layer_norm",
    "fused": "rms_norm",
    "var": "centred_by_hand",
}


class Logits(nn.Module):
    """A model of transformers whose only result is what its head returns."""

    def __init__(self, model, *arguments):
        super().__init__()
        self.model, self.arguments = model, arguments

    def forward(self, x):
        more = {"decoder_input_ids": x[:, :3]} if "decoder_input_ids" in self.arguments else {}
        key = "pixel_values" if "pixel_values" in self.arguments else "input_ids"
        return self.model(**{key: x}, **more, **{"use_cache": False} if "use_cache" in self.arguments else {})[0]


def llama():
    return Logits(hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, **SPECIAL)), "use_cache")


def gemma():
    return Logits(hf.GemmaForCausalLM(hf.GemmaConfig(**DECODER, **SPECIAL)), "use_cache")


def gpt2(tied=False):
    config = hf.GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=24, n_positions=16, tie_word_embeddings=tied)
    return Logits(hf.GPT2LMHeadModel(config), "use_cache")


def opt():
    more = {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 16}
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    return Logits(hf.OPTForCausalLM(hf.OPTConfig(**sizes, **SPECIAL, **more)), "use_cache")


def t5():
    config = hf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=24,
                         tie_word_embeddings=False, decoder_start_token_id=0)  # fmt: skip
    model = hf.T5ForConditionalGeneration(config)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return Logits(model, "decoder_input_ids", "use_cache")


def vit():
    sizes = {key: value for key, value in SIZES.items() if key not in ("vocab_size", "tie_word_embeddings")}
    return Logits(hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4)), "pixel_values")


def bert():
    config = hf.BertConfig(**SIZES, max_position_embeddings=16, pad_token_id=0)
    return Logits(hf.BertForSequenceClassification(config))


def gemma2():
    return Logits(hf.Gemma2ForCausalLM(hf.Gemma2Config(**DECODER, **SPECIAL)), "use_cache")


class TokenMix(nn.Module):
    """Norms without weights, a parameter that is joined to the stream, and one that is added to it."""

    def __init__(self):
        super().__init__()
        self.embed, self.token = nn.Embedding(20, WIDTH), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(31, WIDTH))
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.places
        x = x + self.down(self.up(nn.functional.layer_norm(x, (x.shape[-1],))).relu())
        x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return self.head(x[:, 0] * 0.5)


FAMILIES = {"llama": llama, "gemma": gemma, "gpt2": gpt2, "opt": opt, "t5": t5, "vit": vit, "mix": TokenMix}
FAMILIES |= {name: (lambda kind=kind: Stream(kind)) for name, kind in KINDS.items()}
JOINED = ("llama", "gpt2", "mean", "rms", "t5")
SLOW = ("gemma", "opt", "t5")


def words(name):
    if name == "vit":
        return torch.randn(4, 3, 8, 8, dtype=torch.float64)
    return torch.randint(3, 20, (4, 30 if name in (*KINDS, "mix") else 7))


def built(name, regions="root", make=None, **how):
    torch.manual_seed(0)
    model = (make or FAMILIES[name])().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    x = words(name)
    ecospa_fx.compile(model, example_inputs=(x,), regions=regions, **how)
    return model, x


def residual(model):
    (coupling,) = [c for c in ecospa_fx.couplings(model) if c.kind == "residual"]
    return coupling


def learned(model, x):
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES = [
    pytest.param(name, how, marks=pytest.mark.sweep if name in SLOW else ())
    for name in FAMILIES
    for how in ("root", *(("joined",) if name in JOINED else ()))
]


@pytest.mark.parametrize(("name", "regions"), CASES)
def test_outputs_stay_and_gradients_follow(name, regions):
    """Gradients in the new basis are those that the turned model computes anew, of norms too."""
    model, x = built(name, regions)
    before, _ = learned(model, x)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    coupling = residual(model)
    done = ecospa_fx.rotate(model, [coupling], grams=gathered(model, (words(name),)))
    assert not done.refused and done.energy[coupling.name].shape == (1, coupling.size)
    assert all(not torch.equal(weights[m.parameter], model.get_parameter(m.parameter)) for m in coupling.members)
    carried = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    out, gradients = learned(model, x)
    rough = 1e-5 if name in ("llama", "gemma", "t5") else 1e-9  # these compute norms in float32
    torch.testing.assert_close(out, before, rtol=rough, atol=rough)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(carried[parameter], gradient, rtol=rough, atol=10 * rough, msg=parameter)


@pytest.mark.parametrize("regions", ["root", "joined"])
@pytest.mark.parametrize("kind", ["by_hand", "layer_norm"])
@pytest.mark.parametrize("data", [False, True], ids=["without_data", "with_data"])
def test_a_stream_in_a_few_directions_needs_as_few_entries(kind, regions, data):
    """No entry is idle before. A mean that is subtracted takes one entry more."""
    torch.manual_seed(0)
    model, few = Stream(kind).double(), 5
    directions = torch.linalg.qr(torch.randn(WIDTH, few, dtype=torch.float64)).Q
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "down.weight" in name or "down.bias" in name:
                parameter.copy_(directions @ directions.T @ parameter)
            elif "embed" in name:
                parameter.copy_(parameter @ directions @ directions.T)
    x = words("rms")
    expected = model(x).detach()
    ecospa_fx.compile(model, example_inputs=(x,), regions=regions)
    coupling, keep = residual(model), few + (kind == "layer_norm")
    grams, seen = gathered(model, (x,)), ((x,),) * data
    before = copy.deepcopy(model)
    ecospa_fx.rotate(model, [coupling], grams=grams)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    ecospa_fx.shrink(model, {coupling.name: torch.arange(keep)}, absorb=gathered(model, *seen))
    assert residual(model).size == keep
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    ecospa_fx.shrink(before, {coupling.name: torch.arange(keep)})
    assert float((before(x) - expected).detach().norm()) > 10 * float((model(x) - expected).detach().norm())


@pytest.mark.parametrize("name", ["rms", "mean", "gpt2"])
@pytest.mark.parametrize("make", [
    lambda p: optim.SGD(p, lr=0.0, momentum=0.9), lambda p: optim.AdamW(p, lr=0.0), lambda p: optim.ASGD(p, lr=0.0),
], ids=["sgd", "adamw", "asgd"])  # fmt: skip
def test_momentum_follows_as_the_gradient_does(name, make):
    """After one step it is a multiple of the gradient, before and after; averages of weights stay those of a model."""
    model, x = built(name)
    optimizer = make(model.parameters())
    learned(model, x)
    optimizer.step()
    ecospa_fx.rotate(model, [residual(model)], optimizer=optimizer)
    _, gradients = learned(model, x)
    for parameter, gradient in gradients.items():
        state = optimizer.state[model.get_parameter(parameter)]
        if "momentum_buffer" in state:
            torch.testing.assert_close(state["momentum_buffer"], gradient, rtol=1e-8, atol=1e-9)
        elif "exp_avg" in state:
            torch.testing.assert_close(state["exp_avg"], 0.1 * gradient, rtol=1e-8, atol=1e-9)
            assert bool((state["exp_avg_sq"] >= 0).all()) and state["exp_avg_sq"].shape == gradient.shape
        else:
            torch.testing.assert_close(state["ax"], model.get_parameter(parameter).detach())


def test_a_copy_with_other_norms_computes_what_it_did():
    model, x = built("mean")
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    expected = average(x).detach()
    ecospa_fx.rotate(model, [residual(model)], also=average)
    torch.testing.assert_close(average(x), expected)
    assert not torch.equal(average.head.weight, model.head.weight)


@pytest.mark.parametrize("name", ["mean", "rms"])
def test_moments_that_were_read_before_follow(name):
    """Weights take over after a rotation as if the moments had been read after it."""
    model, x = built(name)
    grams, coupling = gathered(model, (x,), ridge=1e-3), residual(model)
    ecospa_fx.rotate(model, [coupling], grams=grams)
    twin = copy.deepcopy(model)
    ecospa_fx.shrink(model, {coupling.name: torch.arange(7)}, absorb=grams)
    ecospa_fx.shrink(twin, {coupling.name: torch.arange(7)}, absorb=gathered(twin, (x,), ridge=1e-3))
    torch.testing.assert_close(model(x), twin(x), rtol=1e-6, atol=1e-6)


def test_a_model_that_runs_its_own_python_turns_too():
    model, x = built("gpt2", execution="module")
    before, _ = learned(model, x)
    done = ecospa_fx.rotate(model, [residual(model)])
    assert done.energy
    torch.testing.assert_close(model(x).detach(), before)
    ecospa_fx.shrink(model, {residual(model): torch.arange(12)})
    assert model(x).shape == before.shape


class Scaled(Stream):
    """What a block adds is scaled channel by channel."""

    def __init__(self):
        super().__init__("rms_norm")
        self.scales = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        x = self.embed(x)
        return self.head(self.norm(x + self.scales * self.blocks[0](x)))


class Placed(Stream):
    """A table that is no parameter is added."""

    def __init__(self):
        super().__init__("rms_norm")
        self.register_buffer("table", torch.randn(30, WIDTH, dtype=torch.float64))

    def forward(self, x):
        return self.head(self.norm(self.blocks[0](self.embed(x) + self.table)))


class Clipped(Stream):
    def __init__(self):
        super().__init__("rms_norm")

    def forward(self, x):
        return self.head(self.norm(self.blocks[0](self.embed(x)).clamp(-3, 3)))


class PostNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)
        self.first, self.second = (Block(nn.Identity()) for _ in range(2))
        self.norms = nn.ModuleList(NORMS["layer_norm"](WIDTH) for _ in range(2))

    def forward(self, x):
        x = self.norms[0](self.first(self.embed(x)))
        return self.head(self.norms[1](self.second(x)))


class Grouped(nn.Module):
    """A norm of other than one mean."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)
        self.block, self.weight = Block(NORMS["rms_norm"](WIDTH)), nn.Parameter(torch.rand(WIDTH) + 1)

    def forward(self, x):
        x = self.block(self.embed(x))
        return self.head(self.weight * (x / x.abs().amax(-1, keepdim=True)))


REFUSED = {
    "scaled": (Scaled, "no change of basis passes through aten.mul"),
    "placed": (Placed, "`table` lies on it, and is no parameter"),
    "clipped": (Clipped, "no change of basis passes through aten.clamp"),
    "post_norm": (PostNorm, "scales its entries apart, and cannot move"),
    "grouped": (Grouped, "depends on the basis of the stream"),
    "gpt2": (lambda: gpt2(tied=True), "writes the stream as well: untie them"),
    "bert": (bert, "adds its result to the stream"),
    "gemma2": (gemma2, "adds its result to the stream"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_turn_says_why_and_stays(name):
    make, reason = REFUSED[name]
    model, _ = built(name if name in ("bert", "gemma2", "gpt2") else "rms", make=make)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    coupling = residual(model)
    done = ecospa_fx.rotate(model, [coupling])
    assert reason in done.refused[coupling.name] and not done.energy
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_tied_weights_turn_where_the_norm_between_has_one_scale():
    """As in a GPT-2 that has just been made: its norms are all ones."""
    model, x = gpt2(tied=True).double().eval(), words("gpt2")
    ecospa_fx.compile(model, example_inputs=(x,), regions="root")
    before, _ = learned(model, x)
    assert ecospa_fx.rotate(model, [residual(model)]).energy
    torch.testing.assert_close(model(x).detach(), before)
    assert model.model.lm_head.weight is model.model.transformer.wte.weight


@pytest.mark.parametrize("absorb", [False, True])
def test_a_trainer_turns_a_stream_before_it_shrinks(absorb):
    model, x = built("rms")
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    trainer = ecospa_fx.EcoSpaTrainer(
        model, optimizer, target=0.4, start=2, end=6, interval=2, rotate=True, absorb=absorb
    )
    losses = []
    for _ in range(8):
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert residual(model).size < WIDTH and all(map(math.isfinite, losses))
