"""How the state of an optimizer follows when rows and columns of its parameters go.

    optimizer -> its rule, by class -> new values of one parameter's state
              no rule -> tensors proved elementwise are sliced, numbers stay, the rest is refused

Elementwise state commutes with a shrink: stepping and then slicing is slicing and then stepping. Where the update is
not elementwise (Muon's orthogonalisation, trust ratios, Adafactor's clipping) the state still follows; the next step is
then that of the smaller matrix, which is no part of the larger one's step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.optim import Optimizer

from .errors import OptimizerError

Keep = Mapping[int, Tensor]
State = Mapping[str, Any]
StateRule = Callable[[State, Tensor, Keep], Mapping[str, Any]]
"""`rule(state, parameter, keep)`: new values of one parameter's state. `parameter` is as before the shrink, `keep` maps
each dim that loses entries to the sorted positions that stay. What a rule does not return is judged without it."""

_RULES: dict[type | str, StateRule] = {}


def state_rule(optimizer: type | str) -> Callable[[StateRule], StateRule]:
    """Teach shrinking the state of an optimizer class and its subclasses. The latest rule wins.

    >>> @ecospa_fx.state_rule(MyOptimizer)
    ... def my_optimizer(state, parameter, keep):
    ...     return {"row_scale": ecospa_fx.take(state["row_scale"], keep, dims=(0,))}

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
        return {entry: take(value, keep) for entry, value in held.items() if value.shape == parameter.shape}

    return rule


def factored(row: str, column: str) -> StateRule:
    """The rule of Adafactor (arXiv 1804.04235), which keeps row and column means of a matrix's second moment.

    `row` holds means over the last dim, `column` over the one before, with or without a dim of 1 left there. The second
    moment they stand for is `row[i] * column[j] / mean(row)`. Its means over what stays are the new ones, which leaves
    that estimate as it was for every entry that stays.
    """

    def rule(state: State, parameter: Tensor, keep: Keep) -> dict[str, Any]:
        if not isinstance(state.get(row), Tensor) or parameter.ndim < 2:
            return {}
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
        return {row: rows.mul_(by_row), column: columns.mul_(by_column)}

    return rule


def shrunk_state(
    optimizer: Optimizer, name: str, parameter: Tensor, keep: Keep
) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """New values of what an optimizer holds for one parameter: (state dict, entry, new value).

    Raises:
        OptimizerError: some of it cannot follow.
    """
    for each in _layers(optimizer):
        state = each.state.get(parameter) if hasattr(each, "state") else None
        if not state:
            continue
        check_can_follow(each)
        rule = _rule_of(type(each))
        made = dict(rule(state, parameter, keep)) if rule is not None else {}
        for entry, value in state.items():
            if entry in made:
                yield state, entry, made[entry]
            elif _is_elementwise(each, entry, value, parameter):
                yield state, entry, take(value, keep)
            else:
                _refuse_unless_number(each, name, parameter, entry, value)


def check_can_follow(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state no shrink can be carried through.

    Raises:
        OptimizerError: it is of such a class.
    """
    if any(isinstance(each, torch.optim.LBFGS) for each in _layers(optimizer)):
        raise OptimizerError(
            "LBFGS keeps steps and gradient differences of all parameters as one flat vector each; their products tell "
            "the curvature of the whole, and without some entries they tell that of no model. Shrink without passing "
            "it and make a new LBFGS afterwards, or train with AdamW or SGD while shrinking"
        )


def _layers(optimizer: Any) -> Iterator[Any]:
    """An optimizer and those that it wraps, each once."""
    seen: list[Any] = []
    queue = [optimizer]
    while queue:
        each = queue.pop()
        if not any(each is other for other in seen):
            seen.append(each)
            queue.extend(value for value in vars(each).values() if isinstance(value, Optimizer))
            yield each


def _rule_of(cls: type) -> StateRule | None:
    for base in cls.__mro__:
        for key in (base, f"{base.__module__}.{base.__qualname__}"):
            if key in _RULES:
                return _RULES[key]
    return None


def _is_elementwise(optimizer: Any, entry: str, value: Any, parameter: Tensor) -> bool:
    """Whether a state tensor has its parameter's shape for a reason, not by chance.

    A preconditioner of rows by rows has the shape of a square matrix too. So the entry must have its parameter's shape
    wherever the optimizer holds it, and one of these parameters, where this one is a matrix, must not be square.
    """
    if not isinstance(value, Tensor) or value.shape != parameter.shape or not value.ndim:
        return False
    holders = [(p, state[entry]) for p, state in optimizer.state.items() if isinstance(p, Tensor) and entry in state]
    alike = all(isinstance(held, Tensor) and (held.shape == p.shape or held.numel() == 1) for p, held in holders)
    return alike and (value.ndim == 1 or any(p.ndim > 1 and len(set(p.shape)) > 1 for p, _ in holders))


def _refuse_unless_number(optimizer: Any, name: str, parameter: Tensor, entry: str, value: Any) -> None:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.numel() > 1:
            kind = type(optimizer).__name__
            where = "" if leaf is value else f" in a {type(value).__name__}"
            raise OptimizerError(
                f"{kind} holds `{entry}`{where} of shape {tuple(leaf.shape)} for `{name}` of shape "
                f"{tuple(parameter.shape)}: which of it belongs to which row or column is not known, so it cannot "
                f"shrink along. Say it with @ecospa_fx.state_rule({kind}), or use an optimizer with elementwise state "
                "(AdamW, SGD with momentum)"
            )


_ADAM = elementwise("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
for _cls, _rule in {
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
    torch.optim.Adafactor: factored("row_var", "col_var"),
    "transformers.optimization.Adafactor": factored("exp_avg_sq_row", "exp_avg_sq_col"),
}.items():
    state_rule(_cls)(_rule)
