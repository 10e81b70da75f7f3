"""GGUF files: which entries of one are marked as removed, and the same file without them.

read  -> Marked   a file of llama.cpp's converter, each tensor with the slices of it that are NaN throughout
write -> a file   with what is kept of each axis, and other metadata; there whole, or not there
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ecospa_fx.checkpoint.directory import synced
from ecospa_fx.errors import CheckpointError, EcoSpaError, FormatError

Mask = npt.NDArray[np.bool_]
KeptSlices = Mapping[tuple[str, int], Mask]  # (tensor, axis) -> what stays of it; what is absent is whole

MOST = 2**24  # entries that are looked at in one piece


@dataclass(frozen=True)
class MarkedTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: in the file.
        shape: as in torch: rows first. The file itself counts the other way round.
        gone: for each axis, which of its slices are NaN throughout.
        holes: entries that are NaN.
        held: what the `gguf` package read.
    """

    name: str
    shape: tuple[int, ...]
    gone: tuple[Mask, ...]
    holes: int
    held: Any

    @property
    def size(self) -> int:
        """Entries."""
        return prod(self.shape)

    def values(self, keep: tuple[Mask, ...] | None = None) -> npt.NDArray[Any]:
        """What is left of it, in the numbers of the file: bfloat16 as its 16 bits."""
        data: npt.NDArray[Any] = self.held.data
        if self.held.tensor_type.name == "BF16":
            data = data.view(np.uint16).reshape(self.shape)
        if keep is None:
            return data
        for axis, mask in enumerate(keep):
            if not mask.all():
                data = np.compress(mask, data, axis=axis)
        return data

    def marks(self, values: npt.NDArray[Any]) -> Mask:
        """Which of its values are NaN."""
        if values.dtype.kind != "f" and self.held.tensor_type.name != "BF16":
            return np.zeros(values.shape, dtype=np.bool_)
        found: Mask = (values & 0x7FFF) > 0x7F80 if values.dtype == np.uint16 else np.isnan(values)
        return found


@dataclass(frozen=True)
class Marked:
    """A GGUF file of a marked model.

    Attributes:
        path: where it is.
        tensors: by their names, in its order.
        fields: its metadata: key -> (value, type, type of the entries of an array), types of the `gguf` package.
        alignment: of its tensors, in bytes.
    """

    path: Path
    tensors: dict[str, MarkedTensor]
    fields: dict[str, tuple[Any, Any, Any]]
    alignment: int

    def value(self, key: str) -> Any:
        """What a key holds; None where it is absent."""
        return self.fields[key][0] if key in self.fields else None


def read(path: Path) -> Marked:
    """Read a GGUF file, and find what is marked in it.

    Raises:
        EcoSpaError: the `gguf` package is not there.
        CheckpointError: it is no GGUF file, or one that is not whole.
        FormatError: it is quantised, in big-endian order, or split; or nothing in it is marked.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise EcoSpaError("GGUF files need the gguf package: pip install 'ecospa-fx[gguf]'") from None

    try:
        reader = gguf.GGUFReader(path)
        fields = {
            key: (field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
            for key, field in reader.fields.items()
            if not key.startswith("GGUF.") and len(field.parts) > 0
        }
    except (ValueError, KeyError, IndexError, TypeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as GGUF: {type(error).__name__}: {error}") from error
    if gguf.Keys.General.ARCHITECTURE not in fields:
        raise CheckpointError(f"{path} holds no model: it has no {gguf.Keys.General.ARCHITECTURE}")
    if reader.endianess != gguf.GGUFEndian.LITTLE:
        raise FormatError(f"{path} is in big-endian order; cut a little-endian one, then convert it")
    if fields.get(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, (1,))[0] > 1:
        raise FormatError(f"{path} is one of several parts; convert again without splitting")
    tensors = {held.name: _marked(held, path) for held in reader.tensors}
    if not any(tensor.holes for tensor in tensors.values()):
        raise FormatError(
            f"nothing in {path} is marked as removed: convert what ecospa_fx.save_unshrunk(model, ..., mark=True) wrote"
        )
    return Marked(path, tensors, fields, int(reader.alignment))


def _marked(held: Any, path: Path) -> MarkedTensor:
    kind = held.tensor_type.name
    if kind not in ("F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64"):
        raise FormatError(
            f"`{held.name}` in {path} is {kind}; only what is not quantised can be cut: convert with --outtype f32, "
            "f16 or bf16, and quantise the smaller file"
        )
    shape = tuple(int(n) for n in reversed(held.shape))
    tensor = MarkedTensor(held.name, shape, tuple(np.zeros(n, dtype=np.bool_) for n in shape), 0, held)
    if kind.startswith("I") or not tensor.size:
        return tensor
    values = tensor.values()
    counts = [np.zeros(n, dtype=np.int64) for n in shape]
    step = max(1, MOST // max(1, tensor.size // shape[0]))
    for start in range(0, shape[0], step):
        holes = tensor.marks(values[start : start + step])
        if holes.any():
            for axis, count in enumerate(counts):
                others = tuple(a for a in range(len(shape)) if a != axis)
                found = holes.sum(axis=others, dtype=np.int64)
                if axis:
                    count += found
                else:
                    count[start : start + step] = found
    gone = tuple(count == tensor.size // n for count, n in zip(counts, shape, strict=True))
    if gone[0].all():
        raise FormatError(f"`{held.name}` in {path} is NaN throughout, and something must be left of every tensor")
    return MarkedTensor(held.name, shape, gone, int(counts[0].sum()), held)


def write(source: Marked, target: Path, kept: KeptSlices, fields: Mapping[str, tuple[Any, Any, Any]]) -> int:
    """Write what is kept of a file, zeros where it is marked, and return how many entries that is.

    Raises:
        FormatError: it would take the place of its source.
        CheckpointError: it cannot be written. What was there before is there still.
    """
    import gguf

    if target.exists() and os.path.samefile(target, source.path):
        raise FormatError(f"{target} is the file that is cut; name another")
    keep = {
        name: tuple(kept.get((name, axis), np.ones(n, dtype=np.bool_)) for axis, n in enumerate(tensor.shape))
        for name, tensor in source.tensors.items()
    }
    beside = target.with_name(f".{target.name}.new")
    writer = gguf.GGUFWriter(beside, fields[gguf.Keys.General.ARCHITECTURE][0])
    writer.data_alignment = source.alignment
    for key, (value, kind, entries) in fields.items():
        if key != gguf.Keys.General.ARCHITECTURE:
            writer.add_key_value(key, value, kind, entries)
    written = 0
    for name, tensor in source.tensors.items():
        shape = [int(mask.sum()) for mask in keep[name]]
        written += prod(shape)
        bits = tensor.held.data.dtype == np.uint8  # bfloat16: the writer is told bytes
        nbytes = prod(shape) * tensor.values().dtype.itemsize
        told = [*shape[:-1], shape[-1] * 2] if bits else shape
        writer.add_tensor_info(name, told, tensor.held.data.dtype, nbytes, raw_dtype=tensor.held.tensor_type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in source.tensors.items():
            values = np.ascontiguousarray(tensor.values(keep[name]))
            if tensor.holes and (holes := tensor.marks(values)).any():
                values = np.where(holes, values.dtype.type(0), values)
            writer.write_tensor_data(values)
        writer.close()
        synced(beside)
        os.replace(beside, target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        writer.close()
        beside.unlink(missing_ok=True)
    return written
