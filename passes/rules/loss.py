"""Losses: entries are compared one by one, and then, by default, all that are left are averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ecospa_fx.passes.ir.relations import Pattern, Pointwise

from .operands import tensors
from .registry import axis_rule, refuse

aten = torch.ops.aten


def _loss(place: int) -> Callable[..., Pattern | Pointwise]:
    """Make the rule of a loss with its reduction (0 is none) at a place among the arguments of the op."""

    def loss(*args: Any, reduction: int = 1, **more: Any) -> Pattern | Pointwise:
        """Every entry that is left counts in the loss."""
        operands = tensors(*args, *more.values())
        how = args[place] if len(args) > place else reduction
        if how == 0:
            return Pointwise(operands, "nonlinear")
        dims = (" ".join(f"d{i}~" for i in reversed(range(x.ndim))) for x in operands)  # they broadcast
        return Pattern(f"{', '.join(dims)} ->", operands, apart=True)

    return loss


axis_rule(aten.mse_loss, aten.l1_loss, aten.smooth_l1_loss, aten.huber_loss, aten.kl_div, aten.soft_margin_loss)(
    _loss(2)
)
axis_rule(aten.binary_cross_entropy, aten.hinge_embedding_loss)(_loss(3))
axis_rule(aten.binary_cross_entropy_with_logits, aten.margin_ranking_loss)(_loss(4))
axis_rule(aten.poisson_nll_loss)(_loss(5))
refuse(
    "Every class counts in the loss",
    aten.cross_entropy_loss, aten.nll_loss, aten.nll_loss_nd, aten.nll_loss2d, aten.multi_margin_loss,
    aten.multilabel_margin_loss, "torch_nn::_linear_cross_entropy_batch_chunked",
    "torch_nn::_linear_cross_entropy_batch_chunked_no_reduction",
)  # fmt: skip
refuse(
    "Every entry counts in the distances that the loss compares",
    aten.cosine_embedding_loss, aten.triplet_margin_loss,
)  # fmt: skip
refuse("Every step counts in the alignments that the loss adds up", aten.ctc_loss)
