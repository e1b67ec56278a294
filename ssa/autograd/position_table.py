"""`ssa::add_position`: the torch.library boundary of kernels/position_table.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import position_table as kernels
from .common import first_order_only, operator


@operator("add_position")
def add_position(x: Tensor, table: Tensor, slots: Tensor) -> Tensor:
    return kernels.add_position_forward(x, table, slots)


@add_position.register_fake
def _(x, table, slots):
    return x.new_empty(x.shape)


@operator("table_gradient")
def table_gradient(dy: Tensor, slots: Tensor, num_slots: int) -> Tensor:
    return kernels.table_gradient(dy, slots, num_slots)


@table_gradient.register_fake
def _(dy, slots, num_slots):
    return dy.new_empty(num_slots, dy.shape[1], dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    _, table, slots = inputs
    ctx.save_for_backward(slots)
    ctx.num_slots, ctx.table_dtype = table.shape[0], table.dtype


def _backward(ctx, dy):
    (slots,) = ctx.saved_tensors
    dtable = table_gradient(dy, slots, ctx.num_slots).to(ctx.table_dtype) if ctx.needs_input_grad[1] else None
    return dy, dtable, None


add_position.register_autograd(_backward, setup_context=_setup_context)
first_order_only(table_gradient)
