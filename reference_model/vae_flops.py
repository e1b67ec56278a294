"""Arithmetic of the VAE's matrix products, counted from the structure of a batch: what a utilisation is measured against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ssa
from reference_model.vae_encoder import EncoderPlan
from reference_model.vae_grid import Level
from reference_model.volume import CELL

if TYPE_CHECKING:
    from reference_model.vae import SparseVAE, VAEConfig


def forward_flops(
    model: SparseVAE, plan: EncoderPlan, partitions: tuple[ssa.VoxelPartition, ssa.VoxelPartition], upsampled: Level
) -> float:
    """Operations of encoder and decoder, two a multiply-add; a backward costs twice as much again. upsampled: latents that are decoded."""
    c = model.config
    rows = len(plan.levels[-1])
    total = 2 * int(plan.active.sum()) * c.channels[0]
    for level, a, b in zip(plan.levels, c.channels, (*c.channels[1:], c.hidden_size), strict=True):
        if c.pooling == "subpixel":
            total += 4 * level.count_pairs() * b * b + 32 * len(level) * a * b
        else:
            total += 2 * level.count_pairs() * (a * b + b * b) + 2 * len(level) * a * b
    total += 2 * rows * c.hidden_size * (c.hidden_size + 3 * c.latent_channels) + 2 * _attention(c, partitions)
    if c.head == "pieces":
        total += 2 * (rows * c.hidden_size * c.latent_channels + len(upsampled) * CELL**3 * c.channels[0])
    coarse = upsampled
    for edge, a, b in zip((2, 4, 8), (c.hidden_size, *c.channels[:0:-1]), c.channels[::-1], strict=True):
        fine = Level(edge, upsampled.latents, upsampled.latent_neighbors)
        if c.decoder == "symmetric":
            total += 2 * fine.count_pairs() * (a * b + b * b) + 2 * len(coarse) * a * b
        elif c.decoder == "subpixel":
            total += 4 * fine.count_pairs() * b * b + 2 * len(coarse) * a * 16 * b
        else:
            total += 2 * coarse.count_pairs() * a * b + 2 * fine.count_pairs() * b * b
        coarse = fine
    return float(total + 2 * len(coarse) * c.channels[0])


def _attention(c: VAEConfig, partitions: tuple[ssa.VoxelPartition, ssa.VoxelPartition]) -> int:
    """The transformer blocks of one half."""
    linear = 2 * partitions[0].num_tokens * c.hidden_size**2 * (4 + 2 * c.mlp_ratio)
    windows = [4 * int(p.window.offsets.diff().long().square().sum()) * c.hidden_size for p in partitions]
    return sum(linear + windows[i % 2] for i in range(c.num_layers))
