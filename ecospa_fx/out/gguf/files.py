"""GGUF files: one with entries marked as removed, and the same file without them.

read  -> Marked   a file of llama.cpp's converter, each tensor with its slices that are NaN throughout
write -> a file   with the kept slices of each axis, and new metadata; it appears complete or not at all
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

from ecospa_fx.checkpoint.directory import sync
from ecospa_fx.errors import CheckpointError, EcoSpaError, FormatError

Mask = npt.NDArray[np.bool_]
KeptSlices = Mapping[tuple[str, int], Mask]  # (tensor, axis) -> slices kept; absent axes keep all

MOST = 2**24  # entries that are examined at a time


@dataclass(frozen=True)
class MarkedTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: name in the file.
        shape: shape as in torch, rows first; the file has the reverse order.
        removed: for each axis, a mask of the slices that are NaN throughout.
        holes: number of entries that are NaN.
        source: the tensor as read by the `gguf` package.
    """

    name: str
    shape: tuple[int, ...]
    removed: tuple[Mask, ...]
    holes: int
    source: Any

    @property
    def size(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    def values(self, keep: tuple[Mask, ...] | None = None) -> npt.NDArray[Any]:
        """Return the kept values in the dtype of the file; bfloat16 as its 16 bits."""
        data: npt.NDArray[Any] = self.source.data
        if self.source.tensor_type.name == "BF16":
            data = data.view(np.uint16).reshape(self.shape)
        if keep is None:
            return data
        for axis, mask in enumerate(keep):
            if not mask.all():
                data = np.compress(mask, data, axis=axis)
        return data

    def marks(self, values: npt.NDArray[Any]) -> Mask:
        """Return a mask of the values that are NaN."""
        if values.dtype.kind != "f" and self.source.tensor_type.name != "BF16":
            return np.zeros(values.shape, dtype=np.bool_)
        marks: Mask = (values & 0x7FFF) > 0x7F80 if values.dtype == np.uint16 else np.isnan(values)
        return marks


@dataclass(frozen=True)
class Marked:
    """A GGUF file of a marked model.

    Attributes:
        path: path of the file.
        tensors: tensors by name, in the order of the file.
        fields: metadata: key -> (value, type, type of the entries of an array), with types of the `gguf` package.
        alignment: alignment of tensors in bytes.
    """

    path: Path
    tensors: dict[str, MarkedTensor]
    fields: dict[str, tuple[Any, Any, Any]]
    alignment: int

    def value(self, key: str) -> Any:
        """Return the value of a key, or None if it is absent."""
        return self.fields[key][0] if key in self.fields else None


def read(path: Path) -> Marked:
    """Read a GGUF file, and find the marked entries.

    Raises:
        EcoSpaError: the `gguf` package is not installed.
        CheckpointError: it is not a GGUF file, or an incomplete one.
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
        raise FormatError(f"{path} is in big-endian order; cut a little-endian file, then convert it")
    if fields.get(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, (1,))[0] > 1:
        raise FormatError(f"{path} is one of several parts; convert again without splitting")
    tensors = {source.name: _marked(source, path) for source in reader.tensors}
    if not any(tensor.holes for tensor in tensors.values()):
        raise FormatError(
            f"nothing in {path} is marked as removed: convert a model that "
            "ecospa_fx.save_unshrunk(model, ..., mark=True) wrote"
        )
    return Marked(path, tensors, fields, int(reader.alignment))


def _marked(source: Any, path: Path) -> MarkedTensor:
    kind = source.tensor_type.name
    if kind not in ("F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64"):
        raise FormatError(
            f"`{source.name}` in {path} is {kind}; a quantised tensor cannot be cut: convert with --outtype f32, "
            "f16 or bf16, and quantise the smaller file"
        )
    shape = tuple(int(n) for n in reversed(source.shape))
    tensor = MarkedTensor(source.name, shape, tuple(np.zeros(n, dtype=np.bool_) for n in shape), 0, source)
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
                added = holes.sum(axis=others, dtype=np.int64)
                if axis:
                    count += added
                else:
                    count[start : start + step] = added
    removed = tuple(count == tensor.size // n for count, n in zip(counts, shape, strict=True))
    if removed[0].all():
        raise FormatError(f"`{source.name}` in {path} is NaN throughout, and every tensor needs at least one entry")
    return MarkedTensor(source.name, shape, removed, int(counts[0].sum()), source)


def write(source: Marked, target: Path, kept: KeptSlices, fields: Mapping[str, tuple[Any, Any, Any]]) -> int:
    """Write the kept slices of a file, with zeros for marked entries, and return the number of entries.

    Raises:
        FormatError: the target is the source itself.
        CheckpointError: the target cannot be written. An earlier file there stays.
    """
    import gguf

    if target.exists() and os.path.samefile(target, source.path):
        raise FormatError(f"{target} is the source itself; name another target")
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
        bits = tensor.source.data.dtype == np.uint8  # bfloat16: the writer takes sizes in bytes
        nbytes = prod(shape) * tensor.values().dtype.itemsize
        declared = [*shape[:-1], shape[-1] * 2] if bits else shape
        writer.add_tensor_info(name, declared, tensor.source.data.dtype, nbytes, raw_dtype=tensor.source.tensor_type)
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
        sync(beside)
        os.replace(beside, target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        writer.close()
        beside.unlink(missing_ok=True)
    return written
