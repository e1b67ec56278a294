"""`ssa::selected_attention`: (q, k, v, topk_indices) → (o, lse), both differentiable, and the inverse map for the backward.

The map is empty where blocks are small: the forward then needs none, and the backward makes it.
"""

from torch import Tensor

from ..kernels.common import lse_dtype
from ..kernels.selected_attention import inverse_map_sizes, selected_attention_backward, selected_attention_forward
from ..kernels.varlen_attention import attention_stats
from .common import first_order_only, operator


def fake_inverse_map(q: Tensor, topk_indices: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    return tuple(offsets.new_empty(size) for size in inverse_map_sizes(q, topk_indices, offsets))


@operator("selected_attention")
def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, topk_indices: Tensor, offsets: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return selected_attention_forward(q, k, v, topk_indices, offsets, softmax_scale)


@selected_attention.register_fake
def _(q, k, v, topk_indices, offsets, softmax_scale):
    csr = fake_inverse_map(q, topk_indices, offsets)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=lse_dtype(q)), *csr


@operator("selected_attention_backward")
def _backward_op(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, topk_indices: Tensor, offsets: Tensor,
    csr_offsets: Tensor, csr_indices: Tensor, chunks: Tensor, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    stats = attention_stats(o, do, lse, dlse)
    return selected_attention_backward(q, k, v, do, stats, topk_indices, offsets, csr_offsets, csr_indices, chunks, softmax_scale)


@_backward_op.register_fake
def _(do, dlse, q, k, v, o, lse, topk_indices, offsets, csr_offsets, csr_indices, chunks, softmax_scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


first_order_only(_backward_op)


def _setup_context(ctx, inputs, output):
    q, k, v, topk_indices, offsets, ctx.softmax_scale = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(q, k, v, *output[:2], topk_indices, offsets, *output[2:])


def _backward(ctx, do, dlse, *_):
    grads = _backward_op(do, dlse, *ctx.saved_tensors, ctx.softmax_scale)
    return *grads, None, None, None


selected_attention.register_autograd(_backward, setup_context=_setup_context)
