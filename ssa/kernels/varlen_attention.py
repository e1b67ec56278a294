"""Variable-length attention with lse: the compression branch (segments = samples) and the window branch (segments = windows).

    s = scale q kᵀ     lse = log Σ exp(s)     p = exp(s − lse)     o = p v
    dv = pᵀ do         ds = p (do vᵀ − delta) with delta = do·o − dlse     dq = scale ds k     dk = scale dsᵀ q

q, o, do, dq [T,Hq,D]; k, v, dk, dv [N,Hkv,D]; lse, delta [T,Hq] fp32; cu_q, cu_k [n+1] int32; index [T] int32 or none: rows of both
sides in segment order (windows that are not contiguous). Rows are (query, head) pairs, see common.py. Grid: (tiles · Hkv).
The backward makes seven products in two kernels instead of five in one: no atomics, so two runs are bitwise equal.
Source: FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2; arXiv 2505.17412, Eq. 6.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LN2, LOG2E, block_d, load_rows, precision, store_rows, tile_rows, tile_segments


def _config(kernel: str, head_dim: int, dtype: torch.dtype, long: bool) -> dict[str, int]:
    """Tile sizes and launch settings; `long`: segments of many keys (compression) rather than windows."""
    if dtype == torch.float32:
        return dict(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=1)
    if kernel == "fwd":
        return dict(BLOCK_M=128, BLOCK_N=64 if long else 32, num_warps=4 if head_dim <= 32 else 8, num_stages=3 if long else 2)
    if kernel == "dq":
        return dict(BLOCK_M=128, BLOCK_N=64 if long else 32, num_warps=8, num_stages=3 if long else 2)
    return dict(BLOCK_M=64, BLOCK_N=128 if long else 64, num_warps=8 if long else 4, num_stages=3 if long else 2)


@triton.jit
def _row_offsets(index_ptr, position, mask, GATHER: tl.constexpr):
    if GATHER:
        return tl.load(index_ptr + position, mask=mask, other=0).to(tl.int64)
    return position.to(tl.int64)


@triton.jit
def _fwd_inner(
    acc, m_i, l_i, q, k_ptr, v_ptr, index_ptr, kv, lo, hi, scale_log2, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, GATHER: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in range(lo, hi, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        valid = n < hi
        at = (_row_offsets(index_ptr, n, valid, GATHER) * HKV + kv) * D
        k = load_rows(k_ptr, at, valid, D, BLOCK_D)
        v = load_rows(v_ptr, at, valid, D, BLOCK_D)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        if MASKED:
            s = tl.where(valid[None, :], s, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_new
    return acc, m_i, l_i


@triton.jit
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, index_ptr, tiles_ptr, scale_log2, HQ: tl.constexpr, HKV: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = HQ // HKV
    tile, kv = tl.program_id(0) // HKV, tl.program_id(0) % HKV
    segment = tl.load(tiles_ptr + tile)
    start_q, num_rows, first = tile_rows(cu_q_ptr, segment, tile, G, BLOCK_M)
    if first < num_rows:
        row = first + tl.arange(0, BLOCK_M)
        valid = row < num_rows
        head = _row_offsets(index_ptr, start_q + row // G, valid, GATHER) * HQ + kv * G + row % G
        q = load_rows(q_ptr, head * D, valid, D, BLOCK_D)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        lo, hi = tl.load(cu_k_ptr + segment), tl.load(cu_k_ptr + segment + 1)
        full = lo + (hi - lo) // BLOCK_N * BLOCK_N
        acc, m_i, l_i = _fwd_inner(
            acc, m_i, l_i, q, k_ptr, v_ptr, index_ptr, kv, lo, full, scale_log2, HKV, D, BLOCK_D, BLOCK_N, GATHER, False, PRECISION
        )
        acc, m_i, l_i = _fwd_inner(
            acc, m_i, l_i, q, k_ptr, v_ptr, index_ptr, kv, full, hi, scale_log2, HKV, D, BLOCK_D, BLOCK_N, GATHER, True, PRECISION
        )
        empty = l_i == 0.0  # no keys at all: o = 0, lse = −inf
        l_i = tl.where(empty, 1.0, l_i)
        acc = acc / l_i[:, None]
        lse = tl.where(empty, -float("inf"), m_i * LN2 + tl.log(l_i))
        store_rows(o_ptr, head * D, acc, valid, D, BLOCK_D)
        tl.store(lse_ptr + head, lse, mask=valid)


@triton.jit
def _dq_inner(
    dq, q, do, lse, delta, k_ptr, v_ptr, index_ptr, kv, lo, hi, scale_log2, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, GATHER: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in range(lo, hi, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        valid = n < hi
        at = (_row_offsets(index_ptr, n, valid, GATHER) * HKV + kv) * D
        k = load_rows(k_ptr, at, valid, D, BLOCK_D)
        v = load_rows(v_ptr, at, valid, D, BLOCK_D)
        p = tl.exp2(tl.dot(q, k.T, input_precision=PRECISION) * scale_log2 - lse[:, None])
        if MASKED:
            p = tl.where(valid[None, :], p, 0.0)
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr, index_ptr, tiles_ptr, scale, HQ: tl.constexpr,
    HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GATHER: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = HQ // HKV
    tile, kv = tl.program_id(0) // HKV, tl.program_id(0) % HKV
    segment = tl.load(tiles_ptr + tile)
    start_q, num_rows, first = tile_rows(cu_q_ptr, segment, tile, G, BLOCK_M)
    if first < num_rows:
        row = first + tl.arange(0, BLOCK_M)
        valid = row < num_rows
        head = _row_offsets(index_ptr, start_q + row // G, valid, GATHER) * HQ + kv * G + row % G
        q = load_rows(q_ptr, head * D, valid, D, BLOCK_D)
        do = load_rows(do_ptr, head * D, valid, D, BLOCK_D)
        lse = tl.load(lse_ptr + head, mask=valid, other=float("inf")) * LOG2E
        delta = tl.load(delta_ptr + head, mask=valid, other=0.0)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        lo, hi = tl.load(cu_k_ptr + segment), tl.load(cu_k_ptr + segment + 1)
        full = lo + (hi - lo) // BLOCK_N * BLOCK_N
        dq = _dq_inner(
            dq, q, do, lse, delta, k_ptr, v_ptr, index_ptr, kv, lo, full, scale * LOG2E, HKV, D, BLOCK_D, BLOCK_N, GATHER, False, PRECISION
        )
        dq = _dq_inner(
            dq, q, do, lse, delta, k_ptr, v_ptr, index_ptr, kv, full, hi, scale * LOG2E, HKV, D, BLOCK_D, BLOCK_N, GATHER, True, PRECISION
        )
        store_rows(dq_ptr, head * D, dq * scale, valid, D, BLOCK_D, ACCUMULATE)


@triton.jit(do_not_specialize=["num_keys"])
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr, index_ptr, tiles_ptr, num_keys, scale,
    SPLITS: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, GATHER: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = HQ // HKV
    tile, rest = tl.program_id(0) // (HKV * SPLITS), tl.program_id(0) % (HKV * SPLITS)
    kv, split = rest % HKV, rest // HKV
    segment = tl.load(tiles_ptr + tile)
    start_k, num_segment_keys, first = tile_rows(cu_k_ptr, segment, tile, 1, BLOCK_N)
    if first < num_segment_keys:
        n = first + tl.arange(0, BLOCK_N)
        valid_n = n < num_segment_keys
        at = (_row_offsets(index_ptr, start_k + n, valid_n, GATHER) * HKV + kv) * D
        k = load_rows(k_ptr, at, valid_n, D, BLOCK_D)
        v = load_rows(v_ptr, at, valid_n, D, BLOCK_D)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        start_q = tl.load(cu_q_ptr + segment)
        num_rows = (tl.load(cu_q_ptr + segment + 1) - start_q) * G
        share = tl.cdiv(tl.cdiv(num_rows, BLOCK_M), SPLITS) * BLOCK_M
        for start in range(split * share, tl.minimum((split + 1) * share, num_rows), BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            valid = row < num_rows
            head = _row_offsets(index_ptr, start_q + row // G, valid, GATHER) * HQ + kv * G + row % G
            q = load_rows(q_ptr, head * D, valid, D, BLOCK_D)
            do = load_rows(do_ptr, head * D, valid, D, BLOCK_D)
            lse = tl.load(lse_ptr + head, mask=valid, other=float("inf")) * LOG2E
            delta = tl.load(delta_ptr + head, mask=valid, other=0.0)
            p = tl.exp2(tl.dot(k, q.T, input_precision=PRECISION) * (scale * LOG2E) - lse[None, :])  # [BLOCK_N, BLOCK_M]
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            dp = tl.dot(v, do.T, input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        out = at + split.to(tl.int64) * num_keys * HKV * D
        store_rows(dk_ptr, out, dk * scale, valid_n, D, BLOCK_D, ACCUMULATE)
        store_rows(dv_ptr, out, dv, valid_n, D, BLOCK_D, ACCUMULATE)


@triton.jit(do_not_specialize=["num_rows"])
def _delta_kernel(o_ptr, do_ptr, dlse_ptr, delta_ptr, num_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < num_rows
    o = load_rows(o_ptr, row * D, valid, D, BLOCK_D).to(tl.float32)
    do = load_rows(do_ptr, row * D, valid, D, BLOCK_D).to(tl.float32)
    tl.store(delta_ptr + row, tl.sum(o * do, 1) - tl.load(dlse_ptr + row, mask=valid, other=0.0), mask=valid)


def attention_delta(o: Tensor, do: Tensor, dlse: Tensor) -> Tensor:
    """delta [T,Hq] = Σ_d do o − dlse, what the backward kernels subtract from dp."""
    delta = torch.empty(o.shape[:2], dtype=torch.float32, device=o.device)
    if delta.numel():
        d = o.shape[2]
        grid = (triton.cdiv(delta.numel(), 64),)
        _delta_kernel[grid](o, do, dlse, delta, delta.numel(), D=d, BLOCK_D=block_d(d), BLOCK_M=64)
    return delta


def varlen_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, index: Tensor | None, scale: float, config: dict | None = None
) -> tuple[Tensor, Tensor]:
    """Contiguous q, k, v → o like q, lse [T,Hq] fp32."""
    o = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    sizes, config = _sizes(q, k, index), config or _config("fwd", q.shape[2], q.dtype, _long(k, cu_k))
    tiles = tile_segments(cu_q, q.shape[0], q.shape[1] // k.shape[1], config["BLOCK_M"])
    if q.shape[0]:
        grid = (tiles.shape[0] * k.shape[1],)
        _fwd_kernel[grid](q, k, v, o, lse, cu_q, cu_k, index, tiles, scale * LOG2E.value, **sizes, **config)
    return o, lse


def varlen_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, cu_q: Tensor, cu_k: Tensor, index: Tensor | None, scale: float,
    out: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None), configs: tuple[dict | None, dict | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv; tensors given in `out` are added to in place."""
    (t, hq, d), (n, hkv, _) = q.shape, k.shape
    long = _long(k, cu_k)
    sizes = _sizes(q, k, index)
    dq, dk, dv = (torch.empty_like(x) if y is None else y for x, y in zip((q, k, v), out, strict=True))
    if t:
        config = configs[0] or _config("dq", d, q.dtype, long)
        tiles = tile_segments(cu_q, t, hq // hkv, config["BLOCK_M"])
        grid = (tiles.shape[0] * hkv,)
        args = (q, k, v, do, lse, delta, dq, cu_q, cu_k, index, tiles, scale)
        _dq_kernel[grid](*args, ACCUMULATE=out[0] is not None, **sizes, **config)
    if n:
        config = configs[1] or _config("dkv", d, q.dtype, long)
        tiles = tile_segments(cu_k, n, 1, config["BLOCK_N"])
        splits = _splits(tiles.shape[0] * hkv, t * hq // hkv, config["BLOCK_M"])
        grid = (tiles.shape[0] * hkv * splits,)
        whole = splits == 1
        dk_out, dv_out = (dk, dv) if whole else torch.empty(2, splits, n, hkv, d, dtype=torch.float32, device=q.device)
        args = (q, k, v, do, lse, delta, dk_out, dv_out, cu_q, cu_k, index, tiles, n, scale)
        _dkv_kernel[grid](*args, SPLITS=splits, ACCUMULATE=whole and out[1] is not None, **sizes, **config)
        if not whole:
            for x, parts, given in ((dk, dk_out, out[1]), (dv, dv_out, out[2])):
                x.copy_(parts.sum(0) if given is None else parts.sum(0).add_(given))
    return dq, dk, dv


def _sizes(q: Tensor, k: Tensor, index: Tensor | None) -> dict:
    d = q.shape[2]
    return dict(HQ=q.shape[1], HKV=k.shape[1], D=d, BLOCK_D=block_d(d), GATHER=index is not None, PRECISION=precision(q))


def _long(k: Tensor, cu_k: Tensor) -> bool:
    """Segments hold many keys on average: compression, rather than windows."""
    return k.shape[0] >= 512 * (cu_k.shape[0] - 1)


def _splits(programs: int, rows: int, block_m: int) -> int:
    """Few keys over many queries leave multiprocessors idle: cut the queries, a power of two so that few variants are compiled."""
    splits = 1
    while programs * splits < 1024 and rows // (splits * 2) >= 16 * block_m and splits < 16:
        splits *= 2
    return splits
