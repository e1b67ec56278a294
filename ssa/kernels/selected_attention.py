"""Selected attention: every (query, key/value head) attends to all tokens of the selection blocks it chose.

Block-major: a tile holds (query, head) rows that chose one block, so K and V are read once for BLOCK_M rows, or ENTRIES queries, of it;
o and dq of small blocks are had query-major instead, see selected_attention_by_query.py.
Each (query, chosen block) pair is an *entry* e = (t Hkv + kv) topk + slot; the inverse map sorts entries stably by bucket (kv, block):
csr_indices lists them, csr_offsets says where each bucket begins, −1 ids come last.

    topk_indices of 3 queries, topk 2, S 2:  [1 −] [0 1] [1 −]       csr_offsets 0 1 4     csr_indices 2 | 0 3 4 | (1 5)

forward   o_e, lse_e of one block a row   →  combine: lse = log Σ_e exp(lse_e), o = Σ_e exp(lse_e − lse) o_e
backward  dq_e a row → summed over slots; dk, dv: the kernel of varlen_attention.py, a segment being a block and its bucket
Partial results live for one chunk of queries at a time (at most SCRATCH bytes): `chunks` [2, chunks · Hkv · S + 1] holds, chunk after
chunk, the running size of its share of every bucket and where the share begins. Atomics only count: two runs are bitwise equal.
q, o [T,Hq,D]; k, v [T,Hkv,D]; topk_indices [T,Hkv,topk] int32; offsets [S+1] int32; lse [T,Hq], stats [T,Hq,2] (`lse_dtype`).
Source: arXiv 2505.17412, Algorithm 1, inverted; inverse map as in fla-org/flash-linear-attention.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LN2, LOG2E, block_d, key_norms, load_norm, load_rows, load_tile, lse_dtype, precision, store_rows, tile_maps
from .inner import dq_keys, forward_rows, load_stats, packed_rows
from .launch import cdiv, launcher, next_power_of_2
from .selected_attention_by_query import by_query, dq_by_query, forward_by_query
from .varlen_attention import launch_dkv

SCRATCH = 320 * 2**20
MAX_SPLITS = 4
MANY = 32768  # queries from which blocks are sorted by how many chose them: for fewer it takes longer than it saves
PART = 256  # entries that one program of the inverse map counts and places, at least
COUNTS = 2**24  # numbers of all these programs, one a bucket, but at least one program a chunk


def _config(kernel: str, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch settings, H200, 2026-11-29.

    Rows are found by an index, so it takes five stages to have a tile's rows on their way while the tile before is at work; at a head
    size of 64 dq has no room for that. ENTRIES 64: three programs a multiprocessor; at a head size of 64 two, with all registers.
    """
    stream = {} if kernel == "dkv" else dict(ENTRIES=0)
    if dtype == torch.float32:
        return dict(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=1, **stream)
    if kernel == "dkv":
        return dict(BLOCK_M=128 if head_dim <= 32 else 64, BLOCK_N=64, num_warps=4, num_stages=5 if head_dim <= 64 else 2)
    deep = head_dim <= (64 if kernel == "fwd" else 32)
    resident = dict(ENTRIES=64, maxnreg=168 if head_dim <= 32 else 255) if head_dim <= 64 else stream
    return dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=5 if deep else 3, **resident)


def _entries(config: dict, group: int) -> int:
    """Entries a program."""
    return config["ENTRIES"] or config["BLOCK_M"] // group


def chunk_queries(q: Tensor, topk_indices: Tensor) -> int:
    """Queries a chunk: their partial results fill SCRATCH."""
    return max(1, SCRATCH // (q.shape[1] * topk_indices.shape[2] * (q.shape[2] * q.element_size() + 4)))


def inverse_map_sizes(q: Tensor, topk_indices: Tensor, offsets: Tensor) -> tuple[tuple[int, ...], ...]:
    """Shapes of what the forward hands to the backward of the inverse map: nothing where it needs none itself."""
    (t, hkv, topk), num_blocks = topk_indices.shape, offsets.shape[0] - 1
    if by_query(q, topk_indices, num_blocks):
        return (0,), (0,), (0,)
    buckets = hkv * num_blocks
    return (buckets + 1,), (t * hkv * topk,), (2, cdiv(t, chunk_queries(q, topk_indices)) * buckets + 1)


@triton.jit
def _entries_of(part, num_entries, chunk_entries, chunk_parts, part_entries):
    """First entry of a part and the end of it. Parts never cross chunks."""
    chunk = part // chunk_parts
    lo = chunk * chunk_entries + part % chunk_parts * part_entries
    return lo, tl.minimum(tl.minimum(lo + part_entries, (chunk + 1) * chunk_entries), num_entries)


@triton.jit
def _buckets(ids_ptr, entry, end, num_blocks, TOPK: tl.constexpr, HKV: tl.constexpr):
    block = tl.load(ids_ptr + entry, mask=entry < end, other=-1)
    return tl.where(block >= 0, entry // TOPK % HKV * num_blocks + block, HKV * num_blocks)


@launcher
@triton.jit(do_not_specialize=["num_entries", "num_blocks", "chunk_entries", "chunk_parts", "part_entries"])
def _count_kernel(
    ids_ptr, counts_ptr, num_entries, num_blocks, chunk_entries, chunk_parts, part_entries, TOPK: tl.constexpr, HKV: tl.constexpr,
    BLOCK: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """counts [parts, Hkv · S + 1]: entries of each bucket in each part. Sums of integers, so atomics give the same in any order."""
    part, i = tl.program_id(0), tl.arange(0, BLOCK)
    lo, hi = _entries_of(part, num_entries, chunk_entries, chunk_parts, part_entries)
    counts_ptr += part.to(tl.int64) * (HKV * num_blocks + 1)
    for first in range(0, HKV * num_blocks + 1, BUCKETS):
        at = first + tl.arange(0, BUCKETS)
        tl.store(counts_ptr + at, tl.zeros([BUCKETS], tl.int32), mask=at <= HKV * num_blocks)
    tl.debug_barrier()
    for start in range(lo, hi, BLOCK):
        bucket = _buckets(ids_ptr, start + i, hi, num_blocks, TOPK, HKV)
        tl.atomic_add(counts_ptr + bucket, tl.full([BLOCK], 1, tl.int32), mask=start + i < hi, sem="relaxed")


@launcher
@triton.jit(do_not_specialize=["num_parts", "num_buckets"])
def _sum_parts_kernel(counts_ptr, totals_ptr, num_parts, num_buckets, BLOCK_P: tl.constexpr, BLOCK_B: tl.constexpr):
    """counts → entries of the bucket in the parts before; totals: in all."""
    bucket = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    total = tl.zeros([BLOCK_B], tl.int32)
    for start in range(0, num_parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        at = counts_ptr + part.to(tl.int64)[:, None] * num_buckets + bucket[None, :]
        mask = (part < num_parts)[:, None] & (bucket < num_buckets)[None, :]
        count = tl.load(at, mask=mask, other=0)
        tl.store(at, total[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        total += tl.sum(count, 0)
    tl.store(totals_ptr + bucket, total, mask=bucket < num_buckets)


@launcher
@triton.jit(do_not_specialize=["num_entries", "num_blocks", "chunk_entries", "chunk_parts", "part_entries"])
def _csr_kernel(
    ids_ptr, counts_ptr, totals_ptr, offsets_ptr, indices_ptr, chunks_ptr, num_entries, num_blocks, chunk_entries, chunk_parts,
    part_entries, TOPK: tl.constexpr, HKV: tl.constexpr, BLOCK: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """Puts the entries of a part where they belong. Its row of counts becomes the place of the next entry of every bucket."""
    part, i = tl.program_id(0), tl.arange(0, BLOCK)
    lo, hi = _entries_of(part, num_entries, chunk_entries, chunk_parts, part_entries)
    counts_ptr += part.to(tl.int64) * (HKV * num_blocks + 1)
    before = 0
    for first in range(0, HKV * num_blocks + 1, BUCKETS):
        at = first + tl.arange(0, BUCKETS)
        there = at <= HKV * num_blocks
        total = tl.load(totals_ptr + at, mask=there, other=0)
        begin = before + tl.cumsum(total, 0) - total
        tl.store(counts_ptr + at, tl.load(counts_ptr + at, mask=there, other=0) + begin, mask=there)
        if part == 0:
            tl.store(offsets_ptr + at, begin, mask=there)
            tl.store(chunks_ptr + at, begin, mask=there)  # of a single chunk
            tl.store(chunks_ptr + (HKV * num_blocks + 1) + at, begin, mask=there)
        before += tl.sum(total, 0)
    tl.debug_barrier()
    for start in range(lo, hi, BLOCK):
        entry = start + i
        bucket = _buckets(ids_ptr, entry, hi, num_blocks, TOPK, HKV)
        rank = tl.sum(((bucket[:, None] == bucket[None, :]) & (i[None, :] < i[:, None])).to(tl.int32), 1)
        place = tl.load(counts_ptr + bucket, mask=entry < hi, other=0) + rank
        tl.store(indices_ptr + place, entry, mask=entry < hi)
        tl.debug_barrier()
        tl.atomic_add(counts_ptr + bucket, tl.full([BLOCK], 1, tl.int32), mask=entry < hi, sem="relaxed")
        tl.debug_barrier()


def invert(topk_indices: Tensor, num_blocks: int, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse map: csr_offsets [Hkv · S + 1], csr_indices [T · Hkv · topk] and chunks, all int32, by a stable counting sort."""
    t, hkv, topk = topk_indices.shape
    m, n, num_chunks, device = t * hkv * topk, hkv * num_blocks, cdiv(t, chunk), topk_indices.device
    if t == 0:
        zeros = topk_indices.new_zeros
        return zeros(n + 1), zeros(0), zeros(2, 1)
    chunk_entries = min(chunk, t) * hkv * topk
    rows = max(1, min(2048, COUNTS // (n + 1)))  # of counts, about
    part_entries = max(PART, next_power_of_2(cdiv(m, rows)))
    chunk_parts = cdiv(chunk_entries, part_entries)
    counts, totals, offsets, indices, chunks = (
        torch.empty(shape, dtype=torch.int32, device=device)
        for shape in ((num_chunks * chunk_parts, n + 1), (n + 1,), (n + 1,), (m,), (2, n + 1))
    )
    parts, sizes = (m, num_blocks, chunk_entries, chunk_parts, part_entries), dict(TOPK=topk, HKV=hkv, BLOCK=64, BUCKETS=1024, num_warps=2)
    _count_kernel[(counts.shape[0],)](topk_indices, counts, *parts, **sizes)
    _sum_parts_kernel[(cdiv(n + 1, 32),)](counts, totals, counts.shape[0], n + 1, BLOCK_P=128, BLOCK_B=32)
    shares = counts[::chunk_parts, :-1].clone() if num_chunks > 1 else None
    _csr_kernel[(counts.shape[0],)](topk_indices, counts, totals, offsets, indices, chunks, *parts, **sizes)
    if shares is not None:
        shares = torch.cat([shares + offsets[:-1], offsets[None, 1:]])  # [chunks + 1, n] where a chunk's share of a bucket begins
        size = torch.diff(shares, dim=0).flatten().cumsum(0, dtype=torch.int32)
        chunks = torch.stack([torch.nn.functional.pad(size, (1, 0)), shares.flatten()[: num_chunks * n + 1]])
    return offsets, indices, chunks


@triton.jit
def _resident_keys(k_ptr, v_ptr, key, end, kv, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    n = tl.arange(0, BLOCK_N)
    base = (key.to(tl.int64) * HKV + kv) * D
    k = load_rows(k_ptr + base, n * (HKV * D), key + n < end, D, BLOCK_D)
    return k, load_rows(v_ptr + base, n * (HKV * D), key + n < end, D, BLOCK_D)


@triton.jit
def _resident_tiles(
    k_ptr, v_ptr, key, end, kv, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """(k, v) of FULL tiles of 64 keys and of the last one, and which of the last are there."""
    tiles = ()
    for i in tl.static_range(FULL):
        tiles += (_resident_keys(k_ptr, v_ptr, key + i * 64, end, kv, HKV, D, BLOCK_D, 64),)  # type: ignore[assignment]
    there = key + FULL * 64 + tl.arange(0, LAST) < end
    tiles += (_resident_keys(k_ptr, v_ptr, key + FULL * 64, end, kv, HKV, D, BLOCK_D, LAST),)  # type: ignore[assignment]
    return tiles, there


@triton.jit
def _resident_rows(
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, entries_ptr, kv, key, end, lo, hi, entry0, scale, GATHER: tl.constexpr, HQ: tl.constexpr,
    HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, FULL: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Entries lo … hi of a block of FULL · 64 + 1 … FULL · 64 + LAST keys: all of them stay, so every row knows its maximum at once."""
    G: tl.constexpr = HQ // HKV
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    r = tl.arange(0, BLOCK_M)
    unit = scale * LOG2E
    tiles, there = _resident_tiles(k_ptr, v_ptr, key, end, kv, HKV, D, BLOCK_D, FULL, LAST)
    for start in range(lo, hi, BLOCK_Q):
        count = tl.minimum(hi - start, BLOCK_Q)
        valid = r // G < count
        entry = tl.load(entries_ptr + start + tl.minimum(r // G, count - 1))  # rows that are not there repeat the last query
        q = load_rows(q_ptr, ((entry.to(tl.uint32) // GATHER).to(tl.int64) * HQ + (kv * G + r % G)) * D, valid, D, BLOCK_D, False)
        s = tl.where(there[None, :], tl.dot(q, tiles[FULL][0].T), -float("inf"))
        m = tl.max(s, 1)
        scores = ()
        for i in tl.static_range(FULL):
            scores += (tl.dot(q, tiles[i][0].T),)  # type: ignore[assignment]
            m = tl.maximum(m, tl.max(scores[i], 1))
        m *= unit
        p = tl.exp2(s * unit - m[:, None])
        sum_p = tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), tiles[FULL][1])
        for i in tl.static_range(FULL):
            p = tl.exp2(scores[i] * unit - m[:, None])
            sum_p += tl.sum(p, 1)
            acc = tl.dot(p.to(q.dtype), tiles[i][1], acc)
        out = (entry - entry0).to(tl.int64) * G + r % G
        store_rows(part_ptr, out * D, acc * (1.0 / sum_p)[:, None], valid, D, BLOCK_D)
        tl.store(part_lse_ptr + out, m * LN2 + tl.log(sum_p), mask=valid)


@launcher
@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "entry0"])
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, norms_ptr, offsets_ptr, entries_ptr, tiles_ptr, num_tiles, scale, num_blocks,
    entry0, TOPK: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ENTRIES: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ENTRIES > 0: a program takes so many and keeps the keys of a block of up to 192 (16 bit). 0: one tile of rows, keys streamed."""
    G: tl.constexpr = HQ // HKV
    bucket, first, count = load_tile(tiles_ptr, tl.program_id(0), num_tiles)
    if count > 0:
        kv, block = bucket // num_blocks, bucket % num_blocks
        lo, hi = tl.load(offsets_ptr + block), tl.load(offsets_ptr + block + 1)
        if ENTRIES > 0 and q_ptr.dtype.element_ty != tl.float32 and hi - lo <= 192:
            what = (q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, entries_ptr, kv, lo, hi, first, first + count, entry0, scale)
            if hi - lo <= 16:
                _resident_rows(*what, HKV * TOPK, HQ, HKV, D, BLOCK_D, BLOCK_M, 0, 16)
            elif hi - lo <= 32:
                _resident_rows(*what, HKV * TOPK, HQ, HKV, D, BLOCK_D, BLOCK_M, 0, 32)
            elif hi - lo <= 64:
                _resident_rows(*what, HKV * TOPK, HQ, HKV, D, BLOCK_D, BLOCK_M, 0, 64)
            elif hi - lo <= 96:
                _resident_rows(*what, HKV * TOPK, HQ, HKV, D, BLOCK_D, BLOCK_M, 1, 32)
            elif hi - lo <= 128:
                _resident_rows(*what, HKV * TOPK, HQ, HKV, D, BLOCK_D, BLOCK_M, 1, 64)
            elif hi - lo <= 144:
                _resident_rows(*what, HKV * TOPK, HQ, HKV, D, BLOCK_D, BLOCK_M, 2, 16)
            elif hi - lo <= 160:
                _resident_rows(*what, HKV * TOPK, HQ, HKV, D, BLOCK_D, BLOCK_M, 2, 32)
            else:
                _resident_rows(*what, HKV * TOPK, HQ, HKV, D, BLOCK_D, BLOCK_M, 2, 64)
        else:
            k_norm = 0.0
            if BOUNDED:
                k_norm = load_norm(norms_ptr, kv, HKV)
            for start in range(first, first + count, BLOCK_M // G):
                valid, head = packed_rows(
                    entries_ptr, start, tl.minimum(first + count - start, BLOCK_M // G), kv, HQ, G, BLOCK_M, HKV * TOPK
                )
                q = load_rows(q_ptr, head * D, valid, D, BLOCK_D)
                o, lse = forward_rows(
                    q, k_norm, k_ptr, v_ptr, None, kv, lo, hi, scale, HKV, D, BLOCK_D, BLOCK_M, BLOCK_N, 0, BOUNDED, PRECISION
                )
                out = _partial_rows(entries_ptr, start, valid, entry0, G, BLOCK_M)
                store_rows(part_ptr, out * D, o, valid, D, BLOCK_D)
                tl.store(part_lse_ptr + out, lse, mask=valid)


@triton.jit
def _partial_rows(entries_ptr, first, valid, entry0, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows of the partial results: (entry of the chunk, head)."""
    r = tl.arange(0, BLOCK_M)
    return (tl.load(entries_ptr + first + r // G, mask=valid, other=0) - entry0).to(tl.int64) * G + r % G


@launcher
@triton.jit(do_not_specialize=["num_rows", "row0", "topk"])
def _combine_kernel(
    part_ptr, part_lse_ptr, ids_ptr, o_ptr, lse_ptr, num_rows, row0, topk, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    local = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (query, head) of the chunk
    valid = local < num_rows
    pair = local // G  # (query, kv head)
    m_i = tl.full([BLOCK_M], -float("inf"), part_lse_ptr.dtype.element_ty)
    for slot in range(topk):
        chosen = tl.load(ids_ptr + (row0 // G + pair) * topk + slot, mask=valid, other=-1) >= 0
        lse = tl.load(part_lse_ptr + (pair * topk + slot) * G + local % G, mask=chosen, other=-float("inf"))
        m_i = tl.maximum(m_i, lse)
    base = tl.where(m_i == -float("inf"), 0.0, m_i)
    l_i = tl.zeros([BLOCK_M], part_lse_ptr.dtype.element_ty)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for slot in range(topk):
        chosen = tl.load(ids_ptr + (row0 // G + pair) * topk + slot, mask=valid, other=-1) >= 0
        entry = (pair * topk + slot) * G + local % G
        w = tl.exp(tl.load(part_lse_ptr + entry, mask=chosen, other=-float("inf")) - base)
        l_i += w
        acc += w.to(tl.float32)[:, None] * load_rows(part_ptr, entry * D, chosen, D, BLOCK_D).to(tl.float32)
    empty = l_i == 0.0  # nothing chosen: o = 0, lse = −inf
    l_i = tl.where(empty, 1.0, l_i)
    store_rows(o_ptr, (row0 + local) * D, acc * tl.div_rn(1.0, l_i.to(tl.float32))[:, None], valid, D, BLOCK_D)
    tl.store(lse_ptr + row0 + local, tl.where(empty, -float("inf"), m_i + tl.log(l_i)), mask=valid)


@triton.jit
def _resident_dq_tile(dq, q, do, lse, delta, k, v, unit, there):
    p = tl.exp2(tl.dot(q, k.T) * unit - lse[:, None])
    if there is not None:
        p = tl.where(there[None, :], p, 0.0)
    ds = p * (tl.dot(do, v.T) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq)


@triton.jit
def _resident_dq(
    q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, part_ptr, entries_ptr, kv, key, end, lo, hi, entry0, scale, GATHER: tl.constexpr,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, FULL: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """As `_resident_rows`, for dq."""
    G: tl.constexpr = HQ // HKV
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    r = tl.arange(0, BLOCK_M)
    unit = scale * LOG2E
    tiles, there = _resident_tiles(k_ptr, v_ptr, key, end, kv, HKV, D, BLOCK_D, FULL, LAST)
    for start in range(lo, hi, BLOCK_Q):
        count = tl.minimum(hi - start, BLOCK_Q)
        valid = r // G < count
        entry = tl.load(entries_ptr + start + tl.minimum(r // G, count - 1))
        head = (entry.to(tl.uint32) // GATHER).to(tl.int64) * HQ + (kv * G + r % G)
        q = load_rows(q_ptr, head * D, valid, D, BLOCK_D, False)
        do = load_rows(do_ptr, head * D, valid, D, BLOCK_D, False)
        lse, delta = load_stats(stats_ptr, head, valid, False)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dq = _resident_dq_tile(dq, q, do, lse, delta, tiles[FULL][0], tiles[FULL][1], unit, there)
        for i in tl.static_range(FULL):
            dq = _resident_dq_tile(dq, q, do, lse, delta, tiles[i][0], tiles[i][1], unit, None)
        out = (entry - entry0).to(tl.int64) * G + r % G
        store_rows(part_ptr, out * D, dq * scale, valid, D, BLOCK_D)


@launcher
@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "entry0"])
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, part_ptr, offsets_ptr, entries_ptr, tiles_ptr, num_tiles, scale, num_blocks,
    entry0, TOPK: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ENTRIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = HQ // HKV
    bucket, first, count = load_tile(tiles_ptr, tl.program_id(0), num_tiles)
    if count > 0:
        kv, block = bucket // num_blocks, bucket % num_blocks
        lo, hi = tl.load(offsets_ptr + block), tl.load(offsets_ptr + block + 1)
        if ENTRIES > 0 and q_ptr.dtype.element_ty != tl.float32 and hi - lo <= 192:
            tensors = (q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, part_ptr, entries_ptr)
            where = (kv, lo, hi, first, first + count, entry0, scale)
            if hi - lo <= 16:
                _resident_dq(*tensors, *where, HKV * TOPK, HQ, HKV, D, BLOCK_D, BLOCK_M, 0, 16)
            elif hi - lo <= 32:
                _resident_dq(*tensors, *where, HKV * TOPK, HQ, HKV, D, BLOCK_D, BLOCK_M, 0, 32)
            elif hi - lo <= 64:
                _resident_dq(*tensors, *where, HKV * TOPK, HQ, HKV, D, BLOCK_D, BLOCK_M, 0, 64)
            elif hi - lo <= 96:
                _resident_dq(*tensors, *where, HKV * TOPK, HQ, HKV, D, BLOCK_D, BLOCK_M, 1, 32)
            elif hi - lo <= 128:
                _resident_dq(*tensors, *where, HKV * TOPK, HQ, HKV, D, BLOCK_D, BLOCK_M, 1, 64)
            elif hi - lo <= 144:
                _resident_dq(*tensors, *where, HKV * TOPK, HQ, HKV, D, BLOCK_D, BLOCK_M, 2, 16)
            elif hi - lo <= 160:
                _resident_dq(*tensors, *where, HKV * TOPK, HQ, HKV, D, BLOCK_D, BLOCK_M, 2, 32)
            else:
                _resident_dq(*tensors, *where, HKV * TOPK, HQ, HKV, D, BLOCK_D, BLOCK_M, 2, 64)
        else:
            for start in range(first, first + count, BLOCK_M // G):
                valid, head = packed_rows(
                    entries_ptr, start, tl.minimum(first + count - start, BLOCK_M // G), kv, HQ, G, BLOCK_M, HKV * TOPK
                )
                q = load_rows(q_ptr, head * D, valid, D, BLOCK_D)
                do = load_rows(do_ptr, head * D, valid, D, BLOCK_D)
                lse, delta = load_stats(stats_ptr, head, valid, True)
                dq = dq_keys(q, do, lse, delta, k_ptr, v_ptr, None, kv, lo, hi, scale, HKV, D, BLOCK_D, BLOCK_M, BLOCK_N, 0, PRECISION)
                out = _partial_rows(entries_ptr, start, valid, entry0, G, BLOCK_M)
                store_rows(part_ptr, out * D, dq, valid, D, BLOCK_D)


@launcher
@triton.jit(do_not_specialize=["num_rows", "row0", "topk"])
def _sum_slots_kernel(
    part_ptr, ids_ptr, dq_ptr, num_rows, row0, topk, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    local = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = local < num_rows
    pair = local // G
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for slot in range(topk):
        chosen = tl.load(ids_ptr + (row0 // G + pair) * topk + slot, mask=valid, other=-1) >= 0
        acc += load_rows(part_ptr, ((pair * topk + slot) * G + local % G) * D, chosen, D, BLOCK_D).to(tl.float32)
    store_rows(dq_ptr, (row0 + local) * D, acc, valid, D, BLOCK_D, ACCUMULATE)


def _hottest_first(offsets: Tensor, csr_offsets: Tensor, num_kv_heads: int, block_n: int, num_tokens: int) -> Tensor:
    """Tile map of the blocks, first those that most queries chose: their programs take longest, and none of them begins last."""
    order = csr_offsets.diff().view(num_kv_heads, -1).sum(0).argsort(descending=True)
    cu = torch.nn.functional.pad(offsets.diff()[order].cumsum(0, dtype=torch.int32), (1, 0))
    starts = torch.nn.functional.pad(offsets[:-1][order], (0, 1))
    (tiles,) = tile_maps((torch.stack([cu, starts]), num_tokens, block_n))
    tiles[0, 0] = order[tiles[0, 0]]
    return tiles


def selected_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, topk_indices: Tensor, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Contiguous q, k, v → o like q, lse [T,Hq], and of `invert` what the backward takes (`inverse_map_sizes`)."""
    (t, hq, d), hkv, topk, num_blocks = q.shape, k.shape[1], topk_indices.shape[2], offsets.shape[0] - 1
    if by_query(q, topk_indices, num_blocks):
        o, lse = forward_by_query(q, k, v, topk_indices, offsets, scale)
        return o, lse, offsets.new_empty(0), offsets.new_empty(0), offsets.new_empty(0)
    chunk = chunk_queries(q, topk_indices)
    csr_offsets, csr_indices, chunks = invert(topk_indices, num_blocks, chunk)
    o = torch.empty_like(q)
    lse = torch.empty(t, hq, dtype=lse_dtype(q), device=q.device)
    if t == 0:
        return o, lse, csr_offsets, csr_indices, chunks
    config = _config("fwd", d, q.dtype)
    sizes = dict(TOPK=topk, HQ=hq, HKV=hkv, D=d, BLOCK_D=block_d(d), PRECISION=precision(q))
    norms = None if config["ENTRIES"] and t < 192 * num_blocks else key_norms(k)  # blocks that are streamed, on average
    share = _entries(config, hq // hkv)
    (tiles,) = tile_maps((chunks, min(chunk, t) * hkv * topk, share), chunks=cdiv(t, chunk))
    part = torch.empty(min(chunk, t) * hq * topk, d, dtype=q.dtype, device=q.device)
    part_lse = torch.empty(min(chunk, t) * hq * topk, dtype=lse.dtype, device=q.device)
    for c in range(tiles.shape[0]):
        n = min(chunk, t - c * chunk)
        _fwd_kernel[(tiles.shape[2],)](
            q, k, v, part, part_lse, norms, offsets, csr_indices, tiles[c], tiles.shape[2], scale, num_blocks,
            c * chunk * hkv * topk, BOUNDED=norms is not None, **sizes, **config,
        )  # fmt: skip
        grid = (cdiv(n * hq, 64),)
        _combine_kernel[grid](
            part, part_lse, topk_indices, o, lse, n * hq, c * chunk * hq, topk, G=hq // hkv, D=d, BLOCK_D=block_d(d), BLOCK_M=64
        )
    return o, lse, csr_offsets, csr_indices, chunks


def _dq_by_block(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, stats: Tensor, topk_indices: Tensor, offsets: Tensor, csr_indices: Tensor, tiles: Tensor,
    chunk: int, scale: float, dq: Tensor, accumulate: bool, config: dict,
) -> None:  # fmt: skip
    """Writes dq, or adds to it, chunk by chunk of queries; tiles: of each."""
    (t, hq, d), hkv, topk, num_blocks = q.shape, k.shape[1], topk_indices.shape[2], offsets.shape[0] - 1
    part = torch.empty(min(chunk, t) * hq * topk, d, dtype=q.dtype, device=q.device)
    for c in range(tiles.shape[0]):
        n = min(chunk, t - c * chunk)
        _dq_kernel[(tiles.shape[2],)](
            q, k, v, do, stats, part, offsets, csr_indices, tiles[c], tiles.shape[2], scale, num_blocks, c * chunk * hkv * topk,
            TOPK=topk, HQ=hq, HKV=hkv, D=d, BLOCK_D=block_d(d), PRECISION=precision(q), **config,
        )  # fmt: skip
        grid = (cdiv(n * hq, 64),)
        _sum_slots_kernel[grid](
            part, topk_indices, dq, n * hq, c * chunk * hq, topk, G=hq // hkv, D=d, BLOCK_D=block_d(d), BLOCK_M=64, ACCUMULATE=accumulate
        )


def selected_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, stats: Tensor, topk_indices: Tensor, offsets: Tensor, csr_offsets: Tensor,
    csr_indices: Tensor, chunks: Tensor, scale: float, out: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv; tensors given in `out` are added to in place. Where the forward needed no inverse map it is made here."""
    (t, hq, d), hkv, topk, num_blocks = q.shape, k.shape[1], topk_indices.shape[2], offsets.shape[0] - 1
    dq = torch.empty_like(q) if out[0] is None else out[0]
    if t == 0:
        return dq, torch.empty_like(k), torch.empty_like(v)
    config_k = _config("dkv", d, q.dtype)
    of_keys = offsets, t, config_k["BLOCK_N"]
    if by_query(q, topk_indices, num_blocks):
        dq_by_query(q, k, v, do, stats, topk_indices, offsets, scale, dq, out[0] is not None)
        csr_offsets, csr_indices, _ = invert(topk_indices, num_blocks, t)
        tiles_k = tile_maps(of_keys)[0] if t < MANY else None
    else:
        chunk = chunk_queries(q, topk_indices)
        config = _config("dq", d, q.dtype)
        of_queries = chunks, min(chunk, t) * hkv * topk, _entries(config, hq // hkv)
        tiles, *rest = tile_maps(of_queries, *([of_keys] if t < MANY else []), chunks=cdiv(t, chunk))
        tiles_k = rest[0] if rest else None
        _dq_by_block(q, k, v, do, stats, topk_indices, offsets, csr_indices, tiles, chunk, scale, dq, out[0] is not None, config)
    if tiles_k is None:
        tiles_k = _hottest_first(offsets, csr_offsets, hkv, config_k["BLOCK_N"], t)
    splits = 1 << min(MAX_SPLITS, t // 4096).bit_length() >> 1 or 1  # a block that every query chose is not one program's work
    args = (q, k, v, do, stats, csr_offsets, num_blocks, csr_indices, hkv * topk, tiles_k, None, 0, scale, out[1:], splits, config_k)
    return dq, *launch_dkv(*args)
