"""Selected attention: every (query, key/value head) attends to all tokens of the selection blocks it chose.

Block-major: a tile holds (query, head) rows that chose one block, so K and V are read once for BLOCK_M rows instead of once a query.
Each (query, chosen block) pair is an *entry* e = (t Hkv + kv) topk + slot; the inverse map sorts entries stably by bucket
(chunk of queries, kv, block): csr_indices lists them, csr_offsets says where each bucket begins, −1 ids come last.

    topk_indices of 3 queries, topk 2, S 2:  [1 −] [0 1] [1 −]       csr_offsets 0 1 4     csr_indices 2 | 0 3 4 | (1 5)

forward   o_e, lse_e of one block a row   →  combine: lse = log Σ_e exp(lse_e), o = Σ_e exp(lse_e − lse) o_e
backward  dq_e a row → summed over slots; dk, dv: one program a key tile, over the rows of its bucket, chunk after chunk
Partial results live for one chunk of queries at a time (at most SCRATCH bytes). No atomics: two runs are bitwise equal.
q, o [T,Hq,D]; k, v [T,Hkv,D]; topk_indices [T,Hkv,topk] int32; offsets [S+1] int32; lse, delta [T,Hq] fp32.
Source: arXiv 2505.17412, Algorithm 1, inverted; inverse map as in fla-org/flash-linear-attention.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LN2, LOG2E, block_d, load_rows, precision, store_rows, tile_rows, tile_segments

SCRATCH = 160 * 2**20
MAX_SPLITS = 4


def _config(kernel: str, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float32:
        return dict(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=1)
    if kernel == "dkv":
        return dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=3)
    return dict(BLOCK_M=128, BLOCK_N=32, num_warps=4 if head_dim <= 64 else 8, num_stages=2)


def chunk_queries(num_heads: int, head_dim: int, topk: int, itemsize: int) -> int:
    """Queries a chunk: their partial results fill SCRATCH."""
    return max(1, SCRATCH // (num_heads * topk * (head_dim * itemsize + 4)))


def invert(topk_indices: Tensor, num_blocks: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The inverse map: csr_offsets [chunks · Hkv · S + 1], csr_indices [T · Hkv · topk], both int32, by one stable sort."""
    t, hkv, topk = topk_indices.shape
    chunks = triton.cdiv(t, chunk)
    device = topk_indices.device
    place = torch.arange(t, device=device, dtype=torch.int32)[:, None] // chunk * hkv + torch.arange(hkv, device=device, dtype=torch.int32)
    bucket = torch.where(topk_indices >= 0, topk_indices + (place * num_blocks)[..., None], chunks * hkv * num_blocks)
    bucket, entries = torch.sort(bucket.flatten(), stable=True)
    buckets = torch.arange(chunks * hkv * num_blocks + 1, device=device, dtype=torch.int32)
    return torch.searchsorted(bucket, buckets, out_int32=True), entries.int()


@triton.jit
def _bucket_rows(csr_offsets_ptr, csr_indices_ptr, tiles_ptr, bucket0, num_buckets, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Bucket of this program's tile (counted from the chunk's first), its entries, heads and which rows are real."""
    tile = tl.load(csr_offsets_ptr + bucket0) * G // BLOCK_M + bucket0 + tl.program_id(0)
    end_tile = tl.load(csr_offsets_ptr + bucket0 + num_buckets) * G // BLOCK_M + bucket0 + num_buckets
    inside = tile < end_tile
    tile = tl.minimum(tile, end_tile - 1)
    bucket = tl.load(tiles_ptr + tile)
    start, num_rows, first = tile_rows(csr_offsets_ptr, bucket, tile, G, BLOCK_M)
    row = first + tl.arange(0, BLOCK_M)
    valid = (row < num_rows) & inside
    entry = tl.load(csr_indices_ptr + start + row // G, mask=valid, other=0)
    return bucket - bucket0, (first < num_rows) & inside, entry, row % G, valid


@triton.jit(do_not_specialize=["bucket0", "num_buckets", "num_blocks", "topk", "entry0"])
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, offsets_ptr, csr_offsets_ptr, csr_indices_ptr, tiles_ptr, scale_log2, bucket0,
    num_buckets, num_blocks, topk, entry0, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = HQ // HKV
    bucket, any_row, entry, h, valid = _bucket_rows(csr_offsets_ptr, csr_indices_ptr, tiles_ptr, bucket0, num_buckets, G, BLOCK_M)
    if any_row:
        kv, block = bucket // num_blocks, bucket % num_blocks
        head = (entry // (topk * HKV)).to(tl.int64) * HQ + kv * G + h
        q = load_rows(q_ptr, head * D, valid, D, BLOCK_D)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        end = tl.load(offsets_ptr + block + 1)
        for start in range(tl.load(offsets_ptr + block), end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            at = (n.to(tl.int64) * HKV + kv) * D
            k = load_rows(k_ptr, at, n < end, D, BLOCK_D)
            v = load_rows(v_ptr, at, n < end, D, BLOCK_D)
            s = tl.dot(q, k.T, input_precision=PRECISION)
            s = tl.where((n < end)[None, :], s, -float("inf"))
            m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
            p = tl.exp2(s * scale_log2 - m_new[:, None])
            alpha = tl.exp2(m_i - m_new)
            l_i = l_i * alpha + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
            m_i = m_new
        out = (entry - entry0).to(tl.int64) * G + h
        store_rows(part_ptr, out * D, acc / l_i[:, None], valid, D, BLOCK_D)
        tl.store(part_lse_ptr + out, m_i * LN2 + tl.log(l_i), mask=valid)


@triton.jit(do_not_specialize=["num_rows", "row0", "topk"])
def _combine_kernel(
    part_ptr, part_lse_ptr, ids_ptr, o_ptr, lse_ptr, num_rows, row0, topk, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    local = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (query, head) of the chunk
    valid = local < num_rows
    pair = local // G  # (query, kv head)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for slot in range(topk):
        chosen = tl.load(ids_ptr + (row0 // G + pair) * topk + slot, mask=valid, other=-1) >= 0
        lse = tl.load(part_lse_ptr + (pair * topk + slot) * G + local % G, mask=chosen, other=-float("inf"))
        m_i = tl.maximum(m_i, lse)
    base = tl.where(m_i == -float("inf"), 0.0, m_i)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for slot in range(topk):
        chosen = tl.load(ids_ptr + (row0 // G + pair) * topk + slot, mask=valid, other=-1) >= 0
        entry = (pair * topk + slot) * G + local % G
        w = tl.exp(tl.load(part_lse_ptr + entry, mask=chosen, other=-float("inf")) - base)
        l_i += w
        acc += w[:, None] * load_rows(part_ptr, entry * D, chosen, D, BLOCK_D).to(tl.float32)
    empty = l_i == 0.0  # nothing chosen: o = 0, lse = −inf
    l_i = tl.where(empty, 1.0, l_i)
    store_rows(o_ptr, (row0 + local) * D, acc / l_i[:, None], valid, D, BLOCK_D)
    tl.store(lse_ptr + row0 + local, tl.where(empty, -float("inf"), m_i + tl.log(l_i)), mask=valid)


@triton.jit(do_not_specialize=["bucket0", "num_buckets", "num_blocks", "topk", "entry0"])
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, part_ptr, offsets_ptr, csr_offsets_ptr, csr_indices_ptr, tiles_ptr, scale, bucket0,
    num_buckets, num_blocks, topk, entry0, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = HQ // HKV
    bucket, any_row, entry, h, valid = _bucket_rows(csr_offsets_ptr, csr_indices_ptr, tiles_ptr, bucket0, num_buckets, G, BLOCK_M)
    if any_row:
        kv, block = bucket // num_blocks, bucket % num_blocks
        head = (entry // (topk * HKV)).to(tl.int64) * HQ + kv * G + h
        q = load_rows(q_ptr, head * D, valid, D, BLOCK_D)
        do = load_rows(do_ptr, head * D, valid, D, BLOCK_D)
        lse = tl.load(lse_ptr + head, mask=valid, other=float("inf")) * LOG2E
        delta = tl.load(delta_ptr + head, mask=valid, other=0.0)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        end = tl.load(offsets_ptr + block + 1)
        for start in range(tl.load(offsets_ptr + block), end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            at = (n.to(tl.int64) * HKV + kv) * D
            k = load_rows(k_ptr, at, n < end, D, BLOCK_D)
            v = load_rows(v_ptr, at, n < end, D, BLOCK_D)
            p = tl.exp2(tl.dot(q, k.T, input_precision=PRECISION) * (scale * LOG2E) - lse[:, None])
            p = tl.where((n < end)[None, :], p, 0.0)
            ds = p * (tl.dot(do, v.T, input_precision=PRECISION) - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        out = (entry - entry0).to(tl.int64) * G + h
        store_rows(part_ptr, out * D, dq * scale, valid, D, BLOCK_D)


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


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "chunks", "topk"])
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, offsets_ptr, csr_offsets_ptr, csr_indices_ptr, tiles_ptr,
    num_tokens, num_blocks, chunks, topk, scale, SPLITS: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = HQ // HKV
    tile, rest = tl.program_id(0) // (HKV * SPLITS), tl.program_id(0) % (HKV * SPLITS)
    kv, split = rest % HKV, rest // HKV
    block = tl.load(tiles_ptr + tile)
    start_k, num_keys, first = tile_rows(offsets_ptr, block, tile, 1, BLOCK_N)
    if first < num_keys:
        n = first + tl.arange(0, BLOCK_N)
        valid_n = n < num_keys
        at = ((start_k + n).to(tl.int64) * HKV + kv) * D
        k = load_rows(k_ptr, at, valid_n, D, BLOCK_D)
        v = load_rows(v_ptr, at, valid_n, D, BLOCK_D)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        share = tl.cdiv(chunks, SPLITS)
        for chunk in range(split * share, tl.minimum((split + 1) * share, chunks)):
            bucket = (chunk * HKV + kv) * num_blocks + block
            start_e = tl.load(csr_offsets_ptr + bucket)
            num_rows = (tl.load(csr_offsets_ptr + bucket + 1) - start_e) * G
            for start in range(0, num_rows, BLOCK_M):
                row = start + tl.arange(0, BLOCK_M)
                valid = row < num_rows
                entry = tl.load(csr_indices_ptr + start_e + row // G, mask=valid, other=0)
                head = (entry // (topk * HKV)).to(tl.int64) * HQ + kv * G + row % G
                q = load_rows(q_ptr, head * D, valid, D, BLOCK_D)
                do = load_rows(do_ptr, head * D, valid, D, BLOCK_D)
                lse = tl.load(lse_ptr + head, mask=valid, other=float("inf")) * LOG2E
                delta = tl.load(delta_ptr + head, mask=valid, other=0.0)
                p = tl.exp2(tl.dot(k, q.T, input_precision=PRECISION) * (scale * LOG2E) - lse[None, :])  # [BLOCK_N, BLOCK_M]
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
                ds = p * (tl.dot(v, do.T, input_precision=PRECISION) - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        out = at + split.to(tl.int64) * num_tokens * HKV * D
        store_rows(dk_ptr, out, dk * scale, valid_n, D, BLOCK_D, ACCUMULATE)
        store_rows(dv_ptr, out, dv, valid_n, D, BLOCK_D, ACCUMULATE)


def selected_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, topk_indices: Tensor, offsets: Tensor, csr_offsets: Tensor, csr_indices: Tensor, chunk: int,
    scale: float, config: dict | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Contiguous q, k, v and the inverse map of `invert(topk_indices, S, chunk)` → o like q, lse [T,Hq] fp32."""
    (t, hq, d), hkv, topk, num_blocks = q.shape, k.shape[1], topk_indices.shape[2], offsets.shape[0] - 1
    o = torch.empty_like(q)
    lse = torch.empty(t, hq, dtype=torch.float32, device=q.device)
    if t == 0:
        return o, lse
    config = config or _config("fwd", d, q.dtype)
    sizes = dict(HQ=hq, HKV=hkv, D=d, BLOCK_D=block_d(d), PRECISION=precision(q))
    tiles = tile_segments(csr_offsets, csr_indices.shape[0], hq // hkv, config["BLOCK_M"])
    part = torch.empty(min(chunk, t) * hq * topk, d, dtype=q.dtype, device=q.device)
    part_lse = torch.empty(min(chunk, t) * hq * topk, dtype=torch.float32, device=q.device)
    for c, grid, n in _chunks(t, chunk, hq, hkv, topk, num_blocks, config["BLOCK_M"]):
        _fwd_kernel[grid](
            q, k, v, part, part_lse, offsets, csr_offsets, csr_indices, tiles, scale * LOG2E.value, c * hkv * num_blocks,
            hkv * num_blocks, num_blocks, topk, c * chunk * hkv * topk, **sizes, **config,
        )  # fmt: skip
        grid = (triton.cdiv(n * hq, 64),)
        _combine_kernel[grid](
            part, part_lse, topk_indices, o, lse, n * hq, c * chunk * hq, topk, G=hq // hkv, D=d, BLOCK_D=block_d(d), BLOCK_M=64
        )
    return o, lse


def selected_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, topk_indices: Tensor, offsets: Tensor, csr_offsets: Tensor,
    csr_indices: Tensor, chunk: int, scale: float, out: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    configs: tuple[dict | None, dict | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv; tensors given in `out` are added to in place."""
    (t, hq, d), hkv, topk, num_blocks = q.shape, k.shape[1], topk_indices.shape[2], offsets.shape[0] - 1
    dq, dk, dv = (torch.empty_like(x) if y is None else y for x, y in zip((q, k, v), out, strict=True))
    if t == 0:
        return dq, dk, dv
    sizes = dict(HQ=hq, HKV=hkv, D=d, BLOCK_D=block_d(d), PRECISION=precision(q))
    config = configs[0] or _config("dq", d, q.dtype)
    tiles = tile_segments(csr_offsets, csr_indices.shape[0], hq // hkv, config["BLOCK_M"])
    part = torch.empty(min(chunk, t) * hq * topk, d, dtype=q.dtype, device=q.device)
    for c, grid, n in _chunks(t, chunk, hq, hkv, topk, num_blocks, config["BLOCK_M"]):
        _dq_kernel[grid](
            q, k, v, do, lse, delta, part, offsets, csr_offsets, csr_indices, tiles, scale, c * hkv * num_blocks, hkv * num_blocks,
            num_blocks, topk, c * chunk * hkv * topk, **sizes, **config,
        )  # fmt: skip
        grid = (triton.cdiv(n * hq, 64),)
        _sum_slots_kernel[grid](
            part, topk_indices, dq, n * hq, c * chunk * hq, topk, G=hq // hkv, D=d, BLOCK_D=block_d(d), BLOCK_M=64,
            ACCUMULATE=out[0] is not None,
        )  # fmt: skip
    config = configs[1] or _config("dkv", d, q.dtype)
    tiles = tile_segments(offsets, t, 1, config["BLOCK_N"])
    chunks = triton.cdiv(t, chunk)
    splits = 1 << (min(MAX_SPLITS, chunks).bit_length() - 1)
    whole = splits == 1
    dk_out, dv_out = (dk, dv) if whole else torch.empty(2, splits, t, hkv, d, dtype=torch.float32, device=q.device)
    grid = (tiles.shape[0] * hkv * splits,)
    _dkv_kernel[grid](
        q, k, v, do, lse, delta, dk_out, dv_out, offsets, csr_offsets, csr_indices, tiles, t, num_blocks, chunks, topk, scale,
        SPLITS=splits, ACCUMULATE=whole and out[1] is not None, **sizes, **config,
    )  # fmt: skip
    if not whole:
        for x, parts, given in ((dk, dk_out, out[1]), (dv, dv_out, out[2])):
            x.copy_(parts.sum(0) if given is None else parts.sum(0).add_(given))
    return dq, dk, dv


def _chunks(t: int, chunk: int, hq: int, hkv: int, topk: int, num_blocks: int, block_m: int):
    """(number, grid of the row tiles, queries) of every chunk; the grid is an upper bound, see common.py."""
    for c in range(triton.cdiv(t, chunk)):
        n = min(chunk, t - c * chunk)
        yield c, (n * hq * topk // block_m + 1 + hkv * num_blocks,), n
