"""Block score and top-k: which selection blocks each (query, key/value head) attends to. No gradient.

    score[t, kv, J] = Σ_{j child of J} Σ_{h in group kv} exp(scale q_h·k_cmp[j] − lse_h)          ids = the topk best J of t's sample

Two kernels over chunks of query tiles, so that [Hkv, T, C] never exists and the scratch [Hkv, S, chunk] stays below SCRATCH bytes:
(1) scores: a program holds BLOCK_J selection blocks × BLOCK_M queries and adds heads and children in registers. Selection blocks come
    in order of falling child count (`fill_order`), so a tile's blocks have about equally many children and few child slots are idle.
(2) top-k: scores are ≥ 0, so their bits order as integers: an exact bisection on the bits finds the topk-th largest, a running
    count places the chosen ids in ascending order; of equal scores the lowest ids win.
q [T,Hq,D], k_cmp [C,Hkv,D], lse [T,Hq] fp32 → [T,Hkv,topk] int32, −1 where a sample has fewer blocks.
Source: arXiv 2505.17412, Eq. 8; exact bisection as in FastVideo's VSA.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2E, block_d, load_rows, precision, tile_segments

SCRATCH = 128 * 2**20
MAX_RESIDENT = 4096  # blocks whose scores one program of the top-k keeps in registers


def _config(head_dim: int, dtype: torch.dtype, ratio: int) -> dict[str, int]:
    slots = min(2, ratio)
    if dtype == torch.float32:
        return dict(BLOCK_M=32, BLOCK_J=32, SLOTS=slots, num_warps=4, num_stages=1)
    return dict(BLOCK_M=128, BLOCK_J=64, SLOTS=slots, num_warps=4, num_stages=3)


@triton.jit
def _sample_rows(cu_seqlens_ptr, tiles_ptr, tile, BLOCK_M: tl.constexpr):
    """Sample of a query tile, its first token and the end of the sample."""
    sample = tl.load(tiles_ptr + tile)
    start = tl.load(cu_seqlens_ptr + sample)
    first = start + (tile - (start // BLOCK_M + sample)) * BLOCK_M
    return sample, first, tl.load(cu_seqlens_ptr + sample + 1)


@triton.jit
def _child_slot(q, k, lse, scale_log2, PRECISION: tl.constexpr):
    return tl.exp2(tl.dot(k, q.T, input_precision=PRECISION) * scale_log2 - lse[None, :])


@triton.jit(do_not_specialize=["tile0", "num_tiles", "num_blocks"])
def _score_kernel(
    q_ptr, k_ptr, lse_ptr, scores_ptr, cu_seqlens_ptr, cu_blocks_ptr, child_offsets_ptr, fill_order_ptr, tiles_ptr, scale_log2,
    tile0, num_tiles, num_blocks, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = HQ // HKV
    pid = tl.program_id(0)
    local, kv, column = pid % num_tiles, pid // num_tiles % HKV, pid // (num_tiles * HKV)
    sample, first, end = _sample_rows(cu_seqlens_ptr, tiles_ptr, tile0 + local, BLOCK_M)
    block0 = tl.load(cu_blocks_ptr + sample)
    block_end = tl.load(cu_blocks_ptr + sample + 1)
    first_block = block0 + column * BLOCK_J
    if (first < end) & (first_block < block_end):
        row = first + tl.arange(0, BLOCK_M)
        valid = row < end
        j = first_block + tl.arange(0, BLOCK_J)
        block = tl.load(fill_order_ptr + j, mask=j < block_end, other=0)
        child = tl.load(child_offsets_ptr + block, mask=j < block_end, other=0)
        count = tl.load(child_offsets_ptr + block + 1, mask=j < block_end, other=0) - child
        acc = tl.zeros([BLOCK_J, BLOCK_M], tl.float32)
        for slot in range(0, tl.max(count, 0), SLOTS):
            has_a, has_b = slot < count, slot + 1 < count
            k_a = load_rows(k_ptr, ((child + slot).to(tl.int64) * HKV + kv) * D, has_a, D, BLOCK_D)
            acc_a = tl.zeros([BLOCK_J, BLOCK_M], tl.float32)
            if SLOTS == 2:
                k_b = load_rows(k_ptr, ((child + slot + 1).to(tl.int64) * HKV + kv) * D, has_b, D, BLOCK_D)
                acc_b = tl.zeros([BLOCK_J, BLOCK_M], tl.float32)
            for h in range(G):
                head = row.to(tl.int64) * HQ + kv * G + h
                q = load_rows(q_ptr, head * D, valid, D, BLOCK_D)
                lse = tl.load(lse_ptr + head, mask=valid, other=float("inf")) * LOG2E
                acc_a += _child_slot(q, k_a, lse, scale_log2, PRECISION)
                if SLOTS == 2:
                    acc_b += _child_slot(q, k_b, lse, scale_log2, PRECISION)
            acc += tl.where(has_a[:, None], acc_a, 0.0)  # masked once for all heads
            if SLOTS == 2:
                acc += tl.where(has_b[:, None], acc_b, 0.0)
        out = (kv.to(tl.int64) * num_blocks + block) * (num_tiles * BLOCK_M) + local * BLOCK_M
        out = out[:, None] + tl.arange(0, BLOCK_M)[None, :]
        tl.store(scores_ptr + out, acc, mask=(j < block_end)[:, None] & valid[None, :])


@triton.jit
def _bits(scores_ptr, j, num_blocks, stride, valid, BLOCK_S: tl.constexpr, ROWS: tl.constexpr):
    """[BLOCK_S, ROWS] bits of the scores of blocks j … j + BLOCK_S; −1, below every score, where there is none or a NaN."""
    j += tl.arange(0, BLOCK_S)
    p = scores_ptr + j[:, None].to(tl.int64) * stride + tl.arange(0, ROWS)[None, :]
    s = tl.load(p, mask=(j < num_blocks)[:, None] & valid[None, :], other=-1.0)
    return tl.where(s >= 0.0, s.to(tl.int32, bitcast=True), -1)


@triton.jit
def _count(resident, scores_ptr, num_blocks, stride, valid, bound, BLOCK_S: tl.constexpr, ROWS: tl.constexpr, RESIDENT: tl.constexpr):
    """[ROWS] how many scores have bits of at least `bound`."""
    if RESIDENT:
        n = tl.sum((resident >= bound[None, :]).to(tl.int32), 0)
    else:
        n = tl.zeros([ROWS], tl.int32)
        for j in range(0, num_blocks, BLOCK_S):
            n += tl.sum((_bits(scores_ptr, j, num_blocks, stride, valid, BLOCK_S, ROWS) >= bound[None, :]).to(tl.int32), 0)
    return n


@triton.jit(do_not_specialize=["tile0", "num_tiles", "num_blocks", "topk"])
def _topk_kernel(
    scores_ptr, ids_ptr, cu_seqlens_ptr, cu_blocks_ptr, tiles_ptr, tile0, num_tiles, num_blocks, topk, HKV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, ROWS: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = BLOCK_M // ROWS
    pid = tl.program_id(0)
    part, local, kv = pid % parts, pid // parts % num_tiles, pid // (parts * num_tiles)
    sample, first, end = _sample_rows(cu_seqlens_ptr, tiles_ptr, tile0 + local, BLOCK_M)
    row = first + part * ROWS + tl.arange(0, ROWS)
    valid = row < end
    if first + part * ROWS < end:
        block0 = tl.load(cu_blocks_ptr + sample)
        n = tl.load(cu_blocks_ptr + sample + 1) - block0
        stride = num_tiles * BLOCK_M
        scores_ptr += (kv.to(tl.int64) * num_blocks + block0) * stride + local * BLOCK_M + part * ROWS
        resident = _bits(scores_ptr, 0, n, stride, valid, BLOCK_S, ROWS)
        hi = tl.max(resident, 0)
        if not RESIDENT:
            for j in range(BLOCK_S, n, BLOCK_S):
                hi = tl.maximum(hi, tl.max(_bits(scores_ptr, j, n, stride, valid, BLOCK_S, ROWS), 0))
        # count(>= lo) >= topk or lo = 0; count(>= hi) < topk: done when they meet, or when a bound splits off exactly topk
        lo = tl.zeros([ROWS], tl.int32)
        hi += 1
        while tl.max(hi - lo, 0) > 1:
            mid = lo + (hi - lo) // 2
            c = _count(resident, scores_ptr, n, stride, valid, mid, BLOCK_S, ROWS, RESIDENT)
            hi = tl.where(c == topk, mid + 1, tl.where(c < topk, mid, hi))
            lo = tl.where(c >= topk, mid, lo)
        above = _count(resident, scores_ptr, n, stride, valid, lo + 1, BLOCK_S, ROWS, RESIDENT)
        at_least = _count(resident, scores_ptr, n, stride, valid, lo, BLOCK_S, ROWS, RESIDENT)
        keep_equal = tl.where(at_least <= topk, at_least - above, topk - above)
        ids_ptr += (row.to(tl.int64) * HKV + kv) * topk
        seen_equal = tl.zeros([ROWS], tl.int32)
        written = tl.zeros([ROWS], tl.int32)
        for j in range(0, n, BLOCK_S):
            bits = resident
            if not RESIDENT:
                bits = _bits(scores_ptr, j, n, stride, valid, BLOCK_S, ROWS)
            equal = (bits == lo[None, :]).to(tl.int32)
            rank_equal = seen_equal[None, :] + tl.cumsum(equal, 0)
            chosen = (bits > lo[None, :]) | ((equal == 1) & (rank_equal <= keep_equal[None, :]))
            place = written[None, :] + tl.cumsum(chosen.to(tl.int32), 0) - 1
            ids = (block0 + j + tl.arange(0, BLOCK_S))[:, None] + tl.zeros([1, ROWS], tl.int32)
            tl.store(ids_ptr[None, :] + place, ids, mask=chosen & valid[None, :])
            seen_equal += tl.sum(equal, 0)
            written += tl.sum(chosen.to(tl.int32), 0)
        for i in range(0, topk):
            tl.store(ids_ptr + i, tl.full([ROWS], -1, tl.int32), mask=valid & (written <= i))


def block_topk(
    q: Tensor, k_cmp: Tensor, lse: Tensor, cu_seqlens: Tensor, cu_blocks: Tensor, child_offsets: Tensor, fill_order: Tensor, ratio: int,
    topk: int, scale: float, config: dict | None = None,
) -> Tensor:  # fmt: skip
    """Contiguous q, k_cmp, lse; cu_blocks [B+1], child_offsets [S+1], fill_order [S] of the partition; ratio: most children of a block."""
    (t, hq, d), hkv, num_blocks = q.shape, k_cmp.shape[1], fill_order.shape[0]
    ids = torch.empty(t, hkv, topk, dtype=torch.int32, device=q.device)
    if t == 0:
        return ids
    config = dict(config or _config(d, q.dtype, ratio))
    launch = dict(num_warps=config.pop("num_warps"), num_stages=config.pop("num_stages"))
    block_m, block_j = config["BLOCK_M"], config["BLOCK_J"]
    tiles = tile_segments(cu_seqlens, t, 1, block_m)
    resident = num_blocks <= MAX_RESIDENT
    block_s = max(16, triton.next_power_of_2(num_blocks)) if resident else 1024
    rows = min(block_m, max(4, 16384 // block_s))
    per_launch = max(1, SCRATCH // (4 * hkv * num_blocks * block_m))
    scores = torch.empty(hkv, num_blocks, min(per_launch, tiles.shape[0]) * block_m, dtype=torch.float32, device=q.device)
    for tile0 in range(0, tiles.shape[0], per_launch):
        n = min(per_launch, tiles.shape[0] - tile0)
        grid = (n * hkv * triton.cdiv(num_blocks, block_j),)
        _score_kernel[grid](
            q, k_cmp, lse, scores, cu_seqlens, cu_blocks, child_offsets, fill_order, tiles, scale * LOG2E.value, tile0, n, num_blocks,
            HQ=hq, HKV=hkv, D=d, BLOCK_D=block_d(d), PRECISION=precision(q), **config, **launch,
        )  # fmt: skip
        grid = (n * hkv * (block_m // rows),)
        _topk_kernel[grid](
            scores, ids, cu_seqlens, cu_blocks, tiles, tile0, n, num_blocks, topk, HKV=hkv, BLOCK_M=block_m, BLOCK_S=block_s, ROWS=rows,
            RESIDENT=resident, num_warps=4,
        )  # fmt: skip
    return ids
