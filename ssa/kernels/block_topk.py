"""Block score and top-k: which selection blocks each (query, key/value head) attends to. No gradient.

    score[t, kv, J] = Σ_{j child of J} Σ_{h in group kv} exp(scale q_h·k_cmp[j] − lse_h)          ids = the topk best J of t's sample

Two kernels over chunks of query tiles, so that [Hkv, T, C] never exists and the Hkv · S scores of each query stay below SCRATCH bytes:
(1) scores, and the best of every GROUP: a program keeps BLOCK_M queries of all heads in shared memory while the keys of its share of
    the blocks pass by, BLOCK_J blocks at a time, and adds heads and children in registers. Blocks come in order of falling child count
    (`fill_order`), so a tile's blocks have about equally many children and few child slots are idle; a block's place in that order is
    where its score lies.
(2) top-k, ROWS queries a program: scores are ≥ 0, so their bits order as integers and a bisection on the bits is exact. The topk-th best
    maximum bounds the topk-th best score from below, and only the topk groups that reach it can hold the choice: a second bisection,
    over their scores, finds the exact one, and the ids are sorted by counting the smaller ones. Both keep what they search in registers.
    A group's scores lie side by side: [Hkv, groups, chunk, GROUP].
q [T,Hq,D], k_cmp [C,Hkv,D], lse [T,Hq] fp32 or fp64 → [T,Hkv,topk] int32, −1 where a sample has fewer blocks.
Source: arXiv 2505.17412, Eq. 8; exact bisection as in FastVideo's VSA.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import block_d, load_rows, load_tile, precision, tile_maps
from .inner import exp_shared, exponent_unit
from .launch import cdiv, launcher, next_power_of_2

SCRATCH = 512 * 2**20
PARTS = 8  # programs that share the columns of a tile of queries
RESIDENT = 64 * 2**10  # bytes of queries that a program keeps in shared memory
GROUP = tl.constexpr(16)
ROWS = 32  # queries a program of the top-k
MAX_GROUPS, MAX_SLOTS = 1024, 64  # maxima, and groups of candidates, that it keeps in registers for each of them


def _config(head_dim: int, dtype: torch.dtype, group: int) -> dict[str, int]:
    """H200, 2026-11-29; at a head size of 64 the queries fill 64 KiB, and three programs a multiprocessor leave room for 32 blocks."""
    if dtype == torch.float32:
        return dict(BLOCK_M=32, BLOCK_J=32, HEADS=1, SHARE=0, num_warps=4, num_stages=1)
    if group % 2:
        tile = dict(BLOCK_M=64, BLOCK_J=64, HEADS=1, num_warps=4)
    else:
        tile = dict(BLOCK_M=32, BLOCK_J=64 if head_dim <= 32 else 32, HEADS=2, num_warps=4)
    registers = dict(maxnreg=128 if head_dim <= 32 or group % 2 else 168) if head_dim <= 64 else {}
    return dict(**tile, SHARE=4, num_stages=2, **registers)


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
@triton.jit(do_not_specialize=["tile0", "num_tiles", "chunk_tiles", "num_groups", "parts"])
def _score_kernel(
    q_ptr, k_ptr, lse_ptr, scores_ptr, best_ptr, cu_blocks_ptr, child_offsets_ptr, fill_order_ptr, tiles_ptr, scale, tile0, num_tiles,
    chunk_tiles, num_groups, parts, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
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
        scores_ptr += ((kv * num_groups).to(tl.int64) * stride + local * BLOCK_M) * GROUP
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
            place = column * BLOCK_J + tl.arange(0, BLOCK_J)
            to = (place // GROUP * stride)[None, :] + m[:, None]
            tl.store(scores_ptr + to * GROUP + (place % GROUP)[None, :], acc, mask=real[None, :])
            acc = tl.where(real[None, :] & (acc >= 0.0), acc, -1.0)  # NaN too
            best = tl.max(tl.reshape(acc, [BLOCK_M, BLOCK_J // GROUP, GROUP]), 2)
            group = column * (BLOCK_J // GROUP) + tl.arange(0, BLOCK_J // GROUP)
            tl.store(best_ptr + (group * stride)[None, :] + m[:, None], best, mask=(group < num_groups)[None, :])


@triton.jit
def _bits(s):
    """Scores are ≥ 0, so their bits order like them; −1, below every score, stands for what is not there and for a NaN."""
    return tl.where(s >= 0.0, s.to(tl.int32, bitcast=True), -1)


@triton.jit
def _chunk(
    values_ptr, groups_ptr, j, number, count, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr
):  # fmt: skip
    """Bits [BLOCK, ROWS] of entries j … of every row, which has `number` of them: the maxima of groups, or, as CANDIDATES, all scores of
    the groups listed."""
    lane = tl.arange(0, ROWS)
    if CANDIDATES:
        slot = j // GROUP + tl.arange(0, BLOCK // GROUP)
        there = slot[:, None] < (number // GROUP)[None, :]
        group = tl.load(groups_ptr + slot[:, None] * stride + lane[None, :], mask=there, other=0)
        i = tl.arange(0, GROUP)[None, None, :]
        there = there[:, :, None] & (group[:, :, None] * GROUP + i < count)
        s = tl.load(values_ptr + ((group * stride + lane[None, :]) * GROUP)[:, :, None] + i, mask=there, other=-1.0)
        s = tl.reshape(tl.permute(s, (0, 2, 1)), [BLOCK, ROWS])
    else:
        i = (j + tl.arange(0, BLOCK))[:, None]
        s = tl.load(values_ptr + i * stride + lane[None, :], mask=i < number[None, :], other=-1.0)
    return _bits(s)


@triton.jit
def _list_best(
    values_ptr, groups_ptr, words_ptr, out_ptr, number, count, stride, topk, lo, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Finds the topk best entries of every row, by bisection on the bits, and lists their numbers.

    Returns the bits of the topk-th best, `lo` where there are fewer, and how many are listed. lo: a lower bound of it.
    The first BLOCK entries stay in registers; where there are more, MORE at a time are read again in each step.
    """
    MORE: tl.constexpr = 32
    first = _chunk(values_ptr, groups_ptr, 0, number, count, stride, ROWS, BLOCK, CANDIDATES)
    end = tl.max(number, 0)
    hi = tl.max(first, 0)
    for j in range(BLOCK, end, MORE):
        hi = tl.maximum(hi, tl.max(_chunk(values_ptr, groups_ptr, j, number, count, stride, ROWS, MORE, CANDIDATES), 0))
    hi = tl.where(number <= topk, lo, hi) + 1
    # count(>= lo) >= topk, count(>= hi) < topk: done when they meet, or when a bound splits off exactly topk.
    # The answer is seldom far below the best: the first steps down from hi are one exponent, two, four, …
    step = 1 << 23
    while tl.max(hi - lo, 0) > 1:
        mid = tl.maximum(lo + (hi - lo) // 2, hi - step)
        step = tl.minimum(step, 1 << 29) * 2
        n = tl.sum((first >= mid[None, :]).to(tl.int32), 0)
        for j in range(BLOCK, end, MORE):
            bits = _chunk(values_ptr, groups_ptr, j, number, count, stride, ROWS, MORE, CANDIDATES)
            n += tl.sum((bits >= mid[None, :]).to(tl.int32), 0)
        hi = tl.where(n == topk, mid + 1, tl.where(n < topk, mid, hi))
        lo = tl.where(n >= topk, mid, lo)
    listed = tl.zeros([ROWS], tl.int32)
    for equal in tl.static_range(2):  # those above the bound, then as many of those at it as are left
        listed = _list_chosen(first, lo, equal, words_ptr, out_ptr, 0, listed, stride, topk, ROWS, BLOCK)
        for j in range(BLOCK, end, MORE):
            bits = _chunk(values_ptr, groups_ptr, j, number, count, stride, ROWS, MORE, CANDIDATES)
            listed = _list_chosen(bits, lo, equal, words_ptr, out_ptr, j, listed, stride, topk, ROWS, MORE)
    return lo, listed


@triton.jit
def _list_chosen(
    bits, lo, EQUAL: tl.constexpr, words_ptr, out_ptr, j, listed, stride, topk, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Lists the entries j … whose bits [BLOCK, ROWS] are above lo, or EQUAL to it, behind those `listed`, at most topk.

    Returns how many there are then. A row's choice becomes words of 32 bits, whose lowest bit is taken again and again: a scan down the
    columns costs more than the bisection.
    """
    lane = tl.arange(0, ROWS)
    to = words_ptr + tl.arange(0, BLOCK // 32)[:, None] * (2 * stride) + lane[None, :]
    chosen = (bits == lo[None, :]) if EQUAL else (bits > lo[None, :])
    bits = tl.reshape(chosen.to(tl.int32), [BLOCK // 32, 32, ROWS])
    tl.debug_barrier()
    tl.store(to, tl.sum(bits << tl.arange(0, 32)[None, :, None], 1))
    tl.store(to + stride, tl.sum(bits, 1))
    tl.debug_barrier()
    for w in range(BLOCK // 32):
        word = tl.load(words_ptr + w * (2 * stride) + lane)
        number = tl.minimum(tl.load(words_ptr + (w * 2 + 1) * stride + lane), topk - listed)
        for n in range(0, tl.max(number, 0)):
            lowest = (word & -word).to(tl.uint32, bitcast=True).to(tl.float32)  # a power of two, whose exponent is its place
            word &= word - 1
            entry = j + w * 32 + (lowest.to(tl.int32, bitcast=True) >> 23) - 127
            tl.store(out_ptr + (listed + n) * stride + lane, entry, mask=n < number)
        listed += number
    return listed


@launcher
@triton.jit(do_not_specialize=["tile0", "num_tiles", "chunk_tiles", "num_groups", "topk", "lists"])
def _topk_kernel(
    scores_ptr, best_ptr, lists_ptr, ids_ptr, cu_blocks_ptr, fill_order_ptr, tiles_ptr, tile0, num_tiles, chunk_tiles, num_groups, topk,
    lists, HKV: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """`lists` numbers of scratch a row: groups, then ids, topk each, then words of chosen bits."""
    parts: tl.constexpr = BLOCK_M // ROWS
    pid = tl.program_id(0)
    part, local, kv = pid % parts, pid // parts % chunk_tiles, pid // (parts * chunk_tiles)
    sample, first, rows = load_tile(tiles_ptr, tile0 + local, num_tiles)
    rows -= part * ROWS
    if rows > 0:
        block0 = tl.load(cu_blocks_ptr + sample)
        n = tl.load(cu_blocks_ptr + sample + 1) - block0
        lane = tl.arange(0, ROWS)
        stride = tl.multiple_of(chunk_tiles * BLOCK_M, ROWS)
        column = tl.multiple_of(local * BLOCK_M + part * ROWS, ROWS)
        best_ptr += (kv * num_groups).to(tl.int64) * stride + column
        scores_ptr += ((kv * num_groups).to(tl.int64) * stride + column) * GROUP
        groups_ptr = lists_ptr + (kv * lists).to(tl.int64) * stride + column
        names_ptr = groups_ptr + topk.to(tl.int64) * stride
        words_ptr = names_ptr + topk.to(tl.int64) * stride
        fill_order_ptr += block0
        zero = tl.zeros([ROWS], tl.int32)
        groups = tl.where(lane < rows, (n + GROUP - 1) // GROUP, 0)
        bound, chosen = _list_best(best_ptr, None, words_ptr, groups_ptr, groups, n, stride, topk, zero, ROWS, GROUPS, False)
        tl.debug_barrier()
        _, listed = _list_best(
            scores_ptr, groups_ptr, words_ptr, names_ptr, chosen * GROUP, n, stride, topk, bound, ROWS, SLOTS * GROUP, True
        )
        tl.debug_barrier()
        for start in range(0, topk, SLOTS):
            slot = (start + tl.arange(0, SLOTS))[:, None]
            here = slot < listed[None, :]
            at = names_ptr + slot * stride + lane[None, :]
            entry = tl.load(at, mask=here, other=0)
            group = tl.load(groups_ptr + entry // GROUP * stride + lane[None, :], mask=here, other=0)
            name = tl.load(fill_order_ptr + group * GROUP + entry % GROUP, mask=here, other=0)
            tl.debug_barrier()  # warps may hold the same entries: none is overwritten before all have read it
            tl.store(at, name, mask=here)
        tl.debug_barrier()
        out_ptr = ids_ptr + ((first + part * ROWS).to(tl.int64) * HKV + kv) * topk + lane * (HKV * topk)
        for start in range(0, topk, SLOTS):  # in order: an id's place is the number of smaller ones
            slot = (start + tl.arange(0, SLOTS))[:, None]
            name = tl.load(names_ptr + slot * stride + lane[None, :], mask=slot < listed[None, :], other=-1)
            place = tl.zeros([SLOTS, ROWS], tl.int32)
            for other in range(0, topk):
                smaller = tl.load(names_ptr + other * stride + lane, mask=other < listed, other=2147483647)
                place += (smaller[None, :] < name).to(tl.int32)
            place = tl.where(slot < listed[None, :], place, slot)
            tl.store(out_ptr[None, :] + place, name, mask=(slot < topk) & (lane < rows)[None, :])


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
    assert block_m % ROWS == 0 and config["BLOCK_J"] % GROUP.value == 0, config
    if tiles is None:
        (tiles,) = tile_maps(topk_map(q, k_cmp, cu_seqlens, config))
    num_tiles = tiles.shape[2]
    parts = min(PARTS, cdiv(num_blocks, config["BLOCK_J"]))
    kept = hq // hkv * block_m * block_d(d) * q.element_size()
    keep = q.dtype != torch.float32 and block_d(d) <= 64 and kept <= RESIDENT  # with the keys, within the 99 KiB of sm_89
    num_groups = cdiv(num_blocks, GROUP.value)
    kept_groups = max(32, min(next_power_of_2(num_groups), MAX_GROUPS))
    slots = max(2, min(next_power_of_2(min(topk, num_groups)), MAX_SLOTS))
    kept = max(kept_groups, slots * GROUP.value)
    lists = 2 * topk + 2 * kept // 32
    chunk = max(1, min(num_tiles, SCRATCH // (4 * hkv * (num_groups * (GROUP.value + 1) + lists) * block_m)))
    scores = torch.empty(hkv, num_groups, chunk * block_m, GROUP.value, dtype=torch.float32, device=device)
    best = torch.empty(hkv, num_groups, chunk * block_m, dtype=torch.float32, device=device)
    scratch = torch.empty(hkv, lists, chunk * block_m, dtype=torch.int32, device=device)
    for tile0 in range(0, num_tiles, chunk):
        n = min(chunk, num_tiles - tile0)
        _score_kernel[(n * hkv * parts,)](
            q, k_cmp, lse, scores, best, cu_blocks, child_offsets, fill_order, tiles, scale, tile0, num_tiles, n, num_groups, parts, HQ=hq,
            HKV=hkv, D=d, BLOCK_D=block_d(d), PRECISION=precision(q), KEEP=keep, **config, **launch,
        )  # fmt: skip
        _topk_kernel[(n * hkv * (block_m // ROWS),)](
            scores, best, scratch, ids, cu_blocks, fill_order, tiles, tile0, num_tiles, n, num_groups, topk, lists, HKV=hkv,
            BLOCK_M=block_m, ROWS=ROWS, GROUPS=kept_groups, SLOTS=slots, num_warps=max(1, min(2, kept // 64), kept // 128),
        )  # fmt: skip
    return ids
