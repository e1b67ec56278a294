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

from .common import LOG2E, block_d, load_rows, load_tile, precision, store_rows, tile_map
from .inner import dkv_rows, dq_keys, forward_rows, packed_rows
from .varlen_attention import largest_norm

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


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "entry0"])
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, k_norm_ptr, offsets_ptr, entries_ptr, tiles_ptr, num_tiles, scale_log2, num_blocks,
    entry0, TOPK: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = HQ // HKV
    bucket, first, count = load_tile(tiles_ptr, tl.program_id(0), num_tiles)
    if count > 0:
        kv, block = bucket // num_blocks, bucket % num_blocks
        lo, hi = tl.load(offsets_ptr + block), tl.load(offsets_ptr + block + 1)
        valid, head = packed_rows(entries_ptr, first, count, kv, HQ, G, BLOCK_M, HKV * TOPK)
        q = load_rows(q_ptr, head * D, valid, D, BLOCK_D)
        k_norm = 0.0
        if BOUNDED:
            k_norm = tl.load(k_norm_ptr + kv)
        o, lse = forward_rows(
            q, k_norm, k_ptr, v_ptr, None, kv, lo, hi, scale_log2, HKV, D, BLOCK_D, BLOCK_M, BLOCK_N, 0, BOUNDED, PRECISION
        )
        out = _partial_rows(entries_ptr, first, valid, entry0, G, BLOCK_M)
        store_rows(part_ptr, out * D, o, valid, D, BLOCK_D)
        tl.store(part_lse_ptr + out, lse, mask=valid)


@triton.jit
def _partial_rows(entries_ptr, first, valid, entry0, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows of the partial results: (entry of the chunk, head)."""
    r = tl.arange(0, BLOCK_M)
    return (tl.load(entries_ptr + first + r // G, mask=valid, other=0) - entry0).to(tl.int64) * G + r % G


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


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "entry0"])
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, part_ptr, offsets_ptr, entries_ptr, tiles_ptr, num_tiles, scale, num_blocks,
    entry0, TOPK: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = HQ // HKV
    bucket, first, count = load_tile(tiles_ptr, tl.program_id(0), num_tiles)
    if count > 0:
        kv, block = bucket // num_blocks, bucket % num_blocks
        lo, hi = tl.load(offsets_ptr + block), tl.load(offsets_ptr + block + 1)
        valid, head = packed_rows(entries_ptr, first, count, kv, HQ, G, BLOCK_M, HKV * TOPK)
        q = load_rows(q_ptr, head * D, valid, D, BLOCK_D)
        do = load_rows(do_ptr, head * D, valid, D, BLOCK_D)
        lse = tl.load(lse_ptr + head, mask=valid, other=float("inf"))
        delta = tl.load(delta_ptr + head, mask=valid, other=0.0)
        dq = dq_keys(q, do, lse, delta, k_ptr, v_ptr, None, kv, lo, hi, scale, HKV, D, BLOCK_D, BLOCK_M, BLOCK_N, 0, PRECISION)
        out = _partial_rows(entries_ptr, first, valid, entry0, G, BLOCK_M)
        store_rows(part_ptr, out * D, dq, valid, D, BLOCK_D)


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


@triton.jit(do_not_specialize=["num_tiles", "num_tokens", "num_blocks", "chunks"])
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, csr_offsets_ptr, entries_ptr, tiles_ptr, num_tiles, num_tokens,
    num_blocks, chunks, scale, TOPK: tl.constexpr, SPLITS: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, rest = tl.program_id(0) // (HKV * SPLITS), tl.program_id(0) % (HKV * SPLITS)
    kv, split = rest % HKV, rest // HKV
    block, first, count = load_tile(tiles_ptr, tile, num_tiles)
    if count > 0:
        valid, at = packed_rows(None, first, count, kv, HKV, 1, BLOCK_N, 0)
        k = load_rows(k_ptr, at * D, valid, D, BLOCK_D)
        v = load_rows(v_ptr, at * D, valid, D, BLOCK_D)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        share = tl.cdiv(chunks, SPLITS)
        for chunk in range(split * share, tl.minimum((split + 1) * share, chunks)):
            bucket = csr_offsets_ptr + (chunk * HKV + kv) * num_blocks + block
            lo, hi = tl.load(bucket), tl.load(bucket + 1)
            dk, dv = dkv_rows(
                dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, entries_ptr, kv, lo, hi, scale, HQ, HQ // HKV, D, BLOCK_D, BLOCK_M,
                HKV * TOPK, PRECISION,
            )  # fmt: skip
        out = (at + split.to(tl.int64) * num_tokens * HKV) * D
        store_rows(dk_ptr, out, dk * scale, valid, D, BLOCK_D, ACCUMULATE)
        store_rows(dv_ptr, out, dv, valid, D, BLOCK_D, ACCUMULATE)


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
    sizes = dict(TOPK=topk, HQ=hq, HKV=hkv, D=d, BLOCK_D=block_d(d), PRECISION=precision(q))
    k_norm = largest_norm(k)
    tiles = tile_map(csr_offsets, min(chunk, t) * hkv * topk, config["BLOCK_M"] * hkv // hq, triton.cdiv(t, chunk))
    part = torch.empty(min(chunk, t) * hq * topk, d, dtype=q.dtype, device=q.device)
    part_lse = torch.empty(min(chunk, t) * hq * topk, dtype=torch.float32, device=q.device)
    for c, tiles_c in enumerate(tiles):
        n = min(chunk, t - c * chunk)
        _fwd_kernel[(tiles.shape[2],)](
            q, k, v, part, part_lse, k_norm, offsets, csr_indices, tiles_c, tiles.shape[2], scale * LOG2E.value, num_blocks,
            c * chunk * hkv * topk, BOUNDED=k_norm is not None, **sizes, **config,
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
    sizes = dict(TOPK=topk, HQ=hq, HKV=hkv, D=d, BLOCK_D=block_d(d), PRECISION=precision(q))
    chunks = triton.cdiv(t, chunk)
    config = configs[0] or _config("dq", d, q.dtype)
    tiles = tile_map(csr_offsets, min(chunk, t) * hkv * topk, config["BLOCK_M"] * hkv // hq, chunks)
    part = torch.empty(min(chunk, t) * hq * topk, d, dtype=q.dtype, device=q.device)
    for c, tiles_c in enumerate(tiles):
        n = min(chunk, t - c * chunk)
        _dq_kernel[(tiles.shape[2],)](
            q, k, v, do, lse, delta, part, offsets, csr_indices, tiles_c, tiles.shape[2], scale, num_blocks, c * chunk * hkv * topk,
            **sizes, **config,
        )  # fmt: skip
        grid = (triton.cdiv(n * hq, 64),)
        _sum_slots_kernel[grid](
            part, topk_indices, dq, n * hq, c * chunk * hq, topk, G=hq // hkv, D=d, BLOCK_D=block_d(d), BLOCK_M=64,
            ACCUMULATE=out[0] is not None,
        )  # fmt: skip
    config = configs[1] or _config("dkv", d, q.dtype)
    tiles = tile_map(offsets, t, config["BLOCK_N"])
    splits = 1 << (min(MAX_SPLITS, chunks).bit_length() - 1)
    whole = splits == 1
    dk_out, dv_out = (dk, dv) if whole else torch.empty(2, splits, t, hkv, d, dtype=torch.float32, device=q.device)
    _dkv_kernel[(tiles.shape[2] * hkv * splits,)](
        q, k, v, do, lse, delta, dk_out, dv_out, csr_offsets, csr_indices, tiles, tiles.shape[2], t, num_blocks, chunks, scale,
        SPLITS=splits, ACCUMULATE=whole and out[1] is not None, **sizes, **config,
    )  # fmt: skip
    if not whole:
        for x, parts, given in ((dk, dk_out, out[1]), (dv, dv_out, out[2])):
            x.copy_(parts.sum(0) if given is None else parts.sum(0).add_(given))
    return dq, dk, dv

