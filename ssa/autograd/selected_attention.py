"""`ssa::selected_attention`: (q, k, v, topk_indices) → (o, lse), both differentiable, and the inverse map for the backward."""

from torch import Tensor

from ..kernels.common import lse_dtype
from ..kernels.selected_attention import chunk_queries, invert, selected_attention_backward, selected_attention_forward
from ..kernels.varlen_attention import attention_stats
from .common import first_order_only, operator


def queries_per_chunk(q: Tensor, topk_indices: Tensor) -> int:
    return chunk_queries(q.shape[1], q.shape[2], topk_indices.shape[2], q.element_size())


def fake_inverse_map(q: Tensor, topk_indices: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of csr_offsets, csr_indices and chunks."""
    t, hkv, topk = topk_indices.shape
    chunk, buckets = queries_per_chunk(q, topk_indices), hkv * (offsets.shape[0] - 1)
    chunks = offsets.new_empty((2, (t + chunk - 1) // chunk * buckets + 1))
    return offsets.new_empty((buckets + 1,)), offsets.new_empty((t * hkv * topk,)), chunks


@operator("selected_attention")
def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, topk_indices: Tensor, offsets: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    chunk = queries_per_chunk(q, topk_indices)
    csr = invert(topk_indices, offsets.shape[0] - 1, chunk)
    return *selected_attention_forward(q, k, v, topk_indices, offsets, *csr[1:], chunk, softmax_scale), *csr


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
    chunk = queries_per_chunk(q, topk_indices)
    return selected_attention_backward(
        q, k, v, do, stats, topk_indices, offsets, csr_offsets, csr_indices, chunks, chunk, softmax_scale
    )


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
