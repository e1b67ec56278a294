"""What the attention kernels share: packed rows, the tile → segment map, masked row loads.

A row of a tile is one (query, head) pair: the G query heads that read one key/value head lie side by side, row r of a segment is
query r // G, head r % G. No row of a tile is wasted whatever G is, and K and V are read once for the whole group.

Tiles never cross segments. With BLOCK_M rows a tile, segment i owns the tiles from (cu[i] G) // BLOCK_M + i on: that is never fewer
than it needs and needs no count from the device, so the grid is the upper bound (cu[-1] G) // BLOCK_M + n and the last tiles of a
segment may be empty:

    cu G = 0 5 5 12, BLOCK_M = 4      starts 0 2 3 6      tiles 0 1 | 2 | 3 4 5      rows 0-3 4 | - | 5-8 9-11 -
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["num_segments", "num_tiles", "steps"])
def _tile_segments_kernel(cu_ptr, out_ptr, num_segments, num_tiles, steps, G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lo = tl.zeros([BLOCK], tl.int32)
    hi = tl.zeros([BLOCK], tl.int32) + num_segments
    for _ in range(steps):
        mid = (lo + hi) // 2
        start = tl.load(cu_ptr + mid) * G // BLOCK_M + mid
        lo = tl.where(start <= tile, mid, lo)
        hi = tl.where(start <= tile, hi, mid)
    tl.store(out_ptr + tile, lo, mask=tile < num_tiles)


def tile_segments(cu: Tensor, total: int, group: int, block_m: int) -> Tensor:
    """Segment of every tile: cu [n+1] int32 with cu[-1] <= total → int32 [total · group // block_m + n]."""
    n = cu.shape[0] - 1
    num_tiles = total * group // block_m + n if n else 0
    out = torch.empty(num_tiles, dtype=torch.int32, device=cu.device)
    if num_tiles:
        grid = (triton.cdiv(num_tiles, 256),)
        _tile_segments_kernel[grid](cu, out, n, num_tiles, n.bit_length(), G=group, BLOCK_M=block_m, BLOCK=256, num_warps=2)
    return out


@triton.jit
def tile_rows(cu_ptr, segment, tile, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """First position of the segment, its number of rows, and the rows of this tile."""
    start = tl.load(cu_ptr + segment)
    num_rows = (tl.load(cu_ptr + segment + 1) - start) * G
    first = (tile - (start * G // BLOCK_M + segment)) * BLOCK_M
    return start, num_rows, first


@triton.jit
def load_rows(ptr, offsets, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[n, BLOCK_D] from rows that begin at `offsets` (int64, elements); zeros where masked."""
    d = tl.arange(0, BLOCK_D)
    full = mask[:, None] if BLOCK_D == D else mask[:, None] & (d < D)[None, :]
    return tl.load(ptr + offsets[:, None] + d[None, :], mask=full, other=0.0)


@triton.jit
def store_rows(ptr, offsets, x, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, ACCUMULATE: tl.constexpr = False):
    """Writes [n, BLOCK_D] to rows that begin at `offsets`, added to what lies there if ACCUMULATE."""
    d = tl.arange(0, BLOCK_D)
    full = mask[:, None] if BLOCK_D == D else mask[:, None] & (d < D)[None, :]
    p = ptr + offsets[:, None] + d[None, :]
    if ACCUMULATE:
        x += tl.load(p, mask=full, other=0.0).to(tl.float32)
    tl.store(p, x.to(ptr.dtype.element_ty), mask=full)


def precision(x: Tensor) -> str:
    """fp32 means fp32, unless torch.set_float32_matmul_precision allows TF32."""
    return "ieee" if x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


def block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def interpreted() -> bool:
    """Whether these kernels were defined under Triton's interpreter, which runs them on CPU tensors."""
    return not isinstance(_tile_segments_kernel, triton.JITFunction)
