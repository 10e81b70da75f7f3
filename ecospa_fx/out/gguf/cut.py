"""Cut of a GGUF file to the sizes of a shrunk model, from a file at original sizes with removed entries marked.

save_unshrunk(model, directory, mark=True)     removed entries are NaN
  -> convert_hf_to_gguf.py directory           llama.cpp's converter: it knows each architecture and its order of rows
  -> files.read                                slices that are NaN throughout were removed, wherever they lie now
  -> units, widths                             the sizes of the format that these are, and whether it can express them
  -> files.write                               the file without them
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecospa_fx.arguments import FLAG, PATH, TEXT, WHOLE, optional, takes
from ecospa_fx.errors import FormatError

from .files import Marked, read, write
from .units import Names, units_of
from .widths import check_other_tensors, choose_widths, kept_axes, metadata, unsupported_marks


@dataclass(frozen=True)
class Cut:
    """The result of `cut_gguf`.

    Attributes:
        before: number of entries of all tensors in the marked file.
        left: number of entries that the shrunk model has.
        written: number of entries in the new file: those left, and zeros where the format needs an entry.
        metadata: changed metadata: a number for all layers, or one per layer.
    """

    before: int
    left: int
    written: int
    metadata: Mapping[str, int | list[int]]

    def __str__(self) -> str:
        changes = ", ".join(f"{key} = {value}" for key, value in self.metadata.items()) or "no metadata changed"
        zeros = f", {self.written - self.left:,} of them zeros" if self.written > self.left else ""
        return f"{self.before:,} -> {self.written:,} entries{zeros}; {changes}"


@takes(source=PATH, target=PATH, zeros=FLAG, per_layer=FLAG, heads=FLAG, round_to=WHOLE, architecture=optional(TEXT))
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

    GGUF has numbers for the width of feed-forward layers and for heads, so these can shrink. All heads have one length,
    and most loaders take one width for all layers. Other removed entries can only be zeros. A loader compares all
    shapes with the metadata, so it refuses a file that it does not support.

    Args:
        source: the file that llama.cpp's converter made of a marked model, in float32, float16 or bfloat16.
        target: the file to write.
        zeros: write zeros for removed entries that the format needs; the model computes the same.
        per_layer: write one width per layer if they differ. The loader of the architecture must read them.
        heads: cut whole heads too, if the loader derives nothing else from their number (such as slopes by head); else
            they stay, as zeros.
        round_to: round feed-forward widths up to multiples of this, with zeros (32 for most kinds of quantisation).
        architecture: write the file as one of another architecture, which computes the same and reads widths per layer.

    Returns:
        The sizes and the metadata that changed.

    Raises:
        CheckpointError: `source` cannot be read, or `target` cannot be written.
        FormatError: nothing is marked; the format cannot express the sizes (without zeros); or a tensor cannot be cut.
    """
    if type(round_to) is not int or round_to < 1:
        raise FormatError(f"round_to={round_to!r} is not a number of entries; pass 1 or more")
    file = read(Path(source))
    names = Names(file)
    fields = dict(file.fields) if architecture is None else _renamed(names, architecture)
    layers = units_of(names)
    reasons = choose_widths(names, layers, per_layer=per_layer, round_to=round_to, heads=heads)
    reasons = [*unsupported_marks(names, layers), *reasons]
    if reasons and not zeros:
        more = f" (and {len(reasons) - 1} more such)" if len(reasons) > 1 else ""
        raise FormatError(
            f"GGUF cannot express the sizes in {file.path.name}: {reasons[0]}{more}. zeros=True puts zeros there, "
            "which compute the same; to avoid them, keep such couplings at full size while training (frozen=[...])"
        )
    normed = [name for name, tensor in file.tensors.items() if "norm" in name and tensor.holes]
    if reasons and normed:
        raise FormatError(
            f"GGUF cannot express the sizes in {file.path.name}: {reasons[0]}. Nor do zeros compute the same, because "
            f"`{normed[0]}` has lost entries too: a norm takes what is left, and would count them; keep such couplings "
            "at full size while training (frozen=[...])"
        )
    check_other_tensors(names, layers)
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
    """Rename the metadata to another architecture, which must have all tensors of this file."""
    gguf = names.gguf
    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in architectures:
        raise FormatError(f"architecture={architecture!r} is not known to the gguf package {_version()}")
    allowed = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[architectures[architecture]]}
    for name in names.file.tensors:
        if re.sub(r"^blk\.\d+\.", "blk.{bid}.", name.rpartition(".")[0]) not in allowed:
            raise FormatError(f"`{name}` is not a tensor of {architecture!r}, which therefore computes something else")
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
