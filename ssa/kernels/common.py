"""What the attention kernels share: packed rows, the tile map, row loads.

A row of a tile is one (query, head) pair: the G query heads that read one key/value head lie side by side, row r of a tile is query
r // G, head r % G. A tile of BLOCK_M rows holds BLOCK_Q = BLOCK_M // G queries, so K and V are read once for the whole group and the
rows' addresses relative to the tile's first query never change.

Tiles never cross segments. Segment i owns the tiles from cu[i] // BLOCK_Q + i on: that is never fewer than it needs and needs no count
from the device, so the grid is the upper bound total // BLOCK_Q + n and the last tiles of a segment may be empty:

    cu = 0 5 5 12, BLOCK_Q 4      first tiles 0 2 3 6      tiles 0 1 | 2 | 3 4 5      positions 0-3 4 | - | 5-8 9-11 -
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher, cdiv, launcher, next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_LOW = tl.constexpr(1.925963033500e-8)  # what fp32 leaves out of it
LN2 = tl.constexpr(0.6931471805599453)
NORM_PARTS = tl.constexpr(64)  # shares of the keys whose largest norms are kept
NORM_ROWS = 64  # keys a program of `key_norms` reads at once


@triton.jit
def _write_tiles(cu_ptr, starts_ptr, out_ptr, num_segments, num_tiles, steps, BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr):
    base = tl.load(cu_ptr)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lo = tl.zeros([BLOCK], tl.int32)
    hi = tl.zeros([BLOCK], tl.int32) + num_segments
    for _ in range(steps):
        mid = (lo + hi) // 2
        below = (tl.load(cu_ptr + mid) - base) // BLOCK_Q + mid <= tile
        lo = tl.where(below, mid, lo)
        hi = tl.where(below, hi, mid)
    real = tile < num_tiles
    start = tl.load(cu_ptr + lo)
    before = (tile - ((start - base) // BLOCK_Q + lo)) * BLOCK_Q
    end = tl.load(cu_ptr + lo + 1, mask=real, other=0)
    tl.store(out_ptr + tile, lo, mask=real)
    tl.store(out_ptr + num_tiles + tile, tl.load(starts_ptr + lo, mask=real, other=0) + before, mask=real)
    tl.store(out_ptr + 2 * num_tiles + tile, tl.minimum(tl.maximum(end - start - before, 0), BLOCK_Q), mask=real)


@launcher
@triton.jit(do_not_specialize=["num_a", "num_b", "num_c", "tiles_a", "tiles_b", "tiles_c", "starts", "steps", "chunks"])
def _tile_maps_kernel(
    cu_a_ptr, cu_b_ptr, cu_c_ptr, out_a_ptr, out_b_ptr, out_c_ptr, num_a, num_b, num_c, tiles_a, tiles_b, tiles_c, starts, steps,
    chunks, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    if row < chunks:
        at = row * num_a
        _write_tiles(cu_a_ptr + at, cu_a_ptr + starts + at, out_a_ptr + row * tiles_a * 3, num_a, tiles_a, steps, BLOCK_A, BLOCK)
    elif row == chunks:
        if BLOCK_B > 0:
            _write_tiles(cu_b_ptr, cu_b_ptr, out_b_ptr, num_b, tiles_b, steps, BLOCK_B, BLOCK)
    else:
        if BLOCK_C > 0:
            _write_tiles(cu_c_ptr, cu_c_ptr, out_c_ptr, num_c, tiles_c, steps, BLOCK_C, BLOCK)


def tile_maps(*maps: tuple[Tensor, int, int], chunks: int = 1) -> list[Tensor]:
    """(segment, first position, number of positions) of every tile, [chunks, 3, tiles] int32, of one to three maps in one launch.

    maps: (cu, total, block_q); cu [n + 1] int32: running size of the n segments, which hold at most `total` positions.
    The first map's segments may come in chunks of n, each numbered by itself and of at most `total` positions: cu [2, chunks · n + 1],
    running sizes over all chunks and where each segment begins.
    """
    outs: list[Tensor] = []
    slots: list[tuple] = []
    for cu, total, block_q in maps:
        rows = 1 if outs else chunks
        n = (cu.shape[-1] - 1) // rows
        num_tiles = total // block_q + n if n else 0
        outs.append(torch.empty((rows, 3, num_tiles), dtype=torch.int32, device=cu.device))
        slots.append((cu, outs[-1], n, num_tiles, block_q))
    cus, to, nums, sizes, (a, b, c) = zip(*slots, *[(None, None, 0, 0, 0)] * (3 - len(maps)), strict=True)
    if any(sizes):
        starts = cus[0].shape[1] if cus[0].ndim == 2 else 0
        _tile_maps_kernel[(cdiv(max(sizes), 256), chunks + len(maps) - 1)](
            *cus, *to, *nums, *sizes, starts, max(nums).bit_length(), chunks, BLOCK_A=a, BLOCK_B=b, BLOCK_C=c, BLOCK=256, num_warps=2
        )
    return outs


@launcher
@triton.jit(do_not_specialize=["num_rows", "part_rows"])
def _norm_kernel(
    k_ptr, out_ptr, num_rows, part_rows, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    part, kv = tl.program_id(0), tl.program_id(1)
    largest = tl.zeros([BLOCK_N], tl.float32)
    for start in range(part * part_rows, tl.minimum((part + 1) * part_rows, num_rows), BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, (row.to(tl.int64) * HKV + kv) * D, row < num_rows, D, BLOCK_D).to(tl.float32)
        largest = tl.maximum(largest, tl.sum(k * k, 1))
    tl.store(out_ptr + part * HKV + kv, tl.sqrt(tl.max(largest, 0)))


@triton.jit
def load_norm(norms_ptr, kv, HKV: tl.constexpr):
    """max |k| of a key/value head, from `key_norms`."""
    return tl.max(tl.load(norms_ptr + tl.arange(0, NORM_PARTS) * HKV + kv), 0)


def key_norms(k: Tensor) -> Tensor | None:
    """max |k| of each of NORM_PARTS shares of the rows of [n,Hkv,D], [NORM_PARTS,Hkv] fp32, for the bounded forward.

    bf16 only: fp16 has not the range and fp32 not the need. One launch: whoever needs the largest takes it of the shares.
    """
    if k.dtype != torch.bfloat16:
        return None
    n, hkv, d = k.shape
    out = torch.empty(NORM_PARTS.value, hkv, dtype=torch.float32, device=k.device)
    part_rows = cdiv(cdiv(n, NORM_PARTS.value), NORM_ROWS) * NORM_ROWS
    _norm_kernel[out.shape](k, out, n, part_rows, HKV=hkv, D=d, BLOCK_D=block_d(d), BLOCK_N=NORM_ROWS, num_warps=4)
    return out


@triton.jit
def load_tile(tiles_ptr, tile, num_tiles):
    """Segment, first position and number of positions of a tile."""
    return tl.load(tiles_ptr + tile), tl.load(tiles_ptr + num_tiles + tile), tl.load(tiles_ptr + 2 * num_tiles + tile)


@triton.jit
def load_rows(ptr, offsets, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr = True):
    """[n, BLOCK_D] from rows that begin at `offsets` (elements); zeros where masked, and beyond D."""
    d = tl.arange(0, BLOCK_D)[None, :]
    p = ptr + offsets[:, None] + d
    if MASKED:
        x = tl.load(p, mask=mask[:, None] if BLOCK_D == D else mask[:, None] & (d < D), other=0.0)
    else:
        x = tl.load(p) if BLOCK_D == D else tl.load(p, mask=d < D, other=0.0)
    return x


@triton.jit
def store_rows(ptr, offsets, x, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, ACCUMULATE: tl.constexpr = False):
    """Writes [n, BLOCK_D] to rows that begin at `offsets`, added to what lies there if ACCUMULATE."""
    d = tl.arange(0, BLOCK_D)[None, :]
    full = mask[:, None] if BLOCK_D == D else mask[:, None] & (d < D)
    p = ptr + offsets[:, None] + d
    if ACCUMULATE:
        x += tl.load(p, mask=full, other=0.0).to(tl.float32)
    tl.store(p, x.to(ptr.dtype.element_ty), mask=full)


def precision(x: Tensor) -> str:
    """fp32 means fp32, unless torch.set_float32_matmul_precision allows TF32."""
    return "ieee" if x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


def lse_dtype(x: Tensor) -> torch.dtype:
    """Of lse and delta behind the door, whose rounding is an error of a whole row: fp64 beside fp32 where the chip multiplies fp64 fast."""
    if x.dtype != torch.float32:
        return torch.float32
    fast = not x.is_cuda or torch.cuda.get_device_capability(x.device) in ((8, 0), (9, 0))
    return torch.float64 if fast else torch.float32


def block_d(head_dim: int) -> int:
    return max(16, next_power_of_2(head_dim))


def interpreted() -> bool:
    """Whether these kernels were defined under Triton's interpreter, which runs them on CPU tensors."""
    return not isinstance(_tile_maps_kernel, Launcher)
