"""Caps over the holes of a surface: the level set 1/2 of its winding number where no face is; and its flaps, which bound nothing."""

from typing import TYPE_CHECKING

import numpy as np

from reference_model.cli import optional_import
from reference_model.distance import ROUGH
from reference_model.meshes import MeshError
from reference_model.triangles import areas, longest_edges, normals, split_longest

if TYPE_CHECKING:
    from reference_model.repair import Surface

_OCTANTS = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), -1).reshape(-1, 3)
_COARSE, _FINE = 64, 512
SEAM = 2 / _FINE  # a cap may end this far from the faces it should meet
_FLAP = 1e-3  # layers nearer than this are one sheet: half a voxel at 1024
_LONE = 0.15  # least mean of the winding numbers on both sides of a face that bounds: 1/2, down to 1/4 at the rim of a hole
_SHORT = 1 / 32
_MOST_CELLS = 4_000_000
_HALF_DIAGONAL = 3**0.5 / 2


def cap_holes(surface: "Surface", border: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Triangles over the holes of surface.hull, whose border edges are [E,2]: (vertices [V,3], faces [F,3]).

    Cells of a grid are refined from 64^3 to 512^3 where the winding number is between 0 and 1 away from the faces, or where the border
    passes; marching cubes draws the level 1/2 in those that no face crosses and in those along the border, where caps and faces overlap.
    """
    igl = optional_import("igl")
    rim = igl.AABB()
    rim.init(surface.hull_vertices, border)
    side = np.arange(_COARSE)
    cells = np.stack(np.meshgrid(side, side, side, indexing="ij"), -1).reshape(-1, 3)
    level = _COARSE
    while True:
        centers = (2.0 * cells + 1) / level - 1
        radius = _HALF_DIAGONAL * 2 / level
        to_rim = np.sqrt(rim.squared_distance(surface.hull_vertices, border, centers)[0])
        empty = np.isnan(surface.unsigned(centers, radius))
        part = np.zeros(len(cells), np.bool_)  # the level 1/2 may pass: at r from a rim the winding number changes by 1 / (2 pi r)
        reach = 0.4 * radius / to_rim[empty]
        part[empty] = np.abs(surface.winding(centers[empty], reach) - 0.5) < reach
        if level == _FINE:
            cells = cells[part | (to_rim <= 2 * radius)]
            break
        cells = (cells[part | (to_rim <= radius)][:, None] * 2 + _OCTANTS).reshape(-1, 3)
        level *= 2
        if len(cells) > _MOST_CELLS:
            raise MeshError("its holes are too many or too large to close")
    corner = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]])
    grid = (cells[:, None] + corner).reshape(-1, 3)
    key, index = np.unique((grid[:, 0] * (_FINE + 1) + grid[:, 1]) * (_FINE + 1) + grid[:, 2], return_inverse=True)
    points = np.stack((key // (_FINE + 1) ** 2, key // (_FINE + 1) % (_FINE + 1), key % (_FINE + 1)), 1) * (2.0 / _FINE) - 1
    cubes = index.reshape(-1, 8).astype(np.int64)
    value = 0.5 - surface.winding(points, 0.0)
    inside = value[cubes] < 0
    cubes = cubes[inside.any(1) & ~inside.all(1)]
    if len(cubes) == 0:
        return np.zeros((0, 3)), np.zeros((0, 3), np.int64)
    crossed = np.unique(cubes)  # only here does the value say where, and not just on which side
    value[crossed] = 0.5 - surface.winding(points[crossed])
    vertices, faces, _ = igl.marching_cubes(value, points, cubes, 0.0)
    return vertices, faces


def lone_faces(surface: "Surface") -> tuple[np.ndarray, np.ndarray]:
    """Parts of the hull, in short faces, with the outside on both sides: flaps of no thickness. (vertices, those faces)."""
    vertices, faces, short = surface.hull_vertices, surface.hull, []
    while len(faces):
        long = longest_edges(vertices, faces) > _SHORT
        short.append(faces[~long])
        vertices, faces = split_longest(vertices, faces[long])
    faces = np.concatenate([surface.hull[:0], *short])
    total, area = areas(vertices, surface.hull).sum(), areas(vertices, faces)
    wide = area > _FLAP * longest_edges(vertices, faces)  # twice as high as a flap is thick: no sliver along an edge of the solid
    faces, area = faces[wide], area[wide]
    center, step = vertices[faces].mean(1), _FLAP * normals(vertices, faces)
    lone = np.arange(len(faces))
    for within, off in ((0.0, ROUGH), (np.inf, 0.0)):  # first roughly: most faces have 1 behind them, those sought at most 1/2 + _LONE
        behind = surface.winding(center[lone] - step[lone], within)
        lone, behind = lone[behind < 0.8], behind[behind < 0.8]
        before = surface.winding(center[lone] + step[lone], within)
        lone = lone[np.abs(behind + before) < 2 * (_LONE + off)]
    return vertices, faces[lone] if area[lone].sum() > 1e-3 * total else faces[:0]
