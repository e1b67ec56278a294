"""Variable-length attention with lse: the compression branch (segments = samples) and the window branch (segments = windows).

    s = scale q kᵀ     lse = log Σ exp(s)     p = exp(s − lse)     o = p v
    dv = pᵀ do         ds = p (do vᵀ − delta) with delta = do·o − dlse     dq = scale ds k     dk = scale dsᵀ q

q, o, do, dq [T,Hq,D]; k, v, dk, dv [N,Hkv,D]; lse [T,Hq], fp64 where q is fp32, else fp32; stats [T,Hq,2]: lse in the exponent's unit
beside delta, which the loop over queries reads again for every tile of keys; cu_q, cu_k [n+1] int32; index [T] int32 or none: rows of both
sides in segment order (windows that are not contiguous). Rows are (query, head) pairs, see common.py.
Grid: (tiles · Hkv), for dk dv (tiles · Hkv · shares of the queries).
The loops over keys and over queries are in inner.py.
The backward makes seven products in two kernels instead of five in one: no atomics, so two runs are bitwise equal.
Source: FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2; arXiv 2505.17412, Eq. 6.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import varlen_attention_hopper as hopper
from .common import block_d, key_norms, load_norm, load_rows, load_tile, lse_dtype, precision, store_rows, tile_maps
from .inner import dkv_rows, dq_keys, forward_rows, load_stats, packed_rows, store_stats, wide
from .launch import cdiv, launcher

SCRATCH = 512 * 2**20  # bytes of the parts of dk and dv


def _config(kernel: str, head_dim: int, dtype: torch.dtype, long: bool) -> dict[str, int]:
    """Tile sizes and launch settings, H200, 2026-11-26; `long`: segments of many keys (compression) rather than windows.

    Beyond a head size of 64 what fits the 99 KiB of sm_89, not tuned.
    """
    if dtype == torch.float32:
        return dict(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=1)
    if head_dim > 64:
        return dict(BLOCK_M=64, BLOCK_N=32 if kernel != "dkv" else 64, num_warps=4, num_stages=2)
    if not long:
        wide = dict(BLOCK_M=128, BLOCK_N=64 if kernel == "dkv" else 32)
        return dict(**wide, num_warps=4, num_stages=2)
    small = head_dim <= 32
    if kernel == "fwd":
        return dict(BLOCK_M=128, BLOCK_N=64, num_warps=4 if small else 8, num_stages=3, maxnreg=128)
    if kernel == "dq":
        return dict(BLOCK_M=128, BLOCK_N=32 if small else 64, num_warps=4, num_stages=3, **(dict(maxnreg=128) if small else {}))
    return dict(BLOCK_M=32, BLOCK_N=128, num_warps=4, num_stages=3)


@launcher
@triton.jit(do_not_specialize=["num_tiles"])
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, cu_k_ptr, index_ptr, norms_ptr, tiles_ptr, num_tiles, scale, HQ: tl.constexpr,
    HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GATHER: tl.constexpr,
    BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, kv = tl.program_id(0) // HKV, tl.program_id(0) % HKV
    segment, first, count = load_tile(tiles_ptr, tile, num_tiles)
    if count > 0:
        valid, head = packed_rows(index_ptr, first, count, kv, HQ, HQ // HKV, BLOCK_M, GATHER)
        q = load_rows(q_ptr, head * D, valid, D, BLOCK_D)
        lo, hi = tl.load(cu_k_ptr + segment), tl.load(cu_k_ptr + segment + 1)
        k_norm = 0.0
        if BOUNDED:
            k_norm = load_norm(norms_ptr, kv, HKV)
        o, lse = forward_rows(
            q, k_norm, k_ptr, v_ptr, index_ptr, kv, lo, hi, scale, HKV, D, BLOCK_D, BLOCK_M, BLOCK_N, GATHER, BOUNDED, PRECISION
        )
        store_rows(o_ptr, head * D, o, valid, D, BLOCK_D)
        tl.store(lse_ptr + head, lse, mask=valid)


@launcher
@triton.jit(do_not_specialize=["num_tiles"])
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, dq_ptr, cu_k_ptr, index_ptr, tiles_ptr, num_tiles, scale, HQ: tl.constexpr,
    HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GATHER: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, kv = tl.program_id(0) // HKV, tl.program_id(0) % HKV
    segment, first, count = load_tile(tiles_ptr, tile, num_tiles)
    if count > 0:
        valid, head = packed_rows(index_ptr, first, count, kv, HQ, HQ // HKV, BLOCK_M, GATHER)
        q = load_rows(q_ptr, head * D, valid, D, BLOCK_D)
        do = load_rows(do_ptr, head * D, valid, D, BLOCK_D)
        lse, delta = load_stats(stats_ptr, head, valid, True)
        lo, hi = tl.load(cu_k_ptr + segment), tl.load(cu_k_ptr + segment + 1)
        dq = dq_keys(
            q, do, lse, delta, k_ptr, v_ptr, index_ptr, kv, lo, hi, scale, HKV, D, BLOCK_D, BLOCK_M, BLOCK_N, GATHER, PRECISION
        )
        store_rows(dq_ptr, head * D, dq, valid, D, BLOCK_D, ACCUMULATE)


@launcher
@triton.jit(do_not_specialize=["num_keys", "num_tiles", "cu_stride"])
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_stride, index_q_ptr, index_k_ptr, tiles_ptr, num_tiles,
    num_keys, scale, SPLITS: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GATHER_Q: tl.constexpr, GATHER_K: tl.constexpr, ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = HQ // HKV
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    pid = tl.program_id(0)
    if GATHER_Q > 0:
        split, pid = pid % SPLITS, pid // SPLITS
    else:  # the programs of one share of the queries run together, which then stay in L2
        split, pid = pid // (HKV * num_tiles), pid % (HKV * num_tiles)
    tile, kv = pid // HKV, pid % HKV
    segment, first, count = load_tile(tiles_ptr, tile, num_tiles)
    if count > 0:
        valid, at = packed_rows(index_k_ptr, first, count, kv, HKV, 1, BLOCK_N, GATHER_K)
        k = load_rows(k_ptr, at * D, valid, D, BLOCK_D)
        v = load_rows(v_ptr, at * D, valid, D, BLOCK_D)
        dk = tl.zeros([BLOCK_N, BLOCK_D], stats_ptr.dtype.element_ty)
        dv = tl.zeros([BLOCK_N, BLOCK_D], stats_ptr.dtype.element_ty)
        cu_q_ptr += kv * cu_stride + segment
        start, end = tl.load(cu_q_ptr), tl.load(cu_q_ptr + 1)
        share = tl.cdiv(tl.cdiv(end - start, BLOCK_Q), SPLITS) * BLOCK_Q
        lo = tl.minimum(start + split * share, end)
        hi = tl.minimum(lo + share, end)
        dk, dv = dkv_rows(
            dk, dv, k, v, q_ptr, do_ptr, stats_ptr, index_q_ptr, kv, lo, hi, scale, HQ, G, D, BLOCK_D, BLOCK_M, GATHER_Q,
            PRECISION,
        )  # fmt: skip
        out = (at + split.to(tl.int64) * num_keys * HKV) * D
        store_rows(dk_ptr, out, dk * scale, valid, D, BLOCK_D, ACCUMULATE)
        store_rows(dv_ptr, out, dv, valid, D, BLOCK_D, ACCUMULATE)


@launcher
@triton.jit(do_not_specialize=["size"])
def _add_parts_kernel(parts_ptr, dk_ptr, dv_ptr, size, SPLITS: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < size
    wide_zero = wide(tl.zeros([1], dk_ptr.dtype.element_ty), tl.zeros([BLOCK], tl.float32))
    dk, dv = wide_zero, wide_zero
    for split in range(SPLITS):
        dk += tl.load(parts_ptr + split * size.to(tl.int64) + at, mask=valid, other=0.0)
        dv += tl.load(parts_ptr + (SPLITS + split) * size.to(tl.int64) + at, mask=valid, other=0.0)
    if ACCUMULATE:
        dk += tl.load(dk_ptr + at, mask=valid, other=0.0).to(tl.float32)
        dv += tl.load(dv_ptr + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=valid)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=valid)


@launcher
@triton.jit(do_not_specialize=["num_rows"])
def _stats_kernel(
    o_ptr, do_ptr, lse_ptr, dlse_ptr, stats_ptr, num_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < num_rows
    o = load_rows(o_ptr, row * D, valid, D, BLOCK_D)
    do = load_rows(do_ptr, row * D, valid, D, BLOCK_D)
    delta = tl.sum(wide(o, o.to(tl.float32)) * wide(o, do.to(tl.float32)), 1) - tl.load(dlse_ptr + row, mask=valid, other=0.0)
    store_stats(stats_ptr, row, o, tl.load(lse_ptr + row, mask=valid, other=0.0), delta, valid)


def attention_stats(o: Tensor, do: Tensor, lse: Tensor, dlse: Tensor) -> Tensor:
    """stats [T,Hq,2] of the backward kernels; delta = Σ_d do o − dlse is what they subtract from dp."""
    stats = torch.empty(*lse.shape, 2, dtype=lse_dtype(o), device=o.device)
    if lse.numel():
        d = o.shape[2]
        grid = (cdiv(lse.numel(), 64),)
        _stats_kernel[grid](o, do, lse, dlse, stats, lse.numel(), D=d, BLOCK_D=block_d(d), BLOCK_M=64)
    return stats


def forward_map(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, config: dict | None = None) -> tuple[Tensor, int, int]:
    """What `tile_maps` takes for the forward."""
    block_m = (config or _config("fwd", q.shape[2], q.dtype, _long(k, cu_k)))["BLOCK_M"]
    return cu_q, q.shape[0], block_m * k.shape[1] // q.shape[1]


def varlen_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, index: Tensor | None, scale: float, config: dict | None = None,
    tiles: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Contiguous q, k, v → o like q, lse [T,Hq] (`lse_dtype`). tiles: of `forward_map`, made here if not given."""
    o = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=lse_dtype(q), device=q.device)
    long = _long(k, cu_k)
    config = config or _config("fwd", q.shape[2], q.dtype, long)
    if q.shape[0]:
        norms = key_norms(k) if long else None
        if tiles is None:
            (tiles,) = tile_maps(forward_map(q, k, cu_q, cu_k, config))
        grid = (tiles.shape[2] * k.shape[1],)
        args = (q, k, v, o, lse, cu_k, index, norms, tiles, tiles.shape[2], scale)
        _fwd_kernel[grid](*args, BOUNDED=norms is not None, **_sizes(q, k, index), **config)
    return o, lse


def varlen_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, stats: Tensor, cu_q: Tensor, cu_k: Tensor, index: Tensor | None, scale: float,
    out: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None), configs: tuple[dict | None, dict | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv; tensors given in `out` are added to in place."""
    (t, hq, d), (n, hkv, _) = q.shape, k.shape
    sizes, long = _sizes(q, k, index), _long(k, cu_k)
    dq = torch.empty_like(q) if out[0] is None else out[0]
    config, config_k = configs[0] or _config("dq", d, q.dtype, long), configs[1] or _config("dkv", d, q.dtype, long)
    on_hopper = configs[1] is None and out[1] is None and out[2] is None and hopper.takes(q, k, do, index, long)
    block_n = hopper.BLOCK_N.value if on_hopper else config_k["BLOCK_N"]
    tiles, tiles_k = tile_maps((cu_q, t, config["BLOCK_M"] * hkv // hq), (cu_k, n, block_n))
    if t:
        grid = (tiles.shape[2] * hkv,)
        args = (q, k, v, do, stats, dq, cu_k, index, tiles, tiles.shape[2], scale)
        _dq_kernel[grid](*args, ACCUMULATE=out[0] is not None, **sizes, **config)
    gather = int(index is not None)
    splits = _splits(n // 64 * hkv, t * hq // hkv // max(1, cu_q.shape[0] - 1), 8 * n * hkv * d, long)
    if on_hopper:
        return dq, *launch_dkv_hopper(q, k, v, do, stats, cu_q, tiles_k, scale, splits)
    dk, dv = launch_dkv(q, k, v, do, stats, cu_q, 0, index, gather, tiles_k, index, gather, scale, out[1:], splits, config_k)
    return dq, dk, dv


def launch_dkv_hopper(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, stats: Tensor, cu_q: Tensor, tiles: Tensor, scale: float, splits: int
) -> tuple[Tensor, Tensor]:
    """`launch_dkv` of what `varlen_attention_hopper.takes`."""
    (hq, d), (n, hkv, _) = q.shape[1:], k.shape
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    if n:
        parts = _parts(dk, dv, splits)
        hopper._dkv_kernel[(tiles.shape[2] * hkv * splits,)](
            q, k, v, do, stats, *parts, cu_q, tiles, tiles.shape[2], n, scale, SPLITS=splits, HQ=hq, HKV=hkv, D=d, **hopper.config(d)
        )
        _add_parts(parts, dk, dv, splits, False)
    return dk, dv


def launch_dkv(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, stats: Tensor, cu_q: Tensor, cu_stride: int, index_q: Tensor | None, gather_q: int,
    tiles: Tensor, index_k: Tensor | None, gather_k: int, scale: float, out: tuple[Tensor | None, Tensor | None], splits: int, config: dict,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk, dv of segments of keys in tiles, each over the queries at positions cu_q[kv cu_stride + segment] … of index_q.

    `splits` programs share the queries of a key tile; their fp32 parts are added in order.
    """
    (hq, d), (n, hkv, _) = q.shape[1:], k.shape
    dk, dv = (torch.empty_like(x) if y is None else y for x, y in zip((k, v), out, strict=True))
    if n:
        parts = _parts(dk, dv, splits)
        _dkv_kernel[(tiles.shape[2] * hkv * splits,)](
            q, k, v, do, stats, *parts, cu_q, cu_stride, index_q, index_k, tiles, tiles.shape[2], n, scale, SPLITS=splits, HQ=hq,
            HKV=hkv, D=d, BLOCK_D=block_d(d), GATHER_Q=gather_q, GATHER_K=gather_k, ACCUMULATE=splits == 1 and out[0] is not None,
            PRECISION=precision(q), **config,
        )  # fmt: skip
        _add_parts(parts, dk, dv, splits, out[0] is not None)
    return dk, dv


def _parts(dk: Tensor, dv: Tensor, splits: int) -> tuple[Tensor, Tensor] | Tensor:
    """Where `splits` programs a key tile write: their own shares [2,splits,...] float32, or the gradients themselves."""
    return (dk, dv) if splits == 1 else torch.empty(2, splits, *dk.shape, dtype=torch.float32, device=dk.device)


def _add_parts(parts: tuple[Tensor, Tensor] | Tensor, dk: Tensor, dv: Tensor, splits: int, accumulate: bool) -> None:
    if splits > 1:
        m = dk.numel()
        _add_parts_kernel[(cdiv(m, 1024),)](parts, dk, dv, m, SPLITS=splits, ACCUMULATE=accumulate, BLOCK=1024, num_warps=4)


def _sizes(q: Tensor, k: Tensor, index: Tensor | None) -> dict:
    d = q.shape[2]
    return dict(HQ=q.shape[1], HKV=k.shape[1], D=d, BLOCK_D=block_d(d), GATHER=int(index is not None), PRECISION=precision(q))


def _long(k: Tensor, cu_k: Tensor) -> bool:
    """Segments hold many keys on average: compression, rather than windows."""
    return k.shape[0] >= 512 * max(1, cu_k.shape[0] - 1)


def _splits(programs: int, rows: int, size: int, long: bool) -> int:
    """Shares of the queries, whose parts take `size` bytes each: few keys over many queries leave multiprocessors idle, of long segments
    at least in the last wave. Powers of two, so that few variants are compiled."""
    enough, most = (8192, 64) if long else (2048, 32)
    splits = 1
    while programs * splits < enough and rows // (splits * 2) >= 1024 and splits < most and 2 * splits * size <= SCRATCH:
        splits *= 2
    return splits
