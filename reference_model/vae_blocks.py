"""Blocks of the VAE (paper: arXiv 2505.17412, section 3.2; the released inference code where a docstring says so).

Rows of a level are `vae_grid.Level`'s: by sample, latent and Z-curve. Letters: n rows, C channels, L latents, B samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ssa
from reference_model.sparse_conv import SparseConv3d
from reference_model.vae_grid import Level
from reference_model.vae_layers import GroupNormSiLU, LayerNormSiLU, Narrow, Widen, unit_linear

if TYPE_CHECKING:
    from reference_model.vae_encoder import EncoderPlan

Extra = Callable[[Tensor], Tensor]  # rows [n,C] → the same with something added

_ROWS = 1 << 18  # rows of the finest level handled at once: [rows, 8, 32] float32 is 268 MB


class Pool(nn.Module):
    """Mean over the active children of each row of the next coarser level; "released" divides by their number plus one."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def factor(self, count: Tensor) -> Tensor:
        """count [...] float32, at least 1 → what a true mean is multiplied by."""
        return count / (count + 1) if self.kind == "released" else torch.ones_like(count)

    def forward(self, x: Tensor, blocks: ssa.Blocks) -> Tensor:
        """x [n,C], blocks: children of each coarser row → [rows,C]."""
        mean = ssa.block_mean(x, blocks)
        return (mean * self.factor(blocks.offsets.diff()[:, None].float())).to(x.dtype) if self.kind == "released" else mean


@dataclass(frozen=True, eq=False)
class Children:
    """The rows of a level as children of the rows of the next coarser one."""

    blocks: ssa.Blocks  # bounds of the children of each coarser row
    places: Tensor  # [n] int64, 8 * coarser row + slot (0 … 7) of each row

    def spread(self, x: Tensor) -> Tensor:
        """x [n,C] → [rows,8C], zeros for absent children."""
        return x.new_zeros(8 * len(self.blocks), x.shape[1]).index_copy(0, self.places, x).view(len(self.blocks), -1)


class _DownTail(nn.Module):
    """What follows the pooling of a down block: conv 3^3, norm, SiLU, conv 3^3, plus the skip."""

    conv1: SparseConv3d
    conv2: SparseConv3d
    norm2: GroupNormSiLU

    def convolve(self, h: Tensor, skip: Tensor, level: Level, cu_level: Tensor) -> Tensor:
        h = self.conv1(h, level)
        h = self.conv2(self.norm2(h, cu_level), level)
        return h + skip.to(h.dtype)


class DownBlock(_DownTail):
    """Residual block of the release: norm, SiLU, pool 2^3, conv 3^3, norm, SiLU, conv 3^3, plus conv 1^3 of the pooled input."""

    def __init__(self, channels_in: int, channels_out: int, pooling: str, backend: str | None):
        super().__init__()
        self.norm1, self.norm2 = GroupNormSiLU(channels_in), GroupNormSiLU(channels_out)
        self.pool = Pool(pooling)
        self.conv1 = SparseConv3d(channels_in, channels_out, backend)
        self.conv2 = SparseConv3d(channels_out, channels_out, backend, zero=True)
        self.skip = unit_linear(channels_in, channels_out)

    def forward(self, x: Tensor, cu_seqlens: Tensor, children: Children, level: Level, cu_level: Tensor) -> Tensor:
        """x [n,C] of the finer level → [rows of level, C']; cu_seqlens, cu_level [B+1] int32: bounds of the samples among both."""
        active = self.pool(self.norm1(x, cu_seqlens), children.blocks)
        return self.convolve(active, self.skip(self.pool(x, children.blocks)), level, cu_level)

    def reduce(self, active: Tensor, raw: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Children [r,8,C] after norm and SiLU, and before, zero where not mask [r,8] → what `convolve` takes."""
        count = mask.sum(1, keepdim=True).float()
        share = self.pool.factor(count) / count
        return active.sum(1) * share, self.skip(raw.sum(1) * share)


class SubpixelDownBlock(_DownTail):
    """`DownBlock` whose pooling is learned: each of the 8 children has its own matrix, in the branch and in the skip; absent ones count 0.

    A mean forgets which children it is over: two layers of voxels in one layer of cells then look the same from both sides of the surface.
    """

    def __init__(self, channels_in: int, channels_out: int, backend: str | None):
        super().__init__()
        self.norm1, self.norm2 = GroupNormSiLU(channels_in), GroupNormSiLU(channels_out)
        self.gather, self.skip = unit_linear(8 * channels_in, channels_out), unit_linear(8 * channels_in, channels_out)
        self.conv1 = SparseConv3d(channels_out, channels_out, backend)
        self.conv2 = SparseConv3d(channels_out, channels_out, backend, zero=True)

    def forward(self, x: Tensor, cu_seqlens: Tensor, children: Children, level: Level, cu_level: Tensor) -> Tensor:
        """x [n,C] of the finer level → [rows of level, C']; cu_seqlens, cu_level [B+1] int32: bounds of the samples among both."""
        active = self.gather(children.spread(self.norm1(x, cu_seqlens)))
        return self.convolve(active, self.skip(children.spread(x)), level, cu_level)

    def reduce(self, active: Tensor, raw: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Children [r,8,C] after norm and SiLU, and before, zero where not mask [r,8] → what `convolve` takes."""
        return self.gather(active.flatten(1)), self.skip(raw.flatten(1))


def down_block(channels_in: int, channels_out: int, pooling: str, backend: str | None = None) -> DownBlock | SubpixelDownBlock:
    if pooling == "subpixel":
        return SubpixelDownBlock(channels_in, channels_out, backend)
    return DownBlock(channels_in, channels_out, pooling, backend)


class Lift(nn.Module):
    """The finest level of the encoder: Linear 1 → C of each value, then norm, SiLU and pooling of the first block.

    Every channel is an affine function of one number, so its norm needs only mean and variance of the values, and rows are made, pooled and
    dropped piece by piece: [N,C] of tens of millions of voxels never exists. A piece holds rows of one large sample or of many small ones,
    which then have scale and shift row by row.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.linear, self.rows = nn.Linear(1, channels), LiftRows()

    def forward(self, plan: EncoderPlan, block: DownBlock | SubpixelDownBlock) -> tuple[Tensor, Tensor]:
        """What `block.convolve` takes, a row for each cell of 2^3 voxels."""
        weight, bias = self.linear.weight[:, 0].float(), self.linear.bias.float()
        mean, variance = plan.moments[:, :, None].unbind(1)
        affine = torch.cat(block.norm1.affine(weight * mean + bias, weight.square() * variance), 1)  # [B,2C]

        def reduce(t: Tensor, mask: Tensor, sample: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
            scale, shift = (table if len(table) == 1 else F.embedding(sample, table)).chunk(2, 1)
            active, raw = self.rows(t, mask, weight, bias, scale, shift)
            return block.reduce(active, raw, mask)

        groups = _together(plan.cells)
        sizes = [sum(plan.cells[first:last]) for first, last in groups]
        samples = torch.repeat_interleave(plan.cu_seqlens[0].diff(), output_size=len(plan.values))  # of each row
        pieces = []
        for (first, last), *group in zip(groups, *(x.split(sizes) for x in (plan.values, plan.active, samples)), strict=True):
            for t, mask, sample in zip(*(x.split(_ROWS) for x in group), strict=True):
                pieces.append(checkpoint(reduce, t, mask, sample - first, affine[first:last], use_reentrant=False))
        h, skip = zip(*pieces, strict=True)
        return torch.cat(h), torch.cat(skip)


def _together(cells: list[int]) -> list[tuple[int, int]]:
    """First and last + 1 of the samples that are handled at once: as many as hold _ROWS rows, or one of more."""
    groups: list[tuple[int, int]] = []
    held = 0
    for i, count in enumerate(cells):
        if groups and held + count <= _ROWS:
            groups[-1], held = (groups[-1][0], i + 1), held + count
        else:
            groups.append((i, i + 1))
            held = count
    return groups


class LiftRows(nn.Module):
    """C channels of each child of some cells, after norm and SiLU, and before. Worth compiling on a GPU: it is all bytes."""

    def forward(self, t: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """t, mask [r,8], weight, bias [C], scale, shift [r,C] or [1,C], float32 → two [r,8,C], 0 where not mask, in autocast's dtype."""
        device = t.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else t.dtype
        raw = t[..., None] * weight + bias
        return (F.silu(raw * scale[:, None] + shift[:, None]) * mask[..., None]).to(dtype), (raw * mask[..., None]).to(dtype)


class UpBlock(nn.Module):
    """Mirror of `DownBlock`: norm, SiLU, repeat to 8 children, conv 3^3, norm, SiLU, conv 3^3, plus conv 1^3 of the repeated input.

    The norms are LayerNorms of each row instead of GroupNorms over the sample: a crop or a chunk then equals the whole.
    """

    def __init__(self, channels_in: int, channels_out: int, backend: str | None):
        super().__init__()
        self.norm1, self.norm2 = LayerNormSiLU(channels_in), LayerNormSiLU(channels_out)
        self.conv1 = SparseConv3d(channels_in, channels_out, backend)
        self.conv2 = SparseConv3d(channels_out, channels_out, backend, zero=True)
        self.skip = unit_linear(channels_in, channels_out)

    def forward(self, x: Tensor, level: Level, finer: Level, extra: Extra | None = None) -> Tensor:
        """x [n,C] → [8n,C'] at the finer level, whose rows are all children of the rows of `level`; extra adds what is known of them."""
        h = _plus(self.conv1(self.norm1(x).repeat_interleave(8, 0), finer), extra)
        h = self.conv2(self.norm2(h), finer)
        return h + self.skip(x).to(h.dtype).repeat_interleave(8, 0)


class SubpixelUpBlock(nn.Module):
    """`UpBlock` whose upsampling is learned: each of the 8 children has its own matrix, in the branch and in the skip.

    Both convolutions then run at C': a fifth less arithmetic in the whole model, and a child knows its place before a neighbour tells it.
    """

    def __init__(self, channels_in: int, channels_out: int, backend: str | None):
        super().__init__()
        self.norm1, self.norm2 = LayerNormSiLU(channels_in), LayerNormSiLU(channels_out)
        self.spread, self.skip = unit_linear(channels_in, 8 * channels_out), unit_linear(channels_in, 8 * channels_out)
        self.conv1 = SparseConv3d(channels_out, channels_out, backend)
        self.conv2 = SparseConv3d(channels_out, channels_out, backend, zero=True)

    def forward(self, x: Tensor, level: Level, finer: Level, extra: Extra | None = None) -> Tensor:
        """x [n,C] → [8n,C'] at the finer level, whose rows are all children of the rows of `level`; extra adds what is known of them."""
        h = self.conv1(_plus(_to_children(self.spread(self.norm1(x))), extra), finer)
        h = self.conv2(self.norm2(h), finer)
        return h + _to_children(self.skip(x).to(h.dtype))


def _plus(x: Tensor, extra: Extra | None) -> Tensor:
    return x if extra is None else extra(x)


def _to_children(x: Tensor) -> Tensor:
    """[n,8C] → [8n,C]."""
    return x.unflatten(1, (8, -1)).flatten(0, 1)


class ReleasedUpBlock(nn.Module):
    """Upsampling of the release: conv 3^3, SiLU, repeat to 8 children, conv 3^3, SiLU; no norm, no skip."""

    def __init__(self, channels_in: int, channels_out: int, backend: str | None):
        super().__init__()
        self.conv1 = SparseConv3d(channels_in, channels_out, backend)
        self.conv2 = SparseConv3d(channels_out, channels_out, backend)

    def forward(self, x: Tensor, level: Level, finer: Level, extra: Extra | None = None) -> Tensor:
        """x [n,C] → [8n,C'] at the finer level, whose rows are all children of the rows of `level`; extra adds what is known of them."""
        h = _plus(F.silu(self.conv1(x, level)).repeat_interleave(8, 0), extra)
        return F.silu(self.conv2(h, finer))


class AttentionBlock(nn.Module):
    """Pre-norm transformer block on latents in packed order: window attention, then an MLP (GELU, tanh form)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, mlp_ratio * hidden_size), nn.GELU("tanh"), nn.Linear(mlp_ratio * hidden_size, hidden_size)
        )

    def forward(self, x: Tensor, partition: ssa.VoxelPartition) -> Tensor:
        """x [L,hidden] in the order of the partition, whose window is attended to."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        attended, _ = ssa.window_attention(q, k, v, partition)
        x = x + self.out(attended.flatten(1))
        return x + self.mlp(self.norm2(x))


def compile_fused(model: nn.Module) -> None:
    """Has torch.compile take the modules that only move bytes, at their first call: worth it on a GPU."""
    for module in model.modules():
        if isinstance(module, (LayerNormSiLU, LiftRows, Widen, Narrow)):
            module.compile(dynamic=True)


def position_code(coords: Tensor, channels: int, factor: float) -> Tensor:
    """Absolute position code (the release): coords [n,3] → [n,channels] float32.

    F = channels // 6 frequencies 10000^(-j/F); for each axis sin, then cos of coordinate * factor * frequency; zeros fill the rest.
    """
    count = channels // 6
    frequency = 10000.0 ** (-torch.arange(count, device=coords.device) / count)
    angle = coords.float()[:, :, None] * factor * frequency  # [n,3,F]
    code = torch.cat((angle.sin(), angle.cos()), 2).flatten(1)
    return F.pad(code, (0, channels - code.shape[1]))
