"""`ssa::varlen_attention`: (q, k, v) → (o, lse), both differentiable."""

from torch import Tensor

from ..kernels.common import lse_dtype
from ..kernels.varlen_attention import attention_stats, varlen_attention_backward, varlen_attention_forward
from .common import first_order_only, operator


@operator("varlen_attention")
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, index: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    return varlen_attention_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, index, softmax_scale)


@varlen_attention.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, index, softmax_scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=lse_dtype(q))


@operator("varlen_attention_backward")
def _backward_op(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    index: Tensor | None, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    stats = attention_stats(o, do, lse, dlse)
    return varlen_attention_backward(q, k, v, do, stats, cu_seqlens_q, cu_seqlens_k, index, softmax_scale)


@_backward_op.register_fake
def _(do, dlse, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, index, softmax_scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


first_order_only(_backward_op)


def _setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens_q, cu_seqlens_k, index, ctx.softmax_scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, index)


def _backward(ctx, do, dlse):
    grads = _backward_op(do, dlse, *ctx.saved_tensors, ctx.softmax_scale)
    return *grads, None, None, None, None


varlen_attention.register_autograd(_backward, setup_context=_setup_context)
