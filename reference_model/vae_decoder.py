"""Decoder of the VAE: latents → a value at each of their 512 voxels (paper: arXiv 2505.17412, section 3.2).

Linear 16→512, position code, window attention over all latents, three upsamplings 512→128→64→32, Linear. Nothing after the attention
looks farther than 3 latents, so those rows may be cropped (training) or cut in chunks (inference) if a halo of 3 latents comes along.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ssa
from reference_model.vae_blocks import ReleasedUpBlock, SubpixelUpBlock, UpBlock, position_code
from reference_model.vae_encoder import GAIN, attend, attention_blocks
from reference_model.vae_grid import Level, children_of_slots, find_latent_neighbors, slots_of_children
from reference_model.vae_layers import Narrow, Widen, unit_linear
from reference_model.vae_pieces import closed, correction, piece_values
from reference_model.volume import CELL

if TYPE_CHECKING:
    from reference_model.vae import VAEConfig

HALO = 3  # latents: the released form reaches 8 + 4 + 4 + 2 + 2 + 1 = 21 voxels, the others 4 + 4 + 2 + 2 + 1 + 1 = 14
EDGES = (2, 4, 8)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = (config.hidden_size, *reversed(config.channels))
        block = {"symmetric": UpBlock, "subpixel": SubpixelUpBlock, "released": ReleasedUpBlock}[config.decoder]
        self.checkpointing = False
        self.linear = unit_linear(config.latent_channels, config.hidden_size, GAIN)
        self.blocks = attention_blocks(config)
        self.up = nn.ModuleList(block(a, b, config.conv_backend) for a, b in zip(widths, widths[1:], strict=False))
        self.occupancy = nn.ModuleList(nn.Linear(c, 1) for c in widths[1:-1]) if config.occupancy else None
        self.head = unit_linear(widths[-1], 1, kind=Narrow)
        self.bounded, self.patch = config.head == "tanh", None
        if config.head == "pieces":
            self.patch = Widen(1, widths[-1])  # of the pieces' values, for the last block to see
            nn.init.zeros_(self.head.weight)  # at first the pieces speak alone

    def attend(self, z: Tensor, latents: Tensor, partitions: tuple[ssa.VoxelPartition, ssa.VoxelPartition], factor: float) -> Tensor:
        """z [L,16] at latents [L,4] → [L,hidden]; never cut, because windows do not nest in chunks."""
        x = self.linear(z if self.patch is None else closed(z))
        return attend(self.blocks, x + position_code(latents[:, 1:], x.shape[1], factor), partitions, self._run)

    def upsample(
        self, x: Tensor, z: Tensor, latents: Tensor, grid: int, prune: float | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """x [L,hidden], z [L,16] at latents [L,4], lexicographic → values [L,512] float32 by child and the occupancy logits.

        Values are NaN where pruned and beyond ±1 where clamping is left to do.
        prune: children whose cell holds a band voxel with a smaller probability are left out (needs the occupancy head).
        The logits {edge: [L,edge^3]} by slot are empty without that head or when pruning.
        """
        if prune is not None and self.occupancy is None:
            raise ValueError("prune needs a model with the occupancy head (VAEConfig.occupancy)")
        neighbors = find_latent_neighbors(latents, grid)
        level = Level.of(latents, neighbors, 1)
        kept: Tensor | None = None  # [L,edge^3] bool of the level, None: all
        logits: dict[int, Tensor] = {}
        pieces = None if self.patch is None else piece_values(z, grid * CELL)
        base = None if pieces is None else pieces.index_select(1, children_of_slots(x.device)).flatten()
        for i, (edge, block) in enumerate(zip(EDGES, self.up, strict=True)):
            finer = Level.of(latents, neighbors, edge, None if kept is None else kept.repeat_interleave(8, 1))
            extra = None
            if self.patch is not None and base is not None and edge == EDGES[-1]:  # the last block sees the values of the pieces
                base = base if finer.places is None else base[finer.places]
                extra = partial(self.patch, t=base.clamp(-2, 2))
            x = self._run(block, x, level, finer, extra)
            if self.occupancy is not None and edge < EDGES[-1]:
                logit = self.occupancy[i](x).float()[:, 0]
                if prune is None:
                    logits[edge] = logit.view(len(latents), edge**3)
                else:
                    chosen = logit.sigmoid() >= prune
                    kept = torch.zeros(len(latents) * edge**3, dtype=torch.bool, device=x.device)
                    kept[slice(None) if finer.places is None else finer.places] = chosen
                    kept = kept.view(len(latents), edge**3)
                    x, finer = x[chosen], Level.of(latents, neighbors, edge, kept)
            level = finer
        values = self.head(x)
        if self.bounded:
            values = values.tanh()
        if level.places is not None:
            values = torch.full((len(latents) * 512,), torch.nan, device=x.device).index_put((level.places,), values)
        values = values.view(len(latents), 512).index_select(1, slots_of_children(x.device))
        return values if pieces is None else pieces + correction(z, values), logits

    def _run(self, function, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)
