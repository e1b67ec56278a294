"""The dense reference: the definition of every operation, for any device and float type, meant to be read.

T tokens, C compression blocks, S selection blocks, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head size.
Everything is a full score matrix and a mask; who may see whom comes from the coordinates alone, never from offsets.
Source: arXiv 2505.17412, section 4.1 (Eqs. 4-10, Algorithm 1). Memory grows with T^2: for tests and small inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .partition import Blocks, VoxelPartition


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """q [T,Hq,D], k, v [N,Hkv,D], visible [T,N] or [T,Hkv,N] bool → o [T,Hq,D], lse [T,Hq] (natural log, fp32 or wider).

    A row that sees nothing gives o = 0, lse = −inf and no gradient.
    """
    s = _scores(q, k, softmax_scale)  # [T, Hkv, G, N]
    visible = visible[:, None, None, :] if visible.ndim == 2 else visible[:, :, None, :]
    s = torch.where(visible, s, -torch.inf)
    lse = _logsumexp(s)
    p = torch.exp(s - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    p = torch.where(visible, p, 0.0)
    o = torch.einsum("thgn,nhd->thgd", p.to(v.dtype), v)
    return o.reshape(q.shape), lse.flatten(1)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of segment i of q attend to the rows of segment i of k."""
    rows_q, rows_k = (torch.arange(x.shape[0], device=x.device) for x in (q, k))
    segment_q = (rows_q[:, None] >= cu_seqlens_q[1:]).sum(1)
    segment_k = (rows_k[:, None] >= cu_seqlens_k[1:]).sum(1)
    return attention(q, k, v, segment_q[:, None] == segment_k, softmax_scale)


def compression_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, partition: VoxelPartition, *, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. 6: every query attends to one token of every compression block of its sample."""
    return attention(q, k_cmp, v_cmp, _same_sample(partition, partition.compression), softmax_scale)


def block_scores(q: Tensor, k_cmp: Tensor, lse: Tensor, partition: VoxelPartition, *, softmax_scale: float | None = None) -> Tensor:
    """Eq. 8: [T,Hkv,S] = Σ over the block's compression blocks and the group's heads of exp(q·k_cmp scale − lse); −inf in other samples."""
    s = _scores(q, k_cmp, softmax_scale)
    p = torch.exp(s - lse.to(s.dtype).view(*s.shape[:3], 1)).sum(2)  # [T, Hkv, C]
    child = _cells(partition.compression.coords, partition.selection.size // partition.compression.size)
    child = (child[:, None] == partition.selection.coords).all(-1)  # [C, S]
    scores = p @ child.to(p.dtype)
    return torch.where(_same_sample(partition, partition.selection)[:, None], scores, -torch.inf)


def block_topk(
    q: Tensor, k_cmp: Tensor, lse: Tensor, partition: VoxelPartition, topk: int, *, softmax_scale: float | None = None
) -> Tensor:
    """Ids [T,Hkv,topk] int32 of the best selection blocks: valid ones first and ascending, −1 after. No gradient."""
    with torch.no_grad():
        scores = block_scores(q, k_cmp, lse, partition, softmax_scale=softmax_scale)
        n = min(topk, scores.shape[-1])
        best, ids = scores.topk(n, dim=-1)
        none = scores.shape[-1]  # sorts last
        ids = torch.where(best >= 0, ids, none).sort(-1).values
        ids = torch.where(ids < none, ids, -1)
        return torch.nn.functional.pad(ids, (0, topk - n), value=-1).int()


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, topk_indices: Tensor, partition: VoxelPartition, *, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Algorithm 1: every query attends to all tokens of the blocks it chose, for each key/value head."""
    ids = torch.arange(len(partition.selection), device=q.device)
    chosen = (topk_indices[..., None] == ids).any(2)  # [T, Hkv, S]
    member = _members(partition, partition.selection)  # [T, S]
    visible = (chosen.to(q.dtype) @ member.T.to(q.dtype)) > 0  # [T, Hkv, T]
    return attention(q, k, v, visible, softmax_scale)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, partition: VoxelPartition, *, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention among the tokens of a window floor((xyz + shift) / size) of one sample."""
    cell = _cells(partition.coords, partition.window.size, partition.window_shift)
    return attention(q, k, v, (cell[:, None] == cell).all(-1), softmax_scale)


def gated_sum(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    """Eq. 4: g0 o_cmp + g1 o_slc + g2 o_win; gates [T,3] or [T,Hq,3]."""
    g = (gates[:, None] if gates.ndim == 2 else gates).to(torch.promote_types(gates.dtype, o_cmp.dtype))
    return (g[..., 0:1] * o_cmp + g[..., 1:2] * o_slc + g[..., 2:3] * o_win).to(o_cmp.dtype)


def spatial_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    partition: VoxelPartition,
    *,
    topk: int,
    topk_indices: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """The three branches and their gated sum, rows in packed order."""
    o_cmp, lse = compression_attention(q, k_cmp, v_cmp, partition, softmax_scale=softmax_scale)
    if topk_indices is None:
        topk_indices = block_topk(q, k_cmp, lse, partition, topk, softmax_scale=softmax_scale)
    o_slc, _ = selected_attention(q, k, v, topk_indices, partition, softmax_scale=softmax_scale)
    o_win, _ = window_attention(q, k, v, partition, softmax_scale=softmax_scale)
    return gated_sum(o_cmp, o_slc, o_win, gates)


def block_mean(x: Tensor, blocks: Blocks) -> Tensor:
    """Mean over the rows of each block: [T, …] → [n, …]."""
    return segment_mean(x.reshape(x.shape[0], x.shape[1:].numel()), blocks.offsets, blocks.index).reshape(-1, *x.shape[1:])


def segment_mean(x: Tensor, offsets: Tensor, index: Tensor | None = None, extra: int = 0) -> Tensor:
    """x [T, F], n segments of rows (of index[rows]) → [n, F]: the sum over n_b + extra rows, 0 for an empty segment."""
    position = torch.arange(x.shape[0], device=x.device)
    member = ((position >= offsets[:-1, None]) & (position < offsets[1:, None])).to(x.dtype)  # [n, T]
    weight = member / (member.sum(1, keepdim=True) + extra).clamp(min=1)
    return weight @ (x if index is None else x[index.long()])


def submanifold_conv3d(x: Tensor, kernel: Tensor, bias: Tensor | None, neighbors: Tensor) -> Tensor:
    """y[i] = Σ_δ x[i + δ] W[δ] + b over the active neighbours; kernel [27, in, out], neighbors [T,27], −1 = none."""
    gathered = torch.where((neighbors >= 0)[..., None], x[neighbors.clamp(min=0).long()], 0.0)  # [T, 27, in]
    y = torch.einsum("tni,nio->to", gathered, kernel)
    return y if bias is None else y + bias


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, num_groups: int, eps: float) -> Tensor:
    """SiLU of GroupNorm, x [N, F] → [N, F]: mean and variance over the rows of a sample and the channels of a group."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normal = [wide[:0]]
    for rows in wide.split(torch.diff(cu_seqlens).tolist()):
        centred = rows.unflatten(1, (num_groups, -1))
        centred = centred - centred.mean((0, 2), keepdim=True)
        rstd = torch.rsqrt(centred.square().mean((0, 2), keepdim=True) + eps)
        normal.append((centred * rstd).flatten(1))
    return torch.nn.functional.silu(torch.cat(normal) * weight + bias).to(x.dtype)


def _scores(q: Tensor, k: Tensor, softmax_scale: float | None) -> Tensor:
    num_kv_heads = k.shape[1]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q = q.unflatten(1, (num_kv_heads, -1))  # head h reads kv head h // G
    s = torch.einsum("thgd,nhd->thgn", q, k) * scale
    return s.to(torch.promote_types(s.dtype, torch.float32))


def _logsumexp(s: Tensor) -> Tensor:
    """logsumexp over the last axis whose gradient is 0, not NaN, for a row of −inf; −inf for an empty axis."""
    empty = (s == -torch.inf).all(-1)
    lse = torch.logsumexp(torch.where(empty[..., None], 0.0, s), -1)
    return torch.where(empty, -torch.inf, lse)


def _cells(coords: Tensor, size: int, shift: int = 0) -> Tensor:
    """[n,4] (sample, x, y, z) → (sample, floor((xyz + shift) / size))."""
    return torch.cat([coords[:, :1], torch.div(coords[:, 1:] + shift, size, rounding_mode="floor")], 1)


def _members(partition: VoxelPartition, blocks: Blocks) -> Tensor:
    """[T,n] bool: token lies in block."""
    return (_cells(partition.coords, blocks.size)[:, None] == blocks.coords).all(-1)


def _same_sample(partition: VoxelPartition, blocks: Blocks) -> Tensor:
    """[T,n] bool: token and block belong to one sample."""
    return partition.coords[:, :1] == blocks.coords[:, 0]
