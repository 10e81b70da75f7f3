"""Sharded saves: all ranks write their parts of the tensors, and ranks of any number read theirs.

save on 4 ranks -> save-7/shard-00001-... to shard-00004-...   by torch.distributed.checkpoint, in safetensors
                   save-7/model.json, plan.json, trainer.json  by the first rank, as in every save
resume on 3     -> each reads the rows that it holds now; `load` in one process reads all of them

The first rank makes the save the current one when every rank has written its part.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from ecospa_fx.collectives import is_distributed
from ecospa_fx.errors import CheckpointError, RanksError
from ecospa_fx.ranks.agreement import Ranks
from ecospa_fx.ranks.shards import groups_of, is_sharded, local_part, whole_of

from .directory import Draft, Save, saving

WEIGHTS = "model/"
"""The beginning of the names of parameters and buffers among the tensors that are sharded."""


class _Told(Draft):
    """The draft of another rank than the first, which writes its random numbers, and takes part in the rest.

    Args:
        directory: the directory of the save.
        rank: this rank.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        super().__init__(directory, {})
        self._rank = rank

    def text(self, name: str, text: str) -> None:
        """Write a file of random numbers; leave any other to the first rank."""
        if name.startswith("random."):
            super().text(of_rank(name, self._rank), text)

    def tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a file of random numbers; leave any other to the first rank."""
        if name.startswith("random."):
            super().tensors(of_rank(name, self._rank), tensors)


def of_rank(name: str, rank: int) -> str:
    """Return the name of a file of the first rank, as another rank writes it."""
    stem, dot, kind = name.partition(".")
    return f"{stem}-{rank}{dot}{kind}"


def own_random(files: Iterable[str]) -> str | None:
    """Return the name of the file of random numbers that this rank goes on with; None if there is none for it."""
    rank = distributed.get_rank() if is_distributed() else 0
    name = of_rank("random.json", rank) if rank else "random.json"
    return name if rank == 0 or name in files else None


def save_by_all(ranks: Ranks, directory: Path, write: Callable[[Draft], None]) -> None:
    """Write a save by all ranks together: on all of them, or on none.

    Args:
        ranks: the processes, all of the run.
        directory: the directory, on a file system that all of them see.
        write: writes everything but shards into a draft, and puts these into `draft.shards`.

    Raises:
        CheckpointError: something cannot be saved, or some processes of the run do not take part.
        RanksError: another rank cannot take part.
    """
    if ranks.count != distributed.get_world_size():
        raise CheckpointError(
            f"{ranks.count} of {distributed.get_world_size()} processes hold this model; it is saved by all or by one"
        )

    def work() -> None:
        ranks.agree("save", {"directory": str(directory)})
        with ExitStack() as stack:
            draft = stack.enter_context(saving(directory)) if ranks.is_first else None
            (number,) = ranks.first([float(draft.directory.name.partition("-")[2]) if draft else 0.0], "save")
            folder = directory / f"save-{int(number)}"
            mine = Draft(folder, {}) if draft is not None else _Told(folder, distributed.get_rank())
            write(mine)
            ranks.agree("save", {"names of sharded tensors": sorted(mine.shards or ())})
            _write_shards(folder, mine.shards or {})
            written = ranks.first(sorted(path.name for path in folder.glob("shard-*")), "save")
            for name in written[ranks.index :: ranks.count]:
                mine.finish(name)
            files = ranks.gathered(mine.files, "save")
            if draft is not None:
                draft.files |= {name: file for each in files.values() for name, file in each.items()}

    ranks.together("save", work)


def _write_shards(folder: Path, shards: Mapping[str, Tensor]) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    state = {name: tensor.detach() for name, tensor in shards.items()}
    with _told_by_torch("written"):
        save(state, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


@contextmanager
def _told_by_torch(done: str) -> Iterator[None]:
    """Say in the words of this library what torch.distributed.checkpoint says on every rank, or when one is gone."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"shards cannot be {done}: {type(cause).__name__} on rank {rank}: {cause}") from error
    except RuntimeError as error:
        raise RanksError(
            f"shards cannot be {done}: another rank does not answer ({error}); see its own output"
        ) from error


def read_shards(
    save: Save, like: Mapping[str, Tensor], *, prefix: str | None = None, values: bool = True
) -> dict[str, Tensor]:
    """Read tensors that ranks wrote.

    Args:
        save: the save.
        like: name -> a tensor; one that is sharded says how this one is to be.
        prefix: read all tensors whose names begin so; None: read those in `like`.
        values: False: make them on the meta device, and read nothing.

    Raises:
        CheckpointError: the save has no such tensor, at that shape.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(save.directory))
    known: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    names: Iterable[str] = like if prefix is None else [name for name in known if name.startswith(prefix)]
    state = {}
    for name in names:
        if name not in known:
            raise CheckpointError(f"{save.directory} has no sharded tensor `{name}`")
        shape, dtype = known[name].size, known[name].properties.dtype
        model = like.get(name)
        if not values:
            state[name] = torch.empty(shape, dtype=dtype, device="meta")
        elif model is None or not is_sharded(model):
            state[name] = torch.empty(shape, dtype=dtype)
        elif model.shape != shape:
            raise CheckpointError(
                f"{save.directory} holds `{name}` at {tuple(shape)}, and it is {tuple(model.shape)} here; give the "
                "model the sizes of the save before it is sharded: ecospa_fx.load"
            )
        else:
            local = local_part(model)
            home = local.device if prefix is None else torch.device("cpu")  # values that are copied into a model
            state[name] = whole_of(torch.empty_like(local, dtype=dtype, device=home), model)
    if values and state:
        ranks = Ranks(groups_of(state.values()))
        ranks.meet("resume")  # one that has failed so far would miss what torch sends
        alone = not ranks
        with warnings.catch_warnings(), _told_by_torch("read"):
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(state, storage_reader=reader, no_dist=alone)
    return state
