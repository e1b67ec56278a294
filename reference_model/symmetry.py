"""The 48 symmetries of the cube, exact on volumes because voxel centres lie symmetric about 0."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import permutations, product

import torch
from torch import Tensor

from reference_model.dataset import VolumeBatch, collate_volumes
from reference_model.tiles import CELL, lattice
from reference_model.volume import Volume


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
    if not 0 <= index < 48:
        raise ValueError(f"index must be in [0, 48), got {index=}")
    matrix = symmetries()[index]
    axes = matrix.abs().argmax(1).tolist()
    flipped = [a for a in range(3) if matrix[a].sum() < 0]
    last = volume.resolution // CELL - 1
    latents = torch.stack([last - volume.latents[:, a] if i in flipped else volume.latents[:, a] for i, a in enumerate(axes)], 1)
    key = latents.long()
    order = ((key[:, 0] << 40) + (key[:, 1] << 20) + key[:, 2]).argsort()

    def move(tile: Tensor) -> Tensor:
        moved = tile.view(-1, CELL, CELL, CELL).permute(0, *(1 + a for a in axes)).flip([1 + a for a in flipped])
        return moved.reshape(-1, CELL**3)[order]

    rows = torch.full(volume.inside.shape, -1, dtype=torch.int32, device=latents.device)
    rows[volume.latent_index.long(), volume.child_index] = torch.arange(len(volume.coords), dtype=torch.int32, device=latents.device)
    rows = move(rows)
    latent_index, child = (rows >= 0).nonzero().unbind(1)
    source = rows[latent_index, child]
    latents = latents[order]
    return replace(
        volume,
        coords=latents[latent_index] * CELL + lattice(CELL, latents.device).int()[child],
        values=volume.values[source],
        sharp=volume.sharp[source],
        latents=latents,
        latent_index=latent_index.int(),
        inside=move(volume.inside),
        meta={**volume.meta, "symmetry": str(_find(matrix @ symmetries()[int(volume.meta.get("symmetry", 0))]))},
    )


def turn_batch(batch: VolumeBatch, indices: Sequence[int], device: torch.device | str, non_blocking: bool = False) -> VolumeBatch:
    """A batch on the device, its bounds from the host: sample i moved by `apply_symmetry(…, indices[i])`; no indices leave it as it is."""
    voxels, cells = batch.cu_seqlens.tolist(), batch.cu_latents.tolist()
    moved = batch.to(device, non_blocking)
    if not indices:
        return moved
    turned = []
    for i, index in enumerate(indices):
        n, c = slice(voxels[i], voxels[i + 1]), slice(cells[i], cells[i + 1])
        volume = Volume(
            batch.resolution, moved.coords[n, 1:], moved.values[n], moved.sharp[n], moved.latents[c, 1:], moved.latent_index[n] - cells[i],
            moved.inside[c], meta=batch.meta[i],
        )  # fmt: skip
        turned.append(apply_symmetry(volume, index))
    return replace(collate_volumes(turned).to(device, non_blocking), dropped=batch.dropped)


def _find(matrix: Tensor) -> int:
    return int((symmetries() == matrix).all(2).all(1).nonzero())
