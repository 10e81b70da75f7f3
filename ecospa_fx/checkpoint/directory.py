"""Directory of saves: it holds one complete save at every moment, even if a process is killed.

run/checkpoint.json      the name of the current save, the format, and size and hash of each of its files
run/save-7/...           its files, never written to again

write save-8/ -> fsync each file and the directory -> rename the new checkpoint.json over the old -> delete save-7/
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ecospa_fx.errors import CheckpointError
from ecospa_fx.json_text import format_json, parse_json
from ecospa_fx.ranks.agreement import Ranks

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

FORMAT = 2
MANIFEST = "checkpoint.json"
LARGEST_MANIFEST = 2**20  # in bytes
NAME = re.compile(r"save-(\d{1,18})")

SHARDS = re.compile(r"shard-.*\.safetensors")  # as torch.distributed.checkpoint names them

ALONE = Ranks()
Read = TypeVar("Read")


@dataclass(frozen=True)
class Save:
    """A complete save, whose files have the sizes and hashes that were written down.

    Attributes:
        directory: the directory with its files.
        files: name of each file -> its hash.
    """

    directory: Path
    files: Mapping[str, str]

    @property
    def sharded(self) -> bool:
        """True if ranks wrote parts of its tensors."""
        return any(map(SHARDS.fullmatch, self.files))

    def text(self, name: str) -> str:
        """Read a text file.

        Raises:
            CheckpointError: it is not part of the save, or not text.
        """
        if name not in self.files:
            raise CheckpointError(f"{self.directory} has no {name}")
        try:
            return (self.directory / name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.directory / name} cannot be read: {error}") from error

    def document(self, name: str) -> dict[str, Any]:
        """Read the object in a JSON file.

        Raises:
            CheckpointError: it is not part of the save, or not a JSON object.
        """
        document = parse_json(self.text(name), str(self.directory / name))
        if not isinstance(document, dict):
            raise CheckpointError(f"{self.directory / name} cannot be read: it is not a JSON object")
        return document

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read a safetensors file. The tensors are mapped from the file: copy those that outlive the save.

        Raises:
            CheckpointError: it is not part of the save, or its header does not fit its content.
        """
        if name not in self.files:
            raise CheckpointError(f"{self.directory} has no {name}")
        try:
            with safe_open(self.directory / name, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{self.directory / name} cannot be read: {error}") from error


class Draft:
    """A save that is being written.

    Attributes:
        shards: name -> tensor, of those that are sharded over ranks and are written by all; None: there are none.
    """

    def __init__(self, directory: Path, shards: dict[str, Tensor] | None = None) -> None:
        self.directory, self.shards = directory, shards
        self.files: dict[str, dict[str, Any]] = {}

    def document(self, name: str, value: Any) -> None:
        """Write a JSON file."""
        self.text(name, format_json(value))

    def text(self, name: str, text: str) -> None:
        """Write a text file."""
        write_text(self.directory / name, text)
        self.finish(name)

    def tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file.

        Raises:
            CheckpointError: it cannot be written, for example because the disk is full.
        """
        try:
            save_file(dict(tensors), self.directory / name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.directory / name} cannot be written: {error}") from error
        self.finish(name)

    def finish(self, name: str) -> None:
        """Wait until a file is on the disk, and write down what is in it."""
        path = self.directory / name
        sync(path)
        self.files[name] = {"bytes": path.stat().st_size, "sha256": _hash(path)}


@contextmanager
def saving(directory: Path) -> Iterator[Draft]:
    """Write a new save: it becomes the current one when the block ends, and leaves no trace if the block fails.

    Raises:
        CheckpointError: another process is saving to the directory.
    """
    fresh = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be made a directory: {error.strerror or error}") from error
    if fresh:
        sync(directory.parent)
    with _locked(directory):
        draft = Draft(directory / f"save-{1 + max(_numbers(directory), default=0)}")
        draft.directory.mkdir()
        try:
            yield draft
            sync(draft.directory)
            sync(directory)
            document = {"format": FORMAT, "save": draft.directory.name, "files": draft.files}
            write_text(directory / f"{MANIFEST}.new", format_json(document))
            sync(directory / f"{MANIFEST}.new")
            os.replace(directory / f"{MANIFEST}.new", directory / MANIFEST)
        except BaseException:
            if not _is_current(draft.directory):  # an interrupt may come right after the renaming
                shutil.rmtree(draft.directory, ignore_errors=True)
            raise
        sync(directory)
        for number in _numbers(directory):
            if directory / f"save-{number}" != draft.directory:
                shutil.rmtree(directory / f"save-{number}", ignore_errors=True)


def read_save(directory: Path, read: Callable[[Save], Read], *, ranks: Ranks = ALONE, values: bool = True) -> Read:
    """Call `read` with the current save and return its result; start again if another save replaces it meanwhile.

    Args:
        directory: the directory.
        read: reads files of the save.
        ranks: processes that read a directory that all of them see, of whose shards each checks a share.
        values: False: `read` reads no values of shards, which are not checked therefore.

    Raises:
        CheckpointError: there is no save, it is incomplete, or its files have changed.
        RanksError: another rank has found this.
    """
    while True:
        before = _manifest_of_first(directory, ranks)
        problem: CheckpointError | OSError | None = None
        try:
            save = _checked(directory, before, ranks, values)
        except (CheckpointError, OSError) as error:
            problem = error
        if not ranks.any(problem is not None, "resume"):
            try:
                return read(save)
            except (CheckpointError, OSError) as error:
                if ranks:  # the others read
                    raise
                problem = error
        if _manifest_of_first(directory, ranks) != before:
            continue
        if problem is None:
            ranks.meet("resume")  # the rank with the problem tells it here
        if isinstance(problem, CheckpointError):
            raise problem
        raise CheckpointError(f"{directory} cannot be read: {problem}") from problem


def saved_files(directory: Path) -> Path:
    """Return the directory with the files of the current save, without checking them.

    Raises:
        CheckpointError: there is no save.
    """
    return directory / str(_document(directory, _manifest(directory))["save"])


def _manifest_of_first(directory: Path, ranks: Ranks) -> bytes:
    """Return the manifest that the first rank sees; one that does not see any is told."""
    return ranks.said_by_first(_manifest(directory).decode("latin-1"), "resume").encode("latin-1")


def _manifest(directory: Path) -> bytes:
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a saved model: it has no {MANIFEST}")
    with path.open("rb") as file:
        content = file.read(LARGEST_MANIFEST + 1)
    if len(content) > LARGEST_MANIFEST:
        raise CheckpointError(f"{path} is larger than {LARGEST_MANIFEST} bytes: it was not written by ecospa_fx.save")
    return content


def _document(directory: Path, manifest: bytes) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        document = parse_json(manifest.decode(), str(path))
        version, name, files = document["format"], document.get("save"), document.get("files")
    except (UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version!r}; this version of ecospa_fx reads {FORMAT}")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise CheckpointError(f"{path} names no save: {name!r} is not `save-` and a number")
    if not isinstance(files, dict) or not all(isinstance(file, dict) for file in files.values()):
        raise CheckpointError(f"{path} has no list of files")
    return {"save": name, "files": files}


def _checked(directory: Path, manifest: bytes, ranks: Ranks, values: bool) -> Save:
    document = _document(directory, manifest)
    save = directory / document["save"]
    shards = sorted(filter(SHARDS.fullmatch, document["files"]))
    others = {*shards} - ({*shards[ranks.index :: ranks.count]} if values else set())
    for name, file in document["files"].items():
        if Path(name).name != name or name == ".." or "\\" in name or "\0" in name:
            raise CheckpointError(f"{directory / MANIFEST} names a file outside its directory: {name!r}")
        if name in others:
            continue
        path = save / name
        if not path.is_file():
            raise CheckpointError(f"{save} is incomplete: {name} is missing")
        size = path.stat().st_size
        if size != file.get("bytes"):
            raise CheckpointError(
                f"{path} is not the file that was saved: it has {size} bytes, not {file.get('bytes')!s:.40}"
            )
        if _hash(path) != file.get("sha256"):
            raise CheckpointError(f"{path} is not the file that was saved: it has been changed since")
    return Save(save, {name: file["sha256"] for name, file in document["files"].items()})


def _is_current(save: Path) -> bool:
    try:
        return saved_files(save.parent) == save
    except CheckpointError:
        return False


def _numbers(directory: Path) -> list[int]:
    matches = (NAME.fullmatch(path.name) for path in directory.iterdir())
    return [int(match.group(1)) for match in matches if match]


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other processes, such as other ranks of a distributed run, from saving to the same directory."""
    if fcntl is None:
        yield
        return
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"another process is saving to {directory}; save from one process only") from error
        except OSError:  # a file system without locks
            pass
        yield


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 with unix line ends."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no directories
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
