"""Optimizer state: the tensors that optimizers hold for parameters, and how they follow a shrink of these.

    optimizers -> the optimizers that they wrap -> their rules in `optimizer_table` -> new values of each state
                                                -> no rule: tensors proved elementwise are sliced, numbers stay, the
                                                   rest is refused

Numbers stay as they are: step counts, and running norms of whole tensors, which forget the removed entries in their own
time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.arguments import SEVERAL, shown
from ecospa_fx.errors import OptimizerError
from ecospa_fx.passes.graph.tensors import parameters_of
from ecospa_fx.ranks.agreement import Ranks
from ecospa_fx.ranks.shards import gathered, groups_of, is_sharded, split

from .optimizer_table import Keep, SliceLater, State, rules_for


def averages_of(parameters: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> list[dict[str, Tensor]]:
    """Collect the averages of weights that optimizers hold, by the names of the model's parameters."""
    averages = []
    for optimizer in optimizers:
        for each in layers(optimizer):
            entry = rules_for(type(each)).average
            states = getattr(each, "state", {})
            named = {name: states[p][entry] for name, p in parameters.items() if entry in states.get(p, ())}
            averages += [named] if named else []
    return averages


class OptimizerStates:
    """The states of some optimizers, which follow a shrink one parameter after another.

    Raises:
        OptimizerError: the state of an optimizer cannot follow any shrink.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._layers: list[Any] = []
        for optimizer in optimizers:
            check_can_follow(optimizer)
            # The innermost comes first: its rule is the one for a state that its wrapper shows too.
            inner_first = reversed(list(layers(optimizer)))
            self._layers += [each for each in inner_first if not any(each is other for other in self._layers)]
        self._proved: dict[tuple[int, str], bool] = {}

    def shrunk(self, name: str, parameter: Tensor, keep: Keep) -> Iterator[tuple[dict[str, Any], str, Any]]:
        """Yield (state, entry, new value or a `SliceLater` still to be made) for one parameter.

        Raises:
            OptimizerError: an entry of the state cannot follow.
        """
        seen: set[int] = set()  # a wrapper may show the state of the optimizer in it as its own
        for number, optimizer in enumerate(self._layers):
            state = getattr(optimizer, "state", {}).get(parameter)
            if not state or id(state) in seen:
                continue
            seen.add(id(state))
            by_rule = _by_rule(optimizer, name, state, parameter, keep)
            for entry, value in state.items():
                if entry in by_rule:
                    yield state, entry, by_rule[entry]
                elif self._is_elementwise(number, entry, value, parameter):
                    yield state, entry, SliceLater(value)
                else:
                    _check_number(optimizer, name, parameter, entry, value)

    def entries(self, parameter: Tensor) -> Iterator[tuple[dict[str, Any], str, Any]]:
        """Yield (state, entry, value) for one parameter."""
        for optimizer in self._layers:
            state: dict[str, Any] = getattr(optimizer, "state", {}).get(parameter) or {}
            yield from ((state, entry, value) for entry, value in state.items())

    def _is_elementwise(self, number: int, entry: str, value: Any, parameter: Tensor) -> bool:
        """Decide whether a state tensor has its parameter's shape for a reason, not by chance.

        A preconditioner of rows by rows has the shape of a square matrix too. So the entry must have its parameter's
        shape wherever the optimizer holds it, and one of these parameters, where this one is a matrix, must not be
        square.
        """
        if not isinstance(value, Tensor) or value.shape != parameter.shape or not value.ndim:
            return False
        if not _plain(value, parameter):
            return False
        states = self._layers[number].state
        holders = [(p, state[entry]) for p, state in states.items() if isinstance(p, Tensor) and entry in state]
        if (number, entry) not in self._proved:
            self._proved[number, entry] = all(
                isinstance(tensor, Tensor) and (tensor.shape == p.shape or tensor.numel() == 1) for p, tensor in holders
            )
        oblong = value.ndim == 1 or any(p.ndim > 1 and len(set(p.shape)) > 1 for p, _ in holders)
        return self._proved[number, entry] and oblong


def forget_resized(optimizer: Optimizer | Iterable[Optimizer]) -> None:
    """Drop the state of parameters that have other sizes by now, by weights of a checkpoint: it begins anew."""
    for each in [layer for one in several(optimizer) for layer in layers(one)]:
        states = getattr(each, "state", {})
        for p in [p for p in states if isinstance(p, Tensor)]:
            held = [leaf for leaf in pytree.tree_leaves(dict(states[p])) if isinstance(leaf, Tensor)]
            if any(leaf.shape != p.shape and leaf.numel() > 1 for leaf in held):
                del states[p]


def several(optimizer: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """Return one optimizer or several as a list.

    Raises:
        OptimizerError: it is something else.
    """
    given: Any = optimizer
    if isinstance(given, Optimizer) or _holds_groups(given):
        return [given]
    several = list(given) if SEVERAL.fits(given) else [given]
    for each in several:
        if not isinstance(each, Optimizer) and not _holds_groups(each):
            raise OptimizerError(f"optimizer is {shown(each)}; pass the one made from model.parameters(), or several")
    return several


def _holds_groups(value: Any) -> bool:
    """Return whether an object may be taken for an optimizer, as wrappers of one may."""
    return not isinstance(value, type) and hasattr(value, "param_groups") and hasattr(value, "state")


def check_can_follow(optimizer: Optimizer) -> None:
    """Refuse an optimizer that no shrink can be carried through.

    Raises:
        OptimizerError: it is LBFGS, or of a class without a rule that holds tensors outside of its parameters' states.
    """
    nested = list(layers(optimizer))
    for number, each in enumerate(nested):
        cls, rules = type(each).__name__, rules_for(type(each))
        if rules.refusal is not None:
            raise OptimizerError(rules.refusal)
        for setting in ("parameters_as_bucket_view", "overlap_with_ddp") if is_partitioned(each) else ():
            if getattr(each, setting, getattr(each, f"_{setting}", False)):
                raise OptimizerError(
                    f"this {cls} was made with {setting}=True, and its buckets of parameters would keep their sizes "
                    "when the model shrinks; leave it out"
                )
        # A wrapper shows the parameter groups and states of the optimizer in it.
        wraps = any(other.param_groups is each.param_groups for other in nested[number + 1 :])
        for where, tensor in _beside_states(each, wraps) if rules.slices is None else ():
            raise OptimizerError(
                f"{cls} holds a tensor of shape {tuple(tensor.shape)} in `{where}`, outside of its parameters' "
                "states: whether it follows the parameters is not known, so nothing can shrink. If it does not, "
                f"register a rule for the rest of it, @ecospa_fx.state_rule({cls}); else use another optimizer "
                "(AdamW, SGD with momentum)"
            )


def layers(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer and the optimizers that it wraps, each once."""
    seen: list[Any] = []
    queue = [optimizer]
    while queue:
        each = queue.pop()
        if not any(each is other for other in seen):
            seen.append(each)
            queue.extend(leaf for _, leaf in _attributes(each) if isinstance(leaf, Optimizer))
            yield each


def second_moments(model: nn.Module, optimizers: Sequence[Optimizer], wanted: Collection[str]) -> dict[str, Tensor]:
    """Return the roots of Adam's second moments by parameter name, bias-corrected.

    Raises:
        OptimizerError: the optimizers hold none for any of the parameters that are wanted.
    """
    roots = {}
    for optimizer in [layer for each in optimizers for layer in layers(each)]:
        betas = {id(p): group.get("betas", (0.0, 0.0)) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in parameters_of(model):
            state = optimizer.state.get(parameter, {})
            moment = state.get("exp_avg_sq")
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                fade = float(betas[id(parameter)][1])
                roots[name] = (moment / (1.0 - fade ** float(state.get("step", 1)))).sqrt()
    if not roots.keys() & set(wanted) and not any(map(is_partitioned, optimizers)):
        entries = sorted({key for each in optimizers for state in each.state.values() for key in state})
        kinds = " and ".join(type(each).__name__ for each in optimizers)
        who = f"this {kinds} holds" if len(optimizers) == 1 else f"these, {kinds}, hold"
        raise OptimizerError(
            f'score="adam" reads `exp_avg_sq` of the weights\' optimizer, but {who} '
            f"{', '.join(entries) or 'nothing yet'}; take a step first, use an Adam, or another score"
        )
    return roots


def is_partitioned(optimizer: Any) -> bool:
    """Return whether an optimizer holds on each rank the state of a part of the parameters only."""
    return any(cls.__name__ == "ZeroRedundancyOptimizer" for each in layers(optimizer) for cls in type(each).__mro__)


def innermost(optimizer: Any) -> list[Any]:
    """Return the optimizers inside an optimizer that wrap none: their steps are taken whoever calls them."""
    return [each for each in layers(optimizer) if not any(isinstance(v, Optimizer) for _, v in _attributes(each))]


def _attributes(optimizer: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, leaf) of the attributes of an optimizer, states and groups of its parameters aside."""
    for name, value in vars(optimizer).items():
        if name not in ("state", "param_groups", "defaults"):
            yield from ((name, leaf) for leaf in pytree.tree_leaves(value))


def _beside_states(optimizer: Any, attributes_only: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield (place, tensor) of the tensors that an optimizer holds other than for one of its parameters."""
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    leaves = list(_attributes(optimizer))
    for number, group in enumerate(() if attributes_only else optimizer.param_groups):
        options = {name: value for name, value in group.items() if name != "params"}
        leaves += [
            (f"param_groups[{number}][{name!r}]", leaf)
            for name, value in options.items()
            for leaf in pytree.tree_leaves(value)
        ]
    for key, value in getattr(optimizer, "state", {}).items():
        if not (attributes_only or isinstance(key, Tensor)):
            leaves += [(f"state[{key!r}]", leaf) for leaf in pytree.tree_leaves(value)]
    for where, leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.numel() > 1 and id(leaf) not in parameters:
            yield where, leaf


def _by_rule(optimizer: Any, name: str, state: State, parameter: Tensor, keep: Keep) -> Mapping[str, Any]:
    rule = rules_for(type(optimizer)).slices
    if rule is None:
        return {}
    placed: dict[str, Any] = {}
    if is_sharded(parameter):  # what is not of its shape, such as means over rows, is small: rules get all of it
        placed = {key: v for key, v in state.items() if is_sharded(v) and v.shape != parameter.shape}
        if placed:
            Ranks(groups_of(placed.values())).meet(f"gather the optimizer state of `{name}`")
            state = {**state, **{key: gathered(value) for key, value in placed.items()}}
    try:
        values = dict(rule(state, parameter, keep))
        return {key: split(value, placed[key]) if key in placed else value for key, value in values.items()}
    except Exception as error:
        raise OptimizerError(
            f"the state rule of {type(optimizer).__name__} failed on `{name}` of shape {tuple(parameter.shape)} with "
            f"{type(error).__name__}: {error}; nothing was changed"
        ) from error


def _check_number(optimizer: Any, name: str, parameter: Tensor, entry: str, value: Any) -> None:
    """Refuse state that is neither sliced nor made of plain numbers and words."""
    cls, inside = type(optimizer).__name__, f" in a {type(value).__name__}"
    for leaf in pytree.tree_leaves(value):
        where = f"`{entry}`" if leaf is value else f"`{entry}`{inside}"
        if not isinstance(leaf, (Tensor, *_WORDS)):
            what = f"{where}, a {type(leaf).__name__},"
        elif isinstance(leaf, Tensor) and not _plain(leaf, parameter):
            what = f"{where}, a {type(leaf).__name__} of shape {tuple(leaf.shape)},"
        elif isinstance(leaf, Tensor) and leaf.numel() > 1:
            what = f"{where} of shape {tuple(leaf.shape)}"
        else:
            continue
        raise OptimizerError(
            f"{cls} holds {what} for `{name}` of shape {tuple(parameter.shape)}: which of it belongs to which row or "
            f"column is not known, so it cannot shrink along. Say it with @ecospa_fx.state_rule({cls}), or use an "
            "optimizer with elementwise state (AdamW, SGD with momentum)"
        )


_WORDS = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


def _plain(value: Tensor, parameter: Tensor) -> bool:
    """Decide whether a tensor is of a plain class: not a quantized one, say, that packs its entries in its own way."""
    return type(value) in (Tensor, nn.Parameter, type(parameter))
