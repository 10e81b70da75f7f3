"""Cut of tokens: one change of a model, its optimizers and its copies, compared with the model before.

find         -> the dims of the model's tensors along which tokens lie
-> cut       rows go, with their gradients and optimizer state; configurations and modules are told the new ids
-> compared  the same call, renumbered, gives what it gave, in the entries that stay
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.errors import CaptureError, EcoSpaError, FormatError, ShrinkError
from ecospa_fx.logs import logger
from ecospa_fx.model.compiled import MODEL, CompiledModel
from ecospa_fx.model.configured import changed, numbers_of
from ecospa_fx.model.copies import Copy
from ecospa_fx.model.journal import Journal
from ecospa_fx.model.lookup import try_call
from ecospa_fx.model.slicing import prepare_tensors
from ecospa_fx.out.hf_pretrained import shapes_in
from ecospa_fx.passes.follow.attributes import sync_layer_sizes
from ecospa_fx.passes.graph.tensors import named_tensors, storage_key
from ecospa_fx.plan import Plan

from .pieces import Pieces
from .places import TokenCall, Vocabulary, difference, find, run
from .recompiled import adopt_rows, captured_call, forget_graphs, note, own_python
from .settings import below, configurations, held_ids, renumbered

PADDING = 16  # a model may have this share of its rows for no token, to fill up a multiple


class TokenCut:
    """One change of a model, its optimizers and its copies."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        copies: Sequence[Copy],
        pieces: Pieces | None,
        kept: Sequence[int],
        calls: Sequence[TokenCall],
    ) -> None:
        self.model, self.optimizers, self.copies, self.pieces, self.calls = model, optimizers, copies, pieces, calls
        self.kept = torch.tensor(kept)
        self.left: list[str] = []  # tensors that still have as many entries as there were tokens
        self.compiled: CompiledModel | None = model.__dict__.get(MODEL)
        self.modules = [model, *(copy.module for copy in copies if copy.module is not None)]

    def made(self, journal: Journal) -> int:
        """Make the change, compare the model with itself before, and return how many rows it had."""
        for module in self.modules:
            note(journal, module, module.__dict__.get(MODEL))
        captured = self.compiled is not None and self.compiled.captured
        seen = captured_call(self.model)
        with own_python(self.model, self.compiled):
            found = self._found()
            self._check(found)
            fields = counts_of(self.model, found, self.kept.tolist())
            self._cut(journal, found, fields)
            self._compare(found, fields)
        for module in self.modules:
            state: CompiledModel | None = module.__dict__.get(MODEL)
            if state is not None and not state.plan.original_shapes:
                forget_graphs(module, state)
        if captured and self.compiled is not None and not self.compiled.captured:
            try:
                self._capture_again(found, seen)
            except CaptureError as error:
                logger("capture").info("the next call captures the model anew, because this one cannot: %s", error)
        self.left = [
            f"`{name}` {tuple(tensor.shape)}"
            for name, tensor in named_tensors(self.model).items()
            if found.rows in tensor.shape and found.rows != len(self.kept)
        ]
        return found.rows

    def _found(self) -> Vocabulary:
        first: CaptureError | None = None
        for call in self.calls:
            try:
                return find(self.model, call, self.kept.tolist())
            except CaptureError as error:
                first = first or error
        assert first is not None
        raise first

    def _check(self, found: Vocabulary) -> None:
        kind, most = type(self.model).__name__, int(self.kept[-1])
        if most >= found.rows:
            raise ShrinkError(f"a token to keep is {most}, and {kind} has rows for {found.rows:,} tokens, from 0 on")
        if self.pieces is not None:
            count, last = len(self.pieces), max(self.pieces.tokens)
            if last >= found.rows or found.rows - count > found.rows // PADDING:
                raise ShrinkError(
                    f"the tokenizer has {count:,} tokens, up to id {last}, and {kind} rows for {found.rows:,}: it is "
                    "the tokenizer of another model"
                )
        if len(self.kept) == found.rows:
            raise ShrinkError(f"all {found.rows:,} tokens of {kind} would stay; keep fewer")
        config = hasattr(getattr(self.model, "config", None), "to_dict")
        if found.unexplained and not config:
            i, dim = found.unexplained[0]
            raise ShrinkError(
                f"a result of {kind}, {tuple(found.outputs[i].shape)}, has an entry per token along dim {dim}, and "
                "these are not the scores of single tokens (a softmax over all of them inside the model). Return the "
                "scores, and take the softmax outside"
            )

    def _cut(self, journal: Journal, found: Vocabulary, fields: TokenCounts) -> None:
        held = named_tensors(self.model)
        after = Plan()
        for name, dim in found.places:
            after.kept[name, dim] = self.kept
            after.original_shapes[name] = tuple(held[name].shape)
        named = [(name, t) for each in (held, *(copy.tensors for copy in self.copies)) for name, t in each.items()]
        memories = {storage_key(held[name]) for name, _ in found.tables}
        prepare_tensors(named, Plan(), after, self.optimizers).commit(journal)
        new = {int(old): i for i, old in enumerate(self.kept)}
        looked_up = {name for name, t in held.items() if storage_key(t) in memories} | {n for n, _ in found.tables}
        done: set[int] = set()
        for module in self.modules:
            sync_layer_sizes(module)
            owners = {id(module.get_submodule(name.rpartition(".")[0])) for name in looked_up}
            for each, name, value in held_ids(module):
                if value in new and (not isinstance(each, nn.Embedding) or id(each) in owners):
                    vars(each)[name] = new[value]
            for config in configurations(module):
                if id(config) not in done:
                    done.add(id(config))
                    journal.note_object(config)
                    changes = renumbered(config, new, found.rows)
                    for name, value in changes.items():
                        setattr(config, name, value)
            fields.write(module, len(self.kept))
            state: CompiledModel | None = module.__dict__.get(MODEL)
            if state is not None and state.plan.original_shapes:
                forget_graphs(module, state)
                adopt_rows(module, state, found.places, len(self.kept))

    def _compare(self, found: Vocabulary, fields: TokenCounts) -> None:
        """Refuse a model that gives other results than before."""
        call = found.call.renumbered(self._new(found))
        why = self._difference(found, call)
        if why is not None and fields.guessed:  # integers that happen to be as many
            for module in self.modules:
                fields.write(module, found.rows)
            why = why if self._difference(found, call) is not None else None
        if why is not None:
            raise ShrinkError(
                f"{type(self.model).__name__} without these tokens is another model: {why}. Something in it depends on "
                "the tokens' ids, or on how many there are"
            )

    def _difference(self, found: Vocabulary, call: TokenCall) -> str | None:
        try:
            after = run(self.model, call)
        except CaptureError as error:
            return str(error)
        except EcoSpaError:
            raise
        except Exception as error:  # the forward of the user's model
            return f"its forward fails, {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]:.200}"
        return difference(found.outputs, after, self.kept, found.rows)

    def _capture_again(self, found: Vocabulary, seen: TokenCall | None) -> None:
        """Capture a model that was captured before, by a call like the first one where it is known."""
        # The integers of a call that is made up are 0 and 1, which any table has.
        call = found.call.renumbered(self._new(found)) if seen is None else seen
        try_call(self.model, call.args, call.kwargs)

    def _new(self, found: Vocabulary) -> Tensor:
        """Return the new id of each token, 0 where it is gone."""
        new = torch.zeros(found.rows, dtype=torch.long)
        new[self.kept] = torch.arange(len(self.kept))
        return new


@dataclass(frozen=True)
class TokenCounts:
    """The numbers of a configuration, and the integers of modules, that are how many tokens there are.

    Attributes:
        where: ways to numbers of the configuration.
        attributes: (path of a module, name).
        guessed: whether the integers of modules are known by their value alone.
    """

    where: Sequence[tuple[str | int, ...]]
    attributes: Collection[tuple[str, str]]
    guessed: bool

    def write(self, model: nn.Module, tokens: int) -> None:
        """Set them."""
        for path, name in self.attributes:
            vars(model.get_submodule(path))[name] = tokens
        for way in self.where:
            owner: Any = getattr(model, "config")  # noqa: B009
            for part in way[:-1]:
                owner = getattr(owner, str(part))
            setattr(owner, str(way[-1]), tokens)


def counts_of(model: nn.Module, found: Vocabulary, kept: Sequence[int]) -> TokenCounts:
    """Find the numbers that must follow, and add the places that a configuration knows of.

    Raises:
        FormatError: no number of a configuration gives these tensors.
    """
    tokens = len(kept)
    held = {
        (path, name)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) is int and value == found.rows and name not in ("num_embeddings", "out_features", "in_features")
    }
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict") or not hasattr(model, "save_pretrained"):
        return TokenCounts((), held, True)
    kind = type(model).__name__
    ways = [where for where, value in numbers_of(config) if value == found.rows and isinstance(where[-1], str)]
    before = shapes_in(model, config)
    for where in ([way] for way in ways) if len(ways) == 1 else (*([way] for way in ways), ways):
        if not where:
            continue
        after = shapes_in(model, _smaller(changed(config, dict.fromkeys(map(tuple, where), tokens)), kept, found.rows))
        dims = {
            (name, dim)
            for name in before.keys() & after.keys()
            for dim, (old, new) in enumerate(zip(before[name], after[name], strict=True))
            if (old, new) == (found.rows, tokens)
        }
        known = named_tensors(model)
        if after and dims >= set(found.places):
            found.places = sorted((n, d) for n, d in dims if n in known and known[n].shape[d] == found.rows)
            names = {way[-1] for way in where}
            return TokenCounts(where, {(path, name) for path, name in held if name in names}, False)
    named = ", ".join(f"`{name}` dim {dim}" for name, dim in found.places[:4])
    raise FormatError(
        f"no number of the configuration of this {kind} is how many tokens there are in {named}, so that it could not "
        "be saved and loaded; where adapters were added, merge them first"
    )


def _smaller(config: Any, kept: Sequence[int], rows: int) -> Any:
    """Renumber the tokens in a copy of a configuration: a table refuses one for padding that it has no row for."""
    new = {old: i for i, old in enumerate(kept)}
    for each in below(config):
        for name, value in renumbered(each, new, rows).items():
            setattr(each, name, value)
    return config
