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
from typing import Any

import torch
from torch import Tensor

from reference_model.tiles import lattice
from reference_model.volume import CELL


@dataclass(frozen=True, eq=False)
class Level:
    """The active cells of one level, rows by latent, then by slot; tables are built when first used."""

    edge: int  # cells an axis in a latent: 8, 4, 2 or 1
    latents: Tensor  # [L,4] int32 (sample, x, y, z), lexicographic
    latent_neighbors: Tensor  # [L,27] int32, as `find_latent_neighbors`
    places: Tensor | None = None  # [n] int64, latent * edge^3 + slot of each row, ascending; None: every cell is active
    cache: dict[str, Any] = field(default_factory=dict, repr=False)  # of the convolution backends

    @classmethod
    def of(cls, latents: Tensor, latent_neighbors: Tensor, edge: int, active: Tensor | None = None) -> Level:
        """active [L,edge^3] bool by slot, None: all. One host synchronisation where it is given."""
        return cls(edge, latents, latent_neighbors, None if active is None else active.flatten().nonzero().flatten())

    def __len__(self) -> int:
        return len(self.latents) * self.edge**3 if self.places is None else len(self.places)

    @cached_property
    def coords(self) -> Tensor:
        """[n,4] int32 (sample, x, y, z) in the grid of this level."""
        count = self.edge**3
        places = torch.arange(len(self), device=self.latents.device) if self.places is None else self.places
        cell = self.latents[places // count]
        local = slot_coords(self.edge, cell.device)[places % count].int()
        return torch.cat((cell[:, :1], cell[:, 1:] * self.edge + local), 1)

    @cached_property
    def neighbors(self) -> Tensor:
        """[n,27] int32: row of the cell at + (dx, dy, dz), column (dx+1) + 3(dy+1) + 9(dz+1); -1 = none."""
        which, slot = _beside(self.edge, self.latents.device)
        if self.places is None:
            first = torch.where(self.latent_neighbors >= 0, self.latent_neighbors * self.edge**3, -1)
            return first[:, which].bitwise_or_(slot).view(-1, 27)  # a sum that leaves -1 alone; in place: [L,edge^3,27] is gigabytes
        latent, own = self.places // self.edge**3, self.places % self.edge**3
        return self._row_at(self.latent_neighbors[latent[:, None], which[own]], slot[own])

    def count_pairs(self) -> int:
        """Pairs of a row and a neighbour of it, itself included. One host synchronisation."""
        if self.places is not None:
            return int((self.neighbors >= 0).sum())
        which, _ = _beside(self.edge, self.latents.device)
        return int((which.flatten().bincount(minlength=27) * (self.latent_neighbors >= 0).sum(0)).sum())

    @cached_property
    def halo(self) -> Tensor:
        """[L,(edge+2)^3] int32: rows of the cells in and round each latent, z fastest; -1 = none."""
        which, slot = _around(self.edge, self.latents.device)
        return self._row_at(self.latent_neighbors[:, which], slot)

    @cached_property
    def raster(self) -> Tensor:
        """[n] int64: latent * edge^3 + (x * edge + y) * edge + z of each row."""
        count, device = self.edge**3, self.latents.device
        places = torch.arange(len(self), device=device) if self.places is None else self.places
        child = slot_coords(self.edge, device) @ torch.tensor([self.edge**2, self.edge, 1], device=device)
        return places - places % count + child[places % count]

    def places_of_children(self, finer: Level) -> Tensor:
        """[n of finer] int64: 8 * row of this level + slot below it of each row of the next finer level."""
        places = torch.arange(len(finer), device=self.latents.device) if finer.places is None else finer.places
        return self._row_of_place[places // 8].long() * 8 + places % 8

    def _row_at(self, latent: Tensor, slot: Tensor) -> Tensor:
        """Rows of cells named by latent (int32, -1 = none) and slot (int32)."""
        place = torch.where(latent >= 0, latent, len(self.latents)) * self.edge**3 + slot
        return self._row_of_place[place]

    @cached_property
    def _row_of_place(self) -> Tensor:
        """[(L+1) edge^3] int32; the latent behind the last holds nothing."""
        count = self.edge**3
        row = torch.full(((len(self.latents) + 1) * count,), -1, dtype=torch.int32, device=self.latents.device)
        row[slice(len(self)) if self.places is None else self.places] = torch.arange(len(self), dtype=torch.int32, device=row.device)
        return row


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
@torch.inference_mode(False)  # a constant first asked for in inference must serve training too
def slot_coords(edge: int, device: torch.device) -> Tensor:
    """[edge^3,3] int64: place of each slot of the Z-curve in its latent."""
    order = _slot_of(lattice(edge, device)).argsort()
    return lattice(edge, device)[order]


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def slots_of_children(device: torch.device) -> Tensor:
    """[512] int64: slot of the child (dx*8+dy)*8+dz."""
    return _slot_of(lattice(CELL, device))


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def children_of_slots(device: torch.device) -> Tensor:
    """[512] int64: child (dx*8+dy)*8+dz of the slot."""
    return slots_of_children(device).argsort()


def _slot_of(xyz: Tensor) -> Tensor:
    """Place along the Z-curve of points [...,3] with coordinates below 8; x is the slowest axis of a cube of 2^3."""
    bit = torch.arange(3, device=xyz.device)
    digits = (xyz[..., None, :] >> bit[:, None]) & 1  # [...,bit,axis]
    return (digits << (3 * bit[:, None] + 2 - bit)).sum((-1, -2))


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _beside(edge: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[edge^3,27] column of `find_latent_neighbors` and slot (int32) of the neighbours of each slot."""
    return _locate(slot_coords(edge, device)[:, None] + (lattice(3, device) - 1).flip(1), edge)  # x fastest


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _around(edge: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[(edge+2)^3] the same for the cells in and round a latent."""
    return _locate(lattice(edge + 2, device) - 1, edge)


def _locate(cell: Tensor, edge: int) -> tuple[Tensor, Tensor]:
    """Cells [...,3] of a latent's frame, -1 to edge → column of `find_latent_neighbors` and slot (int32)."""
    step = torch.div(cell, edge, rounding_mode="floor")
    return (step[..., 0] + 1) + 3 * (step[..., 1] + 1) + 9 * (step[..., 2] + 1), _slot_of(cell - step * edge).int()
