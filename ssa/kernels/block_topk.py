"""Block score and top-k: which selection blocks each (query, key/value head) attends to. No gradient.

    score[t, kv, J] = Σ_{j child of J} Σ_{h in group kv} exp(scale q_h·k_cmp[j] − lse_h)          ids = the topk best J of t's sample

Two kernels over chunks of query tiles, so that [Hkv, T, C] never exists and the scratch [Hkv, S, chunk] stays below SCRATCH bytes:
(1) scores, and the best of every GROUP: a program keeps BLOCK_M queries of all heads in shared memory while the keys of its share of
    the blocks pass by, BLOCK_J blocks at a time, and adds heads and children in registers. Blocks come in order of falling child count
    (`fill_order`), so a tile's blocks have about equally many children and few child slots are idle; a block's place in that order is
    where its score lies.
(2) top-k, ROWS queries a warp: scores are ≥ 0, so their bits order as integers and a bisection on the bits is exact. The topk-th best
    maximum bounds the topk-th best score from below, and only the topk groups that reach it can hold the choice: their scores above
    the bound are listed, a bisection over the list finds the exact one, and the ids are sorted by counting the smaller ones.
q [T,Hq,D], k_cmp [C,Hkv,D], lse [T,Hq] fp32 or fp64 → [T,Hkv,topk] int32, −1 where a sample has fewer blocks.
Source: arXiv 2505.17412, Eq. 8; exact bisection as in FastVideo's VSA.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import block_d, load_rows, load_tile, precision, tile_maps
from .inner import exp_shared, exponent_unit
from .launch import cdiv, launcher

SCRATCH = 512 * 2**20
PARTS = 8  # programs that share the columns of a tile of queries
RESIDENT = 64 * 2**10  # bytes of queries that a program keeps in shared memory
GROUP = tl.constexpr(16)
TOPK = dict(ROWS=32, BLOCK_S=32, num_warps=1)  # queries a program of the top-k, scores of each that it reads at once


def _config(head_dim: int, dtype: torch.dtype, group: int) -> dict[str, int]:
    """H200, 2026-11-26."""
    if dtype == torch.float32:
        return dict(BLOCK_M=32, BLOCK_J=32, HEADS=1, SHARE=0, num_warps=4, num_stages=1)
    if group % 2:
        tile = dict(BLOCK_M=64, BLOCK_J=64, HEADS=1, num_warps=4)
    else:
        tile = dict(BLOCK_M=32, BLOCK_J=128, HEADS=2, num_warps=8) if head_dim > 32 else dict(BLOCK_M=32, BLOCK_J=64, HEADS=2, num_warps=4)
    return dict(**tile, SHARE=4, num_stages=2, **(dict(maxnreg=128) if head_dim <= 64 else {}))


@triton.jit
def _query_and_head(HEADS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of each row of a tile: two heads of a query lie eight rows apart, which one thread of a matrix instruction holds."""
    tl.static_assert(HEADS <= 2)
    r = tl.arange(0, HEADS * BLOCK_M)
    if HEADS == 1:
        query, head = r, r * 0
    else:
        query, head = r // 16 * 8 + r % 8, r // 8 % 2
    return query, head


@triton.jit
def _scores(
    q, k, lse, unit, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, SHARE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """[BLOCK_M, BLOCK_J] sum over heads of exp(q k − lse), lse in the unit of `exp_of`."""
    p = exp_shared(q, tl.dot(q, k.T, input_precision=PRECISION) * unit - lse[:, None], HEADS * BLOCK_M, BLOCK_J, SHARE)
    if HEADS > 1:
        p = tl.reshape(tl.sum(tl.reshape(p, [BLOCK_M // 8, 2, 8, BLOCK_J]), 1), [BLOCK_M, BLOCK_J])
    return p


@launcher
@triton.jit(do_not_specialize=["tile0", "num_tiles", "chunk_tiles", "num_blocks", "num_groups", "parts"])
def _score_kernel(
    q_ptr, k_ptr, lse_ptr, scores_ptr, best_ptr, cu_blocks_ptr, child_offsets_ptr, fill_order_ptr, tiles_ptr, scale, tile0, num_tiles,
    chunk_tiles, num_blocks, num_groups, parts, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, HEADS: tl.constexpr, SHARE: tl.constexpr, PRECISION: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """KEEP: the queries of all heads stay in shared memory while the keys of many columns pass by; else they are read for each."""
    G: tl.constexpr = HQ // HKV
    pid = tl.program_id(0)
    local, kv, part = pid % chunk_tiles, pid // chunk_tiles % HKV, pid // (chunk_tiles * HKV)
    sample, first, count = load_tile(tiles_ptr, tile0 + local, num_tiles)
    block0, block_end = tl.load(cu_blocks_ptr + sample), tl.load(cu_blocks_ptr + sample + 1)
    if (count > 0) & (block0 + part * BLOCK_J < block_end):
        m = tl.arange(0, BLOCK_M)
        query, head = _query_and_head(HEADS, BLOCK_M)
        valid = query < count
        q_ptr += (first.to(tl.int64) * HQ + kv * G) * D
        lse_ptr += first.to(tl.int64) * HQ + kv * G
        row = (query * HQ + head) * D
        lse_at = query * HQ + head
        unit, lse_unit = exponent_unit(tl.zeros([1], q_ptr.dtype.element_ty), scale)
        qs, lses = (), ()
        if KEEP:
            for h in tl.static_range(0, G, HEADS):
                qs += (load_rows(q_ptr + h * D, row, valid, D, BLOCK_D),)  # type: ignore[assignment]
                lse = tl.load(lse_ptr + h + lse_at, mask=valid, other=float("inf")).to(tl.float32)
                lses += (lse * lse_unit,)  # type: ignore[assignment]
        stride = chunk_tiles * BLOCK_M
        scores_ptr += (kv * num_blocks).to(tl.int64) * stride + local * BLOCK_M
        best_ptr += (kv * num_groups).to(tl.int64) * stride + local * BLOCK_M
        for column in range(part, tl.cdiv(block_end - block0, BLOCK_J), parts):
            j = block0 + column * BLOCK_J + tl.arange(0, BLOCK_J)
            real = j < block_end
            block = tl.load(fill_order_ptr + j, mask=real, other=0)
            child = tl.load(child_offsets_ptr + block, mask=real, other=0)
            children = tl.load(child_offsets_ptr + block + 1, mask=real, other=0) - child
            acc = tl.zeros([BLOCK_M, BLOCK_J], tl.float32)
            for slot in range(0, tl.max(children, 0)):
                # an absent child is one that exists, times 0: its exp is finite
                at = child + tl.minimum(slot, children - 1)
                has = (slot < children).to(tl.float32)
                k = load_rows(k_ptr, (at.to(tl.int64) * HKV + kv) * D, real, D, BLOCK_D)
                if KEEP:
                    for i in tl.static_range(0, G // HEADS):
                        acc += _scores(qs[i], k, lses[i], unit, HEADS, BLOCK_M, BLOCK_J, SHARE, PRECISION) * has[None, :]
                else:
                    for h in range(0, G, HEADS):
                        q = load_rows(q_ptr + h * D, row, valid, D, BLOCK_D)
                        lse = tl.load(lse_ptr + h + lse_at, mask=valid, other=float("inf")).to(tl.float32) * lse_unit
                        acc += _scores(q, k, lse, unit, HEADS, BLOCK_M, BLOCK_J, SHARE, PRECISION) * has[None, :]
            tl.store(scores_ptr + (j * stride)[None, :] + m[:, None], acc, mask=real[None, :])
            acc = tl.where(real[None, :] & (acc >= 0.0), acc, -1.0)  # NaN too
            best = tl.max(tl.reshape(acc, [BLOCK_M, BLOCK_J // GROUP, GROUP]), 2)
            group = column * (BLOCK_J // GROUP) + tl.arange(0, BLOCK_J // GROUP)
            tl.store(best_ptr + (group * stride)[None, :] + m[:, None], best, mask=(group < num_groups)[None, :])


@triton.jit
def _bits(scores_ptr, j, count, stride, ROWS: tl.constexpr, BLOCK_S: tl.constexpr):
    """[BLOCK_S, ROWS] bits of scores j … of each row; −1, below every score, from `count` on and for a NaN."""
    i = tl.arange(0, BLOCK_S)
    p = scores_ptr + stride.to(tl.int64) * j + (i[:, None] * stride + tl.arange(0, ROWS)[None, :])
    s = tl.load(p, mask=i[:, None] < (count - j)[None, :], other=-1.0)
    return tl.where(s >= 0.0, s.to(tl.int32, bitcast=True), -1)


@triton.jit
def _count(scores_ptr, count, stride, bound, ROWS: tl.constexpr, BLOCK_S: tl.constexpr):
    """[ROWS] how many scores have bits of at least `bound`."""
    n = tl.zeros([ROWS], tl.int32)
    for j in range(0, tl.max(count, 0), BLOCK_S):
        n += tl.sum((_bits(scores_ptr, j, count, stride, ROWS, BLOCK_S) >= bound[None, :]).to(tl.int32), 0)
    return n


@triton.jit
def _kth_best(scores_ptr, count, stride, topk, lo, ROWS: tl.constexpr, BLOCK_S: tl.constexpr):
    """Bits of the topk-th best score of every row, 0 where there are fewer: at least topk scores reach it, or all. `lo`: a lower bound."""
    hi = tl.zeros([ROWS], tl.int32)
    for j in range(0, tl.max(count, 0), BLOCK_S):
        hi = tl.maximum(hi, tl.max(_bits(scores_ptr, j, count, stride, ROWS, BLOCK_S), 0))
    hi = tl.where(count <= topk, lo + 1, hi + 1)
    # count(>= lo) >= topk, count(>= hi) < topk: done when they meet, or when a bound splits off exactly topk.
    # The answer is seldom far below the best score: the first steps down from hi are one exponent, two, four, …
    step = 1 << 23
    while tl.max(hi - lo, 0) > 1:
        mid = tl.maximum(lo + (hi - lo) // 2, hi - step)
        step = tl.minimum(step, 1 << 29) * 2
        c = _count(scores_ptr, count, stride, mid, ROWS, BLOCK_S)
        hi = tl.where(c == topk, mid + 1, tl.where(c < topk, mid, hi))
        lo = tl.where(c >= topk, mid, lo)
    return lo


@triton.jit
def _write_best(
    scores_ptr, names_ptr, out_ptr, out_stride, count, stride, topk, lo, NAMED: tl.constexpr, ROWS: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """Places of the topk best scores of every row, in order, or their names if NAMED, to out_ptr [ROWS]; `lo` from _kth_best.

    Returns how many there are. The names may be overwritten: none is written behind the one it was read from.
    """
    above = _count(scores_ptr, count, stride, lo + 1, ROWS, BLOCK_S)
    equals = tl.zeros([ROWS], tl.int32)
    written = tl.zeros([ROWS], tl.int32)
    for j in range(0, tl.max(count, 0), BLOCK_S):
        bits = _bits(scores_ptr, j, count, stride, ROWS, BLOCK_S)
        equal = (bits == lo[None, :]).to(tl.int32)
        rank = equals[None, :] + tl.cumsum(equal, 0)
        chosen = (bits > lo[None, :]) | ((equal == 1) & (rank <= (topk - above)[None, :]))
        place = written[None, :] + tl.cumsum(chosen.to(tl.int32), 0) - 1
        at = (j + tl.arange(0, BLOCK_S))[:, None] + tl.zeros([1, ROWS], tl.int32)
        if NAMED:
            at = tl.load(names_ptr + at * stride + tl.arange(0, ROWS)[None, :], mask=chosen, other=0)
            tl.debug_barrier()
        tl.store(out_ptr[None, :] + place * out_stride, at, mask=chosen)
        equals += tl.sum(equal, 0)
        written += tl.sum(chosen.to(tl.int32), 0)
    return written


@launcher
@triton.jit(do_not_specialize=["tile0", "num_tiles", "chunk_tiles", "num_blocks", "num_groups", "listable", "topk"])
def _topk_kernel(
    scores_ptr, best_ptr, list_ptr, listed_ptr, ids_ptr, cu_blocks_ptr, fill_order_ptr, tiles_ptr, tile0, num_tiles, chunk_tiles,
    num_blocks, num_groups, listable, topk, HKV: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = BLOCK_M // ROWS
    pid = tl.program_id(0)
    part, local, kv = pid % parts, pid // parts % chunk_tiles, pid // (parts * chunk_tiles)
    sample, first, rows = load_tile(tiles_ptr, tile0 + local, num_tiles)
    rows -= part * ROWS
    if rows > 0:
        block0 = tl.load(cu_blocks_ptr + sample)
        n = tl.load(cu_blocks_ptr + sample + 1) - block0
        lane = tl.arange(0, ROWS)
        count = tl.where(lane < rows, n, 0)
        stride = tl.multiple_of(chunk_tiles * BLOCK_M, ROWS)
        column = tl.multiple_of(local * BLOCK_M + part * ROWS, ROWS)
        scores_ptr += (kv * num_blocks + block0).to(tl.int64) * stride + column
        best_ptr += (kv * num_groups).to(tl.int64) * stride + column
        list_ptr += (kv * listable).to(tl.int64) * stride + column
        listed_ptr += (kv * listable).to(tl.int64) * stride + column
        out_ptr = ids_ptr + ((first + part * ROWS).to(tl.int64) * HKV + kv) * topk + lane * (HKV * topk)
        groups = (count + GROUP - 1) // GROUP
        bound = _kth_best(best_ptr, groups, stride, topk, tl.zeros([ROWS], tl.int32), ROWS, BLOCK_S)
        chosen = _write_best(best_ptr, best_ptr, out_ptr, 1, groups, stride, topk, bound, False, ROWS, BLOCK_S)
        tl.debug_barrier()
        i = tl.arange(0, GROUP)[:, None]
        length = tl.zeros([ROWS], tl.int32)
        for slot in range(0, tl.max(chosen, 0)):
            group = tl.load(out_ptr + slot, mask=slot < chosen, other=0)
            at = group[None, :] * GROUP + i
            s = tl.load(
                scores_ptr + at.to(tl.int64) * stride + lane[None, :], mask=(slot < chosen)[None, :] & (at < count[None, :]), other=-1.0
            )  # fmt: skip
            above = ((s >= 0.0) & (s.to(tl.int32, bitcast=True) >= bound[None, :])).to(tl.int32)
            place = (length[None, :] + tl.cumsum(above, 0) - 1) * stride + lane[None, :]
            tl.store(list_ptr + place, s, mask=above == 1)
            tl.store(listed_ptr + place, tl.load(fill_order_ptr + block0 + at, mask=above == 1, other=0), mask=above == 1)
            length += tl.sum(above, 0)
        tl.debug_barrier()
        lo = _kth_best(list_ptr, length, stride, topk, bound, ROWS, BLOCK_S)
        written = _write_best(list_ptr, listed_ptr, listed_ptr + lane, stride, length, stride, topk, lo, True, ROWS, BLOCK_S)
        tl.debug_barrier()
        for slot in range(0, topk):
            found = tl.load(listed_ptr + slot * stride + lane, mask=slot < written, other=-1)
            rank = tl.zeros([ROWS], tl.int32)
            for j in range(0, topk, BLOCK_S):
                at = (j + tl.arange(0, BLOCK_S))[:, None]
                names = tl.load(listed_ptr + at * stride + lane[None, :], mask=at < written[None, :], other=2147483647)
                rank += tl.sum((names < found[None, :]).to(tl.int32), 0)
            tl.store(out_ptr + tl.where(slot < written, rank, slot), found, mask=lane < rows)


def topk_map(q: Tensor, k_cmp: Tensor, cu_seqlens: Tensor, config: dict | None = None) -> tuple[Tensor, int, int]:
    """What `tile_maps` takes for the scores."""
    t, hq, d = q.shape
    return cu_seqlens, t, (config or _config(d, q.dtype, hq // k_cmp.shape[1]))["BLOCK_M"]


def block_topk(
    q: Tensor, k_cmp: Tensor, lse: Tensor, cu_seqlens: Tensor, cu_blocks: Tensor, child_offsets: Tensor, fill_order: Tensor, topk: int,
    scale: float, config: dict | None = None, tiles: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Contiguous q, k_cmp, lse; cu_blocks [B+1], child_offsets [S+1], fill_order [S] of the partition's selection blocks.

    tiles: of `topk_map`, made here if not given.
    """
    (t, hq, d), hkv, num_blocks = q.shape, k_cmp.shape[1], fill_order.shape[0]
    device = q.device
    ids = torch.empty(t, hkv, topk, dtype=torch.int32, device=device)
    if t == 0:
        return ids
    config = dict(config or _config(d, q.dtype, hq // hkv))
    launch = {key: config.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in config}
    block_m = config["BLOCK_M"]
    assert block_m % TOPK["ROWS"] == 0 and config["BLOCK_J"] % GROUP.value == 0, config
    if tiles is None:
        (tiles,) = tile_maps(topk_map(q, k_cmp, cu_seqlens, config))
    num_tiles = tiles.shape[2]
    parts = min(PARTS, cdiv(num_blocks, config["BLOCK_J"]))
    kept = hq // hkv * block_m * block_d(d) * q.element_size()
    keep = q.dtype != torch.float32 and block_d(d) <= 64 and kept <= RESIDENT  # with the keys, within the 99 KiB of sm_89
    num_groups = cdiv(num_blocks, GROUP.value)
    listable = min(topk, num_groups) * GROUP.value
    chunk = max(1, min(num_tiles, SCRATCH // (4 * hkv * (num_blocks + num_groups + 2 * listable) * block_m)))
    scores, best, listed_scores = (
        torch.empty(hkv, n, chunk * block_m, dtype=torch.float32, device=device) for n in (num_blocks, num_groups, listable)
    )
    listed = torch.empty(hkv, listable, chunk * block_m, dtype=torch.int32, device=device)
    for tile0 in range(0, num_tiles, chunk):
        n = min(chunk, num_tiles - tile0)
        _score_kernel[(n * hkv * parts,)](
            q, k_cmp, lse, scores, best, cu_blocks, child_offsets, fill_order, tiles, scale, tile0, num_tiles, n, num_blocks, num_groups,
            parts, HQ=hq, HKV=hkv, D=d, BLOCK_D=block_d(d), PRECISION=precision(q), KEEP=keep, **config, **launch,
        )  # fmt: skip
        _topk_kernel[(n * hkv * (block_m // TOPK["ROWS"]),)](
            scores, best, listed_scores, listed, ids, cu_blocks, fill_order, tiles, tile0, num_tiles, n, num_blocks, num_groups, listable,
            topk, HKV=hkv, BLOCK_M=block_m, **TOPK,
        )  # fmt: skip
    return ids
