"""`ssa::block_mean`: the torch.library boundary of kernels/block_mean.py."""

from __future__ import annotations

from torch import Tensor

from ..kernels import block_mean as kernels
from .common import first_order_only, operator
from .position_table import table_gradient


@operator("block_mean")
def block_mean(x: Tensor, offsets: Tensor, index: Tensor | None, table: Tensor | None, slots: Tensor | None, extra: int) -> Tensor:
    return kernels.block_mean_forward(x, offsets, index, table, slots, extra)


@block_mean.register_fake
def _(x, offsets, index, table, slots, extra):
    return x.new_empty(offsets.shape[0] - 1, x.shape[1])


@operator("block_mean_backward")
def block_mean_backward(dy: Tensor, offsets: Tensor, index: Tensor | None, num_tokens: int, extra: int) -> Tensor:
    return kernels.block_mean_backward(dy, offsets, index, num_tokens, extra)


@block_mean_backward.register_fake
def _(dy, offsets, index, num_tokens, extra):
    return dy.new_empty(num_tokens, dy.shape[1])


def _setup_context(ctx, inputs, output):
    x, offsets, index, table, slots, ctx.extra = inputs
    ctx.save_for_backward(offsets, index, slots)
    ctx.num_tokens = x.shape[0]
    ctx.num_slots, ctx.table_dtype = (0, None) if table is None else (table.shape[0], table.dtype)


def _backward(ctx, dy):
    offsets, index, slots = ctx.saved_tensors
    dx = block_mean_backward(dy, offsets, index, ctx.num_tokens, ctx.extra)
    dtable = None if slots is None else table_gradient(dx, slots, ctx.num_slots).to(ctx.table_dtype)
    return dx, None, None, dtable, None, None


block_mean.register_autograd(_backward, setup_context=_setup_context)
first_order_only(block_mean_backward)
