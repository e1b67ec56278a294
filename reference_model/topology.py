"""Where decoded voxels change how the true surface hangs together: counted cell by cell, as marching cubes would draw it.

A surface of polygons has the Euler characteristic V - E + F. In marching cubes each vertex belongs to four cubes, each side of a polygon to
two, and a cube with n crossed edges holds n sides and a polygon for each of its loops: it adds loops - n / 4. Cells of 8^3 voxels that do
not touch share no cube, so cells of one parity change it on their own; put into the truth parity after parity, their changes add up to that
of the whole.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from reference_model.mc_tables import CORNERS, FACES, case_table
from reference_model.tiles import lattice
from reference_model.vae_grid import find_latent_neighbors
from reference_model.volume import CELL

_HALO = CELL + 2
_ROWS = 1 << 10  # cells at once


def parities(latents: Tensor) -> Tensor:
    """[L] int64 in 0…7: cells [L,3] of one parity do not touch."""
    return (latents.long() % 2 * torch.tensor([4, 2, 1], device=latents.device)).sum(1)


def places_round(latents: Tensor, resolution: int) -> Tensor:
    """[L,10^3] int64: places row * 512 + child of the voxels in and round each cell [L,3], lexicographic, in values [2L,512].

    The second half of these is what never changes: beyond the latents the nearest voxel of a cell goes on, as it truly is.
    """
    column, child, own = _halo(latents.device)
    beside = find_latent_neighbors(F.pad(latents.int(), (1, 0)), resolution // CELL)[:, column].long()
    alone = torch.arange(len(latents), 2 * len(latents), device=latents.device)[:, None] * CELL**3 + own
    return torch.where(beside < 0, alone, beside * CELL**3 + child)


def euler(values: Tensor) -> Tensor:
    """[n] int64, four times the Euler characteristic of the cubes in and round cells, of values [n,10^3], negative inside."""
    return torch.cat([_euler(part) for part in values.split(_ROWS)]) if len(values) else values.new_zeros(0, dtype=torch.int64)


def _euler(values: Tensor) -> Tensor:
    corners = values.view(-1, _HALO, _HALO, _HALO)
    edge = _HALO - 1

    def at(x: Tensor, corner: int) -> Tensor:
        i, j, k = CORNERS[corner]
        return x[:, i : i + edge, j : j + edge, k : k + edge]

    side = (corners < 0).short()
    case = sum(at(side, c) << c for c in range(8)).long()  # type: ignore[union-attr]
    number, first, weight = _table(values.device)
    variant = first[case]
    rare = weight.any(1)[case].nonzero(as_tuple=True)
    a, b, c, d = torch.stack([at(corners, i)[rare] for i in range(8)], 1)[:, torch.tensor(FACES, device=values.device)].unbind(2)
    variant[rare] += (weight[case[rare]] * torch.where(a < 0, a * c > b * d, b * d > a * c)).sum(1)
    return number[variant].flatten(1).sum(1)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _table(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of `case_table`: 4 loops - crossed edges of each variant, first and weight."""
    table = case_table()
    number = 4 * (table.loop_of.amax(1) + 1) - (table.loop_of >= 0).sum(1)
    return number.to(device), table.first.to(device), table.weight.to(device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _halo(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """[10^3] each: column of `find_latent_neighbors` and child of the voxels in and round a cell; the nearest child of the cell itself."""
    x = lattice(_HALO) - 1
    step, place = torch.tensor([1, 3, 9]), torch.tensor([CELL * CELL, CELL, 1])
    column = ((torch.div(x, CELL, rounding_mode="floor") + 1) * step).sum(1)
    return column.to(device), (x % CELL * place).sum(1).to(device), (x.clamp(0, CELL - 1) * place).sum(1).to(device)
