"""Units of a GGUF file: the parts that can be left out, because the format has a key for their number.

These are entries of feed-forward layers, heads, and key heads, with their places on the axes of the tensors of a block.
The names are the format's own, from the tables of the `gguf` package; sizes are checked against the metadata.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ecospa_fx.errors import CheckpointError, FormatError

from .files import Marked, MarkedTensor, Mask


@dataclass(frozen=True, eq=False)
class UnitRange:
    """The place of units on an axis: one after the other from `start` on, `size` entries each."""

    tensor: MarkedTensor
    axis: int
    start: int
    units: int
    size: int

    @property
    def removed(self) -> Mask:
        """The mask of marked entries, `[units, size]`."""
        return self.tensor.removed[self.axis][self.start : self.start + self.units * self.size].reshape(self.units, -1)


@dataclass
class Units:
    """The units of one kind in one block: entries of a feed-forward layer, or heads.

    Attributes:
        block: number of the block.
        what: name of the kind, for errors.
        key: metadata key of their number.
        runs: their places on axes.
        keep: mask of the units that stay; at first those that are not marked in all places.
    """

    block: int
    what: str
    key: str
    runs: list[UnitRange]
    keep: Mask = field(init=False)

    def __post_init__(self) -> None:
        self.keep = ~np.logical_and.reduce([run.removed.all(axis=1) for run in self.runs])


@dataclass
class Layers:
    """The units of all blocks, and the metadata that counts them."""

    feeds: list[Units]
    queries: dict[int, Units]
    keys: dict[int, Units]

    def all(self) -> Iterable[Units]:
        """Iterate over all units."""
        yield from (*self.feeds, *self.queries.values(), *self.keys.values())


class Names:
    """The names of metadata and tensors in the format, from the tables of the `gguf` package."""

    def __init__(self, file: Marked) -> None:
        import gguf

        self.file, self.gguf = file, gguf
        self.architecture = str(file.value(gguf.Keys.General.ARCHITECTURE))
        self.blocks = int(file.value(self.key(gguf.Keys.LLM.BLOCK_COUNT)) or 0)

    def key(self, template: str) -> str:
        """Return the metadata key for this file's architecture."""
        return template.format(arch=self.architecture)

    def values(self, key: str) -> list[int] | None:
        """Return the value of a key for each block, or None if it is absent.

        Raises:
            CheckpointError: it is a list of another length.
        """
        value = self.file.value(key)
        if value is None:
            return None
        if not isinstance(value, list):
            return [int(value)] * self.blocks
        if len(value) != self.blocks:
            raise CheckpointError(f"{self.file.path} has {self.blocks} blocks, but {len(value)} values of {key}")
        return [int(v) for v in value]

    def of_embedding(self, removed: Mask) -> bool:
        """Check whether the removed slices are those of the embedding's width."""
        name = self.gguf.TENSOR_NAMES[self.gguf.MODEL_TENSOR.TOKEN_EMBD]
        embedding = self.file.tensors.get(f"{name}.weight")
        return embedding is not None and np.array_equal(removed, embedding.removed[-1])

    def tensors(self, kind: str, block: int) -> list[MarkedTensor]:
        """List the weight and the bias of one kind in a block, if present."""
        name = self.gguf.TENSOR_NAMES[self.gguf.MODEL_TENSOR[kind]].format(bid=block)
        tensors = (self.file.tensors.get(f"{name}.{part}") for part in ("weight", "bias"))
        return [tensor for tensor in tensors if tensor is not None]

    def rows(self, kinds: Iterable[str], block: int) -> list[tuple[MarkedTensor, int]]:
        """List the output axes of tensors of these kinds, with those of biases."""
        tensors = [tensor for kind in kinds for tensor in self.tensors(kind, block)]
        return [(t, len(t.shape) - (2 if t.name.endswith(".weight") else 1)) for t in tensors]

    def columns(self, kind: str, block: int) -> list[tuple[MarkedTensor, int]]:
        """List the input axis of a weight."""
        return [(t, len(t.shape) - 1) for t in self.tensors(kind, block) if t.name.endswith(".weight")]


# Metadata key, tensors with that number of rows (twice that if gate and values are fused), tensor with as many columns.
FEEDS = (
    ("FEED_FORWARD_LENGTH", ("FFN_UP", "FFN_GATE"), "FFN_DOWN"),
    ("EXPERT_FEED_FORWARD_LENGTH", ("FFN_UP_EXP", "FFN_GATE_EXP", "FFN_GATE_UP_EXP"), "FFN_DOWN_EXP"),
    ("EXPERT_SHARED_FEED_FORWARD_LENGTH", ("FFN_UP_SHEXP", "FFN_GATE_SHEXP"), "FFN_DOWN_SHEXP"),
)


def units_of(names: Names) -> Layers:
    """Find the units in the tensors of each block.

    Raises:
        FormatError: entries are marked in a tensor whose size differs from the metadata.
    """
    layers = Layers([], {}, {})
    for block in range(names.blocks):
        for length, ups, down in FEEDS:
            if feed := _feed(names, block, length, ups, down):
                layers.feeds.append(feed)
        _heads(names, block, layers)
        _adopt(names, block, [units for units in layers.all() if units.block == block])
    return layers


def _feed(names: Names, block: int, length: str, ups: Sequence[str], down: str) -> Units | None:
    columns, rows = names.columns(down, block), names.rows(ups, block)
    if not columns or not rows:
        return None
    size = columns[0][0].shape[-1]
    key = names.key(getattr(names.gguf.Keys.LLM, length))
    if length.startswith("EXPERT_FEED") and key not in names.file.fields:
        key = names.key(names.gguf.Keys.LLM.FEED_FORWARD_LENGTH)  # the key that some architectures use for experts
    runs = []
    for tensor, axis in (*columns, *rows):
        parts = tensor.shape[axis] // size if tensor.shape[axis] in (size, 2 * size) else 0
        runs += [UnitRange(tensor, axis, part * size, size, 1) for part in range(parts)]
        if not parts:
            _unless_marked([*columns, *rows], f"`{tensor.name}` has {tensor.shape[axis]} rows, not {size}")
            return None
    lengths = names.values(key)
    if lengths is None or lengths[block] != size:
        value = "is absent" if lengths is None else f"is {lengths[block]} for block {block}"
        _unless_marked([*columns, *rows], f"`{columns[0][0].name}` has {size} columns, and {key} {value}")
        return None
    return Units(block, f"feed-forward entries of block {block}", key, runs)


def _heads(names: Names, block: int, layers: Layers) -> None:
    keys = names.gguf.Keys.Attention
    queries = names.values(names.key(keys.HEAD_COUNT))
    groups = names.values(names.key(keys.HEAD_COUNT_KV)) or queries
    out = names.columns("ATTN_OUT", block)
    projections = {kind: names.rows([kind], block) for kind in ("ATTN_Q", "ATTN_K", "ATTN_V", "ATTN_QKV")}
    axes = [*out, *(axis for each in projections.values() for axis in each)]
    if not out or not any(projections.values()):
        return
    heads, kv = (0, 0) if queries is None or groups is None else (queries[block], groups[block])
    width = out[0][0].shape[-1]
    if not heads or not kv or heads % kv or width % heads:
        _unless_marked(axes, f"`{out[0][0].name}` has {width} columns for {heads} query heads and {kv} key heads")
        return
    value = width // heads
    of_queries, of_keys = [UnitRange(t, a, 0, heads, value) for t, a in out], []
    for tensor, axis in projections["ATTN_QKV"]:
        rest = tensor.shape[axis] - kv * value  # [query heads | key heads] of the length of keys, then the values
        if rest <= 0 or rest % (heads + kv):
            _unless_marked(axes, f"`{tensor.name}` has {tensor.shape[axis]} rows, which are not whole heads")
            return
        length = rest // (heads + kv)
        of_queries.append(UnitRange(tensor, axis, 0, heads, length))
        of_keys.append(UnitRange(tensor, axis, heads * length, kv, length))
        of_keys.append(UnitRange(tensor, axis, rest, kv, value))
    lengths = {"ATTN_V": value}  # queries are as long as keys
    for kind, count, runs in (("ATTN_Q", heads, of_queries), ("ATTN_K", kv, of_keys), ("ATTN_V", kv, of_keys)):
        for tensor, axis in projections[kind]:
            length = lengths.setdefault("ATTN_V" if kind == "ATTN_V" else "ATTN_K", tensor.shape[axis] // count)
            if tensor.shape[axis] != count * length:
                _unless_marked(axes, f"`{tensor.name}` has {tensor.shape[axis]} rows, not {count} heads of {length}")
                return
            runs.append(UnitRange(tensor, axis, 0, count, length))
    if of_keys:
        layers.queries[block] = Units(block, f"heads of block {block}", names.key(keys.HEAD_COUNT), of_queries)
        layers.keys[block] = Units(block, f"key heads of block {block}", names.key(keys.HEAD_COUNT_KV), of_keys)


def _unless_marked(axes: Iterable[tuple[MarkedTensor, int]], why: str) -> None:
    """Leave tensors alone that differ from the metadata, if nothing of them was removed.

    Raises:
        FormatError: something was removed.
    """
    for tensor, axis in axes:
        if tensor.removed[axis].any():
            raise FormatError(
                f"{int(tensor.removed[axis].sum())} of {tensor.shape[axis]} entries of `{tensor.name}` are marked as "
                f"removed, and it is unclear what they are: {why}"
            )


def _adopt(names: Names, block: int, candidates: Sequence[Units]) -> None:
    """Add other tensors of a block that lost the same entries as some units (sinks and norms by head) to these."""
    prefix = f"blk.{block}."
    taken = {(run.tensor.name, run.axis) for units in candidates for run in units.runs}
    for tensor in names.file.tensors.values():
        for axis, removed in enumerate(tensor.removed):
            if not tensor.name.startswith(prefix) or (tensor.name, axis) in taken or not removed.any():
                continue
            if names.of_embedding(removed):
                continue
            fitting: dict[int, tuple[Units, UnitRange]] = {}
            for units in candidates:
                for run in units.runs:
                    for size, like in ((run.size, run.removed.ravel()), (1, ~units.keep)):
                        if np.array_equal(removed, like):
                            fitting[id(units)] = units, UnitRange(tensor, axis, 0, run.units, size)
            if len(fitting) == 1:
                ((units, run),) = fitting.values()
                units.runs.append(run)
