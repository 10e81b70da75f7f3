"""Exactness of a model's shrinking, asserted in one line of a test suite."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ecospa_fx.api import compile
from ecospa_fx.errors import VerificationError
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.execution import Execution
from ecospa_fx.model.lookup import couplings
from ecospa_fx.see.explanation import example_call
from ecospa_fx.see.verification import Verification, verify


def assert_exact(
    model: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    regions: str | Sequence[str] = "auto",
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Verification:
    """Assert that shrinking a model equals masking it, for every coupling alone and for all together.

    >>> assert_exact(model, (x,), dtype=torch.float64)

    A copy is compiled, so the model stays as it is. Outputs and gradients in eval mode are compared.

    Args:
        model: any module, compiled or not.
        example_inputs: positional arguments of a call; by default those that the model itself offers
            (`dummy_inputs`, `example_input_array`).
        example_kwargs: keyword arguments of that call.
        regions: as for `ecospa_fx.compile`.
        dtype: dtype of the computation. In `torch.float64`, rounding hides nothing; None: the dtype of the model.
        seed: seed of the random selections.

    Returns:
        The comparisons, at least one per coupling.

    Raises:
        VerificationError: a coupling differs from masking, or was never compared.
        NoCouplingError: nothing can shrink, so there is nothing to assert.
        NoInputsError: there are no inputs.
        CaptureError: the model cannot be captured.
    """
    args, kwargs = example_call(model, example_inputs, example_kwargs)
    copied = copy.deepcopy(model)
    if dtype is not None:
        copied = copied.to(dtype)
        cast = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
        args, kwargs = pytree.tree_map_only(Tensor, cast, (args, kwargs))
    compiled = copied.__dict__.get(MODEL)
    execution: Execution = "graph" if compiled is None else compiled.execution
    compile(copied, example_inputs=args, example_kwargs=kwargs, regions=regions, execution=execution)
    result = verify(copied, example_inputs=args, example_kwargs=kwargs, seed=seed)
    result.raise_if_failed()
    missed = [coupling.name for coupling in couplings(copied) if coupling.name not in result.by_coupling]
    if missed:
        raise VerificationError(
            f"`{missed[0]}` was never compared{f', nor were {len(missed) - 1} more' if missed[1:] else ''}: this call "
            "of the model does not run it; pass example_inputs that do"
        )
    return result
