"""Voxels of every level of the VAE as rows, and who is beside whom, from the latents alone (paper: arXiv 2505.17412, section 3.2).

A latent (cell of 8^3 voxels) holds e^3 cells at the levels e = 8, 4, 2, 1. Inside a latent they are numbered along the Z-curve, so slot s
of one level lies in slot s // 8 of the next coarser one at every level: children of a row are neighbours in memory.

    e = 4, slots of the cells (x, y, z):  000 001 010 011 100 101 110 111 002 003 012 ...        parents (e = 2): 0 0 0 0 0 0 0 0 1 1 1 ...

Letters: L latents, n rows (active cells of a level), B samples. A neighbour of a cell lies in one of the 27 latents around its own, in a
slot that is known beforehand: only the table of latents [L,27] needs a search.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from reference_model.tiles import lattice
from reference_model.volume import CELL


@dataclass(frozen=True, eq=False)
class Level:
    """The active cells of one level, rows by latent, then by slot; built by `build_level`."""

    edge: int  # cells an axis in a latent: 8, 4, 2 or 1
    latents: Tensor  # [L,4] int32 (sample, x, y, z), lexicographic
    places: Tensor | None  # [n] int64, latent * edge^3 + slot of each row; None: every cell is active
    neighbors: Tensor  # [n,27] int32 rows, -1 = none, column (dx+1) + 3(dy+1) + 9(dz+1)
    cache: dict[str, object] = field(default_factory=dict, repr=False)  # of the convolution backends

    def __len__(self) -> int:
        return self.neighbors.shape[0]

    @cached_property
    def coords(self) -> Tensor:
        """[n,4] int32 (sample, x, y, z) in the grid of this level."""
        count = self.edge**3
        places = torch.arange(len(self), device=self.latents.device) if self.places is None else self.places
        cell = self.latents[places // count]
        local = slot_coords(self.edge, cell.device)[places % count].int()
        return torch.cat((cell[:, :1], cell[:, 1:] * self.edge + local), 1)


def build_level(latents: Tensor, latent_neighbors: Tensor, edge: int, active: Tensor | None = None) -> Level:
    """Rows and neighbour table of a level: latents [L,4], latent_neighbors [L,27] int32, active [L,edge^3] bool by slot (None: all)."""
    which, slot = _neighbor_slots(edge, latents.device)
    around = latent_neighbors[:, which]  # [L,edge^3,27]
    count = edge**3
    if active is None:
        table = torch.where(around >= 0, around * count + slot, -1)
        return Level(edge, latents, None, table.view(-1, 27))
    places = active.flatten().nonzero().flatten()
    row = torch.full(((len(latents) + 1) * count,), -1, dtype=torch.int32, device=latents.device)  # those of a latent that is none: -1
    row[places] = torch.arange(len(places), dtype=torch.int32, device=latents.device)
    around = around.view(-1, 27)[places]
    slot = slot.expand(len(latents), -1, -1).reshape(-1, 27)[places]
    return Level(edge, latents, places, row[torch.where(around >= 0, around, len(latents)) * count + slot])


def find_latent_neighbors(latents: Tensor, grid: int) -> Tensor:
    """[L,27] int32: rows of the 3^3 latents around each, -1 = none; latents [L,4] lexicographic, 0 <= xyz < grid. Samples do not meet."""
    key = _latent_key(latents, grid)
    steps = torch.arange(-1, 2, device=latents.device)
    size = grid + 2
    step = (steps[None, None, :] * size**2 + steps[None, :, None] * size + steps[:, None, None]).flatten()  # x fastest
    wanted = key[:, None] + step
    if len(key) == 0:
        return wanted.int()
    found = torch.searchsorted(key, wanted).clamp_(max=len(key) - 1)
    return torch.where(key[found] == wanted, found, -1).int()


def check_latents(latents: Tensor, grid: int) -> None:
    """ValueError unless latents are [L,4] integer, unique, lexicographic and inside the grid."""
    if latents.ndim != 2 or latents.shape[1] != 4 or latents.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"latents must be [L,4] int32 or int64, got {latents.shape=} {latents.dtype=}")
    if len(latents) == 0:
        return
    key = _latent_key(latents, grid)
    xyz = latents[:, 1:]
    facts = torch.stack((xyz.amin().long(), xyz.amax().long(), (key.diff() > 0).all().long())).tolist()
    if facts[0] < 0 or facts[1] >= grid:
        raise ValueError(f"latents must lie in [0, {grid}), got {facts[0]} to {facts[1]}")
    if not facts[2]:
        raise ValueError("latents must be unique and in lexicographic order of (sample, x, y, z)")


def _latent_key(latents: Tensor, grid: int) -> Tensor:
    sample, x, y, z = latents.long().unbind(1)
    size = grid + 2
    return ((sample * size + x + 1) * size + y + 1) * size + z + 1


@lru_cache(maxsize=32)
def slot_coords(edge: int, device: torch.device) -> Tensor:
    """[edge^3,3] int64: place of each slot of the Z-curve in its latent."""
    order = _slot_of(lattice(edge, device)).argsort()
    return lattice(edge, device)[order]


@lru_cache(maxsize=32)
def slots_of_children(device: torch.device) -> Tensor:
    """[512] int64: slot of the child (dx*8+dy)*8+dz."""
    return _slot_of(lattice(CELL, device))


def _slot_of(xyz: Tensor) -> Tensor:
    """Place along the Z-curve of points [...,3] with coordinates below 8; x is the slowest axis of a cube of 2^3."""
    bit = torch.arange(3, device=xyz.device)
    digits = (xyz[..., None, :] >> bit[:, None]) & 1  # [...,bit,axis]
    return (digits << (3 * bit[:, None] + 2 - bit)).sum((-1, -2))


@lru_cache(maxsize=32)
def _neighbor_slots(edge: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[edge^3,27]: column of `find_latent_neighbors` and slot (int32) where the neighbour of a slot lies."""
    offsets = (lattice(3, device) - 1).flip(1)  # x fastest
    beside = slot_coords(edge, device)[:, None] + offsets
    step = torch.div(beside, edge, rounding_mode="floor")
    which = (step[..., 0] + 1) + 3 * (step[..., 1] + 1) + 9 * (step[..., 2] + 1)
    return which, _slot_of(beside - step * edge).int()
