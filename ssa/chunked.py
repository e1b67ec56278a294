"""The same operations in plain PyTorch without [T,T] memory: any device, any float type; what runs without a GPU.

Every branch is a set of segments: some queries that all see the same keys. The selected branch turns its lists around (block → queries
that chose it), attends block by block and joins the blocks of a query by their lse, as flash attention joins tiles of keys; so every
branch reads keys as they lie, and its backward, which recomputes the scores from lse, gathers and never scatters onto one row twice.
Segments of similar size share a padded batch of matrix products. Padding reads and writes one extra row of zeros at the end of a tensor,
so nothing crosses segments, not even NaN. Offsets are read on the host.

Letters: N rows of queries, H = Hkv, G = Hq / Hkv, M queries and L keys of a tile, n tiles of a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .partition import Blocks, VoxelPartition

PIECE = 2**22  # elements of the largest temporary tensor: scores of a batch, queries of a piece

Tiles = Iterator[tuple[Tensor, Tensor]]  # (lists [n, M], rows of k [n, L]) of each batch, padded with the number of lists and of rows


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
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        for b in range(partition.batch_size):
            keys = k_cmp[cu_cmp[b] : cu_cmp[b + 1]].to(lse.dtype)
            parents = partition.parents[cu_cmp[b] : cu_cmp[b + 1]].long() - cu_slc[b]
            num_blocks = cu_slc[b + 1] - cu_slc[b]
            rows = max(1, PIECE // max(1, hq // hkv * keys.shape[0]))
            for i, h in itertools.product(range(cu[b], cu[b + 1], rows), range(hkv)):
                j = min(i + rows, cu[b + 1])
                group = slice(h * (hq // hkv), (h + 1) * (hq // hkv))
                s = keys[:, h] @ q[i:j, group].to(lse.dtype).flatten(0, 1).T  # [C, rows * G]
                p = s.mul_(scale).sub_(lse[i:j, group].flatten()).exp_().unflatten(1, (j - i, -1)).sum(-1)
                score = p.new_zeros(num_blocks, j - i).index_add_(0, parents, p)
                best = score.T.contiguous().topk(min(topk, num_blocks), dim=-1).indices.sort(-1).values + cu_slc[b]
                ids[i:j, h, : best.shape[-1]] = best.int()
    return ids


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, topk_indices: Tensor, partition: VoxelPartition, *, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Every query attends to all tokens of the blocks it chose."""
    (t, hq, d), hkv, topk = q.shape, k.shape[1], topk_indices.shape[2]
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    offsets, num_blocks = partition.selection.offsets.tolist(), len(partition.selection)
    starts_k = [h * t + x for h in range(hkv) for x in offsets[:-1]]  # block x of kv head h is segment h * num_blocks + x
    sizes_k = [end - start for start, end in itertools.pairwise(offsets)] * hkv
    segment = topk_indices.long() + num_blocks * torch.arange(hkv, device=q.device)[:, None]
    segment = segment.masked_fill(topk_indices < 0, num_blocks * hkv).reshape(t * hkv, topk)
    rows = max(1, PIECE // max(1, topk * max(1, hq // hkv) * d))

    def pieces() -> Iterator[tuple[int, int, Tiles]]:
        for i in range(0, t * hkv, rows):
            j = min(i + rows, t * hkv)
            lists = segment[i:j].flatten()
            sizes_q = torch.bincount(lists, minlength=num_blocks * hkv + 1).tolist()[:-1]
            starts_q = itertools.accumulate(sizes_q, initial=0)
            segments = zip(starts_q, sizes_q, starts_k, sizes_k, strict=False)
            yield i, j, _tiles(segments, hq // hkv, d, lists.argsort(stable=True), lists.shape[0], None, t * hkv, q.device)

    queries = q.unflatten(1, (hkv, hq // hkv)).flatten(0, 1)[:, None]  # [N = T * Hkv, 1, G, D]
    keys, values = (x.transpose(0, 1).flatten(0, 1)[:, None] for x in (k, v))  # [Hkv * T, 1, D]
    o, lse = _Attention.apply(queries, keys, values, scale, topk, pieces)
    return o.reshape(q.shape), lse.reshape(t, hq)


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
    return (x.to(torch.promote_types(x.dtype, table.dtype)) + table.index_select(0, slots.long())).to(x.dtype)


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
    """Attention inside segments of consecutive rows, or of consecutive places of `index`."""
    (t, hq, d), (num_keys, hkv) = q.shape, k.shape[:2]
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    sizes_q, sizes_k = ([b - a for a, b in itertools.pairwise(starts)] for starts in (starts_q, starts_k))
    order = None if index is None else index.long()

    def pieces() -> Iterator[tuple[int, int, Tiles]]:
        segments = zip(starts_q, sizes_q, starts_k, sizes_k, strict=False)
        yield 0, t, _tiles(segments, hq, d, order, t, order, num_keys, q.device)

    o, lse = _Attention.apply(q.unflatten(1, (hkv, hq // hkv)), k, v, scale, 1, pieces)
    return o.flatten(1, 2), lse.flatten(1)


def _tiles(
    segments: Iterator[tuple[int, int, int, int]], num_heads: int, head_dim: int,
    order_q: Tensor | None, end_q: int, order_k: Tensor | None, end_k: int, device: torch.device,
) -> Tiles:  # fmt: skip
    """Segments (first query, queries, first key, keys), places in the orders, as batches of tiles padded with end_q and end_k.

    Sizes of one batch differ by less than twice. Long segments are cut by queries; no batch holds two parts of one segment, so that a
    batch adds to a row of dk once.
    """
    jobs = []
    for first_q, queries, first_k, keys in segments:
        if queries and keys:
            step = max(1, PIECE // (num_heads * max(keys, head_dim)))
            jobs += [(keys, min(step, queries - i), first_k, first_q + i) for i in range(0, queries, step)]

    def similar(job: tuple[int, int, int, int]) -> tuple[int, int]:
        return job[0].bit_length(), job[1].bit_length()

    def rows(first: Tensor, size: Tensor, most: int, order: Tensor | None, end: int) -> Tensor:
        step = torch.arange(most, device=device)
        place = first + step
        if order is not None:
            place = order[place.clamp_(max=order.shape[0] - 1)]
        return torch.where(step < size, place, end)

    for _, group in itertools.groupby(sorted(jobs, key=similar), similar):
        same = list(group)
        most_k, most_q = (max(sizes) for sizes in itertools.islice(zip(*same, strict=True), 2))
        count = max(1, PIECE // 4 // max(num_heads * most_q * max(most_k, head_dim), num_heads * most_k * head_dim))
        for i in range(0, len(same), count):
            keys, queries, first_k, first_q = torch.tensor(same[i : i + count], device=device).T[:, :, None]
            yield rows(first_q, queries, most_q, order_q, end_q), rows(first_k, keys, most_k, order_k, end_k)


class _Attention(torch.autograd.Function):
    """q [N,H,G,D], k, v [rows,H,D] → o like q, lse [N,H,G] (fp32 or wider), where query i has `width` lists of keys.

    pieces() yields (i, j, tiles) over the queries; the tiles of queries i … j name their lists 0 … (j − i) · width. Saves q, k, v, o, lse;
    with p = exp(s − lse) and delta = Σ o · do − dlse, ds = p (do · v − delta) (arXiv 2307.08691, section 3.1).
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, width: int, pieces: Callable[[], Iterator[tuple[int, int, Tiles]]]
    ) -> tuple[Tensor, Tensor]:
        o, lse = torch.empty_like(q, memory_format=torch.contiguous_format), _widened(q.new_empty(q.shape[:-1]))
        keys, values = _with_zero_row(k), _with_zero_row(v)
        with torch.autocast(q.device.type, enabled=False):
            for i, j, tiles in pieces():
                queries = _with_zero_row(q[i:j])
                o_list = queries.new_zeros((j - i) * width + 1, *q.shape[1:])
                lse_list = queries.new_full(o_list.shape[:-1], -torch.inf)
                for lists, rows in tiles:
                    s = _scores(_rows(queries, lists // width), keys, rows, scale)  # [n, H, G * M, L]
                    top = s.amax(-1, keepdim=True)
                    p = s.sub_(top).exp_()
                    total = p.sum(-1, keepdim=True)
                    o_tile = (p @ _rows(values, rows)).div_(total)
                    _write(o_list, lists, o_tile)
                    _write(lse_list, lists, top.add_(total.log_())[..., 0])
                o[i:j], lse[i:j] = _join(o_list[:-1].unflatten(0, (j - i, width)), lse_list[:-1].unflatten(0, (j - i, width)))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale, ctx.width, ctx.pieces = scale, width, pieces
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor, dlse: Tensor):
        q, k, v, o, lse = ctx.saved_tensors
        width, scale = ctx.width, ctx.scale
        keys, values, dq = _with_zero_row(k), _with_zero_row(v), torch.empty_like(q)
        dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
        with torch.autocast(q.device.type, enabled=False):
            # do · v and delta must cancel where a query sees one key: fp64, because fp32 sums in another order do not
            exact = torch.float32 if q.device.type == "mps" else torch.float64
            delta = (o.to(exact)[..., None, :] @ do.to(exact)[..., None])[..., 0, 0] - dlse
            for i, j, tiles in ctx.pieces():
                queries, do_piece, lse_piece, delta_piece = (_with_zero_row(x[i:j]) for x in (q, do, lse, delta))
                dq_list = queries.new_zeros((j - i) * width + 1, *q.shape[1:])
                for lists, rows in tiles:
                    query = lists // width
                    q_tile, do_tile = _rows(queries, query), _rows(do_piece, query)
                    p = _scores(q_tile, keys, rows, scale).sub_(_rows(lse_piece[..., None], query)).exp_()
                    _add(dv, rows, p, do_tile, q.shape[2])
                    dp = do_tile.to(exact) @ _rows(values, rows).mT.to(exact)
                    ds = dp.sub_(_rows(delta_piece[..., None], query)).to(p.dtype).mul_(p)
                    _add(dk, rows, ds, q_tile, q.shape[2])
                    _write(dq_list, lists, ds @ _rows(keys, rows))
                dq[i:j] = dq_list[:-1].unflatten(0, (j - i, width)).sum(1).mul_(scale)
        return dq, dk[:-1].mul_(scale).to(k.dtype), dv[:-1].to(v.dtype), None, None, None


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _with_zero_row(x: Tensor) -> Tensor:
    """[rows, …] → [rows + 1, …], fp32 or wider: the row that padding reads."""
    return torch.cat([_widened(x), _widened(x.new_zeros(1, *x.shape[1:]))])


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [N,H,G,D] or [N,H,D], rows [n,M] → [n,H,G·M,D] or [n,H,M,D]."""
    x = x.index_select(0, rows.flatten()).unflatten(0, rows.shape)
    return x.movedim(1, 3).flatten(2, 3) if x.dim() == 5 else x.transpose(1, 2)


def _write(x: Tensor, rows: Tensor, values: Tensor) -> None:
    """values [n,H,G·M,…] into the rows [n,M] of x [N,H,G,…]: the inverse of `_rows`."""
    values = values.unflatten(2, (-1, rows.shape[1])).movedim(3, 1)
    x.index_copy_(0, rows.flatten(), values.flatten(0, 1))


def _add(x: Tensor, rows: Tensor, weights: Tensor, values: Tensor, group: int) -> None:
    """Adds Σ weights [n,H,G·M,L] · values [n,H,G·M,D] to the rows [n,L] of x [N,H,D], head by head: short sums round less."""
    weights, values = (y.unflatten(2, (group, -1)) for y in (weights, values))
    x.index_add_(0, rows.flatten(), (weights.mT @ values).sum(2).transpose(1, 2).flatten(0, 1))


def _scores(queries: Tensor, keys: Tensor, rows: Tensor, scale: float) -> Tensor:
    """[n,H,G·M,D] · [n,L] rows of keys → [n,H,G·M,L], −inf where padded."""
    s = (queries @ _rows(keys, rows).mT).mul_(scale)
    return s.masked_fill_((rows == keys.shape[0] - 1)[:, None, None], -torch.inf)


def _join(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """o [N,width,…,D], lse [N,width,…] of the lists of a query → o, lse of their union; without any key 0 and −inf."""
    total = lse.logsumexp(1)
    weight = (lse - total.masked_fill(total == -torch.inf, 0)[:, None]).exp_()
    return (weight[..., None] * o).sum(1), total
