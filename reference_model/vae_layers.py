"""Small layers of the VAE (paper: arXiv 2505.17412, section 3.2): linears and how they start, norms with SiLU. n rows, C channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ssa


def unit_linear(channels_in: int, channels_out: int, gain: float = 1.0, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """Linear that starts with variance gain^2 times that of its input: outside norms nothing else keeps a signal's size."""
    linear = kind(channels_in, channels_out)
    nn.init.normal_(linear.weight, std=gain * channels_in**-0.5)
    nn.init.zeros_(linear.bias)
    return linear


class GroupNormSiLU(nn.Module):
    """SiLU of GroupNorm over all rows of a sample and the channels of a group (32 groups, fewer if 32 does not divide C); eps 1e-5."""

    def __init__(self, channels: int):
        super().__init__()
        self.groups, self.eps = math.gcd(32, channels), 1e-5
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """x [n,C], cu_seqlens [B+1] int32: bounds of the samples → [n,C] in x's dtype."""
        return ssa.group_norm_silu(x, self.weight, self.bias, cu_seqlens, self.groups, self.eps)

    def affine(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Moments [B,C] of each channel → (scale, shift) [B,C] such that x * scale + shift is the normalised x."""
        means, variances = (x.unflatten(1, (self.groups, -1)) for x in (mean, variance))
        center = means.mean(2, keepdim=True)
        spread = (variances + (means - center).square()).mean(2, keepdim=True)
        scale = (torch.rsqrt(spread + self.eps) * self.weight.view(self.groups, -1)).flatten(1)
        return scale, self.bias - center.expand_as(means).flatten(1) * scale


class LayerNormSiLU(nn.LayerNorm):
    """SiLU of the LayerNorm of each row, in the dtype of the row. Worth compiling on a GPU: torch's own kernel is slow on narrow rows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x)).to(x.dtype)


class Widen(nn.Linear):
    """Linear 1 → C of a number for each row, added to the row. Worth compiling on a GPU.

    Written out: as a matrix product, its gradient reads millions of rows for C weights, and libraries do such ones badly.
    """

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        """x [n,C], t [n] float32 → [n,C] in x's dtype."""
        return x + torch.addcmul(self.bias, t[:, None], self.weight[:, 0]).to(x.dtype)


class Narrow(nn.Linear):
    """Linear C → 1: x [n,C] → [n] float32. Worth compiling on a GPU.

    With gradients it is written out, for the reason of `Widen`, and sums in float32; without, it is a product in autocast's dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x).float()[:, 0]
        return (x * self.weight[0].float()).sum(1) + self.bias
