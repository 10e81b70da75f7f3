"""How the state of an optimizer follows when rows and columns of its parameters go.

    optimizers -> those that they wrap -> a rule each, by class -> new values of each parameter's state
                                       -> no rule: what is proved elementwise is sliced, numbers stay, else refused

Elementwise state commutes with a shrink: stepping and then slicing is slicing and then stepping. Where the update is
not elementwise (Muon's orthogonalisation, trust ratios, Adafactor's clipping) the state still follows; the next step is
then that of the smaller matrix, which is no part of the larger one's step. Numbers stay as they are: step counts, and
running norms of whole tensors, which then forget in their own time what has gone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.errors import OptimizerError

Value = TypeVar("Value")
Keep = Mapping[int, Tensor]
State = Mapping[str, Any]
StateRule = Callable[[State, Tensor, Keep], Mapping[str, Any]]
"""`rule(state, parameter, keep)`: new values of one parameter's state. `parameter` is as before the shrink, `keep` maps
each dim that loses entries to the sorted positions that stay. What a rule does not return is judged without it."""


@dataclass(frozen=True)
class SliceLater:
    """A state tensor of its parameter's shape, to be sliced as the parameter is: all of them at once, in one launch."""

    value: Tensor


_RULES: dict[type | str, StateRule] = {}


def state_rule(optimizer: type | str) -> Callable[[StateRule], StateRule]:
    """Teach shrinking the state of an optimizer class and its subclasses. The latest rule wins.

    >>> @ecospa_fx.state_rule(MyOptimizer)
    ... def my_optimizer(state, parameter, keep):
    ...     return {"row_scale": ecospa_fx.optimizers.take(state["row_scale"], keep, dims=(0,))}

    Args:
        optimizer: the class, or where it is found (`"package.module.Class"`), which need not be importable.
    """

    def register(rule: StateRule) -> StateRule:
        _RULES[optimizer] = rule
        return rule

    return register


def take(value: Tensor, keep: Keep, dims: Iterable[int | None] | None = None) -> Tensor:
    """A copy of a state tensor with what stays of it.

    Args:
        value: state of a parameter.
        keep: parameter dim -> positions that stay, as a rule gets it.
        dims: for each dim of `value` the parameter's dim that it runs along, or None; by default its own.
    """
    made = value.detach()
    for dim, of in enumerate(range(value.ndim) if dims is None else dims):
        if of is not None and of in keep:
            made = made.index_select(dim, keep[of].to(made.device))
    return made.clone() if made.data_ptr() == value.data_ptr() else made


def elementwise(*entries: str) -> StateRule:
    """The rule of state in which each entry belongs to the entry of the parameter at the same place."""

    def rule(state: State, parameter: Tensor, keep: Keep) -> dict[str, Any]:
        held = {entry: state[entry] for entry in entries if isinstance(state.get(entry), Tensor)}
        return {entry: SliceLater(value) for entry, value in held.items() if value.shape == parameter.shape}

    return rule


def factored(row: str, column: str, *entries: str) -> StateRule:
    """The rule of Adafactor (arXiv 1804.04235), which keeps row and column means of a matrix's second moment.

    `row` holds means over the last dim, `column` over the one before, with or without a dim of 1 left there. The second
    moment they stand for is `row[i] * column[j] / mean(row)`. Its means over what stays are the new ones, which leaves
    that estimate as it was for every entry that stays. `entries` are elementwise.
    """
    others = elementwise(*entries)

    def rule(state: State, parameter: Tensor, keep: Keep) -> dict[str, Any]:
        made = dict(others(state, parameter, keep))
        if not isinstance(state.get(row), Tensor) or parameter.ndim < 2:
            return made
        *batch, i, j = range(parameter.ndim)
        kept_dim = state[row].ndim == parameter.ndim
        dims_row = (*batch, i, None) if kept_dim else (*batch, i)
        dims_column = (*batch, None, j) if kept_dim else (*batch, j)
        at = -2 if kept_dim else -1  # the row's own dim in `row`
        outer = {dim: index for dim, index in keep.items() if dim in batch}
        mean = take(state[row], outer, dims_row).mean(at, keepdim=True)
        rows, columns = take(state[row], keep, dims_row), take(state[column], keep, dims_column)
        # A gradient that has been zero so far has no estimate to keep.
        by_row = torch.where(mean > 0, columns.mean(-1, keepdim=True) / mean, 1.0)
        by_column = torch.where(mean > 0, rows.mean(at, keepdim=True) / mean, 1.0)
        return {**made, row: rows.mul_(by_row), column: columns.mul_(by_column)}

    return rule


AVERAGES: dict[type | str, str] = {
    torch.optim.ASGD: "ax",
    "schedulefree.adamw_schedulefree.AdamWScheduleFree": "z",
    "schedulefree.sgd_schedulefree.SGDScheduleFree": "z",
    "schedulefree.radam_schedulefree.RAdamScheduleFree": "z",
}
"""Entries that are weights themselves and follow whatever a shrink does to these; all others are of gradients."""


def averages_of(parameters: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> list[dict[str, Tensor]]:
    """The weights that optimizers hold beside those of the model, by the names of the model's."""
    found = []
    for optimizer in optimizers:
        for each in layers(optimizer):
            entry = by_class(type(each), AVERAGES)
            states = getattr(each, "state", {})
            held = {name: states[p][entry] for name, p in parameters.items() if entry in states.get(p, ())}
            found += [held] if held else []
    return found


class States:
    """What some optimizers hold, of which the state of one parameter after another follows a shrink.

    Raises:
        OptimizerError: an optimizer is of a kind that cannot follow any shrink.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._layers: list[Any] = []
        for optimizer in optimizers:
            check_can_follow(optimizer)
            # What is wrapped comes first: its rule is the one for a state that its wrapper shows too.
            inner_first = reversed(list(layers(optimizer)))
            self._layers += [each for each in inner_first if not any(each is held for held in self._layers)]
        self._proved: dict[tuple[int, str], bool] = {}

    def shrunk(self, name: str, parameter: Tensor, keep: Keep) -> Iterator[tuple[dict[str, Any], str, Any]]:
        """New values of what is held for one parameter: (state, entry, new value or a `SliceLater` still to be made).

        Raises:
            OptimizerError: some of it cannot follow.
        """
        seen: set[int] = set()  # a wrapper may show the state of what it wraps as its own
        for number, optimizer in enumerate(self._layers):
            state = getattr(optimizer, "state", {}).get(parameter)
            if not state or id(state) in seen:
                continue
            seen.add(id(state))
            made = _by_rule(optimizer, name, state, parameter, keep)
            for entry, value in state.items():
                if entry in made:
                    yield state, entry, made[entry]
                elif self._like_its_parameter(number, entry, value, parameter):
                    yield state, entry, SliceLater(value)
                else:
                    _check_number(optimizer, name, parameter, entry, value)

    def held(self, parameter: Tensor) -> Iterator[tuple[dict[str, Any], str, Any]]:
        """What is held for one parameter: (state, entry, value)."""
        for optimizer in self._layers:
            state: dict[str, Any] = getattr(optimizer, "state", {}).get(parameter) or {}
            yield from ((state, entry, value) for entry, value in state.items())

    def _like_its_parameter(self, number: int, entry: str, value: Any, parameter: Tensor) -> bool:
        """Whether a state tensor has its parameter's shape for a reason, not by chance.

        A preconditioner of rows by rows has the shape of a square matrix too. So the entry must have its parameter's
        shape wherever the optimizer holds it, and one of these parameters, where this one is a matrix, must not be
        square.
        """
        if not isinstance(value, Tensor) or value.shape != parameter.shape or not value.ndim:
            return False
        if not _plain(value, parameter):
            return False
        holders = [(p, s[entry]) for p, s in self._layers[number].state.items() if isinstance(p, Tensor) and entry in s]
        if (number, entry) not in self._proved:
            self._proved[number, entry] = all(
                isinstance(held, Tensor) and (held.shape == p.shape or held.numel() == 1) for p, held in holders
            )
        oblong = value.ndim == 1 or any(p.ndim > 1 and len(set(p.shape)) > 1 for p, _ in holders)
        return self._proved[number, entry] and oblong


def several(optimizer: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """One optimizer or several, as a list."""
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)


def check_can_follow(optimizer: Optimizer) -> None:
    """Refuse an optimizer that no shrink can be carried through.

    Raises:
        OptimizerError: it is LBFGS, or of a class without a rule that holds tensors outside of its parameters' states.
    """
    held = list(layers(optimizer))
    for number, each in enumerate(held):
        kind = type(each).__name__
        shown = any(other.param_groups is each.param_groups for other in held[number + 1 :])  # it wraps what holds them
        if isinstance(each, torch.optim.LBFGS):
            raise OptimizerError(
                "LBFGS keeps steps and gradient differences of all parameters as one flat vector each; their products "
                "tell the curvature of the whole, and without some entries they tell that of no model. Shrink without "
                "passing it and make a new LBFGS afterwards, or train with AdamW or SGD while shrinking"
            )
        for where, tensor in _beside_states(each, shown) if _rule_of(type(each)) is None else ():
            raise OptimizerError(
                f"{kind} holds a tensor of shape {tuple(tensor.shape)} in `{where}`, outside of its parameters' "
                "states: whether it follows the parameters is not known, so nothing can shrink. If it does not, "
                f"register a rule for the rest of it, @ecospa_fx.state_rule({kind}); else use another optimizer "
                "(AdamW, SGD with momentum)"
            )


def layers(optimizer: Any) -> Iterator[Any]:
    """An optimizer and those that it wraps, each once."""
    seen: list[Any] = []
    queue = [optimizer]
    while queue:
        each = queue.pop()
        if not any(each is other for other in seen):
            seen.append(each)
            queue.extend(leaf for _, leaf in _attributes(each) if isinstance(leaf, Optimizer))
            yield each


def second_moments(model: nn.Module, optimizers: Sequence[Optimizer], wanted: Collection[str]) -> dict[str, Tensor]:
    """The roots of Adam's second moments by parameter name, bias-corrected.

    Raises:
        OptimizerError: the optimizers hold none for any of the parameters that are wanted.
    """
    found = {}
    for optimizer in optimizers:
        betas = {id(p): group.get("betas", (0.0, 0.0)) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            state = optimizer.state.get(parameter, {})
            moment = state.get("exp_avg_sq")
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                fade = float(betas[id(parameter)][1])
                found[name] = (moment / (1.0 - fade ** float(state.get("step", 1)))).sqrt()
    if not found.keys() & set(wanted):
        held = sorted({key for each in optimizers for state in each.state.values() for key in state})
        kinds = " and ".join(type(each).__name__ for each in optimizers)
        who = f"this {kinds} holds" if len(optimizers) == 1 else f"these, {kinds}, hold"
        raise OptimizerError(
            f'score="adam" reads `exp_avg_sq` of the weights\' optimizer, but {who} '
            f"{', '.join(held) or 'nothing yet'}; take a step first, use an Adam, or another score"
        )
    return found


def innermost(optimizer: Any) -> list[Any]:
    """Of an optimizer and those that it wraps the ones that wrap none: their steps are taken whoever calls them."""
    return [each for each in layers(optimizer) if not any(isinstance(v, Optimizer) for _, v in _attributes(each))]


def _attributes(optimizer: Any) -> Iterator[tuple[str, Any]]:
    """What an optimizer holds beside the states and groups of its parameters: name, and what lies under it."""
    for name, value in vars(optimizer).items():
        if name not in ("state", "param_groups", "defaults"):
            yield from ((name, leaf) for leaf in pytree.tree_leaves(value))


def _beside_states(optimizer: Any, attributes_only: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors that an optimizer holds, but not for one of its parameters alone: where, and which."""
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    held = list(_attributes(optimizer))
    for number, group in enumerate(() if attributes_only else optimizer.param_groups):
        options = {name: value for name, value in group.items() if name != "params"}
        held += [
            (f"param_groups[{number}][{name!r}]", leaf)
            for name, value in options.items()
            for leaf in pytree.tree_leaves(value)
        ]
    for key, value in getattr(optimizer, "state", {}).items():
        if not (attributes_only or isinstance(key, Tensor)):
            held += [(f"state[{key!r}]", leaf) for leaf in pytree.tree_leaves(value)]
    for where, leaf in held:
        if isinstance(leaf, Tensor) and leaf.numel() > 1 and id(leaf) not in mine:
            yield where, leaf


def _rule_of(cls: type) -> StateRule | None:
    return by_class(cls, _RULES)


def by_class(cls: type, table: Mapping[type | str, Value]) -> Value | None:
    """What a table says of a class, or of the nearest class that it derives from."""
    for base in cls.__mro__:
        for key in (base, f"{base.__module__}.{base.__qualname__}"):
            if key in table:
                return table[key]
    return None


def _by_rule(optimizer: Any, name: str, state: State, parameter: Tensor, keep: Keep) -> Mapping[str, Any]:
    rule = _rule_of(type(optimizer))
    if rule is None:
        return {}
    try:
        return dict(rule(state, parameter, keep))
    except Exception as error:
        raise OptimizerError(
            f"the state rule of {type(optimizer).__name__} failed on `{name}` of shape {tuple(parameter.shape)} with "
            f"{type(error).__name__}: {error}; nothing was changed"
        ) from error


def _check_number(optimizer: Any, name: str, parameter: Tensor, entry: str, value: Any) -> None:
    """Refuse state that is neither sliced nor made of plain numbers and words."""
    kind, inside = type(optimizer).__name__, f" in a {type(value).__name__}"
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
            f"{kind} holds {what} for `{name}` of shape {tuple(parameter.shape)}: which of it belongs to which row or "
            f"column is not known, so it cannot shrink along. Say it with @ecospa_fx.state_rule({kind}), or use an "
            "optimizer with elementwise state (AdamW, SGD with momentum)"
        )


_WORDS = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


def _plain(value: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor is what it looks like: no quantized one, say, that packs its entries in a way of its own."""
    return type(value) in (Tensor, nn.Parameter, type(parameter))


_ADAM = elementwise("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_KNOWN: dict[type | str, StateRule] = {
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.NAdam: _ADAM,
    torch.optim.RAdam: _ADAM,
    torch.optim.SparseAdam: _ADAM,
    torch.optim.Adamax: elementwise("exp_avg", "exp_inf"),
    torch.optim.SGD: elementwise("momentum_buffer"),
    torch.optim.RMSprop: elementwise("square_avg", "momentum_buffer", "grad_avg"),
    torch.optim.Adagrad: elementwise("sum"),
    torch.optim.Adadelta: elementwise("square_avg", "acc_delta"),
    torch.optim.ASGD: elementwise("ax"),
    torch.optim.Rprop: elementwise("prev", "step_size"),
    torch.optim.Muon: elementwise("momentum_buffer"),
    torch.optim.Adafactor: factored("row_var", "col_var", "variance"),
    "transformers.optimization.Adafactor": factored("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", "exp_avg"),
}
for _cls, _rule in _KNOWN.items():
    state_rule(_cls)(_rule)
