"""Measuring: the loss of a few batches and its gradients, of a model that is as it was afterwards."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ecospa_fx.compensate.forecast import worth_of
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import EcoSpaError, TargetError
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.journal import Journal
from ecospa_fx.model.keeping import keep_only
from ecospa_fx.model.lookup import couplings, regions_of, state_of
from ecospa_fx.model.restore import restore
from ecospa_fx.passes.find.discover import Kind
from ecospa_fx.passes.graph.tensors import is_quantized, parameters_of
from ecospa_fx.score.saliency import Saliency

from .objective import Loss
from .settings import check_option


def listed_calls(batches: Iterable[Any]) -> list[Any]:
    """Return batches as a list.

    Raises:
        TargetError: there are none, or one has no entries.
    """
    calls = list(batches)
    if not calls:
        raise TargetError("batches is empty; pass a few batches of the data that the model is for")
    for number, batch in enumerate(calls):
        tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        if tensors and not any(tensor.numel() for tensor in tensors):
            raise TargetError(f"batch {number} has no entries; leave it out")
    return calls


def check_kinds(kinds: Collection[str] | None) -> None:
    """Refuse kinds of coupling that do not exist, or none.

    Raises:
        TargetError: naming them.
    """
    if isinstance(kinds, str):
        raise TargetError(f"kinds={kinds!r} is one string; pass a list of them")
    if kinds is not None and not kinds:
        raise TargetError("kinds is empty, so that nothing may shrink; pass some, or None for all")
    for kind in kinds or ():
        check_option("kinds", kind, get_args(Kind))


def let_train(model: nn.Module, saliency: Saliency, frozen: Collection[Any] = ()) -> bool:
    """Let those weights have gradients without which a coupling cannot be judged; return whether there are any.

    Args:
        model: a compiled model.
        saliency: has read one batch.
        frozen: couplings that need not be judged.
    """
    parameters = dict(parameters_of(model, remove_duplicate=False))
    unjudged = [c for c in couplings(model) if c not in frozen and not saliency.judges(c)]
    members = {member.parameter for coupling in unjudged for member in coupling.members}
    for name in members & parameters.keys():
        parameters[name].requires_grad_(True)
    return bool(members)


def check_plain_numbers(model: nn.Module) -> None:
    """Refuse weights that are not plain numbers."""
    for name, tensor in parameters_of(model):
        if is_quantized(tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
            held = type(tensor).__name__ if is_quantized(tensor) else tensor.dtype
            raise TargetError(f"`{name}` holds {held}, quantised weights; de-quantise the model first")
    for module_name, module in model.named_modules():
        weight = module._buffers.get("weight", module._buffers.get("qweight"))
        if weight is not None and not (weight.is_floating_point() or weight.is_complex()):
            raise TargetError(f"`{module_name}` holds quantised weights of {weight.dtype}; de-quantise the model first")


@contextmanager
def as_it_was_unless_shrunk(model: nn.Module) -> Iterator[None]:
    """Undo after an error that the model has been compiled, if nothing has shrunk."""
    compiled_before = MODEL in model.__dict__
    try:
        yield
    except BaseException:
        state = model.__dict__.get(MODEL)
        if state is not None and not compiled_before and not state.plan.original_shapes:
            restore(model)
        raise


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let all weights have gradients, in evaluation mode; then let everything be as it was."""
    parameters = list(model.parameters())
    states = [(p, p.requires_grad, p.grad) for p in parameters]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for p in parameters:
        p.grad = None
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, learns, gradient in states:
            p.requires_grad_(learns)
            p.grad = gradient if gradient is None or gradient.shape == p.shape else None
        for module, training in modes:
            module.training = training


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Let no weight have a gradient, unless it is asked for inside; then let all have one again."""
    parameters = list(model.parameters())
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def value_of(objective: Loss, model: nn.Module, batch: Any, number: int) -> float:
    """Return the loss of a batch."""
    return float(_checked(objective, model, batch, number).detach())


def backward_of(objective: Loss, model: nn.Module, batch: Any, number: int) -> None:
    """Compute the gradients of the loss of a batch."""
    with torch.enable_grad():
        loss = _checked(objective, model, batch, number)
        if loss.requires_grad:  # or there is nothing in it that a gradient could be read of
            loss.backward()


def _checked(objective: Loss, model: nn.Module, batch: Any, number: int) -> Tensor:
    """Compute the loss of a batch.

    Raises:
        TargetError: the model cannot be called with it, or the loss is not a finite number.
    """
    try:
        value = objective(model, batch)
    except EcoSpaError:
        raise
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        line = (str(error).strip().splitlines() or [""])[0]
        advice = "is it of another vocabulary or shape?"
        if isinstance(error, TypeError) and isinstance(batch, Mapping):
            advice = "a mapping is passed by name, model(**batch); pass (batch,) to a model that takes it as a whole"
        raise TargetError(
            f"batch {number} does not fit the model: {type(error).__name__}: {line:.200}; {advice}"
        ) from error
    if not isinstance(value, Tensor) or value.ndim > 0:
        raise TargetError(f"loss returns {type(value).__name__} and not a scalar tensor")
    if not bool(value.detach().isfinite()):
        raise TargetError(f"the loss of batch {number} is {float(value):g}; it must be a finite number")
    return value


@contextmanager
def unwatched(model: nn.Module) -> Iterator[None]:
    """Let nobody who watches the regions of a compiled model, such as a trainer's scores, see the calls inside."""
    watchers = [(region, region.watcher) for region in regions_of(model).values()]
    for region, _ in watchers:
        region.watcher = None
    try:
        yield
    finally:
        for region, watcher in watchers:
            region.watcher = watcher


@contextmanager
def smaller(model: nn.Module, keeps: Mapping[str, Tensor]) -> Iterator[None]:
    """Shrink a compiled model for the time inside, really, and put everything back: these sizes come again.

    Args:
        model: the model.
        keeps: coupling name -> entries that stay.
    """
    compiled = state_of(model)
    by_name = {c.name: c for c in compiled.couplings()}
    routings = [(region, region.routing) for region in compiled.regions.values()]
    journal = Journal()
    try:
        if keeps:
            keep_only(compiled, model, {by_name[name]: keep for name, keep in keeps.items()}, journal)
        yield
    finally:
        journal.undo()
        for region, routing in routings:
            region.routing = routing


def weakest_first(
    model: nn.Module,
    calls: Iterable[tuple[int, Any]],
    objective: Loss,
    wanted: Collection[Coupling],
    by_context: bool = True,
) -> tuple[dict[Coupling, Tensor], dict[Coupling, Tensor]]:
    """Read the saliency of entries off batches.

    Args:
        model: a compiled model.
        calls: batches with their numbers.
        objective: the loss.
        wanted: couplings to judge.
        by_context: whether contexts (heads) have orders of their own.

    Returns:
        Coupling -> its entries from the weakest on, `[size]` or `[contexts, size]`; and coupling -> the expected rise
        of the loss by the first of them, by the second, ..., `[size]`, for those that can be judged.
    """
    saliency = Saliency(model)
    saliency.reader.begins = saliency.reader.computes_again = True
    others = [c for c in couplings(model) if c not in wanted]
    begun = False
    try:
        with without_gradients(model):
            for number, batch in calls:
                backward_of(objective, model, batch, number)
                saliency.accumulate()
                model.zero_grad(set_to_none=True)
                if not begun and let_train(model, saliency, others):
                    saliency.reset()
                    backward_of(objective, model, batch, number)
                    saliency.accumulate()
                    model.zero_grad(set_to_none=True)
                begun = True
            orders = {
                c: saliency.entries(c, by_context=by_context and c.context is not None).argsort(dim=-1, stable=True)
                for c in wanted
            }
            judged = [c for c in wanted if saliency.judges(c)]
            return orders, {c: worth_of(c, saliency, by_context=by_context) for c in judged}
    finally:
        saliency.detach()
