"""Random access to sparse voxels: dense tiles of 8^3, one per latent cell that holds any, found through a table over the latent grid."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

CELL = 8
_STEP = 1 << 21  # voxels handled at once: 16 MB per int64 temporary
OCTANTS = list(product((0, 1), repeat=3))


def lattice(n: int, device: torch.device | str | None = None) -> Tensor:
    """All points of [0, n)^3, [n^3,3] int64, z fastest."""
    axis = torch.arange(n, device=device)
    return torch.cartesian_prod(axis, axis, axis)


@dataclass(frozen=True, eq=False)
class Tiles:
    """Values of voxels in an R^3 grid. Points from -8 to R + 7 may be asked for; what is not there is NaN."""

    resolution: int
    latents: Tensor  # [L,3] int64, lexicographic
    table: Tensor  # [(R/8+2)^3] int64: latent cell → row of values, L where there is no tile
    values: Tensor  # [L+1,512] float32, NaN where no voxel is known; the last row is the empty tile

    @classmethod
    def build(cls, coords: Tensor, values: Tensor, resolution: int) -> Tiles:
        """Voxels coords [N,3] (integer, unique, any order) with values [N] (no NaN); ValueError otherwise."""
        if coords.ndim != 2 or coords.shape[1] != 3 or coords.is_floating_point() or values.shape != coords.shape[:1]:
            raise ValueError(f"coords must be integer [N,3] and values [N], got {coords.shape=} {coords.dtype=} {values.shape=}")
        if resolution < CELL or resolution % CELL:
            raise ValueError(f"resolution must be a positive multiple of {CELL}, got {resolution=}")
        if len(coords) and not 0 <= coords.min() <= coords.max() < resolution:
            raise ValueError(f"coords must lie in [0, {resolution}), got {coords.min().item()} to {coords.max().item()}")
        marks = torch.zeros((resolution // CELL + 2) ** 3, dtype=torch.bool, device=coords.device)
        for c in coords.split(_STEP):
            marks[_cell_key(c >> 3, resolution)] = True
        keys = marks.nonzero().flatten()
        table = torch.full(marks.shape, len(keys), device=coords.device)
        table[keys] = torch.arange(len(keys), device=coords.device)
        flat = torch.full(((len(keys) + 1) * CELL**3,), torch.nan, device=coords.device)
        for c, v in zip(coords.split(_STEP), values.split(_STEP), strict=True):
            flat[table[_cell_key(c >> 3, resolution)] * CELL**3 + local_index(c)] = v.float()
        known = int(flat.isfinite().sum())
        if known != len(coords):
            raise ValueError(f"coords must be unique and values finite, got {len(coords)} voxels of which {known} remain")
        size = resolution // CELL + 2
        latents = torch.stack((keys // size**2, keys // size % size, keys % size), 1) - 1
        return cls(resolution, latents, table, flat.view(-1, CELL**3))

    def rows(self, latents: Tensor) -> Tensor:
        """Rows of `values` of latent cells [...,3], -1 to R/8 per axis; L (the empty tile) where there is no tile."""
        return self.table[_cell_key(latents, self.resolution)]

    def octants(self, latents: Tensor) -> Tensor:
        """Rows [n,8] of the cells latents [n,3] + OCTANTS."""
        return self.rows(latents[:, None] + torch.tensor(OCTANTS, device=latents.device))

    def at(self, points: Tensor) -> Tensor:
        """Values of voxels points [...,3] integer."""
        return self.values.view(-1)[self.rows(points >> 3) * CELL**3 + local_index(points)]


def _cell_key(latents: Tensor, resolution: int) -> Tensor:
    x, y, z = latents.long().unbind(-1)
    size = resolution // CELL + 2
    return ((x + 1) * size + y + 1) * size + z + 1


def local_index(coords: Tensor) -> Tensor:
    """Place (dx*8+dy)*8+dz of voxels coords [...,3] in their cell of 8^3, int64."""
    x, y, z = (coords.long() & (CELL - 1)).unbind(-1)
    return (x * CELL + y) * CELL + z
