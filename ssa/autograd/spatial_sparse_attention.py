"""`ssa::spatial_sparse_attention`: the three branches, score, top-k and gated sum in one op, and all gradients in another.

One op instead of four saves memory and passes: the gate's backward yields every branch's stats, and each branch adds its dq, dk, dv to
what lies there. Outputs after o are what the backward needs; they have no gradient.
"""

import torch
from torch import Tensor

from ..kernels.block_topk import block_topk, topk_map
from ..kernels.common import lse_dtype, tile_maps
from ..kernels.gated_sum import gated_sum_backward, gated_sum_forward
from ..kernels.selected_attention import selected_attention_backward, selected_attention_forward
from ..kernels.varlen_attention import forward_map, varlen_attention_backward, varlen_attention_forward
from .common import first_order_only, operator
from .selected_attention import fake_inverse_map


@operator("spatial_sparse_attention")
def spatial_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, topk_indices: Tensor | None, cu_seqlens: Tensor,
    cu_compression: Tensor, cu_selection: Tensor, child_offsets: Tensor, fill_order: Tensor, offsets: Tensor, cu_window: Tensor,
    window_index: Tensor | None, topk: int, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tiles_cmp, tiles_topk, tiles_win = tile_maps(
        forward_map(q, k_cmp, cu_seqlens, cu_compression), topk_map(q, k_cmp, cu_seqlens), forward_map(q, k, cu_window, cu_window)
    )
    o_cmp, lse_cmp = varlen_attention_forward(q, k_cmp, v_cmp, cu_seqlens, cu_compression, None, softmax_scale, tiles=tiles_cmp)
    if topk_indices is None:
        topk_indices = block_topk(
            q, k_cmp, lse_cmp, cu_seqlens, cu_selection, child_offsets, fill_order, topk, softmax_scale, tiles=tiles_topk
        )
    else:
        topk_indices = topk_indices.clone(memory_format=torch.contiguous_format)
    o_slc, lse_slc, csr_offsets, csr_indices, chunks = selected_attention_forward(q, k, v, topk_indices, offsets, softmax_scale)
    o_win, lse_win = varlen_attention_forward(q, k, v, cu_window, cu_window, window_index, softmax_scale, tiles=tiles_win)
    o = gated_sum_forward(o_cmp, o_slc, o_win, gates)
    return o, o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win, topk_indices, csr_offsets, csr_indices, chunks


@spatial_sparse_attention.register_fake
def _(
    q, k, v, k_cmp, v_cmp, gates, topk_indices, cu_seqlens, cu_compression, cu_selection, child_offsets, fill_order, offsets, cu_window,
    window_index, topk, softmax_scale,
):  # fmt: skip
    outputs = (q.new_empty(q.shape) for _ in range(4))
    lses = (q.new_empty(q.shape[:2], dtype=lse_dtype(q)) for _ in range(3))
    ids = q.new_empty((q.shape[0], k.shape[1], topk), dtype=torch.int32)
    return *outputs, *lses, ids, *fake_inverse_map(q, ids, offsets)


@operator("spatial_sparse_attention_backward")
def _backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, o_cmp: Tensor, o_slc: Tensor,
    o_win: Tensor, lse_cmp: Tensor, lse_slc: Tensor, lse_win: Tensor, topk_indices: Tensor, csr_offsets: Tensor, csr_indices: Tensor,
    chunks: Tensor, cu_seqlens: Tensor, cu_compression: Tensor, offsets: Tensor, cu_window: Tensor, window_index: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dos, stats, dgates = gated_sum_backward(do, [o_cmp, o_slc, o_win], [lse_cmp, lse_slc, lse_win], gates)
    dq, dk_cmp, dv_cmp = varlen_attention_backward(
        q, k_cmp, v_cmp, dos.pop(0), stats[0], cu_seqlens, cu_compression, None, softmax_scale
    )
    grads = selected_attention_backward(
        q, k, v, dos.pop(0), stats[1], topk_indices, offsets, csr_offsets, csr_indices, chunks, softmax_scale, out=(dq, None, None)
    )
    dq, dk, dv = varlen_attention_backward(
        q, k, v, dos.pop(0), stats[2], cu_window, cu_window, window_index, softmax_scale, out=grads
    )
    return dq, dk, dv, dk_cmp, dv_cmp, dgates


@_backward_op.register_fake
def _(do, q, k, v, k_cmp, v_cmp, gates, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, k_cmp, v_cmp, gates))


first_order_only(_backward_op)


def _setup_context(ctx, inputs, output):
    q, k, v, k_cmp, v_cmp, gates, _, cu_seqlens, cu_compression, _, _, _, offsets, cu_window, window_index, _, scale = inputs
    ctx.softmax_scale = scale
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(
        q, k, v, k_cmp, v_cmp, gates, *output[1:], cu_seqlens, cu_compression, offsets, cu_window, window_index
    )


def _backward(ctx, do, *_):
    if do is None:
        return (None,) * 17
    return *_backward_op(do, *ctx.saved_tensors, ctx.softmax_scale), *(None,) * 11


spatial_sparse_attention.register_autograd(_backward, setup_context=_setup_context)
