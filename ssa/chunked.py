"""The same operations in plain PyTorch without [T,T] memory: any device, any float type; what runs without a GPU.

Every function works through pieces of bounded size and recomputes a piece's scores in the backward (`torch.utils.checkpoint`), so that
only q, k, v and the outputs are kept. Offsets are read on the host. Rows of a piece are gathered into a padded batch
[pieces, rows, Hkv, …]: one matrix product serves many small windows or many queries of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .partition import Blocks, VoxelPartition

PIECE = 2**24  # score elements of one piece


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of segment i of q attend to the rows of segment i of k."""
    return _segments(q, k, v, cu_seqlens_q, cu_seqlens_k, None, softmax_scale)


def compression_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, partition: VoxelPartition, *, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    return _segments(q, k_cmp, v_cmp, partition.cu_seqlens, partition.compression.cu_blocks, None, softmax_scale)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, partition: VoxelPartition, *, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    window = partition.window
    return _segments(q, k, v, window.offsets, window.offsets, window.index, softmax_scale)


def block_topk(
    q: Tensor, k_cmp: Tensor, lse: Tensor, partition: VoxelPartition, topk: int, *, softmax_scale: float | None = None
) -> Tensor:
    """Chosen selection blocks [T,Hkv,topk] int32, ascending, −1 after; a piece of queries at a time."""
    (t, hq, d), hkv = q.shape, k_cmp.shape[1]
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    ids = torch.full((t, hkv, topk), -1, dtype=torch.int32, device=q.device)
    cu, cu_cmp, cu_slc = (x.tolist() for x in (partition.cu_seqlens, partition.compression.cu_blocks, partition.selection.cu_blocks))
    with torch.no_grad():
        for b in range(partition.batch_size):
            keys = k_cmp[cu_cmp[b] : cu_cmp[b + 1]]
            parents = partition.parents[cu_cmp[b] : cu_cmp[b + 1]].long() - cu_slc[b]
            num_blocks = cu_slc[b + 1] - cu_slc[b]
            rows = max(1, PIECE // max(1, hq * keys.shape[0]))
            for i in range(cu[b], cu[b + 1], rows):
                j = min(i + rows, cu[b + 1])
                s = _heads_first(q[i:j], hkv) @ keys.permute(1, 2, 0)[:, None]  # [Hkv, G, rows, C]
                s = (s * scale).to(lse.dtype)
                p = torch.exp(s - lse[i:j].unflatten(1, (hkv, -1)).permute(1, 2, 0)[..., None]).sum(1)
                score = p.new_zeros(*p.shape[:2], num_blocks).index_add_(2, parents, p)
                best = score.topk(min(topk, num_blocks), dim=-1).indices.sort(-1).values + cu_slc[b]
                ids[i:j, :, : best.shape[-1]] = best.transpose(0, 1).int()
    return ids


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, topk_indices: Tensor, partition: VoxelPartition, *, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Every query attends to all tokens of the blocks it chose: the tokens' rows are listed per (query, kv head) and gathered."""
    (t, hq, d), hkv = q.shape, k.shape[1]
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    offsets = partition.selection.offsets.long()
    ids = topk_indices.long()
    first = torch.where(ids >= 0, offsets[ids.clamp(min=0)], 0)
    size = torch.where(ids >= 0, offsets[ids.clamp(min=0) + 1], 0) - first
    end = size.cumsum(-1)  # [T, Hkv, topk]: where each chosen block ends in the list

    def piece(q: Tensor, k: Tensor, v: Tensor, first: Tensor, size: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        n = end[..., -1]  # [rows, Hkv]
        place = torch.arange(max(1, int(n.max())), device=q.device).expand(*n.shape, -1).contiguous()
        slot = torch.searchsorted(end, place, right=True).clamp_(max=end.shape[-1] - 1)
        row = first.gather(-1, slot) + place - (end - size).gather(-1, slot)
        visible = place < n[..., None]
        row = torch.where(visible, row, 0) * hkv + torch.arange(hkv, device=q.device)[:, None]
        keys, values = (x.flatten(0, 1)[row] for x in (k, v))  # [rows, Hkv, n, D]
        s = (q.unflatten(1, (hkv, -1)) @ keys.transpose(-1, -2) * scale).masked_fill(~visible[:, :, None], -torch.inf)
        p, lse = _softmax(s)
        return (p.to(values.dtype) @ values).flatten(1, 2), lse.flatten(1)

    longest = int(end[..., -1].max()) if t and hkv else 0
    rows = max(1, PIECE // max(1, hkv * longest * max(d, hq // hkv)))
    outputs = [
        _recompute(piece, q[i : i + rows], k, v, *(x[i : i + rows] for x in (first, size, end))) for i in range(0, t, rows)
    ]
    return _join(q, outputs)


def block_mean(x: Tensor, blocks: Blocks) -> Tensor:
    """Mean over the rows of each block: [T, …] → [n, …]."""
    return segment_mean(x.reshape(x.shape[0], x.shape[1:].numel()), blocks.offsets, blocks.index).reshape(-1, *x.shape[1:])


def segment_mean(x: Tensor, offsets: Tensor, index: Tensor | None = None, extra: int = 0) -> Tensor:
    """x [T, F] → [n, F]: Σ / (n_b + extra) over the rows index[offsets[b] … offsets[b+1]) of each segment, 0 for an empty one."""
    num_tokens, count = x.shape[0], torch.diff(offsets).long()
    segment = torch.repeat_interleave(torch.arange(count.shape[0], device=x.device), count, output_size=num_tokens)
    if index is not None:
        segment = torch.empty_like(segment).index_copy(0, index.long(), segment)  # the gradient gathers rows, it never scatters
    x_acc = x.to(torch.promote_types(x.dtype, torch.float32))
    total = x_acc.new_zeros(count.shape[0], x.shape[1]).index_add(0, segment, x_acc)
    return (total / (count[:, None] + extra).clamp(min=1)).to(x.dtype)


def add_position(x: Tensor, table: Tensor, slots: Tensor) -> Tensor:
    """x [T, F], table [P, F], slots [T] → x + table[slots] in x's dtype."""
    return (x.to(torch.promote_types(x.dtype, table.dtype)) + table[slots]).to(x.dtype)


def submanifold_conv3d(x: Tensor, kernel: Tensor, bias: Tensor | None, neighbors: Tensor) -> Tensor:
    """y[i] = Σ_δ x[neighbors[i, δ]] W[δ] + b, one tap at a time: memory of one [T, in] gather, never [T, 27, in]."""
    return _SubmanifoldConv3d.apply(x, kernel, bias, neighbors)


class _SubmanifoldConv3d(torch.autograd.Function):
    """Saves x, not what was gathered from it; the table is symmetric, so dx gathers too: no scatter, repeatable."""

    @staticmethod
    def forward(ctx, x, kernel, bias, neighbors):
        ctx.save_for_backward(x, kernel, neighbors)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _sum_over_taps(x, kernel.to(x.dtype), bias, neighbors)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, kernel, neighbors = ctx.saved_tensors
        dx = _sum_over_taps(dy, kernel.to(x.dtype).flip(0).transpose(1, 2), None, neighbors)
        dyf = dy.to(torch.promote_types(dy.dtype, torch.float32))
        dkernel = torch.stack([_neighbor_rows(x, neighbors, tap).to(dyf.dtype).T @ dyf for tap in range(27)])
        dbias = None if ctx.bias_dtype is None else dyf.sum(0).to(ctx.bias_dtype)
        return dx, dkernel.to(kernel.dtype), dbias, None


def _sum_over_taps(x: Tensor, kernel: Tensor, bias: Tensor | None, neighbors: Tensor) -> Tensor:
    acc = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape[0], kernel.shape[2], dtype=acc, device=x.device) + (0 if bias is None else bias.to(acc))
    with torch.autocast(x.device.type, enabled=False):  # sums stay fp32
        for tap in range(27):
            y = torch.addmm(y, _neighbor_rows(x, neighbors, tap).to(acc), kernel[tap].to(acc))
    return y.to(x.dtype)


def _neighbor_rows(x: Tensor, neighbors: Tensor, tap: int) -> Tensor:
    """[T, in]: the row at one tap of every row, 0 where there is none."""
    row = neighbors[:, tap].long()
    return torch.where((row >= 0)[:, None], x[row.clamp(min=0)], 0)


def _segments(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, index: Tensor | None, softmax_scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention inside segments; segments of similar size share a padded batch, long ones are cut by queries."""
    hkv = k.shape[1]
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    if index is not None:
        q, k, v = (x[index.long()] for x in (q, k, v))

    def piece(q: Tensor, k: Tensor, v: Tensor, rows_q: Tensor, rows_k: Tensor) -> tuple[Tensor, Tensor]:
        queries = q[rows_q.clamp(min=0)].unflatten(2, (hkv, -1)).permute(0, 2, 3, 1, 4)  # [n, Hkv, G, rows, D]
        keys, values = (x[rows_k.clamp(min=0)].permute(0, 2, 1, 3)[:, :, None] for x in (k, v))  # [n, Hkv, 1, keys, D]
        absent = (rows_k < 0)[:, None, None, None]
        s = (queries @ keys.transpose(-1, -2) * scale).masked_fill(absent, -torch.inf)
        p, lse = _softmax(s)
        o = (p.to(values.dtype) @ values.masked_fill(absent.transpose(-1, -2), 0)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        real = rows_q >= 0
        return o[real], lse.permute(0, 3, 1, 2).flatten(2, 3)[real]

    outputs, places = [], []
    for rows_q, rows_k in _batches(cu_q, cu_k, q.shape[1], q.device):
        outputs.append(_recompute(piece, q, k, v, rows_q, rows_k))
        places.append(rows_q[rows_q >= 0])
    o, lse = _join(q, outputs)
    if places:
        place = torch.cat(places)
        if index is not None:
            place = index.long()[place]
        back = torch.empty_like(place).scatter_(0, place, torch.arange(place.shape[0], device=place.device))
        o, lse = o[back], lse[back]
    return o, lse


def _batches(cu_q: Tensor, cu_k: Tensor, num_heads: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows_q [n, most], rows_k [n, most]), −1 where padded, so that every query row of every segment comes once."""
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    segments = zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], strict=True)
    jobs = []  # (keys, queries, first key, first query) of a piece
    for q0, q1, k0, k1 in segments:
        step = max(1, PIECE // max(1, num_heads * (k1 - k0)))
        jobs += [(k1 - k0, min(step, q1 - i), k0, i) for i in range(q0, q1, step)]
    jobs.sort()
    while jobs:
        batch = [jobs.pop()]
        most_k, most_q = batch[0][:2]
        while jobs and (len(batch) + 1) * num_heads * max(most_q, jobs[-1][1]) * max(1, most_k) <= PIECE // 4 and 2 * jobs[-1][0] >= most_k:
            batch.append(jobs.pop())
            most_q = max(most_q, batch[-1][1])
        keys, queries, first_k, first_q = torch.tensor(batch, device=device).T[:, :, None]
        step_q, step_k = (torch.arange(n, device=device) for n in (most_q, max(1, most_k)))
        yield torch.where(step_q < queries, first_q + step_q, -1), torch.where(step_k < keys, first_k + step_k, -1)


def _softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and lse (fp32 or wider) of scores whose hidden entries are −inf; a row of −inf gives zeros and −inf."""
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    empty = (s == -torch.inf).all(-1, keepdim=True)
    lse = torch.logsumexp(s.masked_fill(empty, 0.0), -1, keepdim=True)
    p = torch.exp(s - lse)
    return p, lse.masked_fill(empty, -torch.inf)[..., 0]


def _heads_first(q: Tensor, num_kv_heads: int) -> Tensor:
    """[T,Hq,D] → [Hkv,G,T,D]."""
    return q.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)


def _recompute(piece: Callable, *args: Tensor) -> tuple[Tensor, Tensor]:
    return checkpoint(piece, *args, use_reentrant=False, preserve_rng_state=False)


def _join(q: Tensor, outputs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if not outputs:
        return q * 0, q.new_zeros(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    o, lse = zip(*outputs, strict=True)
    return torch.cat(o), torch.cat(lse)
