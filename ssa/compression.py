"""Block compressors δ: the tokens of a block → one key or value of the compression branch.

    conv_mean        mean_block(conv3³(x))                                            arXiv 2505.17412, Eq. 7
    direct3d_s2_v1   pool(silu(conv1³(x)))                                            released model v1.1
    direct3d_s2_v2   conv3³(silu(GN(conv3³(pool(silu(GN(x))))))) + pool(x)            released model v1.0, both conv3³ between blocks

x [T, C] with C = Hkv · D (heads are mixed), plus a table of positions in the block for keys. mean divides by the number of voxels n,
pool by n + 1. Neighbours are found by coordinate, across block borders, never across samples. Parameter names are the release's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import functional
from .partition import VoxelPartition


class SubmanifoldConv3d(nn.Module):
    """3×3×3 convolution over the active neighbours; kernel [27, in, out], tap (dx+1) + 3(dy+1) + 9(dz+1), bias [out]."""

    def __init__(self, in_channels: int, out_channels: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(27, in_channels, out_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(27 * self.kernel.shape[1])
        nn.init.uniform_(self.kernel, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, neighbors: Tensor, impl: str | None = None) -> Tensor:
        return functional.submanifold_conv3d(x, self.kernel, self.bias, neighbors, impl=impl)


class PointwiseConv3d(nn.Module):
    """1×1×1 convolution: kernel [in, out], bias [out]."""

    def __init__(self, in_channels: int, out_channels: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(in_channels, out_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.kernel.shape[0])
        nn.init.uniform_(self.kernel, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.kernel.t(), self.bias)


class GroupNormSiLU(nn.Module):
    """GroupNorm whose statistics run over all rows of a sample (and the channels of a group), in fp32 or wider, then SiLU."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, *, device=None, dtype=None) -> None:
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight = nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype))

    def forward(self, x: Tensor, cu_seqlens: Tensor, impl: str | None = None) -> Tensor:
        """x [N, C], rows of sample b from cu_seqlens[b] to cu_seqlens[b + 1] → [N, C]."""
        return functional.group_norm_silu(x, self.weight, self.bias, cu_seqlens, self.num_groups, self.eps, impl=impl)


class _Wrapped(nn.Module):
    """Holds a convolution under the name `conv`, as the released modules do."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, *args) -> Tensor:
        return self.conv(*args)


class ConvMean(nn.Module):
    """The paper's δ. The convolution starts as the identity, so a fresh compressor is the plain mean."""

    def __init__(self, channels: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = SubmanifoldConv3d(channels, channels, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.conv.kernel.zero_()
            self.conv.kernel[13].fill_diagonal_(1)
            self.conv.bias.zero_()

    def forward(self, x: Tensor, partition: VoxelPartition, table: Tensor | None = None, impl: str | None = None) -> Tensor:
        """x [T, C] in packed order, table [m³, C] or None → [blocks, C]."""
        if table is not None:
            x = functional.add_position(x, table, partition.slots, impl=impl)
        return functional.block_mean(self.conv(x, self.neighbors(partition), impl), partition.compression, impl=impl)

    @staticmethod
    def neighbors(partition: VoxelPartition) -> Tensor:
        """The table of the partition that this compressor reads."""
        return partition.neighbors


class Direct3DS2V1(nn.Module):
    """δ of the released model v1.1."""

    def __init__(self, channels: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.act_layers = nn.Sequential(_Wrapped(PointwiseConv3d(channels, channels, device=device, dtype=dtype)), nn.SiLU())

    def forward(self, x: Tensor, partition: VoxelPartition, table: Tensor | None = None, impl: str | None = None) -> Tensor:
        """x [T, C] in packed order, table [m³, C] or None → [blocks, C]."""
        if table is not None:
            x = functional.add_position(x, table, partition.slots, impl=impl)
        return functional.segment_mean(self.act_layers(x), partition.compression.offsets, extra=1, impl=impl)

    @staticmethod
    def neighbors(partition: VoxelPartition) -> None:
        """It reads none."""


class Direct3DS2V2(nn.Module):
    """δ of the released model v1.0."""

    def __init__(self, channels: int, *, device=None, dtype=None) -> None:
        super().__init__()
        kwargs = dict(device=device, dtype=dtype)
        groups = math.gcd(32, channels)
        self.act_layers = nn.Sequential(GroupNormSiLU(groups, channels, **kwargs))
        self.out_layers = nn.Sequential(
            _Wrapped(SubmanifoldConv3d(channels, channels, **kwargs)),
            GroupNormSiLU(groups, channels, **kwargs),
            nn.Identity(),  # the release's SiLU, so that the next one is number 3
            _Wrapped(SubmanifoldConv3d(channels, channels, **kwargs)),
        )

    def forward(self, x: Tensor, partition: VoxelPartition, table: Tensor | None = None, impl: str | None = None) -> Tensor:
        """x [T, C] in packed order, table [m³, C] or None → [blocks, C]."""
        compression, neighbors = partition.compression, self.neighbors(partition)
        if table is None:
            skip = functional.segment_mean(x, compression.offsets, extra=1, impl=impl)
        else:
            slots = partition.slots
            skip = functional.segment_mean(x, compression.offsets, extra=1, table=table, slots=slots, impl=impl)
            x = functional.add_position(x, table, slots, impl=impl)
        h = self.act_layers[0](x, partition.cu_seqlens, impl)
        h = functional.segment_mean(h, compression.offsets, extra=1, impl=impl)  # [blocks, C]
        conv_in, norm, _, conv_out = self.out_layers
        h = norm(conv_in(h, neighbors, impl), compression.cu_blocks, impl)
        return skip + conv_out(h, neighbors, impl)

    @staticmethod
    def neighbors(partition: VoxelPartition) -> Tensor:
        """The table of the partition that this compressor reads."""
        return partition.block_neighbors


COMPRESSORS: dict[str, type[ConvMean] | type[Direct3DS2V1] | type[Direct3DS2V2]] = {
    "conv_mean": ConvMean,
    "direct3d_s2_v1": Direct3DS2V1,
    "direct3d_s2_v2": Direct3DS2V2,
}
