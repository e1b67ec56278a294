"""The 48 symmetries of the cube, exact on volumes because voxel centres lie symmetric about 0."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import permutations, product

import torch
from torch import Tensor

from reference_model.dataset import VolumeBatch, collate_volumes
from reference_model.tiles import CELL, lattice
from reference_model.vae_pieces import turn_latents, turning
from reference_model.volume import Volume, child_index


@lru_cache(maxsize=1)
def symmetries() -> Tensor:
    """[48,3,3] int64 signed permutation matrices M, x' = M x: the identity first, rows 0 to 23 rotations, 24 to 47 reflections."""
    unit = torch.eye(3, dtype=torch.int64)
    matrices = [unit[list(axes)] * torch.tensor(signs)[:, None] for axes in permutations(range(3)) for signs in product((1, -1), repeat=3)]
    return torch.stack(sorted(matrices, key=lambda m: -round(torch.det(m.double()).item())))


def apply_symmetry(volume: Volume, index: int) -> Volume:
    """Volume of the shape moved by `symmetries()[index]`, bit for bit the one that direct construction would give.

    meta["symmetry"] names the motion since the source: `scale`, `offset` and `y_up` still belong to the source, and
    unit @ symmetries()[symmetry] leads back to its frame. ValueError unless 0 <= index < 48.
    """
    turned = turn_batch(collate_volumes([volume]), [index], volume.latents.device)
    return replace(
        volume, coords=turned.coords[:, 1:].contiguous(), values=turned.values, sharp=turned.sharp,
        latents=turned.latents[:, 1:].contiguous(), latent_index=turned.latent_index, inside=turned.inside, meta=turned.meta[0],
    )  # fmt: skip


def turn_batch(batch: VolumeBatch, indices: Sequence[int], device: torch.device | str, non_blocking: bool = False) -> VolumeBatch:
    """The batch on the device, sample i moved by `symmetries()[indices[i]]`; no indices leave it as it is.

    ValueError unless each sample has an index in [0, 48).
    """
    if indices and (len(indices) != len(batch.meta) or not all(0 <= index < 48 for index in indices)):
        raise ValueError(f"index must be in [0, 48), one a sample, got {[*indices]} for {len(batch.meta)}")
    moved = batch.to(device, non_blocking)
    if not indices:
        return moved
    chosen = torch.tensor(indices).to(device)
    motion, tables = (x[chosen] for x in _tables(chosen.device))
    sample = moved.latents[:, 0].long()
    axes, signs = motion.abs().argmax(2)[sample], motion.sum(2)[sample]
    at = moved.latents[:, 1:].gather(1, axes)
    at = torch.where(signs < 0, batch.resolution // CELL - 1 - at, at)
    key = at.long()
    order = ((sample << 45) + (key[:, 0] << 30) + (key[:, 1] << 15) + key[:, 2]).argsort()
    came_from = tables[sample]  # [L,512] int64; order keeps the rows of a sample where they are, so their first columns stay too
    rows = torch.full(moved.inside.shape, -1, dtype=torch.int32, device=at.device)
    rows[moved.latent_index.long(), child_index(moved.coords[:, 1:])] = torch.arange(len(moved.coords), dtype=torch.int32, device=at.device)
    rows = rows[order].gather(1, came_from)
    latent_index, child = (rows >= 0).nonzero().unbind(1)
    voxels = rows[latent_index, child]
    at = at[order]
    return replace(
        moved,
        coords=torch.cat([moved.coords[:, :1], at[latent_index] * CELL + lattice(CELL, at.device).int()[child]], 1),
        values=moved.values[voxels],
        sharp=moved.sharp[voxels],
        latents=torch.cat([moved.latents[:, :1], at], 1),
        latent_index=latent_index.int(),
        inside=moved.inside[order].gather(1, came_from),
        meta=tuple(
            {**meta, "symmetry": str(_after(i, int(meta.get("symmetry", 0))))}
            for meta, i in zip(batch.meta, indices, strict=True)
        ),
        fit=None if moved.fit is None else turn_latents(moved.fit, _turns(chosen.device), chosen[sample])[order],
    )  # fmt: skip


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # tables first asked for in inference must serve training too
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """`symmetries()` and [48,512] int64: which child of a cell lies at each child's place after a motion."""
    moved = []
    for matrix in symmetries():
        axes, flipped = matrix.abs().argmax(1).tolist(), [a for a in range(3) if matrix[a].sum() < 0]
        moved.append(torch.arange(CELL**3).view(CELL, CELL, CELL).permute(axes).flip(flipped).flatten())
    return symmetries().to(device), torch.stack(moved).to(device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _turns(device: torch.device) -> Tensor:
    """[48,2,15,15]: what each motion does to a fit."""
    return turning(_tables(device)[1])


@lru_cache(maxsize=48 * 48)
def _after(index: int, before: int) -> int:
    """Index of the motion `before` followed by `index`."""
    return int((symmetries() == symmetries()[index] @ symmetries()[before]).all(2).all(1).nonzero())
