"""Units: what of a GGUF file can be left out, as far as the format has names for how many there are.

Entries of feed-forward layers, heads, heads of keys: where each lies on the axes of the tensors of its block. The names
are the format's own, from the tables of the `gguf` package; sizes are checked against the metadata.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ecospa_fx.errors import CheckpointError, FormatError

from .files import Marked, MarkedTensor, Mask


@dataclass(frozen=True, eq=False)
class UnitRange:
    """Where units lie on an axis: `size` entries for each, one unit after the other, from `start` on."""

    tensor: MarkedTensor
    axis: int
    start: int
    units: int
    size: int

    @property
    def gone(self) -> Mask:
        """Which of its entries are marked, `[units, size]`."""
        return self.tensor.gone[self.axis][self.start : self.start + self.units * self.size].reshape(self.units, -1)


@dataclass
class Units:
    """What goes or stays together in one block: entry j of a feed-forward layer, or a head.

    Attributes:
        block: its number.
        what: its name, for errors.
        key: the metadata that says how many there are.
        runs: where they lie.
        keep: which of them stay. At first those that are marked nowhere, or not everywhere.
    """

    block: int
    what: str
    key: str
    runs: list[UnitRange]
    keep: Mask = field(init=False)

    def __post_init__(self) -> None:
        self.keep = ~np.logical_and.reduce([run.gone.all(axis=1) for run in self.runs])


@dataclass
class Layers:
    """The units of all blocks, and the metadata that counts them."""

    feeds: list[Units]
    queries: dict[int, Units]
    keys: dict[int, Units]

    def all(self) -> Iterable[Units]:
        """Every one."""
        yield from (*self.feeds, *self.queries.values(), *self.keys.values())


class Names:
    """The names that the format gives to metadata and tensors, from the tables of the `gguf` package."""

    def __init__(self, file: Marked) -> None:
        import gguf

        self.file, self.gguf = file, gguf
        self.architecture = str(file.value(gguf.Keys.General.ARCHITECTURE))
        self.blocks = int(file.value(self.key(gguf.Keys.LLM.BLOCK_COUNT)) or 0)

    def key(self, template: str) -> str:
        """Metadata of this file's architecture."""
        return template.format(arch=self.architecture)

    def values(self, key: str) -> list[int] | None:
        """What a key says of each block; None where it is absent.

        Raises:
            CheckpointError: it is a list of another length.
        """
        value = self.file.value(key)
        if value is None:
            return None
        if not isinstance(value, list):
            return [int(value)] * self.blocks
        if len(value) != self.blocks:
            raise CheckpointError(f"{self.file.path} has {self.blocks} blocks, and {len(value)} values of {key}")
        return [int(v) for v in value]

    def of_embedding(self, gone: Mask) -> bool:
        """Whether it is of the width of the embedding that something is gone."""
        name = self.gguf.TENSOR_NAMES[self.gguf.MODEL_TENSOR.TOKEN_EMBD]
        embedding = self.file.tensors.get(f"{name}.weight")
        return embedding is not None and np.array_equal(gone, embedding.gone[-1])

    def tensors(self, kind: str, block: int) -> list[MarkedTensor]:
        """Weight and bias of one kind in a block, those that are there."""
        name = self.gguf.TENSOR_NAMES[self.gguf.MODEL_TENSOR[kind]].format(bid=block)
        found = (self.file.tensors.get(f"{name}.{part}") for part in ("weight", "bias"))
        return [tensor for tensor in found if tensor is not None]

    def rows(self, kinds: Iterable[str], block: int) -> list[tuple[MarkedTensor, int]]:
        """The axes along which tensors of these kinds give their outputs, biases among them."""
        found = [tensor for kind in kinds for tensor in self.tensors(kind, block)]
        return [(t, len(t.shape) - (2 if t.name.endswith(".weight") else 1)) for t in found]

    def columns(self, kind: str, block: int) -> list[tuple[MarkedTensor, int]]:
        """The axis along which a weight takes its inputs."""
        return [(t, len(t.shape) - 1) for t in self.tensors(kind, block) if t.name.endswith(".weight")]


# Metadata, the tensors that have its number of rows (or twice that, where gate and values are one), and the columns.
FEEDS = (
    ("FEED_FORWARD_LENGTH", ("FFN_UP", "FFN_GATE"), "FFN_DOWN"),
    ("EXPERT_FEED_FORWARD_LENGTH", ("FFN_UP_EXP", "FFN_GATE_EXP", "FFN_GATE_UP_EXP"), "FFN_DOWN_EXP"),
    ("EXPERT_SHARED_FEED_FORWARD_LENGTH", ("FFN_UP_SHEXP", "FFN_GATE_SHEXP"), "FFN_DOWN_SHEXP"),
)


def units_of(names: Names) -> Layers:
    """Find the units in the tensors of each block.

    Raises:
        FormatError: something is marked in a tensor whose size is not what the metadata says.
    """
    layers = Layers([], {}, {})
    for block in range(names.blocks):
        for spoken, ups, down in FEEDS:
            if found := _feed(names, block, spoken, ups, down):
                layers.feeds.append(found)
        _heads(names, block, layers)
        _adopt(names, block, [units for units in layers.all() if units.block == block])
    return layers


def _feed(names: Names, block: int, spoken: str, ups: Sequence[str], down: str) -> Units | None:
    columns, rows = names.columns(down, block), names.rows(ups, block)
    if not columns or not rows:
        return None
    size = columns[0][0].shape[-1]
    key = names.key(getattr(names.gguf.Keys.LLM, spoken))
    if spoken.startswith("EXPERT_FEED") and key not in names.file.fields:
        key = names.key(names.gguf.Keys.LLM.FEED_FORWARD_LENGTH)  # what some architectures count their experts by
    runs = []
    for tensor, axis in (*columns, *rows):
        parts = tensor.shape[axis] // size if tensor.shape[axis] in (size, 2 * size) else 0
        runs += [UnitRange(tensor, axis, part * size, size, 1) for part in range(parts)]
        if not parts:
            _unless_marked([*columns, *rows], f"`{tensor.name}` has {tensor.shape[axis]} rows, not {size}")
            return None
    said = names.values(key)
    if said is None or said[block] != size:
        what = "is absent" if said is None else f"says {said[block]} for block {block}"
        _unless_marked([*columns, *rows], f"`{columns[0][0].name}` has {size} columns, and {key} {what}")
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
        _unless_marked(axes, f"`{out[0][0].name}` has {width} columns for {heads} heads, {kv} of them of keys")
        return
    value = width // heads
    mine, theirs = [UnitRange(t, a, 0, heads, value) for t, a in out], []
    for tensor, axis in projections["ATTN_QKV"]:
        rest = tensor.shape[axis] - kv * value  # [query heads | key heads] of the length of keys, then the values
        if rest <= 0 or rest % (heads + kv):
            _unless_marked(axes, f"`{tensor.name}` has {tensor.shape[axis]} rows, which are no whole heads")
            return
        length = rest // (heads + kv)
        mine.append(UnitRange(tensor, axis, 0, heads, length))
        theirs.append(UnitRange(tensor, axis, heads * length, kv, length))
        theirs.append(UnitRange(tensor, axis, rest, kv, value))
    lengths = {"ATTN_V": value}  # queries are as long as keys
    for kind, count, runs in (("ATTN_Q", heads, mine), ("ATTN_K", kv, theirs), ("ATTN_V", kv, theirs)):
        for tensor, axis in projections[kind]:
            length = lengths.setdefault("ATTN_V" if kind == "ATTN_V" else "ATTN_K", tensor.shape[axis] // count)
            if tensor.shape[axis] != count * length:
                _unless_marked(axes, f"`{tensor.name}` has {tensor.shape[axis]} rows, not {count} heads of {length}")
                return
            runs.append(UnitRange(tensor, axis, 0, count, length))
    if theirs:
        layers.queries[block] = Units(block, f"heads of block {block}", names.key(keys.HEAD_COUNT), mine)
        layers.keys[block] = Units(block, f"key heads of block {block}", names.key(keys.HEAD_COUNT_KV), theirs)


def _unless_marked(axes: Iterable[tuple[MarkedTensor, int]], why: str) -> None:
    """Tensors that are not what the metadata says are left alone, unless something of them was removed.

    Raises:
        FormatError: it was.
    """
    for tensor, axis in axes:
        if tensor.gone[axis].any():
            raise FormatError(
                f"{int(tensor.gone[axis].sum())} of {tensor.shape[axis]} entries of `{tensor.name}` are marked as "
                f"removed, and what they are is not clear: {why}"
            )


def _adopt(names: Names, block: int, found: Sequence[Units]) -> None:
    """Other tensors of a block that lost just what some units did (sinks and norms by head) go with them."""
    prefix = f"blk.{block}."
    taken = {(run.tensor.name, run.axis) for units in found for run in units.runs}
    for tensor in names.file.tensors.values():
        for axis, gone in enumerate(tensor.gone):
            if not tensor.name.startswith(prefix) or (tensor.name, axis) in taken or not gone.any():
                continue
            if names.of_embedding(gone):
                continue
            fitting: dict[int, tuple[Units, UnitRange]] = {}
            for units in found:
                for run in units.runs:
                    for size, like in ((run.size, run.gone.ravel()), (1, ~units.keep)):
                        if np.array_equal(gone, like):
                            fitting[id(units)] = units, UnitRange(tensor, axis, 0, run.units, size)
            if len(fitting) == 1:
                ((units, run),) = fitting.values()
                units.runs.append(run)
