"""Submanifold 3×3×3 convolution over a neighbour table, as an implicit matrix product.

    y[i]    = Σ_δ x[n(i, δ)] W[δ] + b             n(i, δ) = neighbors[i, δ], absent neighbours (−1) count as 0
    dx[i]   = Σ_δ dy[n(i, −δ)] W[δ]ᵀ              the table is symmetric, so dx is the forward with mirrored, transposed taps
    dW[δ]   = Σ_i x[n(i, δ)]ᵀ dy[i]               rows cut into splits, fp32 partial sums, then one ordered sum: repeatable

x [T, in], W [27, in, out], b [out], neighbors [T, 27] int32, y [T, out]. No [T, 27, in] buffer exists and there are no atomics.
Grids: y has one program for each (tile of rows, tile of out); dW one for each (split, tap, tile of in, tile of out).
Source: arXiv 2505.17412, Eq. 7 (the convolution of the block compressor); δ order is that of method and weights, x fastest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import precision
from .launch import cdiv, launcher, next_power_of_2


def _config(channels_in: int, channels_out: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes; the reduction runs over `in` by BLOCK_I. H200, 2026-11-22, 131,072 rows, bf16: 0.10 ms at 64 → 64, 0.31 at 128 → 128."""
    block_i = min(max(next_power_of_2(channels_in), 16), 64)
    if dtype == torch.float32:
        block_o = min(max(next_power_of_2(channels_out), 16), 64)
        return dict(BLOCK_M=64, BLOCK_I=block_i, BLOCK_O=block_o, num_warps=4, num_stages=3)
    block_o = min(max(next_power_of_2(channels_out), 16), 128)
    if max(block_i, block_o) <= 32:
        return dict(BLOCK_M=256, BLOCK_I=block_i, BLOCK_O=block_o, num_warps=4, num_stages=2)
    narrow = block_o <= 64
    return dict(BLOCK_M=128 if narrow else 64, BLOCK_I=block_i, BLOCK_O=block_o, num_warps=4, num_stages=5 if narrow else 3)


def _config_weight(channels_in: int, channels_out: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes of dW; the reduction runs over rows by BLOCK_T. As above: 0.12 ms at 64 → 64, 0.32 at 128 → 128."""
    block_i = min(max(next_power_of_2(channels_in), 16), 64)
    block_o = min(max(next_power_of_2(channels_out), 16), 64 if dtype == torch.float32 else 128)
    if max(block_i, block_o) <= 32 and dtype != torch.float32:
        return dict(BLOCK_T=64, BLOCK_I=block_i, BLOCK_O=block_o, num_warps=4, num_stages=2)
    return dict(BLOCK_T=32 if block_o <= 64 else 64, BLOCK_I=block_i, BLOCK_O=block_o, num_warps=4, num_stages=3)


@launcher
@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    x_ptr,  # [T, in]
    w_ptr,  # [27, in, out]
    bias_ptr,  # [out]
    neighbors_ptr,  # [T, 27]
    y_ptr,  # [T, out]
    num_tokens,
    channels_in,
    channels_out,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    tiles_o = tl.cdiv(channels_out, BLOCK_O)
    chunks = tl.cdiv(channels_in, BLOCK_I)
    pid = tl.program_id(0)
    rows = (pid // tiles_o).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = (pid % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    row_mask = rows < num_tokens
    out_mask = outs < channels_out
    acc = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for step in range(27 * chunks):
        tap = step // chunks
        ins = (step % chunks) * BLOCK_I + tl.arange(0, BLOCK_I)
        in_mask = ins < channels_in
        index = tl.load(neighbors_ptr + rows * 27 + tap, mask=row_mask, other=-1).to(tl.int64)
        x = tl.load(x_ptr + index[:, None] * channels_in + ins[None, :], mask=(index >= 0)[:, None] & in_mask[None, :], other=0.0)
        w_rows = (tap * channels_in + ins).to(tl.int64)
        w = tl.load(w_ptr + w_rows[:, None] * channels_out + outs[None, :], mask=in_mask[:, None] & out_mask[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outs, mask=out_mask, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None] * channels_out + outs[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & out_mask[None, :])


@launcher
@triton.jit(do_not_specialize=["num_tokens", "rows_per_split"])
def _weight_kernel(
    x_ptr,  # [T, in]
    dy_ptr,  # [T, out]
    neighbors_ptr,  # [T, 27]
    partial_ptr,  # [splits, 27, in, out] fp32
    num_tokens,
    rows_per_split,
    channels_in,
    channels_out,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    tiles_i = tl.cdiv(channels_in, BLOCK_I)
    tiles_o = tl.cdiv(channels_out, BLOCK_O)
    pid = tl.program_id(0)
    slab = pid // (tiles_i * tiles_o)  # split * 27 + tap: the taps of a split run together and share its rows in L2
    tap = slab % 27
    ins = (pid // tiles_o % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)
    outs = (pid % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_mask = ins < channels_in
    out_mask = outs < channels_out
    begin = (slab // 27).to(tl.int64) * rows_per_split
    end = tl.minimum(begin + rows_per_split, num_tokens)
    acc = tl.zeros([BLOCK_I, BLOCK_O], tl.float32)
    for start in range(begin, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        row_mask = rows < end
        index = tl.load(neighbors_ptr + rows * 27 + tap, mask=row_mask, other=-1).to(tl.int64)
        x = tl.load(x_ptr + index[:, None] * channels_in + ins[None, :], mask=(index >= 0)[:, None] & in_mask[None, :], other=0.0)
        dy = tl.load(dy_ptr + rows[:, None] * channels_out + outs[None, :], mask=row_mask[:, None] & out_mask[None, :], other=0.0)
        acc = tl.dot(tl.trans(x), dy, acc, input_precision=INPUT_PRECISION)
    w_rows = slab.to(tl.int64) * channels_in + ins
    tl.store(partial_ptr + w_rows[:, None] * channels_out + outs[None, :], acc, mask=in_mask[:, None] & out_mask[None, :])


def submanifold_conv3d_forward(x: Tensor, kernel: Tensor, bias: Tensor | None, neighbors: Tensor) -> Tensor:
    """x [T, in], kernel [27, in, out] (used in x's dtype), bias [out] or None, neighbors [T, 27] int32 → y [T, out] in x's dtype."""
    num_tokens, channels_in = x.shape
    channels_out = kernel.shape[2]
    y = x.new_empty(num_tokens, channels_out)
    if y.numel() == 0:
        return y
    x, neighbors, kernel = x.contiguous(), neighbors.contiguous(), kernel.to(x.dtype).contiguous()
    config = _config(channels_in, channels_out, x.dtype)
    grid = (cdiv(num_tokens, config["BLOCK_M"]) * cdiv(channels_out, config["BLOCK_O"]),)
    _forward_kernel[grid](
        x,
        kernel,
        x if bias is None else bias.contiguous(),
        neighbors,
        y,
        num_tokens,
        channels_in,
        channels_out,
        HAS_BIAS=bias is not None,
        INPUT_PRECISION=precision(x),
        **config,
    )
    return y


def submanifold_conv3d_backward(dy: Tensor, x: Tensor, kernel: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dy [T, out] → dx [T, in] in x's dtype, dkernel [27, in, out] in kernel's, dbias [out] fp32. `neighbors` must be symmetric."""
    dy = dy.to(x.dtype).contiguous()
    dx = submanifold_conv3d_forward(dy, kernel.flip(0).transpose(1, 2), None, neighbors)
    dkernel = _weight_gradient(dy, x.contiguous(), neighbors.contiguous(), kernel.shape[1], kernel.shape[2])
    return dx, dkernel.to(kernel.dtype), dy.sum(0, dtype=torch.float32)


def _weight_gradient(dy: Tensor, x: Tensor, neighbors: Tensor, channels_in: int, channels_out: int) -> Tensor:
    num_tokens = x.shape[0]
    config = _config_weight(channels_in, channels_out, x.dtype)
    tiles = 27 * cdiv(channels_in, config["BLOCK_I"]) * cdiv(channels_out, config["BLOCK_O"])
    # about 1,000 programs fill any chip of today; a split of fewer than four tiles is not worth its partial sum
    splits = max(1, min(cdiv(1024, tiles), num_tokens // (4 * config["BLOCK_T"])))
    rows_per_split = cdiv(cdiv(num_tokens, splits), config["BLOCK_T"]) * config["BLOCK_T"]
    partial = torch.empty(splits, 27, channels_in, channels_out, dtype=torch.float32, device=x.device)
    if partial.numel() == 0:
        return partial.sum(0)
    _weight_kernel[(splits * tiles,)](
        x,
        dy,
        neighbors,
        partial,
        num_tokens,
        rows_per_split,
        channels_in,
        channels_out,
        INPUT_PRECISION=precision(x),
        **config,
    )
    return partial.sum(0)
