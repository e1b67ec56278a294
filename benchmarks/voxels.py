"""Voxel sets for the benchmarks: a synthetic sheet of any size, and the surface voxels of a mesh.

All functions return int32 coordinates [T, 4] = (sample, x, y, z) on the CPU, unique and in raster order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

GYROID_FREQUENCY = 9.0
BALL_RADIUS_SQUARED = 0.95


def gyroid(num_tokens: int, resolution: int | None = None) -> torch.Tensor:
    """The `num_tokens` cells of a `resolution`^3 grid nearest to a gyroid inside a ball, [num_tokens, 4].

    Cell i of R has its centre u = (2i + 1) / R - 1. Cells with x^2 + y^2 + z^2 < 0.95 are ranked by |g|,
    g = sin 9x cos 9y + sin 9y cos 9z + sin 9z cos 9x: a thin sheet, as sparse latents of a surface are, so T grows with
    area. Equal |g| are taken in raster order. `resolution` defaults to `gyroid_resolution(num_tokens)`.
    ValueError if the ball has fewer than `num_tokens` cells.
    """
    resolution = gyroid_resolution(num_tokens) if resolution is None else resolution
    u = (torch.arange(resolution, dtype=torch.float32) + 0.5) / resolution * 2 - 1
    sin, cos = torch.sin(GYROID_FREQUENCY * u), torch.cos(GYROID_FREQUENCY * u)
    x, y, z = (slice(None), None, None), (None, slice(None), None), (None, None, slice(None))
    distance = (sin[x] * cos[y] + sin[y] * cos[z] + sin[z] * cos[x]).abs().flatten()
    square = u * u
    cells = (square[x] + square[y] + square[z] < BALL_RADIUS_SQUARED).flatten().nonzero().squeeze(1)
    if not 0 < num_tokens <= cells.numel():
        raise ValueError(f"the ball must hold num_tokens cells: {num_tokens=}, {resolution=}, cells={cells.numel()}")
    distance = distance[cells]
    limit = distance.kthvalue(num_tokens).values
    keep = distance < limit
    ties = (distance == limit).nonzero().squeeze(1)
    keep[ties[: num_tokens - int(keep.sum())]] = True
    return _with_sample(_unravel(cells[keep], resolution))


def gyroid_resolution(num_tokens: int) -> int:
    """Grid edge used at a given T: 64 up to 32,768 voxels, 128 up to 262,144, 256 above."""
    return 64 if num_tokens <= 32_768 else 128 if num_tokens <= 262_144 else 256


def solid_box(nx: int, ny: int, nz: int) -> torch.Tensor:
    """Every cell of a box, [nx * ny * nz, 4]: blocks without a gap."""
    grid = torch.meshgrid(torch.arange(nx), torch.arange(ny), torch.arange(nz), indexing="ij")
    return _with_sample(torch.stack([axis.flatten() for axis in grid], 1))


def scattered(num_tokens: int, spacing: int) -> torch.Tensor:
    """`num_tokens` voxels `spacing` apart on a cubic lattice, [num_tokens, 4]: each alone in its block of that edge."""
    edge = 1
    while edge**3 < num_tokens:
        edge += 1
    return _with_sample(_unravel(torch.arange(num_tokens), edge) * spacing)


def stack_samples(samples: list[torch.Tensor]) -> torch.Tensor:
    """Several voxel sets as the samples 0, 1, … of one batch, [sum of T, 4]."""
    return torch.cat([torch.cat([torch.full_like(c[:, :1], i), c[:, 1:]], 1) for i, c in enumerate(samples)])


def linked_rings() -> Any:
    """A `trimesh.Trimesh` made by code: two tori linked like a chain, closed, with a gap between them."""
    import trimesh

    flat = trimesh.creation.torus(major_radius=1.0, minor_radius=0.35, major_sections=96, minor_sections=48)
    upright = flat.copy()
    upright.apply_transform(trimesh.transformations.rotation_matrix(torch.pi / 2, [1, 0, 0]))
    upright.apply_translation([1.0, 0.0, 0.0])
    return trimesh.util.concatenate([flat, upright])


def load_mesh(path: str | Path) -> Any:
    """A mesh file as one `trimesh.Trimesh`. ValueError if it has no faces."""
    import trimesh

    mesh = trimesh.load_mesh(path)
    if not len(mesh.faces):
        raise ValueError(f"the mesh must have faces: {str(path)!r} has {len(mesh.faces)}")
    return mesh


def surface_voxels(mesh: Any, resolution: int) -> torch.Tensor:
    """The cells of a `resolution`^3 grid over [-1, 1]^3 that a mesh's surface passes, [T, 4].

    The mesh is centred on its bounding box and its longest side scaled to 1.9. Faces are cut until no edge is longer than
    half a cell; the cells of all vertices are the set (a cell cut by a corner less than that may be missed).
    """
    import numpy as np
    import trimesh

    low, high = mesh.bounds
    vertices = (mesh.vertices - (low + high) / 2) * (1.9 / (high - low).max())
    points, _ = trimesh.remesh.subdivide_to_size(vertices, mesh.faces, max_edge=1.0 / resolution, max_iter=30)
    cells = np.floor((points + 1) * (resolution / 2)).astype(np.int64)
    return _with_sample(_unravel(torch.from_numpy(np.unique(np.ravel_multi_index(cells.T, (resolution,) * 3))), resolution))


def _unravel(index: torch.Tensor, resolution: int) -> torch.Tensor:
    """Raster index [n] to (x, y, z) [n, 3], z fastest."""
    return torch.stack([index // resolution**2, index // resolution % resolution, index % resolution], 1)


def _with_sample(xyz: torch.Tensor, sample: int = 0) -> torch.Tensor:
    return torch.cat([torch.full_like(xyz[:, :1], sample), xyz], 1).int()
