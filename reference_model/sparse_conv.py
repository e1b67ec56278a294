"""3x3x3 convolution between active cells, behind one interface with three backends that share one parameter layout.

    y[i] = sum over taps d of x[i + d] W[d] + b,    kernel [27, in, out], tap (dx+1) + 3(dy+1) + 9(dz+1), absent neighbours count as 0

"torch" gathers each latent's cells and the layer round them into a dense tile and convolves the tiles (any device, needs nothing);
"triton" is `ssa.submanifold_conv3d` over the level's neighbour table (NVIDIA GPUs, the default there); "spconv" is the library of that name
(`sparse_conv_spconv`).
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import ssa
from reference_model.vae_grid import Level

BACKENDS = ("torch", "triton", "spconv")


class SparseConv3d(nn.Module):
    """Submanifold 3^3 convolution with bias: x [n,in] → [n,out] over the cells of a level; `zero` starts it at 0.

    Under autocast x is cast to its dtype; sums are float32. backend None: "triton" for CUDA tensors, "torch" for others.
    """

    def __init__(self, channels_in: int, channels_out: int, backend: str | None = None, zero: bool = False):
        super().__init__()
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS} or None, got {backend!r}")
        self.backend = backend
        self.kernel = nn.Parameter(torch.zeros(27, channels_in, channels_out))
        self.bias = nn.Parameter(torch.zeros(channels_out))
        if not zero:
            bound = math.sqrt(6 / (27 * channels_in))  # He's variance 2 / fan-in: SiLU halves what goes in
            nn.init.uniform_(self.kernel, -bound, bound)

    def forward(self, x: Tensor, level: Level) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if len(x) == 0:
            return x @ self.kernel[0].to(x.dtype)
        if self.backend == "spconv":
            from reference_model.sparse_conv_spconv import submanifold_conv3d

            return submanifold_conv3d(x, self.kernel, self.bias, level)
        if self.backend == "triton" or self.backend is None and x.is_cuda:
            return ssa.submanifold_conv3d(x, self.kernel, self.bias, level.neighbors, impl="triton")
        return _TileConv.apply(x, self.kernel, level) + self.bias.to(x.dtype)


class _TileConv(torch.autograd.Function):
    """The product over taps. Neighbours are mutual, so dx is the same product with mirrored, transposed taps: gathers only, repeatable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, level: Level) -> Tensor:
        ctx.save_for_backward(x, kernel)
        ctx.level = level
        return _convolve(x, kernel, level)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, kernel = ctx.saved_tensors
        dx = _convolve(dy, kernel.flip(0).transpose(1, 2), ctx.level) if ctx.needs_input_grad[0] else None
        dkernel = torch.zeros_like(kernel)
        weight = _dense(kernel).to(x.dtype)
        for rows in _pieces(ctx.level, sum(kernel.shape[1:])):
            core = _tiles(dy, ctx.level, rows)[:, :, 1:-1, 1:-1, 1:-1].contiguous()
            with _exact():
                _, part, _ = torch.ops.aten.convolution_backward(
                    core, _tiles(x, ctx.level, rows), weight, None, [1] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1, [False, True, False]
                )
            dkernel += part.permute(4, 3, 2, 1, 0).reshape(kernel.shape)
        return dx, dkernel, None


def _convolve(x: Tensor, kernel: Tensor, level: Level) -> Tensor:
    weight = _dense(kernel).to(x.dtype)
    out = x.new_empty(len(level.latents), level.edge**3, kernel.shape[2])
    with torch.autocast(x.device.type, enabled=False), _exact():
        for rows in _pieces(level, sum(kernel.shape[1:])):
            out[rows] = nn.functional.conv3d(_tiles(x, level, rows), weight).flatten(2).transpose(1, 2)
    return out.view(-1, out.shape[2])[level.raster]


def _dense(kernel: Tensor) -> Tensor:
    """kernel [27,in,out] → [out,in,x,y,z] of a dense convolution."""
    return kernel.view(3, 3, 3, *kernel.shape[1:]).permute(4, 3, 2, 1, 0).contiguous()


def _tiles(x: Tensor, level: Level, rows: slice) -> Tensor:
    """[m,C,e+2,e+2,e+2]: cells of some latents and the layer round them."""
    halo = level.halo[rows]
    tile = x.index_select(0, halo.clamp(min=0).flatten()).view(*halo.shape, -1)
    tile.masked_fill_((halo < 0)[..., None], 0)
    return tile.transpose(1, 2).reshape(len(halo), x.shape[1], *(level.edge + 2,) * 3)


def _pieces(level: Level, channels: int) -> Iterator[slice]:
    """Latents a piece, so that its tiles hold about 2^24 numbers."""
    step = max(1, (1 << 24) // (channels * (level.edge + 2) ** 3))
    return (slice(i, i + step) for i in range(0, len(level.latents), step))


def _exact() -> AbstractContextManager:
    """float32 convolutions of cuDNN follow torch's setting for matrix products."""
    allow = torch.get_float32_matmul_precision() != "highest"
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=allow)
