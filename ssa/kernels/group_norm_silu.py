"""GroupNorm over the rows of each sample, then SiLU (the released compressor of model v1.0).

    n = (x − μ) r        μ, 1/r² − eps: mean and variance over the rows of the sample and the channels of the group
    z = n w + b          y = z σ(z)
    dz = dy σ(z) (1 + z − y)          dw = Σ dz n, db = Σ dz over all rows
    dx = r (w dz − m1 − n m2)         m1, m2: means of w dz and of w dz n over the same rows and channels

x, y [N, F], w, b [F], cu_seqlens [B+1] int32, stats [2 B groups] fp32 = (μ, r); channel f is of group f // PER_GROUP.
Three launches a pass: sums of each tile of rows, the tiles of each sample joined in order, one elementwise pass. Tiles never cross
samples (kernels/common.py, "Tiles never cross segments"): sample s owns those from cu_seqlens[s] // tile_rows + s on, so their number
needs no count from the device and the last ones may be empty. No atomics: two runs are bitwise equal.
Variances are sums of squares about the tile's own mean, joined by Chan's formula: rows far from zero lose nothing.
Bytes: x twice in and y once out, forward; x and dy twice in and dx once out, backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launcher, next_power_of_2


def _config(features: int) -> dict[str, int]:
    return dict(BLOCK_T=64, BLOCK_F=min(max(next_power_of_2(features), 16), 64), num_warps=4)


def _config_join(per_group: int) -> dict[str, int]:
    """A program joins BLOCK_N tiles at a time for BLOCK_G groups of BLOCK_C channels."""
    block_c = next_power_of_2(per_group)
    block_g = max(1, 16 // block_c)
    return dict(BLOCK_N=2048 // (block_g * block_c), BLOCK_G=block_g, BLOCK_C=block_c, num_warps=4)


@triton.jit
def _rows_of(cu_ptr, tile, num_samples, tile_rows, steps):
    """Sample, first row and end of a tile; an empty tile begins at or after its end."""
    sample = tile * 0
    high = sample + num_samples
    for _ in range(steps):
        middle = (sample + high) // 2
        below = tl.load(cu_ptr + middle) // tile_rows + middle <= tile
        sample = tl.where(below, middle, sample)
        high = tl.where(below, high, middle)
    first = tl.load(cu_ptr + sample)
    begin = first + (tile - (first // tile_rows + sample)) * tile_rows
    return sample, begin, tl.minimum(begin + tile_rows, tl.load(cu_ptr + sample + 1))


@triton.jit
def _tiles_of(cu_ptr, sample, tile_rows):
    """First tile, number of tiles and number of rows of a sample."""
    begin = tl.load(cu_ptr + sample)
    rows = tl.load(cu_ptr + sample + 1) - begin
    return begin // tile_rows + sample, tl.cdiv(rows, tile_rows), rows


@triton.jit
def _load(ptr, rows, cols, mask, features):
    return tl.load(ptr + rows.to(tl.int64)[:, None] * features + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _pair(ptr, sample, num_samples, groups, group, mask):
    """Both numbers of a sample's groups, from [2 B groups]."""
    at = ptr + sample.to(tl.int64) * groups + group
    return tl.load(at, mask=mask, other=0.0), tl.load(at + num_samples.to(tl.int64) * groups, mask=mask, other=0.0)


@triton.jit
def _affine(weight_ptr, bias_ptr, cols, mask):
    return tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32), tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _sigmoid(z):
    return tl.div_rn(tl.full(z.shape, 1.0, tl.float32), 1 + tl.exp(-z))  # the default division is off by two roundings


@triton.jit
def _over_group(x, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_G · BLOCK_C] → the same shape: every channel gets the sum of its group."""
    total = tl.sum(tl.reshape(x, [BLOCK_G, BLOCK_C]), 1)
    return tl.reshape(tl.broadcast_to(total[:, None], [BLOCK_G, BLOCK_C]), [BLOCK_G * BLOCK_C])


@launcher
@triton.jit(do_not_specialize=["num_samples", "tile_rows", "steps"])
def _moments_kernel(
    x_ptr,  # [N, F]
    cu_ptr,  # [B+1]
    partial_ptr,  # [tiles, 2, F] fp32: mean, sum of squares about it
    num_samples,
    tile_rows,
    steps,
    features,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    tiles_f = tl.cdiv(features, BLOCK_F)
    tile = tl.program_id(0) // tiles_f
    cols = (tl.program_id(0) % tiles_f) * BLOCK_F + tl.arange(0, BLOCK_F)
    _, begin, end = _rows_of(cu_ptr, tile, num_samples, tile_rows, steps)
    mean = tl.zeros([BLOCK_F], tl.float32)
    squares = tl.zeros([BLOCK_F], tl.float32)
    for start in range(begin, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        mask = (rows < end)[:, None] & (cols < features)[None, :]
        x = _load(x_ptr, rows, cols, mask, features)
        count = tl.minimum(end - start, BLOCK_T).to(tl.float32)
        before = (start - begin).to(tl.float32)
        mean_new = tl.div_rn(tl.sum(x, 0), tl.zeros([BLOCK_F], tl.float32) + count)
        centred = tl.where(mask, x - mean_new[None, :], 0.0)
        delta = mean_new - mean
        mean += delta * (count / (before + count))
        squares += tl.sum(centred * centred, 0) + delta * delta * (before * count / (before + count))
    at = partial_ptr + tile.to(tl.int64) * 2 * features + cols
    tl.store(at, mean, mask=cols < features)
    tl.store(at + features, squares, mask=cols < features)


@launcher
@triton.jit(do_not_specialize=["num_samples", "tile_rows"])
def _statistics_kernel(
    partial_ptr,  # [tiles, 2, F] fp32
    cu_ptr,  # [B+1]
    stats_ptr,  # [2 B groups] fp32
    num_samples,
    tile_rows,
    groups,
    eps,
    PER_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles_g = tl.cdiv(groups, BLOCK_G)
    sample = tl.program_id(0) // tiles_g
    place = tl.arange(0, BLOCK_G * BLOCK_C)
    group = (tl.program_id(0) % tiles_g) * BLOCK_G + place // BLOCK_C
    real = (place % BLOCK_C < PER_GROUP) & (group < groups)
    features = groups * PER_GROUP
    cols = group * PER_GROUP + place % BLOCK_C
    first, tiles, rows = _tiles_of(cu_ptr, sample, tile_rows)
    size = tl.maximum(rows, 1).to(tl.float32) * PER_GROUP
    total = tl.zeros([BLOCK_G * BLOCK_C], tl.float32)
    for start in range(0, tiles, BLOCK_N):
        tile = start + tl.arange(0, BLOCK_N)
        count = tl.minimum(rows - tile * tile_rows, tile_rows).to(tl.float32)
        mask = (tile < tiles)[:, None] & real[None, :]
        total += tl.sum(_load(partial_ptr, 2 * (first + tile), cols, mask, features) * count[:, None], 0)
    size += tl.zeros([BLOCK_G * BLOCK_C], tl.float32)
    mean = tl.div_rn(_over_group(total, BLOCK_G, BLOCK_C), size)
    total = tl.zeros([BLOCK_G * BLOCK_C], tl.float32)
    for start in range(0, tiles, BLOCK_N):
        tile = start + tl.arange(0, BLOCK_N)
        count = tl.minimum(rows - tile * tile_rows, tile_rows).to(tl.float32)
        mask = (tile < tiles)[:, None] & real[None, :]
        delta = _load(partial_ptr, 2 * (first + tile), cols, mask, features) - mean[None, :]
        squares = _load(partial_ptr, 2 * (first + tile) + 1, cols, mask, features)
        total += tl.sum(tl.where(mask, squares + delta * delta * count[:, None], 0.0), 0)
    rstd = tl.div_rn(tl.full([BLOCK_G * BLOCK_C], 1.0, tl.float32), tl.sqrt_rn(_over_group(total, BLOCK_G, BLOCK_C) / size + eps))
    once = (place % BLOCK_C == 0) & (group < groups)
    at = stats_ptr + sample.to(tl.int64) * groups + group
    tl.store(at, mean, mask=once)
    tl.store(at + num_samples.to(tl.int64) * groups, rstd, mask=once)


@launcher
@triton.jit(do_not_specialize=["num_samples", "tile_rows", "steps"])
def _forward_kernel(
    x_ptr,  # [N, F]
    weight_ptr,  # [F]
    bias_ptr,  # [F]
    cu_ptr,  # [B+1]
    stats_ptr,  # [2 B groups] fp32
    y_ptr,  # [N, F]
    num_samples,
    tile_rows,
    steps,
    groups,
    PER_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    features = groups * PER_GROUP
    tiles_f = tl.cdiv(features, BLOCK_F)
    cols = (tl.program_id(0) % tiles_f) * BLOCK_F + tl.arange(0, BLOCK_F)
    col_mask = cols < features
    sample, begin, end = _rows_of(cu_ptr, tl.program_id(0) // tiles_f, num_samples, tile_rows, steps)
    mean, rstd = _pair(stats_ptr, sample, num_samples, groups, cols // PER_GROUP, col_mask)
    weight, bias = _affine(weight_ptr, bias_ptr, cols, col_mask)
    for start in range(begin, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        mask = (rows < end)[:, None] & col_mask[None, :]
        x = _load(x_ptr, rows, cols, mask, features)
        z = (x - mean[None, :]) * rstd[None, :] * weight[None, :] + bias[None, :]
        y = z * _sigmoid(z)
        tl.store(y_ptr + rows.to(tl.int64)[:, None] * features + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _normal_and_dz(x_ptr, dy_ptr, rows, cols, mask, features, mean, rstd, weight, bias):
    normal = (_load(x_ptr, rows, cols, mask, features) - mean[None, :]) * rstd[None, :]
    z = normal * weight[None, :] + bias[None, :]
    sigmoid = _sigmoid(z)
    return normal, _load(dy_ptr, rows, cols, mask, features) * sigmoid * (1 + z - z * sigmoid)


@launcher
@triton.jit(do_not_specialize=["num_samples", "tile_rows", "steps"])
def _sums_kernel(
    dy_ptr,  # [N, F]
    x_ptr,  # [N, F]
    weight_ptr,  # [F]
    bias_ptr,  # [F]
    cu_ptr,  # [B+1]
    stats_ptr,  # [2 B groups] fp32
    partial_ptr,  # [tiles, 2, F] fp32: Σ dz, Σ dz n
    num_samples,
    tile_rows,
    steps,
    groups,
    PER_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    features = groups * PER_GROUP
    tiles_f = tl.cdiv(features, BLOCK_F)
    tile = tl.program_id(0) // tiles_f
    cols = (tl.program_id(0) % tiles_f) * BLOCK_F + tl.arange(0, BLOCK_F)
    col_mask = cols < features
    sample, begin, end = _rows_of(cu_ptr, tile, num_samples, tile_rows, steps)
    mean, rstd = _pair(stats_ptr, sample, num_samples, groups, cols // PER_GROUP, col_mask)
    weight, bias = _affine(weight_ptr, bias_ptr, cols, col_mask)
    sum_dz = tl.zeros([BLOCK_F], tl.float32)
    sum_dzn = tl.zeros([BLOCK_F], tl.float32)
    for start in range(begin, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        mask = (rows < end)[:, None] & col_mask[None, :]
        normal, dz = _normal_and_dz(x_ptr, dy_ptr, rows, cols, mask, features, mean, rstd, weight, bias)
        sum_dz += tl.sum(dz, 0)  # 0 where masked, since dy is
        sum_dzn += tl.sum(dz * normal, 0)
    at = partial_ptr + tile.to(tl.int64) * 2 * features + cols
    tl.store(at, sum_dz, mask=col_mask)
    tl.store(at + features, sum_dzn, mask=col_mask)


@launcher
@triton.jit(do_not_specialize=["num_samples", "tile_rows", "num_tiles"])
def _join_kernel(
    partial_ptr,  # [tiles, 2, F] fp32
    weight_ptr,  # [F]
    cu_ptr,  # [B+1]
    means_ptr,  # [2 B groups] fp32: m1, m2
    dweight_ptr,  # [F]
    dbias_ptr,  # [F]
    num_samples,
    tile_rows,
    num_tiles,
    groups,
    PER_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program `sample` gives the means of a sample; that after the last sample dw and db, from the tiles of all."""
    tiles_g = tl.cdiv(groups, BLOCK_G)
    sample = tl.program_id(0) // tiles_g
    place = tl.arange(0, BLOCK_G * BLOCK_C)
    group = (tl.program_id(0) % tiles_g) * BLOCK_G + place // BLOCK_C
    real = (place % BLOCK_C < PER_GROUP) & (group < groups)
    features = groups * PER_GROUP
    cols = group * PER_GROUP + place % BLOCK_C
    every = sample == num_samples
    first, tiles, rows = _tiles_of(cu_ptr, tl.minimum(sample, num_samples - 1), tile_rows)
    first = tl.where(every, 0, first)
    tiles = tl.where(every, num_tiles, tiles)
    sum_dz = tl.zeros([BLOCK_G * BLOCK_C], tl.float32)
    sum_dzn = tl.zeros([BLOCK_G * BLOCK_C], tl.float32)
    for start in range(0, tiles, BLOCK_N):
        tile = start + tl.arange(0, BLOCK_N)
        mask = (tile < tiles)[:, None] & real[None, :]
        sum_dz += tl.sum(_load(partial_ptr, 2 * (first + tile), cols, mask, features), 0)
        sum_dzn += tl.sum(_load(partial_ptr, 2 * (first + tile) + 1, cols, mask, features), 0)
    if every:
        tl.store(dweight_ptr + cols, sum_dzn.to(dweight_ptr.dtype.element_ty), mask=real)
        tl.store(dbias_ptr + cols, sum_dz.to(dbias_ptr.dtype.element_ty), mask=real)
    else:
        weight = tl.load(weight_ptr + cols, mask=real, other=0.0).to(tl.float32)
        size = tl.maximum(rows, 1).to(tl.float32) * PER_GROUP
        once = (place % BLOCK_C == 0) & (group < groups)
        at = means_ptr + sample.to(tl.int64) * groups + group
        tl.store(at, _over_group(weight * sum_dz, BLOCK_G, BLOCK_C) / size, mask=once)
        tl.store(at + num_samples.to(tl.int64) * groups, _over_group(weight * sum_dzn, BLOCK_G, BLOCK_C) / size, mask=once)


@launcher
@triton.jit(do_not_specialize=["num_samples", "tile_rows", "steps"])
def _backward_kernel(
    dy_ptr,  # [N, F]
    x_ptr,  # [N, F]
    weight_ptr,  # [F]
    bias_ptr,  # [F]
    cu_ptr,  # [B+1]
    stats_ptr,  # [2 B groups] fp32
    means_ptr,  # [2 B groups] fp32
    dx_ptr,  # [N, F]
    num_samples,
    tile_rows,
    steps,
    groups,
    PER_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    features = groups * PER_GROUP
    tiles_f = tl.cdiv(features, BLOCK_F)
    cols = (tl.program_id(0) % tiles_f) * BLOCK_F + tl.arange(0, BLOCK_F)
    col_mask = cols < features
    sample, begin, end = _rows_of(cu_ptr, tl.program_id(0) // tiles_f, num_samples, tile_rows, steps)
    mean, rstd = _pair(stats_ptr, sample, num_samples, groups, cols // PER_GROUP, col_mask)
    m1, m2 = _pair(means_ptr, sample, num_samples, groups, cols // PER_GROUP, col_mask)
    weight, bias = _affine(weight_ptr, bias_ptr, cols, col_mask)
    for start in range(begin, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        mask = (rows < end)[:, None] & col_mask[None, :]
        normal, dz = _normal_and_dz(x_ptr, dy_ptr, rows, cols, mask, features, mean, rstd, weight, bias)
        dx = (dz * weight[None, :] - m1[None, :] - normal * m2[None, :]) * rstd[None, :]
        tl.store(dx_ptr + rows.to(tl.int64)[:, None] * features + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _tiling(num_rows: int, num_samples: int, block_t: int) -> tuple[int, int, int]:
    """Rows of a tile, number of tiles, steps of the search for a tile's sample."""
    # about 500 tiles fill any chip of today and are joined in a few steps
    tile_rows = block_t * max(1, cdiv(num_rows, 512 * block_t))
    return tile_rows, num_rows // tile_rows + num_samples, num_samples.bit_length()


def group_norm_silu_forward(
    x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """x [N, F] → y [N, F] in x's dtype, stats [2 B groups] fp32, flat: torch.compile would specialise on an axis of one sample."""
    (num_rows, features), num_samples = x.shape, cu_seqlens.shape[0] - 1
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    stats = torch.empty(2 * num_samples * num_groups, dtype=torch.float32, device=x.device)
    if y.numel() == 0:
        return y, stats.zero_()
    x, per_group = x.contiguous(), features // num_groups
    config, join = _config(features), _config_join(per_group)
    tile_rows, num_tiles, steps = _tiling(num_rows, num_samples, config["BLOCK_T"])
    partial = torch.empty(num_tiles, 2, features, dtype=torch.float32, device=x.device)
    grid = (num_tiles * cdiv(features, config["BLOCK_F"]),)
    _moments_kernel[grid](x, cu_seqlens, partial, num_samples, tile_rows, steps, features, **config)
    _statistics_kernel[(num_samples * cdiv(num_groups, join["BLOCK_G"]),)](
        partial, cu_seqlens, stats, num_samples, tile_rows, num_groups, eps, PER_GROUP=per_group, **join
    )
    _forward_kernel[grid](
        x, weight.contiguous(), bias.contiguous(), cu_seqlens, stats, y, num_samples, tile_rows, steps, num_groups,
        PER_GROUP=per_group, **config,
    )  # fmt: skip
    return y, stats


def group_norm_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dy [N, F] → dx [N, F], dweight [F], dbias [F] in the dtypes of x, weight and bias."""
    (num_rows, features), num_samples = x.shape, cu_seqlens.shape[0] - 1
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dx.numel() == 0:
        return dx, torch.zeros_like(weight), torch.zeros_like(bias)
    num_groups = stats.shape[0] // (2 * num_samples)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    dy, x, weight, bias, per_group = dy.contiguous(), x.contiguous(), weight.contiguous(), bias.contiguous(), features // num_groups
    config, join = _config(features), _config_join(per_group)
    tile_rows, num_tiles, steps = _tiling(num_rows, num_samples, config["BLOCK_T"])
    partial = torch.empty(num_tiles, 2, features, dtype=torch.float32, device=x.device)
    means = torch.empty_like(stats)
    grid = (num_tiles * cdiv(features, config["BLOCK_F"]),)
    _sums_kernel[grid](
        dy, x, weight, bias, cu_seqlens, stats, partial, num_samples, tile_rows, steps, num_groups, PER_GROUP=per_group, **config
    )
    _join_kernel[((num_samples + 1) * cdiv(num_groups, join["BLOCK_G"]),)](
        partial, weight, cu_seqlens, means, dweight, dbias, num_samples, tile_rows, num_tiles, num_groups, PER_GROUP=per_group, **join
    )
    _backward_kernel[grid](
        dy, x, weight, bias, cu_seqlens, stats, means, dx, num_samples, tile_rows, steps, num_groups, PER_GROUP=per_group, **config
    )
    return dx, dweight, dbias
