"""Encoder of the VAE: band voxels → mean and log variance of 16 channels at each latent (paper: arXiv 2505.17412, section 3.2).

Linear 1→32; three residual blocks that halve the resolution, 32→64→128→512; Linear, position code, window attention at the latents,
LayerNorm without weights, Linear. With head "pieces" the latents fitted to the cells enter before the attention and
are added to the mean, but for the last, the kind of the cell, which stays as it is. GroupNorms take their statistics over a sample, so a
sample is never cropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ssa
from reference_model.dataset import VolumeBatch
from reference_model.vae_blocks import AttentionBlock, Children, Lift, down_block, position_code
from reference_model.vae_grid import Level, find_latent_neighbors, slots_of_children
from reference_model.vae_layers import unit_linear
from reference_model.vae_loss import STEEPNESS
from reference_model.vae_pieces import closed, correction
from reference_model.volume import CELL, child_index

if TYPE_CHECKING:
    from reference_model.vae import VAEConfig

EDGES = (4, 2, 1)
_KIND_LOGVAR = -9.0
GAIN = 2.0  # of what the position code is added to, so that it is not drowned


@dataclass(frozen=True, eq=False)
class EncoderPlan:
    """Everything of a batch that depends on coordinates, and its values by children."""

    values: Tensor  # [n4,8] float32: values of the children of each cell of 2^3 voxels, 0 where there is none
    active: Tensor  # [n4,8] bool
    cells: list[int]  # rows of each sample
    levels: tuple[Level, ...]  # edges 4, 2, 1
    children: tuple[Children, ...]  # levels[0] under levels[1], levels[1] under levels[2]
    moments: Tensor  # [B,2] float32: mean and variance of each sample's values
    cu_seqlens: tuple[Tensor, ...]  # [B+1] int32, bounds of the samples among the rows of each level

    @classmethod
    def build(cls, batch: VolumeBatch) -> EncoderPlan:
        """One host synchronisation for the cells, one for each level's rows."""
        latents, device = batch.latents, batch.latents.device
        place = batch.latent_index.long() * CELL**3 + slots_of_children(device)[child_index(batch.coords[:, 1:])]
        values = torch.zeros(len(latents) * CELL**3, device=device)
        active = torch.zeros(values.shape, dtype=torch.bool, device=device)
        values[place] = batch.values.clamp(-1, 1)
        active[place] = True
        masks = {CELL: active.view(len(latents), CELL**3)}
        for edge in EDGES:
            masks[edge] = masks[2 * edge].view(len(latents), edge**3, 8).any(2)
        neighbors = find_latent_neighbors(latents, batch.resolution // CELL)
        levels = tuple(Level.of(latents, neighbors, edge, masks[edge] if edge > 1 else None) for edge in EDGES)
        counts = torch.stack([F.pad(mask.sum(1).cumsum(0), (1, 0)) for mask in masks.values()])
        bounds = counts[:, batch.cu_latents.long()]
        children = []
        for fine, coarse, cu in zip(levels, levels[1:], bounds[2:], strict=False):
            count = masks[fine.edge].view(-1, 8).sum(1)
            offsets = F.pad((count if coarse.places is None else count[coarse.places]).cumsum(0), (1, 0))
            children.append(Children(ssa.Blocks(2, offsets.int(), cu.int(), coarse.coords), coarse.places_of_children(fine)))
        rows = levels[0].places
        return cls(
            values.view(-1, 8)[rows], active.view(-1, 8)[rows], bounds[1].diff().tolist(), levels, tuple(children), _moments(batch),
            tuple(bounds[1:].int().unbind()),
        )  # fmt: skip


def _moments(batch: VolumeBatch) -> Tensor:
    """[B,2] float32: mean and variance of the values of each sample, 0 where there are none."""
    t, cu = batch.values.clamp(-1, 1).double(), batch.cu_seqlens.long()
    sums = [F.pad(x.cumsum(0), (1, 0))[cu].diff() for x in (t, t.square())]  # one at a time: of two, a GPU scans each with one block
    mean, square = torch.stack(sums) / cu.diff().clamp(min=1)
    return torch.stack((mean, (square - mean.square()).clamp(min=0)), 1).float()


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = (*config.channels, config.hidden_size)
        self.checkpointing = False
        self.lift = Lift(widths[0])
        self.down = nn.ModuleList(down_block(a, b, config.pooling, config.conv_backend) for a, b in zip(widths, widths[1:], strict=False))
        self.linear = unit_linear(config.hidden_size, config.hidden_size, GAIN)
        # `patch` is what weights of that form call what reads a fit
        self.patch = unit_linear(config.latent_channels, config.hidden_size) if config.head == "pieces" else None
        self.blocks = attention_blocks(config)
        self.moments = unit_linear(config.hidden_size, 2 * config.latent_channels)
        with torch.no_grad():  # a standard deviation of 0.14 at first: a decoder learns little from noise
            self.moments.weight[config.latent_channels :] = 0
            self.moments.bias[config.latent_channels :] = -4
            if self.patch is not None:  # at first the coefficients are the latents, their variance what suits the weight of the KL
                self.moments.weight.zero_()
                self.moments.bias[config.latent_channels :] = -9 + math.log(max(config.lambda_kl, 1e-9) / 1e-3 / STEEPNESS[config.error])

    def forward(
        self, plan: EncoderPlan, partitions: tuple[ssa.VoxelPartition, ssa.VoxelPartition], factor: float, fit: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """→ mean, logvar [L,16] float32, rows as the latents; partitions: windows without and with shift.

        fit [L,16]: latents fitted to the cells, which the mean is added to where they are open.
        """
        run = self._checkpointed if self.checkpointing and torch.is_grad_enabled() else _plain
        first = self.down[0]
        h, skip = self.lift(plan, first)
        x = run(first.convolve, h, skip, plan.levels[0], plan.cu_seqlens[0])
        for i, block in enumerate(list(self.down)[1:]):
            x = run(block, x, plan.cu_seqlens[i], plan.children[i], plan.levels[i + 1], plan.cu_seqlens[i + 1])
        x = self.linear(x)
        x = x + position_code(plan.levels[-1].latents[:, 1:], x.shape[1], factor)
        if self.patch is not None and fit is not None:
            x = x + self.patch(closed(fit))
        x = attend(self.blocks, x, partitions, run)
        mean, logvar = self.moments(F.layer_norm(x, x.shape[1:])).float().chunk(2, 1)
        if fit is not None:  # no gradient would hold the kind of a cell, the last number, where it is
            mean, logvar = fit + correction(fit, F.pad(mean[:, :-1], (0, 1))), F.pad(logvar[:, :-1], (0, 1), value=_KIND_LOGVAR)
        return mean, logvar.clamp(-30, 20)

    @staticmethod
    def _checkpointed(function, *args):
        return checkpoint(function, *args, use_reentrant=False)


def _plain(function, *args):
    return function(*args)


def attention_blocks(config: VAEConfig) -> nn.ModuleList:
    return nn.ModuleList(AttentionBlock(config.hidden_size, config.num_heads, config.mlp_ratio) for _ in range(config.num_layers))


def attend(blocks: nn.ModuleList, x: Tensor, partitions: tuple[ssa.VoxelPartition, ssa.VoxelPartition], run=_plain) -> Tensor:
    """Window attention, unshifted and shifted in turn; x [L,hidden] in the order of the latents, in and out."""
    x = partitions[0].sort(x)
    for i, block in enumerate(blocks):
        x = run(block, x, partitions[i % 2])
    return partitions[0].unsort(x)
