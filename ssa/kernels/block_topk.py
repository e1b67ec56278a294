"""Block score and top-k: which selection blocks each (query, key/value head) attends to. No gradient.

    score[t, kv, J] = Σ_{j child of J} Σ_{h in group kv} exp(scale q_h·k_cmp[j] − lse_h)          ids = the topk best J of t's sample

Three kernels over chunks of query tiles, so that [Hkv, T, C] never exists and the scratch [Hkv, S, chunk] stays below SCRATCH bytes:
(1) scores: a program holds BLOCK_J selection blocks × BLOCK_M queries and adds heads and children in registers. Selection blocks come
    in order of falling child count (`fill_order`), so a tile's blocks have about equally many children and few child slots are idle.
(2) the best score of every GROUP blocks.
(3) top-k, one thread a query: scores are ≥ 0, so their bits order as integers and a bisection on the bits is exact. The topk-th best
    maximum bounds the topk-th best score from below, and only the topk groups that reach it can hold the choice: their scores above
    the bound are listed, a bisection over the list finds the exact one, a running count places the ids in ascending order.
q [T,Hq,D], k_cmp [C,Hkv,D], lse [T,Hq] fp32 → [T,Hkv,topk] int32, −1 where a sample has fewer blocks.
Source: arXiv 2505.17412, Eq. 8; exact bisection as in FastVideo's VSA.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import block_d, load_rows, load_tile, precision, tile_map
from .inner import exp_shared, exponent_unit

SCRATCH = 256 * 2**20
GROUP = tl.constexpr(16)
GROUPS = tl.constexpr(4)  # a program of the maxima
BLOCK_S = tl.constexpr(16)  # scores a thread reads at once
ROWS = 32  # queries a program of the top-k: one a thread


def _config(head_dim: int, dtype: torch.dtype, group: int) -> dict[str, int]:
    if dtype == torch.float32:
        return dict(BLOCK_M=32, BLOCK_J=32, HEADS=1, SHARE=0, num_warps=4, num_stages=1)
    if head_dim > 32:
        registers = dict(maxnreg=128) if head_dim <= 64 else {}
        return dict(BLOCK_M=64, BLOCK_J=128, HEADS=1, SHARE=4, num_warps=8, num_stages=3, **registers)
    # H200, 2026-11-22: three programs a multiprocessor
    return dict(BLOCK_M=64, BLOCK_J=64, HEADS=2 if group % 2 == 0 else 1, SHARE=4, num_warps=4, num_stages=3, maxnreg=168)


@triton.jit(do_not_specialize=["tile0", "num_tiles", "chunk_tiles", "num_blocks", "num_tokens"])
def _score_kernel(
    q_ptr, k_ptr, lse_ptr, scores_ptr, cu_blocks_ptr, child_offsets_ptr, fill_order_ptr, tiles_ptr, scale, tile0,
    num_tiles, chunk_tiles, num_blocks, num_tokens, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, HEADS: tl.constexpr, SHARE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = HQ // HKV
    pid = tl.program_id(0)
    local, kv, column = pid % chunk_tiles, pid // chunk_tiles % HKV, pid // (chunk_tiles * HKV)
    sample, first, count = load_tile(tiles_ptr, tile0 + local, num_tiles)
    block0, block_end = tl.load(cu_blocks_ptr + sample), tl.load(cu_blocks_ptr + sample + 1)
    if (count > 0) & (block0 + column * BLOCK_J < block_end):
        m = tl.arange(0, BLOCK_M)
        j = block0 + column * BLOCK_J + tl.arange(0, BLOCK_J)
        real = j < block_end
        block = tl.load(fill_order_ptr + j, mask=real, other=0)
        child = tl.load(child_offsets_ptr + block, mask=real, other=0)
        children = tl.load(child_offsets_ptr + block + 1, mask=real, other=0) - child
        q_ptr += (first.to(tl.int64) * HQ + kv * G) * D
        lse_ptr += (kv * G).to(tl.int64) * num_tokens + first
        r = tl.arange(0, HEADS * BLOCK_M)
        rows_valid = r % BLOCK_M < count
        row = (r % BLOCK_M * HQ + r // BLOCK_M) * D
        lse_at = r // BLOCK_M * num_tokens.to(tl.int64) + r % BLOCK_M
        acc = tl.zeros([BLOCK_M, BLOCK_J], tl.float32)
        unit, lse_unit = exponent_unit(tl.zeros([1], q_ptr.dtype.element_ty), scale)
        for slot in range(0, tl.max(children, 0)):
            # an absent child is one that exists, times 0: its exp is finite
            at = child + tl.minimum(slot, children - 1)
            has = (slot < children).to(tl.float32)
            k = load_rows(k_ptr, (at.to(tl.int64) * HKV + kv) * D, real, D, BLOCK_D)
            for h in range(0, G, HEADS):
                q = load_rows(q_ptr + h * D, row, rows_valid, D, BLOCK_D)
                lse = tl.load(lse_ptr + h * num_tokens.to(tl.int64) + lse_at, mask=rows_valid, other=float("inf"))
                s = tl.dot(q, k.T, input_precision=PRECISION) * unit - (lse * lse_unit)[:, None]
                p = tl.reshape(exp_shared(q, s, HEADS * BLOCK_M, BLOCK_J, SHARE), [HEADS, BLOCK_M, BLOCK_J])
                acc += tl.sum(p, 0) * has[None, :]
        stride = chunk_tiles * BLOCK_M
        scores_ptr += (kv * num_blocks).to(tl.int64) * stride + local * BLOCK_M
        tl.store(scores_ptr + (block * stride)[None, :] + m[:, None], acc, mask=real[None, :])


@triton.jit
def _bits(scores_ptr, j, count, stride, ROWS: tl.constexpr):
    """[BLOCK_S, ROWS] bits of scores j … of each row; −1, below every score, from `count` on and for a NaN."""
    i = tl.arange(0, BLOCK_S)
    p = scores_ptr + stride.to(tl.int64) * j + (i[:, None] * stride + tl.arange(0, ROWS)[None, :])
    s = tl.load(p, mask=i[:, None] < (count - j)[None, :], other=-1.0)
    return tl.where(s >= 0.0, s.to(tl.int32, bitcast=True), -1)


@triton.jit
def _count(scores_ptr, count, stride, bound, ROWS: tl.constexpr):
    """[ROWS] how many scores have bits of at least `bound`."""
    n = tl.zeros([ROWS], tl.int32)
    for j in range(0, tl.max(count, 0), BLOCK_S):
        n += tl.sum((_bits(scores_ptr, j, count, stride, ROWS) >= bound[None, :]).to(tl.int32), 0)
    return n


@triton.jit
def _kth_best(scores_ptr, count, stride, topk, lo, ROWS: tl.constexpr):
    """Bits of the topk-th best score of every row, 0 where there are fewer: at least topk scores reach it, or all. `lo`: a lower bound."""
    hi = tl.zeros([ROWS], tl.int32)
    for j in range(0, tl.max(count, 0), BLOCK_S):
        hi = tl.maximum(hi, tl.max(_bits(scores_ptr, j, count, stride, ROWS), 0))
    hi = tl.where(count <= topk, lo + 1, hi + 1)
    # count(>= lo) >= topk, count(>= hi) < topk: done when they meet, or when a bound splits off exactly topk.
    # The answer is seldom far below the best score: the first steps down from hi are one exponent, two, four, …
    step = 1 << 23
    while tl.max(hi - lo, 0) > 1:
        mid = tl.maximum(lo + (hi - lo) // 2, hi - step)
        step = tl.minimum(step, 1 << 29) * 2
        c = _count(scores_ptr, count, stride, mid, ROWS)
        hi = tl.where(c == topk, mid + 1, tl.where(c < topk, mid, hi))
        lo = tl.where(c >= topk, mid, lo)
    return lo


@triton.jit
def _write_ids(
    scores_ptr, listed_ptr, count, stride, out_ptr, rows, block0, topk, lo, HKV: tl.constexpr, ROWS: tl.constexpr, LISTED: tl.constexpr
):  # fmt: skip
    """Ids of the topk best scores of every row, ascending, −1 after; `lo` from _kth_best."""
    above = _count(scores_ptr, count, stride, lo + 1, ROWS)
    out = out_ptr + tl.arange(0, ROWS) * (HKV * topk)
    equals = tl.zeros([ROWS], tl.int32)
    written = tl.zeros([ROWS], tl.int32)
    for j in range(0, tl.max(count, 0), BLOCK_S):
        bits = _bits(scores_ptr, j, count, stride, ROWS)
        equal = (bits == lo[None, :]).to(tl.int32)
        rank = equals[None, :] + tl.cumsum(equal, 0)
        chosen = (bits > lo[None, :]) | ((equal == 1) & (rank <= (topk - above)[None, :]))
        place = written[None, :] + tl.cumsum(chosen.to(tl.int32), 0) - 1
        at = (j + tl.arange(0, BLOCK_S))[:, None]
        if LISTED:
            ids = tl.load(listed_ptr + at * stride + tl.arange(0, ROWS)[None, :], mask=chosen, other=0)
        else:
            ids = block0 + at + tl.zeros([1, ROWS], tl.int32)
        tl.store(out[None, :] + place, ids, mask=chosen)
        equals += tl.sum(equal, 0)
        written += tl.sum(chosen.to(tl.int32), 0)
    for i in range(0, topk):
        tl.store(out + i, tl.full([ROWS], -1, tl.int32), mask=(tl.arange(0, ROWS) < rows) & (written <= i))


@triton.jit(do_not_specialize=["tile0", "num_tiles", "chunk_tiles", "num_blocks", "num_groups", "parts"])
def _best_kernel(
    scores_ptr, best_ptr, cu_blocks_ptr, tiles_ptr, tile0, num_tiles, chunk_tiles, num_blocks, num_groups, parts, HKV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    part, local, kv = pid % parts, pid // parts % chunk_tiles, pid // (parts * chunk_tiles)
    sample, _, rows = load_tile(tiles_ptr, tile0 + local, num_tiles)
    block0 = tl.load(cu_blocks_ptr + sample)
    count = tl.load(cu_blocks_ptr + sample + 1) - block0
    if (rows > 0) & (part * GROUPS * GROUP < count):
        stride = tl.multiple_of(chunk_tiles * BLOCK_M, BLOCK_M)
        column = local * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        j = part * GROUPS * GROUP + tl.arange(0, GROUPS * GROUP)[:, None]
        scores_ptr += (kv * num_blocks + block0).to(tl.int64) * stride
        s = tl.load(scores_ptr + (j * stride + column), mask=j < count, other=-1.0)
        s = tl.where(s >= 0.0, s, -1.0)  # NaN too
        group = part * GROUPS + tl.arange(0, GROUPS)[:, None]
        best_ptr += (kv * num_groups).to(tl.int64) * stride
        best = tl.max(tl.reshape(s, [GROUPS, GROUP, BLOCK_M]), 1)
        tl.store(best_ptr + (group * stride + column), best, mask=group < num_groups)


@triton.jit(do_not_specialize=["tile0", "num_tiles", "chunk_tiles", "num_blocks", "num_groups", "listable", "topk"])
def _topk_kernel(
    scores_ptr, best_ptr, list_ptr, listed_ptr, ids_ptr, cu_blocks_ptr, tiles_ptr, tile0, num_tiles, chunk_tiles, num_blocks, num_groups,
    listable, topk, HKV: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = BLOCK_M // ROWS
    pid = tl.program_id(0)
    part, local, kv = pid % parts, pid // parts % chunk_tiles, pid // (parts * chunk_tiles)
    sample, first, rows = load_tile(tiles_ptr, tile0 + local, num_tiles)
    rows -= part * ROWS
    if rows > 0:
        block0 = tl.load(cu_blocks_ptr + sample)
        n = tl.load(cu_blocks_ptr + sample + 1) - block0
        count = tl.where(tl.arange(0, ROWS) < rows, n, 0)
        stride = tl.multiple_of(chunk_tiles * BLOCK_M, ROWS)
        column = tl.multiple_of(local * BLOCK_M + part * ROWS, ROWS)
        scores_ptr += (kv * num_blocks + block0).to(tl.int64) * stride + column
        best_ptr += (kv * num_groups).to(tl.int64) * stride + column
        list_ptr += (kv * listable).to(tl.int64) * stride + column
        listed_ptr += (kv * listable).to(tl.int64) * stride + column
        ids_ptr += ((first + part * ROWS).to(tl.int64) * HKV + kv) * topk
        lane = tl.arange(0, ROWS)
        groups = (count + GROUP - 1) // GROUP
        bound = _kth_best(best_ptr, groups, stride, topk, tl.zeros([ROWS], tl.int32), ROWS)
        _write_ids(best_ptr, listed_ptr, groups, stride, ids_ptr, rows, 0, topk, bound, HKV, ROWS, False)
        tl.debug_barrier()
        i = tl.arange(0, GROUP)[:, None]
        length = tl.zeros([ROWS], tl.int32)
        for slot in range(0, topk):
            group = tl.load(ids_ptr + lane * (HKV * topk) + slot, mask=lane < rows, other=-1)
            at = group[None, :] * GROUP + i
            p = scores_ptr + at.to(tl.int64) * stride + lane[None, :]
            s = tl.load(p, mask=(group >= 0)[None, :] & (at < count[None, :]), other=-1.0)
            above = ((s >= 0.0) & (s.to(tl.int32, bitcast=True) >= bound[None, :])).to(tl.int32)
            place = (length[None, :] + tl.cumsum(above, 0) - 1) * stride + lane[None, :]
            tl.store(list_ptr + place, s, mask=above == 1)
            tl.store(listed_ptr + place, block0 + at, mask=above == 1)
            length += tl.sum(above, 0)
        tl.debug_barrier()
        lo = _kth_best(list_ptr, length, stride, topk, bound, ROWS)
        _write_ids(list_ptr, listed_ptr, length, stride, ids_ptr, rows, block0, topk, lo, HKV, ROWS, True)


def block_topk(
    q: Tensor, k_cmp: Tensor, lse: Tensor, cu_seqlens: Tensor, cu_blocks: Tensor, child_offsets: Tensor, fill_order: Tensor, topk: int,
    scale: float, config: dict | None = None,
) -> Tensor:  # fmt: skip
    """Contiguous q, k_cmp, lse; cu_blocks [B+1], child_offsets [S+1], fill_order [S] of the partition's selection blocks."""
    (t, hq, d), hkv, num_blocks = q.shape, k_cmp.shape[1], fill_order.shape[0]
    device = q.device
    ids = torch.empty(t, hkv, topk, dtype=torch.int32, device=device)
    if t == 0:
        return ids
    config = dict(config or _config(d, q.dtype, hq // hkv))
    launch = {key: config.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in config}
    block_m = config["BLOCK_M"]
    assert block_m % ROWS == 0, block_m
    tiles = tile_map(cu_seqlens, t, block_m)
    num_tiles = tiles.shape[2]
    lse = lse.float().t().contiguous()  # [Hq, T]
    columns = triton.cdiv(num_blocks, config["BLOCK_J"])
    num_groups = triton.cdiv(num_blocks, GROUP.value)
    listable = min(topk, num_groups) * GROUP.value
    chunk = max(1, min(num_tiles, SCRATCH // (4 * hkv * (num_blocks + num_groups + 2 * listable) * block_m)))
    scores, best, listed_scores = (
        torch.empty(hkv, n, chunk * block_m, dtype=torch.float32, device=device) for n in (num_blocks, num_groups, listable)
    )
    listed = torch.empty(hkv, listable, chunk * block_m, dtype=torch.int32, device=device)
    for tile0 in range(0, num_tiles, chunk):
        n = min(chunk, num_tiles - tile0)
        _score_kernel[(n * hkv * columns,)](
            q, k_cmp, lse, scores, cu_blocks, child_offsets, fill_order, tiles, scale, tile0, num_tiles, n, num_blocks, t, HQ=hq, HKV=hkv,
            D=d, BLOCK_D=block_d(d), PRECISION=precision(q), **config, **launch,
        )  # fmt: skip
        parts = triton.cdiv(num_groups, GROUPS.value)
        _best_kernel[(n * hkv * parts,)](
            scores, best, cu_blocks, tiles, tile0, num_tiles, n, num_blocks, num_groups, parts, HKV=hkv, BLOCK_M=block_m, num_warps=4
        )
        _topk_kernel[(n * hkv * (block_m // ROWS),)](
            scores, best, listed_scores, listed, ids, cu_blocks, tiles, tile0, num_tiles, n, num_blocks, num_groups, listable, topk,
            HKV=hkv, BLOCK_M=block_m, ROWS=ROWS, num_warps=1,
        )  # fmt: skip
    return ids
