"""Optimizer table: one record per optimizer class, with all that shrinks and rotations must know of its state.

    TABLE -> rules_for(class)   the record of the class, gaps filled from the nearest base classes
          <- state_rule         teach a rule by which state is sliced
          <- register           teach the rest: averages of weights, changes of basis

Elementwise state commutes with a shrink: stepping and then slicing is slicing and then stepping. Where the update is
not elementwise (Muon's orthogonalisation, trust ratios, Adafactor's clipping) the state still follows; the next step is
then that of the smaller matrix, which is not a part of the larger one's step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

Keep = Mapping[int, Tensor]
State = Mapping[str, Any]
StateRule = Callable[[State, Tensor, Keep], Mapping[str, Any]]
"""`rule(state, parameter, keep)`: new values of one parameter's state. `parameter` is as before the shrink, `keep` maps
each dim that loses entries to the sorted positions that stay. Entries that a rule does not return are judged without
it: tensors proved to be elementwise are sliced, numbers stay, and anything else is refused."""

TransformsAs = Literal["gradient", "update", "square", "update_square", "scale"]
"""How an entry of the state follows a change of basis. Updates transform by the matrix of the weights, gradients by its
inverse transpose. Squares transform by the squares of these matrices, which is exact where entries are uncorrelated;
scales are roots of squares."""


@dataclass(frozen=True)
class SliceLater:
    """A state tensor of its parameter's shape, to be sliced as the parameter is: all of them at once, in one launch."""

    value: Tensor


@dataclass(frozen=True)
class OptimizerRules:
    """The record of one optimizer class. For a field that is None the nearest base class with a value counts.

    Attributes:
        slices: rule by which the state of a parameter is sliced.
        average: entry that holds weights, such as a running average; it follows whatever a shrink does to the weights.
            All other entries are of gradients.
        transforms: entry -> how it follows a change of basis. Entries that are not listed cannot follow a rotation.
        unscales: whether a fused step divides gradients by the scale of a GradScaler and writes the quotients back.
        refusal: why nothing can shrink while this optimizer holds the parameters.
    """

    slices: StateRule | None = None
    average: str | None = None
    transforms: Mapping[str, TransformsAs] | None = None
    unscales: bool | None = None
    refusal: str | None = None


def take(value: Tensor, keep: Keep, dims: Iterable[int | None] | None = None) -> Tensor:
    """Copy the part of a state tensor that stays.

    Args:
        value: state of a parameter.
        keep: parameter dim -> positions that stay, as a rule gets it.
        dims: for each dim of `value` the parameter's dim that it runs along, or None; by default its own.
    """
    part = value.detach()
    for dim, of in enumerate(range(value.ndim) if dims is None else dims):
        if of is not None and of in keep:
            part = part.index_select(dim, keep[of].to(part.device))
    return part.clone() if part.data_ptr() == value.data_ptr() else part


def elementwise(*entries: str) -> StateRule:
    """Make the rule of state in which each entry belongs to the entry of the parameter at the same place."""

    def rule(state: State, parameter: Tensor, keep: Keep) -> dict[str, Any]:
        tensors = {entry: state[entry] for entry in entries if isinstance(state.get(entry), Tensor)}
        return {entry: SliceLater(value) for entry, value in tensors.items() if value.shape == parameter.shape}

    return rule


def factored(row: str, column: str, *entries: str) -> StateRule:
    """Make the rule of Adafactor (arXiv 1804.04235), which keeps row and column means of a matrix's second moment.

    `row` holds means over the last dim, `column` over the one before, with or without a dim of 1 left there. The second
    moment they stand for is `row[i] * column[j] / mean(row)`. Its means over the entries that stay are the new ones,
    which leaves that estimate as it was for each of these. `entries` are elementwise.
    """
    others = elementwise(*entries)

    def rule(state: State, parameter: Tensor, keep: Keep) -> dict[str, Any]:
        values = dict(others(state, parameter, keep))
        if not isinstance(state.get(row), Tensor) or parameter.ndim < 2:
            return values
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
        return {**values, row: rows.mul_(by_row), column: columns.mul_(by_column)}

    return rule


_ADAM = OptimizerRules(
    elementwise("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    transforms={"exp_avg": "gradient", "exp_avg_sq": "square", "max_exp_avg_sq": "square"},
)
_SCHEDULE_FREE = OptimizerRules(average="z")

TABLE: dict[type | str, OptimizerRules] = {
    torch.optim.Adam: replace(_ADAM, unscales=True),
    torch.optim.AdamW: replace(_ADAM, unscales=True),
    torch.optim.NAdam: _ADAM,
    torch.optim.RAdam: _ADAM,
    torch.optim.SparseAdam: replace(_ADAM, transforms=None),
    torch.optim.Adamax: OptimizerRules(
        elementwise("exp_avg", "exp_inf"), transforms={"exp_avg": "gradient", "exp_inf": "scale"}
    ),
    torch.optim.SGD: OptimizerRules(
        elementwise("momentum_buffer"), transforms={"momentum_buffer": "gradient"}, unscales=True
    ),
    torch.optim.RMSprop: OptimizerRules(
        elementwise("square_avg", "momentum_buffer", "grad_avg"),
        transforms={"square_avg": "square", "grad_avg": "gradient", "momentum_buffer": "update"},
    ),
    torch.optim.Adagrad: OptimizerRules(elementwise("sum"), transforms={"sum": "square"}, unscales=True),
    torch.optim.Adadelta: OptimizerRules(
        elementwise("square_avg", "acc_delta"), transforms={"square_avg": "square", "acc_delta": "update_square"}
    ),
    torch.optim.ASGD: OptimizerRules(elementwise("ax"), average="ax", transforms={"ax": "update"}),
    torch.optim.Rprop: OptimizerRules(elementwise("prev", "step_size")),
    torch.optim.Muon: OptimizerRules(elementwise("momentum_buffer"), transforms={"momentum_buffer": "gradient"}),
    torch.optim.Adafactor: OptimizerRules(factored("row_var", "col_var", "variance")),
    torch.optim.LBFGS: OptimizerRules(
        refusal="LBFGS keeps steps and gradient differences of all parameters as one flat vector each; their inner "
        "products estimate the curvature of the whole model, and slicing them would make that estimate wrong. Shrink "
        "without passing it and make a new LBFGS afterwards, or train with AdamW or SGD while shrinking"
    ),
    "transformers.optimization.Adafactor": OptimizerRules(
        factored("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", "exp_avg")
    ),
    "schedulefree.adamw_schedulefree.AdamWScheduleFree": _SCHEDULE_FREE,
    "schedulefree.sgd_schedulefree.SGDScheduleFree": _SCHEDULE_FREE,
    "schedulefree.radam_schedulefree.RAdamScheduleFree": _SCHEDULE_FREE,
}
"""Optimizer class, or its full name where it need not be importable -> its record."""


def rules_for(cls: type) -> OptimizerRules:
    """Return the record of an optimizer class, each field from the nearest class in its MRO that has a value."""
    keys = [key for base in cls.__mro__ for key in (base, f"{base.__module__}.{base.__qualname__}")]
    records = [TABLE[key] for key in keys if key in TABLE]
    values = {
        field.name: next((value for each in records if (value := getattr(each, field.name)) is not None), None)
        for field in fields(OptimizerRules)
    }
    return OptimizerRules(**values)


def state_rule(optimizer: type | str) -> Callable[[StateRule], StateRule]:
    """Teach shrinking the state of an optimizer class and its subclasses. The latest rule wins.

    >>> @ecospa_fx.state_rule(MyOptimizer)
    ... def my_optimizer(state, parameter, keep):
    ...     return {"row_scale": ecospa_fx.optimizers.take(state["row_scale"], keep, dims=(0,))}

    Args:
        optimizer: the class, or its full name (`"package.module.Class"`), which need not be importable.
    """

    def teach(rule: StateRule) -> StateRule:
        register(optimizer, slices=rule)
        return rule

    return teach


def register(
    optimizer: type | str,
    *,
    slices: StateRule | None = None,
    average: str | None = None,
    transforms: Mapping[str, TransformsAs] | None = None,
    unscales: bool | None = None,
) -> None:
    """Teach what a shrink and a rotation must know of an optimizer class and its subclasses. The latest value wins.

    >>> ecospa_fx.optimizers.register(MyOptimizer, transforms={"momentum": "gradient", "variance": "square"})

    Args:
        optimizer: the class, or its full name (`"package.module.Class"`), which need not be importable.
        slices: rule by which its state is sliced, see `ecospa_fx.state_rule`.
        average: entry of the state that holds weights, such as a running average of them.
        transforms: entry of the state -> how it follows a change of basis: as a `"gradient"`, as an `"update"` of the
            weights, as the `"square"` of the one or the `"update_square"` of the other, or as a `"scale"`, the root of
            a square.
        unscales: whether its fused step divides gradients by a GradScaler's scale and writes the quotients back.
    """
    given = {"slices": slices, "average": average, "transforms": transforms, "unscales": unscales}
    rules: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    TABLE[optimizer] = replace(TABLE.get(optimizer, OptimizerRules()), **rules)
