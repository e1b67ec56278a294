"""Volumes of shapes with a known distance, and checks of meshes against what is known."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from reference_model.tiles import CELL, lattice
from reference_model.volume import BAND, TAU, Volume, child_index, group_voxels, voxel_centers

Distance = Callable[[Tensor], Tensor]  # points [n,3] float64 → [n], negative inside, 1-Lipschitz


def sphere(radius: float, centre: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Distance:
    return lambda p: (p - torch.tensor(centre).double()).norm(dim=1) - radius


def torus(major: float, minor: float) -> Distance:
    return lambda p: torch.hypot(p[:, :2].norm(dim=1) - major, p[:, 2]) - minor


def box(half: tuple[float, float, float], frame: Tensor | None = None) -> Distance:
    def distance(p: Tensor) -> Tensor:
        q = (p if frame is None else p @ frame).abs() - torch.tensor(half).double()
        return q.clamp(min=0).norm(dim=1) + q.amax(1).clamp(max=0)

    return distance


def box_edge_distance(half: tuple[float, float, float], frame: Tensor) -> Distance:
    """Unsigned distance to the twelve edges of a box."""

    def distance(p: Tensor) -> Tensor:
        q = (p @ frame).abs() - torch.tensor(half).double()
        off = torch.stack([torch.stack([q[:, a].clamp(min=0), *(q[:, b] for b in range(3) if b != a)], 1).norm(dim=1) for a in range(3)])
        return off.amin(0)

    return distance


def rotation(seed: int) -> Tensor:
    q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]
    return q * torch.det(q)


def volume_of(distance: Distance, resolution: int, margin: float = 0.0, edges: Distance | None = None) -> Volume:
    """Volume built directly; with a margin it holds |s| < tau + margin h. `edges` is the distance to marked edges."""
    reach = TAU * BAND + margin * 2 / resolution
    cells = lattice(resolution // CELL)
    near = distance(voxel_centers(cells.double(), resolution // CELL)).abs() < reach + 3**0.5 * CELL / resolution
    points = (cells[near][:, None] * CELL + lattice(CELL)).flatten(0, 1)
    s = distance(voxel_centers(points.double(), resolution))
    band = s.abs() <= reach
    coords = points[band].int()
    order, latents, latent_index = group_voxels(coords, resolution)
    coords, values = coords[order], (s[band][order] / TAU).float()
    inside = (s < 0).view(-1, CELL**3)[band.view(-1, CELL**3).any(1)]
    centres = voxel_centers(coords.double(), resolution)
    sharp = torch.zeros(len(coords), dtype=torch.bool) if edges is None else edges(centres) <= 2 / resolution
    volume = Volume(resolution, coords, values, sharp, latents, latent_index, inside, margin=margin)
    assert torch.equal(inside[latent_index.long(), child_index(coords)], values < 0)
    return volume


def rim(faces: Tensor) -> Tensor:
    """Vertices on edges without an opposite; AssertionError where an edge is used twice in one direction."""
    if len(faces) == 0:
        return faces.new_zeros(0)
    edges = torch.cat((faces, faces.roll(-1, 1)), 0).view(2, -1).T
    n = int(faces.max()) + 1
    key = (edges[:, 0] * n + edges[:, 1]).sort().values
    back = (edges[:, 1] * n + edges[:, 0]).sort().values
    assert (key.diff() > 0).all(), "an edge is used twice in one direction"
    single = key[:0] if torch.equal(key, back) else key[~torch.isin(key, back)]
    return torch.cat((single // n, single % n)).unique()


def euler(vertices: Tensor, faces: Tensor) -> int:
    """V − E + F of a closed mesh, all its vertices used: 2 − 2 genus, summed over components."""
    assert (faces.flatten().bincount(minlength=len(vertices)) > 0).all()
    return len(vertices) - len(faces) // 2


def enclosed(vertices: Tensor, faces: Tensor) -> float:
    a, b, c = vertices.double()[faces].unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


def area(vertices: Tensor, faces: Tensor) -> float:
    a, b, c = vertices.double()[faces].unbind(1)
    return float(torch.linalg.cross(b - a, c - a).norm(dim=1).sum() / 2)


def check_equal(a: Any, b: Any) -> None:
    """Two volumes or batches, bit for bit, wherever their tensors lie."""
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        assert (x.dtype == y.dtype and torch.equal(x.cpu(), y.cpu())) if torch.is_tensor(x) else x == y, f.name
