"""Selected attention of small blocks, query-major: a program holds the heads of one query and walks through the blocks they chose.

selected_attention.py reads K and V once for many queries, but writes and sums a partial result a (query, block). Where blocks hold few
tokens that costs more than reading them again for each query: here nothing is partial, and the forward needs no inverse map.

The chosen blocks are laid end to end, so tiles of keys are full whatever the blocks hold. Position j of that line is token j + shift of
the last block that begins at or before j:

    blocks 7 of 3 tokens from 40, 2 of 2 tokens from 9:    begin 0 3    shift 40 6    positions 0 1 2 3 4 → tokens 40 41 42 9 10
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import block_d, load_rows, lse_dtype, precision, store_rows
from .inner import LINE, dq_keys, forward_rows, load_stats
from .launch import launcher, next_power_of_2

SMALL = 32  # tokens a block, on average, up to which it pays; timed at 12 and 24
GROUPS = range(8, 33)  # heads a key/value head that fill a tile of rows well enough
MOST = 64  # blocks a query: a warp holds where all of them begin


def by_query(q: Tensor, topk_indices: Tensor, num_blocks: int) -> bool:
    """Whether these kernels are the ones to take. Of shapes and types alone, so that forward, backward and compilers agree."""
    t, hkv, topk = topk_indices.shape
    return q.dtype != torch.float32 and q.shape[1] // hkv in GROUPS and topk <= MOST and t <= SMALL * num_blocks


def _config(kernel: str) -> dict[str, int]:
    """Launch settings, H200, 2026-11-30. One warp has the rows of a group of heads; many such programs hide each other's waiting."""
    return dict(BLOCK_N=32, num_warps=1, num_stages=3)


@triton.jit
def _line(ids_ptr, offsets_ptr, TOPK: tl.constexpr, SLOTS: tl.constexpr):
    """(where each chosen block begins, its shift) and the number of keys in all. Ids of −1 are empty blocks."""
    slot = tl.arange(0, SLOTS)
    block = tl.load(ids_ptr + slot, mask=slot < TOPK, other=-1)
    lo = tl.load(offsets_ptr + block, mask=block >= 0, other=0)
    size = tl.load(offsets_ptr + block + 1, mask=block >= 0, other=0) - lo
    begin = tl.cumsum(size, 0) - size
    return (begin, lo - begin), tl.sum(size, 0)


@triton.jit
def _heads(HQ: tl.constexpr, HKV: tl.constexpr, BLOCK_M: tl.constexpr):
    """The key/value head of a program, its place among the (query, key/value head) pairs, its rows and which of them are real."""
    G: tl.constexpr = HQ // HKV
    pair, r = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_M)
    return (pair % HKV).to(tl.int32), pair, pair * G + r, r < G


@launcher
@triton.jit
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, ids_ptr, offsets_ptr, o_ptr, lse_ptr, scale, TOPK: tl.constexpr, SLOTS: tl.constexpr, HQ: tl.constexpr,
    HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv, pair, row, valid = _heads(HQ, HKV, BLOCK_M)
    line, keys = _line(ids_ptr + pair * TOPK, offsets_ptr, TOPK, SLOTS)
    q = load_rows(q_ptr, row * D, valid, D, BLOCK_D)
    o, lse = forward_rows(q, 0.0, k_ptr, v_ptr, line, kv, 0, keys, scale, HKV, D, BLOCK_D, BLOCK_M, BLOCK_N, LINE, False, PRECISION)
    store_rows(o_ptr, row * D, o, valid, D, BLOCK_D)
    tl.store(lse_ptr + row, lse, mask=valid)


@launcher
@triton.jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, ids_ptr, offsets_ptr, dq_ptr, scale, TOPK: tl.constexpr, SLOTS: tl.constexpr,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv, pair, row, valid = _heads(HQ, HKV, BLOCK_M)
    line, keys = _line(ids_ptr + pair * TOPK, offsets_ptr, TOPK, SLOTS)
    q, do = load_rows(q_ptr, row * D, valid, D, BLOCK_D), load_rows(do_ptr, row * D, valid, D, BLOCK_D)
    lse, delta = load_stats(stats_ptr, row, valid, True)
    dq = dq_keys(q, do, lse, delta, k_ptr, v_ptr, line, kv, 0, keys, scale, HKV, D, BLOCK_D, BLOCK_M, BLOCK_N, LINE, PRECISION)
    store_rows(dq_ptr, row * D, dq, valid, D, BLOCK_D, ACCUMULATE)


def _sizes(q: Tensor, k: Tensor, topk: int) -> dict:
    (_, hq, d), hkv = q.shape, k.shape[1]
    rows = max(16, next_power_of_2(hq // hkv))
    return dict(TOPK=topk, SLOTS=next_power_of_2(topk), HQ=hq, HKV=hkv, D=d, BLOCK_D=block_d(d), BLOCK_M=rows, PRECISION=precision(q))


def forward_by_query(q: Tensor, k: Tensor, v: Tensor, topk_indices: Tensor, offsets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Contiguous q, k, v → o like q, lse [T,Hq]."""
    t, hkv, topk = topk_indices.shape
    o, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=lse_dtype(q), device=q.device)
    _fwd_kernel[(t * hkv,)](q, k, v, topk_indices, offsets, o, lse, scale, **_sizes(q, k, topk), **_config("fwd"))
    return o, lse


def dq_by_query(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, stats: Tensor, topk_indices: Tensor, offsets: Tensor, scale: float, dq: Tensor,
    accumulate: bool,
) -> None:  # fmt: skip
    """Writes dq, or adds to it."""
    t, hkv, topk = topk_indices.shape
    sizes = dict(**_sizes(q, k, topk), ACCUMULATE=accumulate)
    _dq_kernel[(t * hkv,)](q, k, v, do, stats, topk_indices, offsets, dq, scale, **sizes, **_config("dq"))
