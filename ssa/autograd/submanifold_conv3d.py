"""`ssa::submanifold_conv3d`: the torch.library boundary of kernels/submanifold_conv3d.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import submanifold_conv3d as kernels
from .common import first_order_only, operator


@operator("submanifold_conv3d")
def submanifold_conv3d(x: Tensor, kernel: Tensor, bias: Tensor | None, neighbors: Tensor) -> Tensor:
    return kernels.submanifold_conv3d_forward(x, kernel, bias, neighbors)


@submanifold_conv3d.register_fake
def _(x, kernel, bias, neighbors):
    return x.new_empty(x.shape[0], kernel.shape[2])


@operator("submanifold_conv3d_backward")
def submanifold_conv3d_backward(dy: Tensor, x: Tensor, kernel: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.submanifold_conv3d_backward(dy, x, kernel, neighbors)


@submanifold_conv3d_backward.register_fake
def _(dy, x, kernel, neighbors):
    return x.new_empty(x.shape), kernel.new_empty(kernel.shape), dy.new_empty(kernel.shape[2], dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, kernel, bias, neighbors = inputs
    ctx.save_for_backward(x, kernel, neighbors)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy):
    dx, dkernel, dbias = submanifold_conv3d_backward(dy, *ctx.saved_tensors)
    return dx, dkernel, None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype), None


submanifold_conv3d.register_autograd(_backward, setup_context=_setup_context)
first_order_only(submanifold_conv3d_backward)
