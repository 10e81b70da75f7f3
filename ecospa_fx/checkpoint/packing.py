"""Packing of nested state (of optimizers, schedules, generators) as JSON and tensors, and back to equal values.

JSON has no tuples, no infinity and no tensors, so these are written as an object with one key that begins with `$`:

{"$tensor": "exp_avg"}       a tensor under that name in the safetensors file
{"$shards": "exp_avg"}       one under that name in the files that all ranks wrote, see sharded.py
{"$tuple": [1, 2]}           a tuple; likewise $set, $size, $deque, $ordered, $counter, $dict
{"$float": "inf"}            a number that JSON does not have
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ecospa_fx.errors import CheckpointError
from ecospa_fx.passes.graph.tensors import is_quantized
from ecospa_fx.ranks.shards import is_sharded

Kind = TypeVar("Kind")

PLAIN = (type(None), bool, int, str)
NUMBERS = "biuf"  # kinds of numpy dtypes: bool, signed, unsigned, floating
SAVABLE = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
    torch.bool,
}  # fmt: skip


class Packer:
    """A converter of values to JSON, which collects their tensors in `tensors`, a repeated one once.

    Args:
        shards: collects the tensors that are sharded over ranks, by name; None: they are refused.
    """

    def __init__(self, shards: dict[str, Tensor] | None = None) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.shards = shards
        self._first: dict[Any, tuple[str, Tensor]] = {}  # keeps tensors alive, so that no address is used again

    def pack(self, value: Any, where: str) -> Any:
        """Convert a value to JSON.

        Args:
            value: nested containers of numbers, strings, tensors and arrays.
            where: its name, in errors and in the names of its tensors.

        Raises:
            CheckpointError: it contains a value of another type.
        """
        kind = type(value)
        if kind in PLAIN:
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if kind is list:
            return self._each(value, where)
        if kind is dict and all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.pack(entry, f"{where}/{key}") for key, entry in value.items()}
        if kind in _MAPPINGS:
            return {_MAPPINGS[kind]: [[self.pack(k, where), self.pack(v, f"{where}/{k}")] for k, v in value.items()]}
        if kind in _SEQUENCES:
            return {_SEQUENCES[kind]: self._each(value, where)}
        if kind is deque:
            return {"$deque": [value.maxlen, *self._each(value, where)]}
        if kind is complex:
            return {"$complex": [self.pack(part, where) for part in (value.real, value.imag)]}
        if kind is bytes:
            return {"$bytes": base64.b64encode(value).decode()}
        if kind in (torch.dtype, torch.device):
            return {f"${kind.__name__}": str(value).removeprefix("torch.")}
        if isinstance(value, (np.generic, np.ndarray)) and value.dtype.kind in NUMBERS and value.dtype.itemsize <= 8:
            if isinstance(value, np.generic):
                return {"$scalar": [value.dtype.str, self.pack(value.item(), where)]}
            native = np.array(value, dtype=value.dtype.newbyteorder("="))
            return {"$array": [value.dtype.str, self._tensor(torch.from_numpy(native), where)]}
        if isinstance(value, Tensor):
            return self._tensor(value, where)
        raise CheckpointError(
            f"`{where}` is a {kind.__module__}.{kind.__qualname__}, which cannot be saved without pickle; numbers, "
            "strings, tensors and lists, tuples, sets and dicts of them can"
        )

    def _each(self, values: Iterable[Any], where: str) -> list[Any]:
        return [self.pack(entry, f"{where}/{i}") for i, entry in enumerate(values)]

    def _tensor(self, tensor: Tensor, where: str) -> dict[str, Any]:
        if self.shards is not None and is_sharded(tensor):
            self.shards[where] = tensor
            return {"$shards": where}
        flat, layout = flatten_layout(tensor, where)
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._first:
            while where in self.tensors:
                where += "'"
            self.tensors[where], self._first[key] = flat, (where, tensor)
        name, _ = self._first[key]
        return {"$tensor": name, **layout}


class Unpacker:
    """A converter of JSON from a `Packer` back to values.

    Args:
        tensors: the tensors that belong to the document.
        source: name of the document, for errors.
        shards: those that were sharded over ranks, by name.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], source: str, shards: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        self.tensors, self.source, self.shards = tensors, source, shards
        self._restored: dict[str, Tensor] = {}

    def unpack(self, value: Any) -> Any:
        """Convert JSON back to the value that was packed.

        Raises:
            CheckpointError: it was not written by a `Packer`.
        """
        try:
            return self._unpacked(value)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self.source} cannot be read: {type(error).__name__}: {error}") from error

    def _unpacked(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._unpacked(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        if not _is_tag(value):
            return {key: self._unpacked(entry) for key, entry in value.items()}
        tag = next(iter(value))
        content = value[tag]
        if tag == "$tensor":
            return self._tensor(content, value)
        if tag == "$shards":
            return self.shards[content]
        if tag in _READ:
            return _READ[tag](self._unpacked(content))
        raise CheckpointError(f"{self.source} holds `{tag}`, which this version of ecospa_fx does not know")

    def _tensor(self, name: str, layout: Mapping[str, Any]) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.source} names a tensor `{name}`, which is not in the file beside it")
        if name not in self._restored:
            self._restored[name] = restore_layout(self.tensors[name], layout)
        return self._restored[name]


def flatten_layout(tensor: Tensor, where: str) -> tuple[Tensor, dict[str, Any]]:
    """Convert a tensor to one that safetensors can hold, contiguous on the CPU, and describe its memory layout.

    The order of dims in memory (channels last, for example) changes the last bit of results, so it is restored.

    Returns:
        The tensor, and its layout: `order` (dims, outermost first, if not in order), `complex` if it is complex, and
        `sparse`, the layout of torch that it has if it is sparse.

    Raises:
        CheckpointError: it is not a plain tensor with values.
    """
    why = None
    if is_quantized(tensor):
        why = "is quantized, which safetensors cannot hold; save before that"
    elif type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        why = f"is a {type(tensor).__name__}; gather it into a plain tensor first"
    elif tensor.is_meta:
        why = "is on the meta device and has no values"
    elif tensor.dtype not in SAVABLE and not tensor.is_complex():
        why = f"is {tensor.dtype}, which safetensors cannot hold"
    dense = _dense(tensor) if why is None else None
    if dense is None:
        why = why or f"is {tensor.layout}, and as a dense tensor does not come back the same or is too large"
        raise CheckpointError(f"`{where}` {why}")
    layout: dict[str, Any] = {}
    if tensor.layout != torch.strided:
        layout["sparse"] = str(tensor.layout).removeprefix("torch.")
    tensor = dense
    flat = tensor.detach().resolve_neg()
    if flat.is_complex():
        flat, layout["complex"] = torch.view_as_real(flat.resolve_conj()), True
    # Of two dims with equal strides, the one of size 1 is the inner one.
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], tensor.shape[dim] == 1))
    if order != list(range(tensor.ndim)) and tensor.permute(order).is_contiguous():
        layout["order"] = order
    flat = flat.cpu().contiguous()
    # safetensors would write the whole storage of a view, or refuse it.
    return (flat if flat.untyped_storage().nbytes() == flat.nbytes else flat.clone()), layout


def restore_layout(tensor: Tensor, layout: Mapping[str, Any]) -> Tensor:
    """Restore the memory layout of a tensor from a safetensors file, in new memory."""
    flat = torch.view_as_complex(tensor) if layout.get("complex") else tensor
    if "sparse" in layout:
        return flat.to_sparse(layout=_of_torch(layout["sparse"], torch.layout))
    if "order" not in layout:
        return flat.clone(memory_format=torch.contiguous_format)
    order = list(layout["order"])
    back = [order.index(dim) for dim in range(flat.ndim)]
    return flat.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


_MOST_DENSE = 2**30  # bytes


def _dense(tensor: Tensor) -> Tensor | None:
    """Return a tensor in its dense form; None if that does not give it back, with zeros or blocks of its own, say."""
    if tensor.layout == torch.strided:
        return tensor
    if tensor.numel() * tensor.element_size() > _MOST_DENSE or tensor.is_complex():
        return None
    sparse = tensor.detach()
    try:
        dense = sparse.to_dense()
        again = dense.to_sparse(layout=sparse.layout)
        same = all(torch.equal(a, b) for a, b in zip(_parts(sparse), _parts(again), strict=True))
    except RuntimeError:  # torch has no way back for this layout or dtype; whoever saves the tensor is told
        return None
    return dense if same else None


def _parts(sparse: Tensor) -> tuple[Tensor, ...]:
    """Return the indices and the values of a sparse tensor."""
    if sparse.layout == torch.sparse_coo:
        return sparse.indices(), sparse.values()  # raises where entries are not in order
    rows = sparse.layout in (torch.sparse_csr, torch.sparse_bsr)
    lines = (sparse.crow_indices(), sparse.col_indices()) if rows else (sparse.ccol_indices(), sparse.row_indices())
    return *lines, sparse.values()


def _is_tag(value: Mapping[str, Any]) -> bool:
    first = next(iter(value), "")
    return isinstance(first, str) and first.startswith("$")


def _number(text: str) -> float:
    if text not in ("inf", "-inf", "nan"):
        raise ValueError(f"{text!r} is not one of inf, -inf, nan")
    return float(text)


def _numeric(dtype: str) -> np.dtype[Any]:
    numeric = np.dtype(dtype)
    if numeric.kind not in NUMBERS:
        raise ValueError(f"{dtype!r} is not a dtype of numbers")
    return numeric


def _of_torch(name: str, kind: type[Kind]) -> Kind:
    value = getattr(torch, name, None)
    if not isinstance(value, kind):
        raise ValueError(f"torch has no {kind.__name__} {name!r}")
    return value


_MAPPINGS: dict[type, str] = {dict: "$dict", OrderedDict: "$ordered", Counter: "$counter"}
_SEQUENCES: dict[type, str] = {tuple: "$tuple", set: "$set", frozenset: "$frozenset", torch.Size: "$size"}
_READ: dict[str, Any] = {
    "$float": _number,
    "$dict": dict,
    "$ordered": OrderedDict,
    "$counter": lambda pairs: Counter(dict(pairs)),
    "$tuple": tuple,
    "$set": set,
    "$frozenset": frozenset,
    "$size": torch.Size,
    "$deque": lambda entries: deque(entries[1:], entries[0]),
    "$complex": lambda parts: complex(*parts),
    "$bytes": lambda text: base64.b64decode(text, validate=True),
    "$dtype": lambda name: _of_torch(name, torch.dtype),
    "$device": torch.device,
    "$scalar": lambda pair: _numeric(pair[0]).type(pair[1]),
    "$array": lambda pair: pair[1].numpy().astype(_numeric(pair[0]), copy=False),
}
