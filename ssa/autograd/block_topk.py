"""`ssa::block_topk`: the chosen selection blocks. Not differentiable."""

import torch
from torch import Tensor

from ..kernels import block_topk as kernels
from .common import operator


@operator("block_topk")
def block_topk(
    q: Tensor, k_cmp: Tensor, lse: Tensor, cu_seqlens: Tensor, cu_blocks: Tensor, child_offsets: Tensor, fill_order: Tensor, topk: int,
    softmax_scale: float,
) -> Tensor:  # fmt: skip
    return kernels.block_topk(q, k_cmp, lse, cu_seqlens, cu_blocks, child_offsets, fill_order, topk, softmax_scale)


@block_topk.register_fake
def _(q, k_cmp, lse, cu_seqlens, cu_blocks, child_offsets, fill_order, topk, softmax_scale):
    return q.new_empty((q.shape[0], k_cmp.shape[1], topk), dtype=torch.int32)
