"""3x3x3 convolution between active cells, behind one interface with three backends that share one parameter layout.

    y[i] = sum over taps d of x[i + d] W[d] + b,    kernel [27, in, out], tap (dx+1) + 3(dy+1) + 9(dz+1), absent neighbours count as 0

"torch" gathers rows through the level's neighbour table, tap by tap (any device, needs nothing); "triton" is the same product in one kernel
(`ssa.submanifold_conv3d`, NVIDIA GPUs, the default there); "spconv" is the library of that name (`sparse_conv_spconv`).
"""

import math

import torch
from torch import Tensor, nn

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
        if self.backend == "spconv":
            from reference_model.sparse_conv_spconv import submanifold_conv3d

            return submanifold_conv3d(x, self.kernel, self.bias, level)
        return ssa.submanifold_conv3d(x, self.kernel, self.bias, level.neighbors, impl=self.backend)
