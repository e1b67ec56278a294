"""Mean over the rows of each block, with an optional position table added on the way in.

    y[b]  = Σ_{p in block b} (x[r] + table[slots[r]]) / (n_b + extra)      r = index[p], or p itself where there is no index
    dx[r] = dy[b] / (n_b + extra)                                          for every p of block b

x [T, F], offsets [n+1] int32 with n_b = offsets[b+1] − offsets[b], index [T] int32 or None, table [P, F] and slots [T] int32 or
None, y [n, F]. extra = 0 is the mean (arXiv 2505.17412, Eq. 7); extra = 1 the released pooling, whose zero row counts.
Grid: one program for each (block, tile of F); a block is read by one program, so the sum has one order. A block without rows gives 0.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launcher, next_power_of_2


def _config(features: int) -> dict[str, int]:
    return dict(BLOCK_T=16, BLOCK_F=min(next_power_of_2(features), 128), num_warps=1)


@launcher
@triton.jit(do_not_specialize=["num_tokens", "extra"])
def _forward_kernel(
    x_ptr,  # [T, F]
    offsets_ptr,  # [n+1]
    index_ptr,  # [T]
    table_ptr,  # [P, F]
    slots_ptr,  # [T]
    y_ptr,  # [n, F]
    features,
    num_tokens,
    extra,
    HAS_INDEX: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    tiles_f = tl.cdiv(features, BLOCK_F)
    pid = tl.program_id(0)
    block = (pid // tiles_f).to(tl.int64)
    cols = (pid % tiles_f) * BLOCK_F + tl.arange(0, BLOCK_F)
    col_mask = cols < features
    begin = tl.load(offsets_ptr + block)
    end = tl.load(offsets_ptr + block + 1)
    acc = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    for start in range(begin, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        row_mask = rows < tl.minimum(end, num_tokens)  # offsets of another partition read nothing beyond x
        if HAS_INDEX:
            rows = tl.load(index_ptr + rows, mask=row_mask, other=0)
        rows = rows.to(tl.int64)
        mask = row_mask[:, None] & col_mask[None, :]
        acc += tl.load(x_ptr + rows[:, None] * features + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_TABLE:
            slots = tl.load(slots_ptr + rows, mask=row_mask, other=0).to(tl.int64)
            acc += tl.load(table_ptr + slots[:, None] * features + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.sum(acc, 0) / tl.maximum(end - begin + extra, 1).to(tl.float32)
    tl.store(y_ptr + block * features + cols, y.to(y_ptr.dtype.element_ty), mask=col_mask)


@launcher
@triton.jit(do_not_specialize=["num_tokens", "extra"])
def _backward_kernel(
    dy_ptr,  # [n, F]
    offsets_ptr,  # [n+1]
    index_ptr,  # [T]
    dx_ptr,  # [T, F]
    features,
    num_tokens,
    extra,
    HAS_INDEX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    tiles_f = tl.cdiv(features, BLOCK_F)
    pid = tl.program_id(0)
    block = (pid // tiles_f).to(tl.int64)
    cols = (pid % tiles_f) * BLOCK_F + tl.arange(0, BLOCK_F)
    col_mask = cols < features
    begin = tl.load(offsets_ptr + block)
    end = tl.load(offsets_ptr + block + 1)
    dy = tl.load(dy_ptr + block * features + cols, mask=col_mask, other=0.0).to(tl.float32)
    dx = (dy / tl.maximum(end - begin + extra, 1).to(tl.float32)).to(dx_ptr.dtype.element_ty)
    for start in range(begin, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        row_mask = rows < tl.minimum(end, num_tokens)
        if HAS_INDEX:
            rows = tl.load(index_ptr + rows, mask=row_mask, other=0)
        at = rows.to(tl.int64)[:, None] * features + cols[None, :]
        tl.store(dx_ptr + at, tl.broadcast_to(dx[None, :], [BLOCK_T, BLOCK_F]), mask=row_mask[:, None] & col_mask[None, :])


def block_mean_forward(
    x: Tensor, offsets: Tensor, index: Tensor | None, table: Tensor | None, slots: Tensor | None, extra: int
) -> Tensor:
    """x [T, F] → [n, F] in x's dtype, summed in fp32."""
    features = x.shape[1]
    num_blocks = offsets.shape[0] - 1
    y = x.new_empty(num_blocks, features)
    if y.numel():
        config = _config(features)
        _forward_kernel[(num_blocks * cdiv(features, config["BLOCK_F"]),)](
            x.contiguous(),
            offsets,
            offsets if index is None else index,
            x if table is None else table.contiguous(),
            offsets if slots is None else slots,
            y,
            features,
            x.shape[0],
            extra,
            HAS_INDEX=index is not None,
            HAS_TABLE=table is not None,
            **config,
        )
    return y


def block_mean_backward(dy: Tensor, offsets: Tensor, index: Tensor | None, num_tokens: int, extra: int) -> Tensor:
    """dy [n, F] → dx [T, F] in dy's dtype. Every row lies in one block, so every row is written."""
    features = dy.shape[1]
    num_blocks = offsets.shape[0] - 1
    dx = dy.new_empty(num_tokens, features)
    if dx.numel():
        config = _config(features)
        _backward_kernel[(num_blocks * cdiv(features, config["BLOCK_F"]),)](
            dy.contiguous(), offsets, offsets if index is None else index, dx, features, num_tokens, extra, HAS_INDEX=index is not None,
            **config,
        )  # fmt: skip
    return dx
