"""cut_gguf on files written by hand: fused projections, experts, tensors that go along, and all that is refused."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

import ecospa_fx
from ecospa_fx import errors

gguf = pytest.importorskip("gguf")

HEADS, KEYS, DIM, WIDE, FFN = 4, 2, 3, 6, 5
FIELDS = {
    "block_count": 1, "embedding_length": WIDE, "feed_forward_length": FFN, "attention.head_count": HEADS,
    "attention.head_count_kv": KEYS, "attention.key_length": DIM, "attention.value_length": DIM,
}  # fmt: skip


def tensors():
    """One block, its projections fused, as float32 with values that tell entries apart."""
    shapes = {
        "token_embd.weight": (7, WIDE),
        "blk.0.attn_qkv.weight": ((HEADS + 2 * KEYS) * DIM, WIDE),
        "blk.0.attn_qkv.bias": ((HEADS + 2 * KEYS) * DIM,),
        "blk.0.attn_output.weight": (WIDE, HEADS * DIM),
        "blk.0.ffn_up.weight": (2 * FFN, WIDE),
        "blk.0.ffn_down.weight": (WIDE, FFN),
    }
    return {name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in shapes.items()}


def write(path, given, fields=(), arch="phi3", **more):
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {**FIELDS, **dict(fields)}.items():
        if isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{arch}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{arch}.{key}", value)
    for key, value in more.items():
        writer.add_uint16(key.replace("_", "."), value)
    for name, values in given.items():
        writer.add_tensor(name, *(values if isinstance(values, tuple) else (values,)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path):
    reader = gguf.GGUFReader(path)
    return {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def mark(given, name, *, rows=(), columns=()):
    given[name][list(rows)] = np.nan
    if columns:
        given[name][..., list(columns)] = np.nan


def without_head(given, head):
    """Mark a query head, of the four."""
    span = range(head * DIM, (head + 1) * DIM)
    mark(given, "blk.0.attn_qkv.weight", rows=span)
    mark(given, "blk.0.attn_qkv.bias", rows=span)
    mark(given, "blk.0.attn_output.weight", columns=span)


def without_keys(given, head):
    """Mark a head of keys and values, of the two, and its query heads."""
    without_keys_only(given, head)
    for query in (2 * head, 2 * head + 1):
        without_head(given, query)


def without_keys_only(given, head):
    for start in (HEADS, HEADS + KEYS):
        span = range((start + head) * DIM, (start + head + 1) * DIM)
        mark(given, "blk.0.attn_qkv.weight", rows=span)
        mark(given, "blk.0.attn_qkv.bias", rows=span)


def cut(tmp_path, given, fields=(), arch="phi3", **options):
    path = write(tmp_path / "marked.gguf", given, fields, arch)
    done = ecospa_fx.cut_gguf(path, tmp_path / "small.gguf", **options)
    return done, read(tmp_path / "small.gguf")


def test_fused_projections(tmp_path):
    given, whole = tensors(), tensors()
    mark(given, "blk.0.ffn_up.weight", rows=(1, FFN + 1))
    mark(given, "blk.0.ffn_down.weight", columns=(1,))
    without_keys(given, 0)
    done, found = cut(tmp_path, given, heads=True)
    assert done.metadata == {
        "phi3.feed_forward_length": 4, "phi3.attention.head_count": 2, "phi3.attention.head_count_kv": 1
    }  # fmt: skip
    rows = [*range(6, 12), *range(15, 18), *range(21, 24)]  # queries 2 and 3, keys 1, values 1
    assert np.array_equal(found["blk.0.attn_qkv.weight"], whole["blk.0.attn_qkv.weight"][rows])
    assert np.array_equal(found["blk.0.attn_qkv.bias"], whole["blk.0.attn_qkv.bias"][rows])
    assert np.array_equal(found["blk.0.attn_output.weight"], whole["blk.0.attn_output.weight"][:, 6:])
    kept = [0, 2, 3, 4]
    assert np.array_equal(found["blk.0.ffn_up.weight"], whole["blk.0.ffn_up.weight"][[*kept, *(FFN + k for k in kept)]])
    assert np.array_equal(found["blk.0.ffn_down.weight"], whole["blk.0.ffn_down.weight"][:, kept])
    assert np.array_equal(found["token_embd.weight"], whole["token_embd.weight"])


def test_key_heads_have_as_many_heads_each(tmp_path):
    given = tensors()
    without_head(given, 1)
    with pytest.raises(errors.FormatError, match="key heads of block 0 have 1 to 2 query heads"):
        cut(tmp_path, given, heads=True)
    done, found = cut(tmp_path, given, heads=True, zeros=True)
    assert done.metadata == {} and str(done).endswith("entries, 39 of them zeros; no metadata changed")
    assert not found["blk.0.attn_output.weight"][:, 3:6].any()
    without_head(given, 2)
    done, found = cut(tmp_path, given, heads=True)
    assert done.metadata == {"phi3.attention.head_count": 2}
    assert found["blk.0.attn_output.weight"][0].tolist() == [0, 1, 2, 9, 10, 11]


def test_keys_that_somebody_asks_for(tmp_path):
    given = tensors()
    without_keys_only(given, 1)
    with pytest.raises(errors.FormatError, match="some key heads of block 0 are removed, but not the query heads that"):
        cut(tmp_path, given, heads=True)
    done, _ = cut(tmp_path, given, heads=True, zeros=True)
    assert done.metadata == {}


def test_what_depends_on_a_head_by_its_number(tmp_path):
    given = tensors()
    without_keys(given, 0)
    with pytest.raises(errors.FormatError, match=r"attention\.max_alibi_bias is set: each head has a slope"):
        cut(tmp_path, given, {"attention.max_alibi_bias": 8.0}, heads=True)
    done, _ = cut(tmp_path, given, {"attention.max_alibi_bias": 8.0}, zeros=True)
    assert done.metadata == {}


def test_lengths_of_heads_that_were_derived_are_said(tmp_path):
    given = tensors()
    without_keys(given, 1)
    done, _ = cut(tmp_path, given, {"attention.key_length": None, "attention.value_length": None}, heads=True)
    assert done.metadata["phi3.attention.key_length"] == done.metadata["phi3.attention.value_length"] == DIM


def test_tensors_that_lost_the_same_go_along(tmp_path):
    given = tensors() | {"blk.0.attn_sinks.weight": np.arange(HEADS, dtype=np.float32)}
    without_keys(given, 0)
    mark(given, "blk.0.attn_sinks.weight", rows=(0, 1))
    _, found = cut(tmp_path, given, heads=True)
    assert found["blk.0.attn_sinks.weight"].tolist() == [2, 3]
    mark(given, "blk.0.attn_sinks.weight", rows=(3,))
    with pytest.raises(errors.FormatError, match=r"`blk\.0\.attn_sinks\.weight` has lost 3 of 4 entries along dim 0"):
        cut(tmp_path, given, heads=True)
    with pytest.raises(errors.FormatError, match=r"`blk\.0\.attn_sinks\.weight` has lost 3 of 4 entries, not those of"):
        cut(tmp_path, given, heads=True, zeros=True)


def experts(key):
    """Two experts of a feed-forward width, counted by a key."""
    given = {
        "token_embd.weight": np.zeros((7, WIDE), np.float32),
        "blk.0.ffn_up_exps.weight": np.arange(2 * FFN * WIDE, dtype=np.float32).reshape(2, FFN, WIDE),
        "blk.0.ffn_gate_exps.weight": np.arange(2 * FFN * WIDE, dtype=np.float32).reshape(2, FFN, WIDE),
        "blk.0.ffn_down_exps.weight": np.arange(2 * FFN * WIDE, dtype=np.float32).reshape(2, WIDE, FFN),
    }
    return given, {"feed_forward_length": FFN if key == "feed_forward_length" else 77, key: FFN}


@pytest.mark.parametrize("key", ["feed_forward_length", "expert_feed_forward_length"])
def test_experts(tmp_path, key):
    given, fields = experts(key)
    up, gate, down = (given[f"blk.0.ffn_{kind}_exps.weight"] for kind in ("up", "gate", "down"))
    for expert, gone in enumerate(([1, 2], [2, 4])):  # each has lost other entries
        up[expert, gone] = gate[expert, gone] = np.nan
        down[expert, :, gone] = np.nan
    with pytest.raises(errors.FormatError, match=r"has lost single entries: experts that keep different rows, for"):
        cut(tmp_path, given, fields)
    done, found = cut(tmp_path, given, fields, zeros=True)
    assert done.metadata == {f"phi3.{key}": 4}  # entry 2 is gone from both
    assert found["blk.0.ffn_down_exps.weight"].shape == (2, WIDE, 4)
    assert not found["blk.0.ffn_up_exps.weight"][0, 1].any() and found["blk.0.ffn_up_exps.weight"][1, 1].all()


def test_a_width_that_the_metadata_does_not_say(tmp_path):
    given = tensors()
    mark(given, "blk.0.ffn_up.weight", rows=(1, FFN + 1))
    mark(given, "blk.0.ffn_down.weight", columns=(1,))
    message = r"1 of 5 entries of `blk\.0\.ffn_down\.weight` are marked.*feed_forward_length is 9 for block 0"
    with pytest.raises(errors.FormatError, match=message):
        cut(tmp_path, given, {"feed_forward_length": 9})
    without_head(given, 0)
    with pytest.raises(errors.FormatError, match=r"has 12 columns for 5 query heads and 5 key heads"):
        cut(tmp_path, given, {"attention.head_count": 5, "attention.head_count_kv": 5})


def test_what_has_no_name_is_zero_or_refused(tmp_path):
    given = tensors()
    for name in ("token_embd.weight", "blk.0.attn_qkv.weight", "blk.0.ffn_up.weight"):
        mark(given, name, columns=(2,))
    for name in ("blk.0.attn_output.weight", "blk.0.ffn_down.weight"):
        mark(given, name, rows=(2,))
    with pytest.raises(errors.FormatError, match=r"`token_embd\.weight` has lost 1 of 6 entries along dim 1, and"):
        cut(tmp_path, given)
    without_keys(given, 1)  # and with it, the width of the embedding is not taken for one of heads
    done, found = cut(tmp_path, given, zeros=True, heads=True)
    assert done.metadata["phi3.attention.head_count"] == 2
    assert not found["token_embd.weight"][:, 2].any() and not np.isnan(found["blk.0.ffn_up.weight"]).any()


def test_lists_stay_lists(tmp_path):
    given = tensors()
    mark(given, "blk.0.ffn_up.weight", rows=(1, FFN + 1))
    mark(given, "blk.0.ffn_down.weight", columns=(1,))
    done, _ = cut(tmp_path, given, {"feed_forward_length": [FFN]})
    assert done.metadata == {"phi3.feed_forward_length": [4]}


def test_files_that_cannot_be_cut(tmp_path, monkeypatch):
    target = tmp_path / "small.gguf"
    target.write_text("mine")
    given = tensors()

    def refused(kind, message, path=None):
        with pytest.raises(kind, match=message):
            ecospa_fx.cut_gguf(path or tmp_path / "marked.gguf", target)
        assert target.read_text() == "mine" and not list(tmp_path.glob(".*"))

    refused(errors.CheckpointError, r"marked\.gguf cannot be read as GGUF: FileNotFoundError")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "gguf", None)
        refused(errors.EcoSpaError, r"GGUF files need the gguf package: pip install 'ecospa-fx\[gguf\]'")
    write(tmp_path / "marked.gguf", given)
    refused(
        errors.FormatError, r"nothing in .*marked\.gguf is marked as removed: convert a model that ecospa_fx\.save_un"
    )
    given["blk.0.ffn_down.weight"][:] = np.nan
    write(tmp_path / "marked.gguf", given)
    refused(errors.FormatError, r"`blk\.0\.ffn_down\.weight` in .* is NaN throughout")
    quantised = np.zeros((6, 34), np.uint8)
    write(tmp_path / "marked.gguf", {"a.weight": (quantised, None, gguf.GGMLQuantizationType.Q8_0)})
    refused(errors.FormatError, r"`a\.weight` in .* is Q8_0; a quantised tensor cannot be cut: convert with")

    given = tensors()
    mark(given, "blk.0.ffn_up.weight", rows=(1, FFN + 1))
    mark(given, "blk.0.ffn_down.weight", columns=(1,))
    write(tmp_path / "marked.gguf", given, split_count=2)
    refused(errors.FormatError, r"is one of several parts; convert again without splitting")
    path = write(tmp_path / "marked.gguf", given)
    (tmp_path / "half.gguf").write_bytes(path.read_bytes()[:-200])
    refused(errors.CheckpointError, r"half\.gguf cannot be read as GGUF: ValueError", tmp_path / "half.gguf")
    (tmp_path / "no.gguf").write_bytes(b"no GGUF file")
    refused(errors.CheckpointError, r"no\.gguf cannot be read as GGUF: ValueError: GGUF magic", tmp_path / "no.gguf")
    with pytest.raises(errors.FormatError, match=r"marked\.gguf is the source itself; name another target"):
        ecospa_fx.cut_gguf(path, path)
    write(tmp_path / "list.gguf", given, {"feed_forward_length": [5, 5]})
    refused(errors.CheckpointError, r"has 1 blocks, but 2 values of phi3\.feed_forward", tmp_path / "list.gguf")
    write(tmp_path / "none.gguf", given, arch="")
    refused(errors.CheckpointError, r"none\.gguf holds no model: it has no general\.archi", tmp_path / "none.gguf")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    refused(errors.CheckpointError, r"small\.gguf cannot be written: No space left on device")
