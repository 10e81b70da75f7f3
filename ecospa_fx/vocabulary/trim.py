"""Trim: a model and its tokenizer lose the tokens that nobody uses, in one step.

Pieces, chosen      -> the tokens that stay: what was asked for, what that is made of, and what can never go
find                -> the dims of the model's tensors along which tokens lie
-> cut              rows go, with their gradients and optimizer state; configurations and modules are told the new ids
-> compared         the same call, renumbered, gives what it gave, in the entries that stay; or everything is put back
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.arguments import CALL, MODULE, SEVERAL, WHOLE, either, instance, optional, shown, takes
from ecospa_fx.errors import ArgumentError, FormatError, ShrinkError, WrapperError
from ecospa_fx.logs import logger
from ecospa_fx.model.copies import copies_of
from ecospa_fx.model.diff import ModuleDiff, diff_of, shapes_of
from ecospa_fx.model.journal import Journal, all_or_nothing
from ecospa_fx.model.left_behind import left_behind
from ecospa_fx.model.lookup import check_optimizer, check_ready, check_values, check_whole
from ecospa_fx.model.optimizer_state import several
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.ranks.members import ranks_of
from ecospa_fx.ranks.wrappers import check_wrappers, unwrapped

from .choice import Choice, chosen
from .cut import TokenCut
from .pieces import Pieces
from .places import TokenCall, without_others
from .recompiled import captured_call
from .settings import configurations, held_ids, ids_in
from .tokenizers import counted, document_of, encoded, first_difference, made_from, special_ids

LINES = 1000  # lines on which the tokenizers are compared
PADDING = 16  # a model may have this share of its rows for no token, to fill up a multiple


@dataclass(frozen=True, eq=False)
class Trimmed:
    """A model and a tokenizer that have lost tokens.

    Attributes:
        tokenizer: the new tokenizer, of the class of the one given, which stays as it was; None without one.
        kept: the ids before of the tokens that stay, `[tokens]`: token `i` was `kept[i]`.
        rows: how many tokens the model had rows for.
        asked: how many of those that stay were asked for, or occur in the texts; others are what they are made of, or
            can never go, or fill up `size`.
        change: the sizes of every layer before and after.
        notes: what a person should know.
    """

    tokenizer: Any
    kept: Tensor
    rows: int
    asked: int
    change: ModuleDiff
    notes: tuple[str, ...] = ()

    def new_ids(self, ids: Tensor) -> Tensor:
        """Return the new ids of tokens, -1 for those that are gone."""
        new = torch.full((self.rows,), -1, dtype=torch.long)
        new[self.kept] = torch.arange(len(self.kept))
        return new[ids.cpu()].to(ids.device)

    def __str__(self) -> str:
        lines = [
            f"{self.rows:,} -> {len(self.kept):,} tokens, {self.asked:,} of them asked for",
            self.change.headline(),
            *(f"note: {each}" for each in self.notes),
        ]
        return "\n".join(lines)


@takes(
    model=MODULE, size=optional(WHOLE), **CALL,
    keep=optional(either(instance("a tensor of ids", Tensor), SEVERAL)), texts=optional(SEVERAL),
)  # fmt: skip
def trim_vocabulary(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    keep: Tensor | Iterable[int] | None = None,
    texts: Iterable[str] | None = None,
    size: int | None = None,
    optimizer: Optimizer | Iterable[Optimizer] = (),
    also: Any = (),
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Trimmed:
    """Remove tokens from a model and its tokenizer.

    >>> trimmed = ecospa_fx.trim_vocabulary(model, tokenizer, texts=lines, size=16000)
    >>> model.save_pretrained("small")
    ... trimmed.tokenizer.save_pretrained("small")

    The tokens that stay get the ids 0, 1, 2, ... in the order that they had, and scores of them are what they were. A
    text whose tokens all stay is cut into the same ones. Parameters stay the same objects; gradients and the state of
    `optimizer` lose the same rows. The configuration follows, and plain transformers loads what is saved. A compiled
    model captures anew; what it has lost otherwise stays lost. On any error everything is as before.

    Where the tokens lie in the model is found by what a call does, see `ecospa_fx/vocabulary/places.py`.

    Args:
        model: any module that looks tokens up in a table; compiled or not.
        tokenizer: a fast tokenizer of transformers, or one of the library `tokenizers`; None for a model without one.
        keep: ids of tokens that stay.
        texts: lines of text, whose tokens stay: the most used ones where `size` has no room for all.
        size: how many tokens stay; what is left over goes to further tokens in the order of their ids. None: those that
            `keep` and `texts` ask for, and those that cannot go: special and added ones, bytes, single characters where
            there are no bytes to fall back to, and whatever tokens that stay are made of.
        optimizer: the optimizer, or several, that hold the parameters. One with state that is left out refuses its next
            step.
        also: copies of the model that shrink with it, see `ecospa_fx.shrink`.
        example_inputs: positional arguments of a call. Of its integers those are tokens by which something is looked
            up, and they are replaced. By default ids alone, by the name `input_ids` for a model of transformers.
        example_kwargs: keyword arguments of that call.

    Raises:
        ArgumentError: neither `keep` nor `texts` is given, or the tokenizer is no fast one.
        ShrinkError: ids are out of range, the tokenizer is of another size than the model, more must stay than `size`,
            or the model reads rows for other tokens than their own.
        CaptureError: the model cannot be called so.
        FormatError: the tokenizer or the configuration cannot express it.
        OptimizerError: the optimizer holds none of the parameters, or state that cannot follow.
        WrapperError: the model is spread over several processes.
    """
    check_wrappers(model)
    model = unwrapped(model)
    if ranks_of(model):
        raise WrapperError("several processes train this model: trim its vocabulary before it is wrapped or sharded")
    check_whole(model, "trim_vocabulary")
    check_ready(model)
    check_values(model, "compare")
    if keep is None and texts is None:
        raise ArgumentError("trim_vocabulary: pass keep=, the ids of tokens that stay, or texts=, lines that hold them")
    optimizers = several(optimizer)
    for each in optimizers:
        check_optimizer(model, each)
    copies = copies_of(model, also)
    pieces = None if tokenizer is None else Pieces(document_of(tokenizer))
    choice, lines = _choose(model, tokenizer, pieces, keep, texts, size)
    made = _trimmed_tokenizer(tokenizer, pieces, choice, lines)
    calls = _calls(model, example_inputs, example_kwargs)

    def trim(journal: Journal) -> Trimmed:
        before = shapes_of(model)
        cut = TokenCut(model, optimizers, copies, pieces, choice.kept, calls)
        rows = cut.made(journal)
        change = diff_of(model, before)
        left_behind().note(model, change.before, optimizers)
        more = f"{', '.join(cut.left[:3])} stay as they are: no token of the call is looked up or scored there"
        notes = (*choice.notes, more) if cut.left else choice.notes
        return Trimmed(made, torch.tensor(choice.kept), rows, choice.asked, change, notes)

    trimmed = all_or_nothing(trim, doing="trim the vocabulary")
    logger("shrink").info("%s", trimmed)
    return trimmed


def _choose(
    model: nn.Module,
    tokenizer: Any,
    pieces: Pieces | None,
    keep: Tensor | Iterable[int] | None,
    texts: Iterable[str] | None,
    size: int | None,
) -> tuple[Choice, list[str]]:
    """Choose the tokens that stay, and return some of the texts."""
    wanted = _ids(() if keep is None else keep)
    if keep is not None and not wanted:
        raise ShrinkError("keep= holds no token; a model needs some")
    most = max(named.shape[dim] for named in named_tensors(model).values() for dim in range(named.ndim))
    required = {i for config in configurations(model) for i in ids_in(config, most)}
    required |= {i for _, _, value in held_ids(model) for i in [value] if 0 <= i < most}
    if pieces is None:
        if texts is not None or size is not None:
            raise ArgumentError("trim_vocabulary: texts= and size= need the tokenizer of the model")
        if min(wanted) < 0 or max(wanted) >= most:
            raise ShrinkError(f"keep= holds {min(wanted)} to {max(wanted)}, and no table of the model has such rows")
        kept = sorted(wanted | required)
        return Choice(tuple(kept), len(wanted)), []
    odd = sorted(wanted - pieces.tokens.keys())
    if odd:
        raise ShrinkError(f"keep= holds {odd[0]}, and the tokenizer has {len(pieces):,} tokens, none with that id")
    lines: list[str] = []
    counts = None
    if texts is not None:
        source = iter(texts)
        lines = list(islice(source, LINES))
        counts = counted(tokenizer, chain(lines, source))
    return chosen(pieces, wanted, counts, required | special_ids(tokenizer), size), lines


def _ids(keep: Tensor | Iterable[int]) -> set[int]:
    if isinstance(keep, Tensor) and (keep.is_floating_point() or keep.is_complex() or keep.dtype is torch.bool):
        raise ArgumentError(f"trim_vocabulary: `keep` is {shown(keep)}; it must be ids, whole numbers")
    found = keep.flatten().tolist() if isinstance(keep, Tensor) else list(keep)
    for each in found:
        if not WHOLE.fits(each):
            raise ArgumentError(f"trim_vocabulary: `keep` holds {shown(each)}; it must be ids, whole numbers")
    return {int(each) for each in found}


def _trimmed_tokenizer(tokenizer: Any, pieces: Pieces | None, choice: Choice, lines: Sequence[str]) -> Any:
    """Make the tokenizer of the tokens that stay, and compare the two on some texts."""
    if pieces is None:
        return None
    made = made_from(tokenizer, pieces.keeping(choice.kept), choice.kept)
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    groups = [list(choice.kept[i : i + 8]) for i in range(0, min(len(choice.kept), 8 * LINES), 8)]
    tried = [line[:2000] for line in lines] + [backend.decode(ids, skip_special_tokens=False) for ids in groups]
    odd = None if pieces.draws else first_difference(tokenizer, made, choice.kept, tried)
    if odd is not None:
        ids = encoded(tokenizer, [odd])[0]
        raise FormatError(
            f"the smaller tokenizer would cut {odd[:60]!r} in another way than into {ids[:8]}, which all stay"
        )
    return made


def _calls(model: nn.Module, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> list[TokenCall]:
    """Return calls to look at, of which the first that the model takes is used: that of a caller, or rows of ids."""
    if args is not None or kwargs is not None:
        return [TokenCall(tuple(args or ()), dict(kwargs or {}))]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ids = torch.zeros(2, 7, dtype=torch.long, device=device)
    config = getattr(model, "config", None)
    calls = [TokenCall((ids,), {})]
    if hasattr(config, "to_dict"):
        more = {"decoder_input_ids": ids.clone()} if getattr(config, "is_encoder_decoder", False) else {}
        calls = [TokenCall((), {"input_ids": ids, **more})]
    seen = captured_call(model)
    if seen is not None:  # a graph of the whole model may serve no call but those like it
        calls += [without_others(seen), seen]
    return calls
