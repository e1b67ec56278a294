"""The gated sum of the three branches and everything its backward can do in one pass.

    o = g0 o_cmp + g1 o_slc + g2 o_win        do_b = g_b do        dg_b = Σ_d do o_b        delta_b = Σ_d do_b o_b

o, o_b, do [T,Hq,D]; lse_b [T,Hq]; stats_b [T,Hq,2]; gates [T,3] or [T,Hq,3], any float type; dgates like gates (summed over heads for
[T,3]). Grid: queries. stats_b is what the branch's backward reads (`attention_stats` of o_b, do_b and lse_b), without a pass of its own.
Source: arXiv 2505.17412, Eq. 4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import block_d, lse_dtype
from .inner import store_stats, wide
from .launch import launcher, next_power_of_2


@triton.jit
def _rows(HQ: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    at = (t * HQ + h)[:, None] * D + d[None, :]
    return t, h, at, (h < HQ)[:, None] & (d < D)[None, :]


@triton.jit
def _gate(gates_ptr, t, h, branch: tl.constexpr, HQ: tl.constexpr, PER_HEAD: tl.constexpr):
    if PER_HEAD:
        return tl.load(gates_ptr + (t * HQ + h) * 3 + branch, mask=h < HQ, other=0.0).to(tl.float32)
    return tl.load(gates_ptr + t * 3 + branch + h * 0).to(tl.float32)


@launcher
@triton.jit
def _fwd_kernel(
    o_cmp_ptr, o_slc_ptr, o_win_ptr, gates_ptr, o_ptr, HQ: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    PER_HEAD: tl.constexpr,
):  # fmt: skip
    t, h, at, mask = _rows(HQ, D, BLOCK_H, BLOCK_D)
    o = _gate(gates_ptr, t, h, 0, HQ, PER_HEAD)[:, None] * tl.load(o_cmp_ptr + at, mask=mask, other=0.0).to(tl.float32)
    o += _gate(gates_ptr, t, h, 1, HQ, PER_HEAD)[:, None] * tl.load(o_slc_ptr + at, mask=mask, other=0.0).to(tl.float32)
    o += _gate(gates_ptr, t, h, 2, HQ, PER_HEAD)[:, None] * tl.load(o_win_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(o_ptr + at, o.to(o_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_branch(
    do, o_ptr, lse_ptr, do_b_ptr, stats_ptr, gates_ptr, dgates_ptr, t, h, at, mask, branch: tl.constexpr, HQ: tl.constexpr,
    PER_HEAD: tl.constexpr,
):  # fmt: skip
    g = _gate(gates_ptr, t, h, branch, HQ, PER_HEAD)
    o = tl.load(o_ptr + at, mask=mask, other=0.0)
    do_b = (g[:, None] * do).to(o.dtype)
    o_wide = wide(o, o.to(tl.float32))
    dg = tl.sum(do * o_wide, 1)
    tl.store(do_b_ptr + at, do_b, mask=mask)
    delta = tl.sum(do_b.to(tl.float32) * o_wide, 1)  # of do_b as rounded: dp − delta cancels
    store_stats(stats_ptr, t * HQ + h, o, tl.load(lse_ptr + t * HQ + h, mask=h < HQ, other=0.0), delta, h < HQ)
    if PER_HEAD:
        tl.store(dgates_ptr + (t * HQ + h) * 3 + branch, dg.to(dgates_ptr.dtype.element_ty), mask=h < HQ)
    else:
        tl.store(dgates_ptr + t * 3 + branch, tl.sum(dg, 0).to(dgates_ptr.dtype.element_ty))


@launcher
@triton.jit
def _bwd_kernel(
    do_ptr, o_cmp_ptr, o_slc_ptr, o_win_ptr, lse_cmp_ptr, lse_slc_ptr, lse_win_ptr, gates_ptr, do_cmp_ptr, do_slc_ptr, do_win_ptr,
    stats_cmp_ptr, stats_slc_ptr, stats_win_ptr, dgates_ptr, HQ: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    t, h, at, mask = _rows(HQ, D, BLOCK_H, BLOCK_D)
    do = tl.load(do_ptr + at, mask=mask, other=0.0).to(tl.float32)
    _bwd_branch(do, o_cmp_ptr, lse_cmp_ptr, do_cmp_ptr, stats_cmp_ptr, gates_ptr, dgates_ptr, t, h, at, mask, 0, HQ, PER_HEAD)
    _bwd_branch(do, o_slc_ptr, lse_slc_ptr, do_slc_ptr, stats_slc_ptr, gates_ptr, dgates_ptr, t, h, at, mask, 1, HQ, PER_HEAD)
    _bwd_branch(do, o_win_ptr, lse_win_ptr, do_win_ptr, stats_win_ptr, gates_ptr, dgates_ptr, t, h, at, mask, 2, HQ, PER_HEAD)


def gated_sum_forward(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    o = torch.empty_like(o_cmp)
    if o.shape[0]:
        _fwd_kernel[(o.shape[0],)](o_cmp, o_slc, o_win, gates, o, **_sizes(o, gates))
    return o


def gated_sum_backward(
    do: Tensor, branches: list[Tensor], lses: list[Tensor], gates: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """do, the three branch outputs and their lse → (do_b of each branch, stats_b of each branch, dgates)."""
    t, hq, _ = do.shape
    dos = [torch.empty_like(do) for _ in branches]
    stats = [torch.empty(t, hq, 2, dtype=lse_dtype(do), device=do.device) for _ in branches]
    dgates = torch.empty_like(gates)
    if t:
        _bwd_kernel[(t,)](do, *branches, *lses, gates, *dos, *stats, dgates, **_sizes(do, gates))
    return dos, stats, dgates


def _sizes(o: Tensor, gates: Tensor) -> dict:
    hq, d = o.shape[1:]
    return dict(HQ=hq, D=d, BLOCK_H=next_power_of_2(hq), BLOCK_D=block_d(d), PER_HEAD=gates.ndim == 3, num_warps=4)
