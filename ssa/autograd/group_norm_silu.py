"""`ssa::group_norm_silu`: the torch.library boundary of kernels/group_norm_silu.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import group_norm_silu as kernels
from .common import first_order_only, operator


@operator("group_norm_silu")
def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    return kernels.group_norm_silu_forward(x, weight, bias, cu_seqlens, num_groups, eps)


@group_norm_silu.register_fake
def _(x, weight, bias, cu_seqlens, num_groups, eps):
    return x.new_empty(x.shape), x.new_empty(2 * (cu_seqlens.shape[0] - 1) * num_groups, dtype=torch.float32)


@operator("group_norm_silu_backward")
def group_norm_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.group_norm_silu_backward(dy, x, weight, bias, stats, cu_seqlens)


@group_norm_silu_backward.register_fake
def _(dy, x, weight, bias, stats, cu_seqlens):
    return tuple(t.new_empty(t.shape) for t in (x, weight, bias))


def _setup_context(ctx, inputs, output):
    x, weight, bias, cu_seqlens, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, output[1], cu_seqlens)


def _backward(ctx, dy, _):
    return *group_norm_silu_backward(dy, *ctx.saved_tensors), None, None, None


group_norm_silu.register_autograd(_backward, setup_context=_setup_context)
first_order_only(group_norm_silu_backward)
