"""Trimmed vocabularies, judged by the same model before, by classes built smaller, and by plain transformers."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import nn
from without_us import WITHOUT_US

import ecospa_fx
from ecospa_fx import errors
from ecospa_fx.cli.app import main
from ecospa_fx.cli.models import named_model

LINES = [
    "the bank of the river is where the fisherman was fishing for trout",
    "a théâtre of war, and other naïve ideas about it: 1914 to 1918",
    "he told the teller of the bank that he was the other one",
    "whether or not the weather is nice, neither of them goes there",
    "thirteen thin thieves thought that they had thrilled the throne",
]
OTHERS = ["the theatre was thin", "fishing for other ideas", "nobody knows the trouble 1917"]
KEEP = list(range(5, 30, 2))
ROWS = 50


def trained_tokenizer(kind):
    special = ["<pad>", "<unk>", "<eos>"]
    options = {"special_tokens": special, "show_progress": False}
    if kind == "bytes":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif kind == "bpe":
        made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder(suffix="</w>")
        trainer = trainers.BpeTrainer(vocab_size=160, end_of_word_suffix="</w>", **options)
    elif kind == "wordpiece":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=160, **options)
    else:
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", **options)
    made.train_from_iterator(LINES, trainer)
    return made


KINDS = ("bytes", "bpe", "wordpiece", "unigram")


class Language(nn.Module):
    """A language model of a table, a block and scores, with the habits of such models as options."""

    def __init__(self, rows=ROWS, tied=True, habit=None):
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.habit = rows, habit
        self.table = nn.Embedding(rows, 16, padding_idx=3)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, rows)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens):
        x = self.table(tokens)
        x = x + self.down(F.gelu(self.up(x)))
        if self.habit == "mean of rows":
            x = x + self.table.weight.mean(0)
        if self.habit == "order of ids":
            x = x * (tokens > 20)[..., None]
        scores = self.head(x)
        if self.habit == "softmax":
            return scores.log_softmax(-1)
        return scores.view(-1, self.rows)


class Nothing(nn.Embedding):
    """A table that is read, and of which nothing can be compared."""

    def forward(self, tokens):
        return str(super().forward(tokens))


def hf(kind, rows, tied=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "llama":
        config = transformers.LlamaConfig(
            **sizes, num_key_value_heads=1, vocab_size=rows, tie_word_embeddings=tied, bos_token_id=2, eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()
    if kind == "bert":
        config = transformers.BertConfig(**sizes, vocab_size=rows, max_position_embeddings=24)
        return transformers.BertForMaskedLM(config).eval()
    config = transformers.BartConfig(
        vocab_size=rows, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=24, pad_token_id=0,
        bos_token_id=2, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config).eval()


def drawn(kept, shape=(2, 6)):
    return kept[torch.randint(len(kept), shape, generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_scores_of_tokens_that_stay(tied, compiled):
    model, twin = Language(tied=tied), Language(tied=tied)
    call = torch.randint(0, ROWS, (2, 5))
    if compiled:
        ecospa_fx.compile(model, example_inputs=(call,))
        half = {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model) if c.kind == "ffn"}
        ecospa_fx.shrink(model, half)
        with torch.no_grad():
            twin.down.weight[:, 1::2] = 0
    trimmed = ecospa_fx.trim_vocabulary(model, keep=KEEP)
    assert trimmed.kept.tolist() == sorted({*KEEP, 3})  # the row for padding stays as well
    tokens = drawn(trimmed.kept)
    torch.testing.assert_close(model(trimmed.new_ids(tokens)), twin(tokens)[:, trimmed.kept])
    assert (model.table.num_embeddings, model.table.padding_idx, model.rows) == (14, 0, 14)
    assert (model.head.weight is model.table.weight) == tied and model.head.bias.shape == (14,)
    if compiled:  # what shrinks before shrinks after
        (coupling,) = [c for c in ecospa_fx.couplings(model) if c.kind == "ffn"]
        assert (coupling.size, coupling.original_size) == (16, 32)
        ecospa_fx.shrink(model, {coupling: torch.arange(8)})
        with torch.no_grad():
            twin.down.weight[:, 16:] = 0
        torch.testing.assert_close(model(trimmed.new_ids(tokens)), twin(tokens)[:, trimmed.kept])


def test_a_step_after_is_a_step_of_the_smaller_class():
    model = Language()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(of, optimizer, tokens):
        F.cross_entropy(of(tokens), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizer, drawn(torch.arange(ROWS)))
    grown = copy.deepcopy(model.state_dict())
    before = copy.deepcopy(optimizer.state_dict())
    trimmed = ecospa_fx.trim_vocabulary(model, keep=KEEP, optimizer=optimizer)
    kept = trimmed.kept
    small = Language(rows=len(kept))
    small.table.padding_idx = 0
    state = {name: value[kept] if value.shape[0] == ROWS else value for name, value in grown.items()}
    small.load_state_dict(state)
    other = torch.optim.AdamW(small.parameters(), lr=1e-2)
    for entry in before["state"].values():
        entry.update({k: v[kept] for k, v in entry.items() if v.ndim and v.shape[0] == ROWS})
    other.load_state_dict(before)
    tokens = trimmed.new_ids(drawn(kept))
    step(model, optimizer, tokens)
    step(small, other, tokens)
    for (name, a), b in zip(model.named_parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_an_optimizer_that_was_not_told():
    model = Language()
    optimizer = torch.optim.AdamW(model.parameters())
    model(drawn(torch.arange(ROWS))).sum().backward()
    optimizer.step()
    ecospa_fx.trim_vocabulary(model, keep=KEEP)
    with pytest.raises(errors.OptimizerError, match=r"table\.weight"):
        optimizer.step()


@pytest.mark.parametrize(
    ("model", "arguments", "error", "words"),
    [
        (Language(), {"keep": []}, errors.ShrinkError, "holds no token"),
        (Language(), {"keep": [1, 50]}, errors.ShrinkError, "rows"),
        (Language(), {"keep": [-1, 4]}, errors.ShrinkError, "-1"),
        (Language(), {"keep": torch.ones(3)}, errors.ArgumentError, "whole numbers"),
        (Language(), {"keep": [1.5]}, errors.ArgumentError, "1.5"),
        (Language(), {}, errors.ArgumentError, "keep="),
        (Language(), {"keep": [1], "size": 9}, errors.ArgumentError, "tokenizer"),
        (Language(), {"keep": range(50)}, errors.ShrinkError, "keep fewer"),
        (Language(), {"keep": KEEP, "tokenizer": "words"}, errors.ArgumentError, "fast tokenizer"),
        (Language(habit="softmax"), {"keep": KEEP}, errors.ShrinkError, "softmax"),
        (Language(habit="softmax", tied=False), {"keep": KEEP}, errors.ShrinkError, "softmax"),
        (Language(habit="mean of rows"), {"keep": KEEP}, errors.ShrinkError, "other tokens"),
        (Language(habit="order of ids"), {"keep": KEEP}, errors.ShrinkError, "another model"),
        (nn.Linear(3, 3), {"keep": [1]}, errors.CaptureError, "example_inputs="),
        (Nothing(40, 4), {"keep": [1, 5]}, errors.CaptureError, "no tensor of numbers"),
        (nn.Embedding(40, 4), {"keep": [1, 5], "optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())},
         errors.OptimizerError, "none of them"),
    ],
)  # fmt: skip
def test_refused_as_a_whole(model, arguments, error, words):
    before, rows = copy.deepcopy(model.state_dict()), getattr(model, "rows", None)
    with pytest.raises(error, match=words):
        ecospa_fx.trim_vocabulary(model, **arguments)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()) and after.keys() == before.keys()
    assert getattr(model, "rows", None) == rows


def test_a_compiled_model_after_an_error():
    model = Language(habit="order of ids")
    call = drawn(torch.arange(ROWS))
    ecospa_fx.compile(model, example_inputs=(call,))
    ecospa_fx.shrink(model, {c: torch.arange(9) for c in ecospa_fx.couplings(model) if c.kind == "ffn"})
    before, graphs = model(call), str(ecospa_fx.couplings(model))
    with pytest.raises(errors.ShrinkError):
        ecospa_fx.trim_vocabulary(model, keep=KEEP)
    assert torch.equal(model(call), before) and str(ecospa_fx.couplings(model)) == graphs


def test_tokens_are_found_among_other_integers():
    """Positions, a mask and a second table of other rows are integers and tables too."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(50, 8), nn.Embedding(20, 8)
            self.gains = nn.Parameter(torch.randn(8, 50))
            self.out = nn.Linear(8, 5)

        def forward(self, tokens, places, mask):
            x = self.words(tokens) + self.places(places) + F.embedding(tokens, self.gains.t())
            return self.out(x * mask[..., None])

    model = Mixed()
    twin, places, mask = copy.deepcopy(model), torch.arange(6).expand(2, 6), torch.ones(2, 6, dtype=torch.long)
    trimmed = ecospa_fx.trim_vocabulary(model, keep=KEEP, example_inputs=(torch.zeros_like(places), places, mask))
    assert (model.words.weight.shape, model.places.weight.shape, model.gains.shape) == ((13, 8), (20, 8), (8, 13))
    tokens = drawn(trimmed.kept)
    torch.testing.assert_close(model(trimmed.new_ids(tokens), places, mask), twin(tokens, places, mask))


def test_what_is_looked_up_by_classes_of_tokens():
    """A buffer gives each token a class, and a table is looked up by that; another buffer is only counted in."""

    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.classes, self.out = nn.Embedding(50, 8, max_norm=1.0), nn.Embedding(4, 8), nn.Linear(8, 50)
            self.register_buffer("class_of", torch.arange(50) % 4)
            self.register_buffer("counts", torch.zeros(50))

        def forward(self, tokens):
            return self.out(self.words(tokens) + self.classes(self.class_of[tokens]))

    model = Classes()
    twin = copy.deepcopy(model)
    trimmed = ecospa_fx.trim_vocabulary(model, keep=KEEP)
    assert model.class_of.tolist() == [i % 4 for i in KEEP] and model.classes.weight.shape == (4, 8)
    assert trimmed.notes == ("`counts` (50,) stay as they are: no token of the call is looked up or scored there",)
    tokens = drawn(trimmed.kept)
    torch.testing.assert_close(model(trimmed.new_ids(tokens)), twin(tokens)[..., trimmed.kept])


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_cut_as_before(kind):
    tokenizer = trained_tokenizer(kind)
    model = Language(rows=tokenizer.get_vocab_size())
    trimmed = ecospa_fx.trim_vocabulary(model, tokenizer, texts=LINES[:3])
    small, gone = trimmed.tokenizer, trimmed.rows - len(trimmed.kept)
    assert gone > 3 and small.get_vocab_size() == len(trimmed.kept)
    names = {small.token_to_id(token) for token in ("<pad>", "<unk>", "<eos>")}
    assert None not in names
    stays, cut = set(trimmed.kept.tolist()), 0
    for line in LINES + OTHERS:
        before, after = tokenizer.encode(line), small.encode(line)
        assert small.decode(after.ids) == tokenizer.decode(before.ids)
        if stays.issuperset(before.ids):
            assert after.tokens == before.tokens
            cut += 1
    assert cut >= 3
    for line in LINES[:3]:
        assert stays.issuperset(tokenizer.encode(line).ids)


def test_a_token_keeps_what_it_is_made_of():
    tokenizer = trained_tokenizer("bytes")
    longest = max(tokenizer.get_vocab(), key=len)
    number = tokenizer.token_to_id(longest)
    model = Language(rows=tokenizer.get_vocab_size())
    trimmed = ecospa_fx.trim_vocabulary(model, tokenizer, keep=[number])
    assert trimmed.tokenizer.encode(longest.replace("Ġ", " ")).tokens == [longest]
    assert 256 + 3 < len(trimmed.kept) < 256 + 3 + len(longest) and trimmed.asked == 1
    every = bytes(range(1, 128)).decode() + "é世🙂"
    assert trimmed.tokenizer.decode(trimmed.tokenizer.encode(every).ids) == every  # no byte was lost


def test_size_is_met_by_the_most_used():
    tokenizer = trained_tokenizer("bytes")
    model = Language(rows=tokenizer.get_vocab_size())
    with pytest.raises(errors.ShrinkError, match="259 tokens must stay: 259 special"):
        ecospa_fx.trim_vocabulary(model, tokenizer, texts=LINES, size=100)
    trimmed = ecospa_fx.trim_vocabulary(model, tokenizer, texts=LINES, size=290)
    assert len(trimmed.kept) == model.table.num_embeddings == 290
    assert trimmed.tokenizer.token_to_id("the") is not None or trimmed.tokenizer.token_to_id("Ġthe") is not None
    assert any("gone" in note for note in trimmed.notes) and "290" in str(trimmed)
    with pytest.raises(errors.ShrinkError, match="another model"):
        ecospa_fx.trim_vocabulary(Language(rows=600), tokenizer, texts=LINES)
    with pytest.raises(errors.ShrinkError, match="no rows for some"):
        ecospa_fx.trim_vocabulary(Language(rows=100), tokenizer, texts=LINES)


@pytest.mark.parametrize("kind", ["llama", "bert", "bart"])
def test_models_of_transformers(kind):
    """The same class at the smaller number of tokens, with the rows that stay, computes the same."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained_tokenizer("bytes"), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    rows = len(tokenizer) + 6  # as many as fill up a multiple
    model, plain = hf(kind, rows), hf(kind, rows)
    trimmed = ecospa_fx.trim_vocabulary(model, tokenizer, texts=LINES[:2])
    kept = trimmed.kept
    assert model.config.vocab_size == len(kept) < len(tokenizer)
    small = hf(kind, len(kept))
    whole_state, state = plain.state_dict(), {}
    for name, tensor in small.state_dict().items():
        value = whole_state[name]
        for dim in range(value.ndim):
            value = value.index_select(dim, kept) if value.shape[dim] != tensor.shape[dim] else value
        state[name] = value
    small.load_state_dict(state)
    tokens = drawn(kept)
    call = {"input_ids": trimmed.new_ids(tokens)}
    more = {"decoder_input_ids": call["input_ids"]} if kind == "bart" else {}
    whole = {"decoder_input_ids": tokens} if kind == "bart" else {}
    with torch.no_grad():
        here = model(**call, **more).logits
        torch.testing.assert_close(here, small(**call, **more).logits)
        torch.testing.assert_close(here, plain(input_ids=tokens, **whole).logits[..., kept])
    if kind != "bert":
        assert trimmed.tokenizer.eos_token_id == model.generation_config.eos_token_id == model.config.eos_token_id
        written = model.generate(**call, max_new_tokens=4, do_sample=False)
        assert int(written.max()) < len(kept)


FAMILIES = """
opt gpt_neox gemma2 gemma3_text qwen2 qwen3 mistral phi falcon bloom mt5 electra distilbert albert deberta-v2
xlm-roberta whisper mamba mpt olmo2 mixtral xglm pegasus marian fsmt roformer fnet big_bird stablelm bart
"""


@pytest.mark.sweep
@pytest.mark.parametrize("kind", FAMILIES.split())
def test_families(kind):
    """Of each the model without its vocabulary's odd half, beside the whole one."""
    torch.manual_seed(0)
    model = named_model(f"hf/{kind}").model.eval()
    plain = copy.deepcopy(model)
    trimmed = ecospa_fx.trim_vocabulary(model, keep=range(4, model.config.vocab_size, 2))
    tokens = trimmed.kept[torch.randint(3, len(trimmed.kept), (2, 6))]
    more = ("input_ids", "decoder_input_ids") if model.config.is_encoder_decoder else ("input_ids",)
    with torch.no_grad():
        before = plain(**dict.fromkeys(more, tokens))[0]
        after = model(**dict.fromkeys(more, trimmed.new_ids(tokens)))[0]
    torch.testing.assert_close(after, before[..., trimmed.kept] if before.shape != after.shape else before)
    assert model.config.vocab_size == len(trimmed.kept)


PLAIN = f"""{WITHOUT_US}
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
call = tokenizer([sys.argv[2]], return_tensors="pt")["input_ids"]
print(call.tolist(), model.generate(call, max_new_tokens=5, do_sample=False).tolist(), sep="\\n")
"""


def test_a_process_without_this_library_writes_the_same(tmp_path):
    """After a shrink in module execution, too."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained_tokenizer("bytes"), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    model = hf("llama", len(tokenizer))
    ecospa_fx.compile(model, example_kwargs={"input_ids": torch.arange(8)[None]}, execution="module")
    ecospa_fx.shrink(model, {c: torch.arange(12) for c in ecospa_fx.couplings(model) if c.kind == "glu"})
    trimmed = ecospa_fx.trim_vocabulary(model, tokenizer, texts=LINES[:2])
    assert {c.size for c in ecospa_fx.couplings(model) if c.kind == "glu"} == {12}
    assert ecospa_fx.save_pretrained(model, tmp_path) is None
    trimmed.tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["vocab_size"], config["intermediate_size"]) == (len(trimmed.kept), 12)
    call = trimmed.tokenizer([OTHERS[0]], return_tensors="pt")["input_ids"]
    here = model.generate(call, max_new_tokens=5, do_sample=False)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path), OTHERS[0]], capture_output=True, text=True, check=False
    )
    assert done.stdout.split("\n")[:2] == [str(call.tolist()), str(here.tolist())], done.stderr


def test_the_command(tmp_path, capsys):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained_tokenizer("bytes"), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    hf("bert", len(tokenizer)).save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    (tmp_path / "texts").write_text("\n".join(LINES[:2]))
    texts, out = f"--texts={tmp_path / 'texts'}", f"--out={tmp_path / 'small'}"
    assert main(["trim-vocabulary", str(tmp_path / "whole"), texts, "--size", "300", out]) == 0
    assert "330 -> 300 tokens" in capsys.readouterr().out
    small = transformers.BertForMaskedLM.from_pretrained(tmp_path / "small")
    assert small.config.vocab_size == len(transformers.AutoTokenizer.from_pretrained(tmp_path / "small")) == 300
    assert main(["trim-vocabulary", str(tmp_path / "whole"), texts, "--size", "30", f"{out}2"]) == 1
    assert "259 tokens must stay" in capsys.readouterr().err and not (tmp_path / "small2").exists()
    assert main(["trim-vocabulary", str(tmp_path), texts, f"{out}2"]) == 2


@pytest.mark.parametrize("policy", ["paper", "adaptive"])
def test_in_the_middle_of_training(tmp_path, policy):
    """A trainer goes on with what it knows; copies follow; the result is saved and loaded."""
    model = Language()
    ecospa_fx.compile(model, example_inputs=(drawn(torch.arange(ROWS)),))
    optimizer, ema = torch.optim.AdamW(model.parameters()), copy.deepcopy(model)
    trainer = ecospa_fx.EcoSpaTrainer(
        model, optimizer, target=0.7, interval=2, end=10, also=[ema], spike=9, policy=policy
    )

    def steps(kept, count):
        for _ in range(count):
            tokens = drawn(kept)
            loss = F.cross_entropy(model(tokens), tokens.flatten())
            loss.backward()
            optimizer.step()
            trainer.step(loss=loss)
            optimizer.zero_grad()

    steps(torch.arange(ROWS), 5)  # the next decision reads steps before and after
    first = sum(c.size for c in ecospa_fx.couplings(model))
    assert first < 48
    trimmed = ecospa_fx.trim_vocabulary(model, keep=KEEP, optimizer=trainer.optimizers, also=[ema])
    steps(torch.arange(len(trimmed.kept)), 7)
    assert sum(c.size for c in ecospa_fx.couplings(model)) < first and trainer.done
    assert ema(torch.arange(14)[None]).shape == (14, 14) and ema.up.weight.shape == model.up.weight.shape
    ecospa_fx.save(model, tmp_path, optimizer=optimizer, trainer=trainer)

    def smaller():
        made = Language(rows=14)
        made.table.padding_idx = 0
        return made

    loaded = ecospa_fx.load(tmp_path, smaller)
    assert torch.equal(loaded(torch.arange(14)[None]), model(torch.arange(14)[None]))
