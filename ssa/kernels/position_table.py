"""A learned table of features by position in a block, added to the rows.

    y[t] = x[t] + table[slots[t]]
    dtable[p] = Σ_{t: slots[t] = p} dy[t]      a product onehot(slots) dy over splits of the rows, then one ordered sum: repeatable

x, y [T, F], table [P, F], slots [T] int32 in 0 … P − 1. Grids: one program for each (tile of rows, tile of F), and for each
(split, tile of P, tile of F). No sort and no atomics.
Source: arXiv 2505.17412, section 4.1 (the intra-block position encoding of the block compressor).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import precision
from .launch import cdiv, launcher, next_power_of_2


def _config(features: int) -> dict[str, int]:
    return dict(BLOCK_T=64, BLOCK_F=min(max(next_power_of_2(features), 16), 64), num_warps=4)


@launcher
@triton.jit(do_not_specialize=["num_tokens"])
def _add_kernel(
    x_ptr,  # [T, F]
    table_ptr,  # [P, F]
    slots_ptr,  # [T]
    y_ptr,  # [T, F]
    num_tokens,
    features,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    tiles_f = tl.cdiv(features, BLOCK_F)
    pid = tl.program_id(0)
    rows = (pid // tiles_f).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = (pid % tiles_f) * BLOCK_F + tl.arange(0, BLOCK_F)
    row_mask = rows < num_tokens
    mask = row_mask[:, None] & (cols < features)[None, :]
    slots = tl.load(slots_ptr + rows, mask=row_mask, other=0).to(tl.int64)
    at = rows[:, None] * features + cols[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(table_ptr + slots[:, None] * features + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, x.to(y_ptr.dtype.element_ty), mask=mask)


@launcher
@triton.jit(do_not_specialize=["num_tokens", "rows_per_split"])
def _table_kernel(
    dy_ptr,  # [T, F]
    slots_ptr,  # [T]
    partial_ptr,  # [splits, P, F] fp32
    num_tokens,
    rows_per_split,
    num_slots,
    features,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    tiles_p = tl.cdiv(num_slots, BLOCK_P)
    tiles_f = tl.cdiv(features, BLOCK_F)
    pid = tl.program_id(0)
    split = (pid // (tiles_p * tiles_f)).to(tl.int64)
    slot = (pid // tiles_f % tiles_p) * BLOCK_P + tl.arange(0, BLOCK_P)
    cols = (pid % tiles_f) * BLOCK_F + tl.arange(0, BLOCK_F)
    col_mask = cols < features
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, num_tokens)
    acc = tl.zeros([BLOCK_P, BLOCK_F], tl.float32)
    for start in range(begin, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        row_mask = rows < end
        slots = tl.load(slots_ptr + rows, mask=row_mask, other=-1)
        dy = tl.load(dy_ptr + rows[:, None] * features + cols[None, :], mask=row_mask[:, None] & col_mask[None, :], other=0.0)
        onehot = (slot[:, None] == slots[None, :]).to(dy.dtype)
        acc = tl.dot(onehot, dy, acc, input_precision=INPUT_PRECISION)
    at = (split * num_slots + slot)[:, None] * features + cols[None, :]
    tl.store(partial_ptr + at, acc, mask=(slot < num_slots)[:, None] & col_mask[None, :])


def add_position_forward(x: Tensor, table: Tensor, slots: Tensor) -> Tensor:
    """x [T, F], table [P, F], slots [T] int32 → x + table[slots] in x's dtype, added in fp32."""
    num_tokens, features = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        config = _config(features)
        grid = (cdiv(num_tokens, config["BLOCK_T"]) * cdiv(features, config["BLOCK_F"]),)
        _add_kernel[grid](x.contiguous(), table.contiguous(), slots.contiguous(), y, num_tokens, features, **config)
    return y


def table_gradient(dy: Tensor, slots: Tensor, num_slots: int) -> Tensor:
    """dy [T, F], slots [T] int32 → [P, F] fp32: the sum of dy over the rows of each slot."""
    num_tokens, features = dy.shape
    config = _config(features)
    block_p = min(max(next_power_of_2(num_slots), 16), 64)
    tiles = cdiv(num_slots, block_p) * cdiv(features, config["BLOCK_F"])
    # a few hundred programs fill the chip; a split of fewer than four tiles is not worth its partial sum
    splits = max(1, min(cdiv(512, tiles), num_tokens // (4 * config["BLOCK_T"])))
    rows_per_split = cdiv(cdiv(num_tokens, splits), config["BLOCK_T"]) * config["BLOCK_T"]
    partial = torch.empty(splits, num_slots, features, dtype=torch.float32, device=dy.device)
    if partial.numel():
        _table_kernel[(splits * tiles,)](
            dy.contiguous(),
            slots.contiguous(),
            partial,
            num_tokens,
            rows_per_split,
            num_slots,
            features,
            BLOCK_P=block_p,
            INPUT_PRECISION=precision(dy),
            **config,
        )
    return partial.sum(0)
