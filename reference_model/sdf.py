"""Signed distance of a mesh on the sparse band of a volume (paper: arXiv 2505.17412, sections 3.1 and 3.3).

An octree keeps the cells that may hold a voxel of the band: |d(centre)| <= tau + half the cell's diagonal. From the latent grid on,
cells are refined in chunks, so memory follows the band of one chunk and never the grid.
"""

from collections.abc import Mapping

import numpy as np
import torch

from reference_model.closing import SEAM
from reference_model.distance import distance
from reference_model.repair import Surface, resolve_surface
from reference_model.specks import find_specks
from reference_model.volume import BAND, CELL, TAU, Volume

_CHUNK = 4096  # latents refined at once: 2M voxels, about 200 MB
_OCTANTS = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), -1).reshape(-1, 3)
_HALF_DIAGONAL = 3**0.5 / 2


def mesh_to_volume(
    vertices: np.ndarray,
    faces: np.ndarray,
    resolution: int,
    *,
    thickness: float | None = None,
    sharp_angle: float = 15.0,
    margin: float = 0.0,
    scale: float = 1.0,
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0),
    y_up: bool = False,
    meta: Mapping[str, str] | None = None,
) -> Volume:
    """Volume of a mesh given in the unit cube: vertices [V,3] float64 in [-1,1], faces [F,3] int64.

    Closed meshes get the exact signed distance. Others are made closed first (`resolve_surface`); open sheets become solids of
    `thickness` (unit cube; None: 1/128, at least two voxels). `sharp_angle` in degrees marks edges by the angle of their faces' normals.
    `margin` in voxel edges: voxels with |s| < tau + margin h are held too (`RESAMPLING_MARGIN` for `resample`).
    MeshError where no volume can be made; ValueError for vertices outside the cube.
    """
    if len(vertices) and np.abs(vertices).max() > 1:
        raise ValueError(f"vertices must lie in [-1,1]^3, got {float(np.abs(vertices).max())=}")
    surface = resolve_surface(vertices, faces, sheet_thickness(resolution) if thickness is None else thickness)
    return surface_to_volume(surface, resolution, sharp_angle=sharp_angle, margin=margin, scale=scale, offset=offset, y_up=y_up, meta=meta)


def sheet_thickness(resolution: int) -> float:
    """Default thickness of open sheets: 1/128 of the cube's half edge, at least two voxels, the least a grid can hold."""
    return max(TAU, 4 / resolution)


def surface_to_volume(
    surface: Surface,
    resolution: int,
    *,
    sharp_angle: float = 15.0,
    margin: float = 0.0,
    scale: float = 1.0,
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0),
    y_up: bool = False,
    meta: Mapping[str, str] | None = None,
) -> Volume:
    """Volume of a resolved surface, as `mesh_to_volume`."""
    reach = TAU * BAND + margin * 2 / resolution
    cells = _candidate_cells(surface, resolution, reach)
    limit = reach if margin else TAU
    latents: list[np.ndarray] = []
    values, places, inside, conflicts = [], [], [], 0
    for chunk in range(0, len(cells), _CHUNK):
        part = cells[chunk : chunk + _CHUNK]
        tile, torn = _distance_tiles(surface, part, resolution, reach)
        band = np.abs(tile) <= reach
        active = band.any(1)
        tile, band, part = tile[active], band[active], part[active]
        values.append(np.clip(tile[band], -limit, limit) / np.float32(TAU))
        places.append(np.flatnonzero(band) + sum(map(len, latents)) * CELL**3)
        latents.append(part.astype(np.int32))
        inside.append(tile < 0)
        conflicts += torn
    latent = np.concatenate([np.zeros((0, 3), np.int32), *latents])
    place = np.concatenate([np.zeros(0, np.int64), *places])
    value = np.concatenate([np.zeros(0, np.float32), *values])
    sign = np.concatenate([np.zeros((0, CELL**3), np.bool_), *inside])
    specks = 0
    if not surface.exact and len(latent):
        flip, specks = find_specks(latent, sign, resolution)
        sign ^= flip
        moved = flip.reshape(-1)[place]
        value[moved] = np.copysign(np.maximum(np.abs(value[moved]), 1e-6), -value[moved])
    index = (place >> 9).astype(np.int32)
    child = np.stack(np.unravel_index(np.arange(CELL**3), (CELL,) * 3), 1).astype(np.int32)
    coords = (latent * CELL)[index]
    coords += child[place & 511]
    sharp = _near_edges(coords, latent, index, resolution, surface.vertices, sharp_edges(surface.vertices, surface.faces, sharp_angle))
    return Volume(
        resolution=resolution,
        coords=torch.from_numpy(coords),
        values=torch.from_numpy(value),
        sharp=torch.from_numpy(sharp),
        latents=torch.from_numpy(latent),
        latent_index=torch.from_numpy(index),
        inside=torch.from_numpy(sign),
        scale=scale,
        offset=offset,
        y_up=y_up,
        margin=margin,
        meta={**surface.report, "sign_conflicts": str(conflicts), "specks": str(specks), **(meta or {})},
    )


def sharp_edges(vertices: np.ndarray, faces: np.ndarray, angle: float) -> np.ndarray:
    """Edges [E,2] int64 where the normals of two faces differ by more than `angle` degrees."""
    normal = np.cross(vertices[faces[:, 1]] - vertices[faces[:, 0]], vertices[faces[:, 2]] - vertices[faces[:, 0]])
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    normal = np.divide(normal, length, out=np.zeros_like(normal), where=length > 0)
    edges = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), 1)
    order = np.argsort(edges[:, 0] * len(vertices) + edges[:, 1], kind="stable")
    edges, face = edges[order], order // 3
    pair = np.flatnonzero((edges[1:] == edges[:-1]).all(1) & (length[face[1:], 0] > 0) & (length[face[:-1], 0] > 0))
    bent = (normal[face[pair]] * normal[face[pair + 1]]).sum(1) < np.cos(np.radians(angle))
    return np.unique(edges[pair[bent]], axis=0)


def _centers(cells: np.ndarray, resolution: int) -> np.ndarray:
    return (2.0 * cells + 1.0) / resolution - 1.0


def _children(cells: np.ndarray) -> np.ndarray:
    """[8n,3]: the eight halves of each cell [n,3], in a grid twice as fine."""
    return (cells[:, None] * 2 + _OCTANTS).reshape(-1, 3)


def _child_index(voxels: np.ndarray) -> np.ndarray:
    """[n] place of voxels [n,3] in their latent cell."""
    d = voxels % CELL
    return (d[:, 0] * CELL + d[:, 1]) * CELL + d[:, 2]


def _candidate_cells(surface: Surface, resolution: int, reach: float) -> np.ndarray:
    """Cells [C,3] of the latent grid that may hold voxels with |s| <= reach, lexicographic."""
    levels = [resolution // CELL]
    while levels[-1] % 2 == 0 and levels[-1] > 8:
        levels.append(levels[-1] // 2)
    side = np.arange(levels[-1])
    cells = np.stack(np.meshgrid(side, side, side, indexing="ij"), -1).reshape(-1, 3)
    for level in reversed(levels):
        if level != levels[-1]:
            cells = _children(cells)
        bound = reach + _HALF_DIAGONAL * 2 / level
        cells = cells[surface.near(_centers(cells, level), bound)]
    return cells[np.lexsort(cells.T[::-1])]


def _distance_tiles(surface: Surface, cells: np.ndarray, resolution: int, reach: float) -> tuple[np.ndarray, int]:
    """Signed distance [n,512] float32 of the children of latent cells [n,3], ±inf beyond reach; and how many neighbours differ in sign."""
    row = np.arange(len(cells))
    fine = cells
    for level in (resolution // 4, resolution // 2, resolution):
        fine = _children(fine)
        row = np.repeat(row, 8)
        if level < resolution:
            keep = surface.near(_centers(fine, level), reach + _HALF_DIAGONAL * 2 / level)
            fine, row = fine[keep], row[keep]
    place = row * CELL**3 + _child_index(fine)
    points = _centers(fine, resolution)
    h = 2 / resolution
    bound = max(reach, h) * 1.001  # a voxel exactly tau away must know its own side
    measured = np.full(len(cells) * CELL**3, np.nan, np.float32)
    outer = surface.signed(points, bound) if surface.exact else surface.unsigned(points, bound)
    measured[place] = np.fmin(outer, surface.to_within(points, bound)) if len(surface.within) else outer
    tile = measured.reshape(-1, CELL, CELL, CELL)
    joined = _joined(tile, bound, h)
    conflicts = 0
    if surface.exact:
        sign = _spread_signs(np.where(np.isnan(tile), 0, np.where(tile < 0, -1, 1)).astype(np.int8), joined)
        conflicts = _disagreements(sign, joined)
    if not surface.exact or conflicts:  # pseudonormals err where faces cross or nearly vanish
        sign = _ask_signs(surface, cells, np.abs(tile), joined, resolution)
        conflicts = _disagreements(sign, joined)
    signed = np.copysign(np.where(np.isnan(tile), np.inf, tile), np.where(sign < 0, np.float32(-1), np.float32(1))).reshape(len(cells), -1)
    if len(surface.within):  # from outside the boundary is the nearest face; from inside it need not be
        measured[place] = -outer
        signed = np.where(signed < 0, np.nan_to_num(measured.reshape(signed.shape), nan=-np.inf), signed)
    if len(surface.sheets):
        sheet = np.full(signed.size, np.inf, np.float32)
        sheet[place] = surface.sheet_distance(points, bound)
        signed = np.fmin(signed, sheet.reshape(signed.shape))
    return signed, conflicts


def _pairs() -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Slices of a tile [n,8,8,8] that meet along each axis."""
    all_, low, high = slice(None), slice(0, -1), slice(1, None)
    return [
        ((all_, low, all_, all_), (all_, high, all_, all_)),
        ((all_, all_, low, all_), (all_, all_, high, all_)),
        ((all_, all_, all_, low), (all_, all_, all_, high)),
    ]


def _joined(tile: np.ndarray, bound: float, h: float) -> list[np.ndarray]:
    """Neighbours along each axis that no boundary separates: their distances to it add up to more than their own distance h."""
    distance = np.where(np.isnan(tile), np.float32(bound), np.abs(tile))
    return [distance[low] + distance[high] > h * 1.0001 for low, high in _pairs()]


def _disagreements(sign: np.ndarray, joined: list[np.ndarray]) -> int:
    """Joined neighbours of opposite sign."""
    return sum(int((j & (sign[low] * sign[high] < 0)).sum()) for j, (low, high) in zip(joined, _pairs(), strict=True))


def _spread_signs(sign: np.ndarray, joined: list[np.ndarray]) -> np.ndarray:
    """Give unknown signs (0) of tiles [n,8,8,8] int8 those of their joined neighbours, in place."""
    todo = np.flatnonzero((sign == 0).any((1, 2, 3)))
    while len(todo):
        work, link = sign[todo], [j[todo] for j in joined]
        before = np.count_nonzero(work)
        for axis in (1, 2, 3):
            lines, gates = np.moveaxis(work, axis, 0), np.moveaxis(link[axis - 1], axis, 0)
            for i in range(1, CELL):
                np.copyto(lines[i], lines[i - 1], where=(lines[i] == 0) & gates[i - 1])
            for i in range(CELL - 2, -1, -1):
                np.copyto(lines[i], lines[i + 1], where=(lines[i] == 0) & gates[i])
        sign[todo] = work
        if np.count_nonzero(work) == before:
            break
        todo = todo[(work == 0).any((1, 2, 3))]
    return sign


def _ask_signs(surface: Surface, cells: np.ndarray, tile: np.ndarray, joined: list[np.ndarray], resolution: int) -> np.ndarray:
    """Signs [n,8,8,8] int8 by the winding number of one voxel, the farthest from the boundary, for all that are joined with it."""
    sign = np.zeros(tile.shape, np.int8)
    flat, depth = sign.reshape(len(cells), -1), np.nan_to_num(tile, nan=np.inf).reshape(len(cells), -1)
    child = np.stack(np.unravel_index(np.arange(CELL**3), (CELL,) * 3), 1)
    if len(surface.caps):  # joined voxels may lie on both sides of the gap at a seam: there every voxel is asked
        fine, row, h = cells, np.arange(len(cells)), 2 / resolution
        for edge in (CELL, CELL // 2, CELL // 4, 1):
            keep = surface.near_seams(_centers(fine, resolution // edge), SEAM + h + _HALF_DIAGONAL * (edge - 1) * h)
            fine, row = fine[keep], row[keep]
            if edge > 1:
                fine, row = _children(fine), np.repeat(row, 8)
        flat[row, _child_index(fine)] = np.where(surface.winding(_centers(fine, resolution), 0.0) > 0.5, -1, 1)
    for turn in range(5):
        open_tiles = np.flatnonzero((flat == 0).any(1))
        if len(open_tiles) == 0:
            break
        rows, places = open_tiles, np.argmax(np.where(flat[open_tiles] == 0, depth[open_tiles], -1), 1)
        if turn == 4:
            rows, places = np.nonzero(flat == 0)
        inside = surface.winding(_centers(cells[rows] * CELL + child[places], resolution), 0.0) > 0.5
        flat[rows, places] = np.where(inside, -1, 1)
        _spread_signs(sign, joined)
    return sign


def _near_edges(
    coords: np.ndarray, latents: np.ndarray, index: np.ndarray, resolution: int, vertices: np.ndarray, edges: np.ndarray
) -> np.ndarray:
    """[N] bool: voxels whose centre lies within one voxel edge of an edge."""
    near = np.zeros(len(coords), np.bool_)
    if len(edges) == 0 or len(coords) == 0:
        return near
    h = 2 / resolution
    flat = edges[:, [0, 1, 1]]
    cell_near = ~np.isnan(distance(_centers(latents, resolution // CELL), vertices, flat, h + _HALF_DIAGONAL * CELL * h))
    rows = np.flatnonzero(cell_near[index])
    for start in range(0, len(rows), _CHUNK * CELL**3):
        part = rows[start : start + _CHUNK * CELL**3]
        near[part] = ~np.isnan(distance(_centers(coords[part], resolution), vertices, flat, h))
    return near
