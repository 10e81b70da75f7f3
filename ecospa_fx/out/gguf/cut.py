"""cut_gguf: a GGUF file of a shrunk model, cut from one at the original sizes in which what is gone is marked.

save_unshrunk(model, directory, mark=True)     removed entries are NaN
  -> convert_hf_to_gguf.py directory           llama.cpp's own: it knows each architecture, and how rows are to lie
  -> gguf_files.read                           slices that are NaN throughout are what was removed, wherever they lie
  -> gguf_units, gguf_widths                   which sizes of the format these are, and what it can say of them
  -> gguf_files.write                          without them
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecospa_fx.errors import FormatError

from .files import Marked, read, write
from .units import Names, units_of
from .widths import check_followed, kept_axes, left_over, metadata, settle


@dataclass(frozen=True)
class Cut:
    """What `cut_gguf` did.

    Attributes:
        before: entries of all tensors of the marked file.
        left: those of them that the shrunk model has.
        written: entries of the new file: those that are left, and zeros where the format cannot do without.
        metadata: what changed: the number for all layers, or one for each.
    """

    before: int
    left: int
    written: int
    metadata: Mapping[str, int | list[int]]

    def __str__(self) -> str:
        said = ", ".join(f"{key} = {value}" for key, value in self.metadata.items()) or "no metadata changed"
        zeros = f", {self.written - self.left:,} of them zeros" if self.written > self.left else ""
        return f"{self.before:,} -> {self.written:,} entries{zeros}; {said}"


def cut_gguf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    zeros: bool = False,
    per_layer: bool = False,
    heads: bool = False,
    round_to: int = 1,
    architecture: str | None = None,
) -> Cut:
    """Write a GGUF file of a shrunk model.

    >>> ecospa_fx.save_unshrunk(model, "marked", mark=True)  # tokenizer.save_pretrained("marked") as well
    >>> # python convert_hf_to_gguf.py marked --outtype f32 --outfile marked.gguf
    >>> ecospa_fx.cut_gguf("marked.gguf", "small.gguf", zeros=True)

    GGUF has numbers for the width of feed-forward layers and for heads; these can shrink. One head is as long as every
    other, and most loaders take one width for all layers. What is gone beyond that can only be zero. A loader compares
    all shapes with the metadata, so that a file which is not for it is refused there.

    Args:
        source: what llama.cpp's converter made of a marked model, as float32, float16 or bfloat16.
        target: where to.
        zeros: put zeros where the format cannot do without what is gone; the model computes the same.
        per_layer: write one width for each layer where they differ. The loader of the architecture must read them.
        heads: cut whole heads too, where their number has no other meaning for the loader (slopes by head, say); else
            they stay, as zeros.
        round_to: keep feed-forward widths at multiples of this, with zeros (32 for most kinds of quantisation).
        architecture: write the file as of another architecture, one that computes the same and reads widths per layer.

    Returns:
        What was done.

    Raises:
        CheckpointError: `source` cannot be read, or `target` not written.
        FormatError: nothing is marked; the format cannot hold what is left (without zeros); or it is not known how to
            cut a tensor.
    """
    if type(round_to) is not int or round_to < 1:
        raise FormatError(f"round_to={round_to!r} is no number of entries; give 1 or more")
    file = read(Path(source))
    names = Names(file)
    fields = dict(file.fields) if architecture is None else _renamed(names, architecture)
    layers = units_of(names)
    reasons = settle(names, layers, per_layer=per_layer, round_to=round_to, heads=heads)
    reasons = [*left_over(names, layers), *reasons]
    if reasons and not zeros:
        more = f" (and {len(reasons) - 1} more such)" if len(reasons) > 1 else ""
        raise FormatError(
            f"GGUF cannot hold what is left of {file.path.name}: {reasons[0]}{more}. zeros=True puts zeros there, "
            "which compute the same; to be rid of them, keep such couplings whole while training (frozen=[...])"
        )
    check_followed(names, layers)
    changed = metadata(names, layers)
    for key, value in changed.items():
        fields[_key(key, names, architecture)] = _field(names, file, key, value)
    before = sum(tensor.size for tensor in file.tensors.values())
    left = before - sum(tensor.holes for tensor in file.tensors.values())
    written = write(file, Path(target), kept_axes(layers), fields)
    return Cut(before, left, written, {_key(key, names, architecture): value for key, value in changed.items()})


def _field(names: Names, file: Marked, key: str, value: int | list[int]) -> tuple[Any, Any, Any]:
    types = names.gguf.GGUFValueType
    entry = types.UINT32
    if key in file.fields:
        _, kind, entries = file.fields[key]
        entry = entries if kind == types.ARRAY else kind
    return (value, types.ARRAY, entry) if isinstance(value, list) else (value, entry, None)


def _key(key: str, names: Names, architecture: str | None) -> str:
    return key if architecture is None else f"{architecture}{key.removeprefix(names.architecture)}"


def _renamed(names: Names, architecture: str) -> dict[str, tuple[Any, Any, Any]]:
    """The metadata under the name of another architecture, which must have all tensors of this file."""
    gguf = names.gguf
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise FormatError(f"architecture={architecture!r} is none that the gguf package {_version()} knows")
    allowed = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[known[architecture]]}
    for name in names.file.tensors:
        if re.sub(r"^blk\.\d+\.", "blk.{bid}.", name.rpartition(".")[0]) not in allowed:
            raise FormatError(f"`{name}` is no tensor of {architecture!r}, which cannot compute the same then")
    here, named = f"{names.architecture}.", gguf.Keys.General.ARCHITECTURE
    fields = {
        f"{architecture}.{key.removeprefix(here)}" if key.startswith(here) else key: value
        for key, value in names.file.fields.items()
    }
    fields[named] = (architecture, *names.file.fields[named][1:])
    return fields


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")
