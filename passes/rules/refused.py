"""Refusals: ops of which every axis stays whole on purpose, each with the reason that users read."""

from __future__ import annotations

import torch

from .registry import refuse

aten = torch.ops.aten

refuse(
    "The value of an entry decides where it is counted",
    aten.histogram, aten.histogramdd, aten.bincount,
)  # fmt: skip
refuse(
    "The position of an entry in the result depends on how many were chosen before it",
    aten.masked_scatter, aten.masked_scatter_, aten.masked_select, aten.nonzero, aten.nonzero_numpy, aten.argwhere,
    aten.nonzero_static, aten.unique_dim, aten.unique_consecutive, aten.unique_dim_consecutive, aten._unique,
    aten._unique2,
)  # fmt: skip
refuse(
    "The entries that are read depend on the layout in memory, which a shrink changes",
    aten.as_strided, aten.as_strided_, aten.as_strided_copy, aten.as_strided_scatter, aten.resize_, aten.resize_as_,
    aten.set_, aten.put, aten.put_, aten._unsafe_masked_index, aten._unsafe_masked_index_put_accumulate,
    aten.max_pool2d_with_indices_backward,
)  # fmt: skip
refuse(
    "It reshapes its operand in place; the variant without `_` in its name can be followed",
    aten.squeeze_, aten.unsqueeze_, aten.t_, aten.transpose_, aten.swapaxes_, aten.swapdims_,
)  # fmt: skip
refuse(
    "Each entry of the result stands for a pair of entries, or for none",
    aten.block_diag, aten.cartesian_prod, aten.combinations, aten.diagonal_scatter, aten._chunk_cat,
)  # fmt: skip
refuse(
    "Every entry of the equations decides every entry of their solution",
    aten.linalg_lstsq, aten.linalg_tensorinv, aten.linalg_tensorsolve,
)  # fmt: skip
refuse("Every entry counts in the distance", aten.dist)
refuse(
    "The entries of a sparse or nested tensor do not lie along axes; a dense one, of to_dense(), can shrink",
    aten.to_sparse, aten._to_sparse, aten.to_sparse_csr, aten.to_sparse_csc, aten.to_sparse_bsr, aten.to_sparse_bsc,
    aten.to_dense, aten._to_dense, aten.sparse_mask, aten._sparse_mm, aten._sparse_addmm, aten.sparse_sampled_addmm,
    aten._sparse_sum, aten._sparse_softmax, aten._sparse_log_softmax, aten.sparse_coo_tensor,
    aten.sparse_compressed_tensor, aten.coalesce, aten._nested_tensor_from_mask,
    aten._nested_tensor_from_mask_left_aligned,
)  # fmt: skip
refuse("The segments that are reduced have lengths of their own", aten.segment_reduce)
refuse(
    "Observed extremes of all entries decide how each is rounded",
    aten.fused_moving_avg_obs_fake_quant, aten._fused_moving_avg_obs_fq_helper,
)  # fmt: skip
refuse(
    "It is written for one size and layout of matrices",
    aten._scaled_mm, aten._int_mm, aten._weight_int8pack_mm, aten._weight_int4pack_mm,
    aten._flash_attention_forward, aten._efficient_attention_forward,
)  # fmt: skip
