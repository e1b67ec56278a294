"""Distances and winding numbers of triangles, asked only as far and as exactly as needed: vertices [V,3] float64, faces [F,3] int64."""

import numpy as np

from reference_model.cli import optional_import
from reference_model.triangles import longest_edges, split_longest

_BLOCK = 1 << 14  # points that share a tree
_FEW = 64  # faces not worth another tree
_LONG = 1 / 16
_ACCURACY = 1.2  # of igl's accuracy scale, whose default is 2: four times as fast
ROUGH = 0.2  # taken for the most that a rough winding number errs; the test of this file measures less


def distance(points: np.ndarray, vertices: np.ndarray, faces: np.ndarray, bound: float, signed: bool = False) -> np.ndarray:
    """Distance [n] float64 from points [n,3] to the faces, which may be flat; NaN beyond `bound`.

    Boxes of points are halved into blocks, each with a tree of the faces that may be near: faster than one tree of all where faces are
    long, about as fast elsewhere.
    signed: negative inside faces that are closed and oriented, by pseudonormals, which the faces that meet at the nearest point make:
    all of those are in its block, so that the result is that of one tree, bit for bit.
    """
    result = np.full(len(points), np.nan)
    if len(faces) == 0 or len(points) == 0:
        return result
    igl = optional_import("igl")
    kind, least = (igl.SIGNED_DISTANCE_TYPE_PSEUDONORMAL, -bound) if signed else (igl.SIGNED_DISTANCE_TYPE_UNSIGNED, 0.0)
    a, b, c = (np.ascontiguousarray(vertices.T)[:, faces[:, i]] for i in range(3))
    low, high = np.minimum(np.minimum(a, b), c) - bound, np.maximum(np.maximum(a, b), c) + bound
    start, end = points.min(0), points.max(0)
    todo = [(np.arange(len(points)), np.flatnonzero(((low <= end[:, None]) & (high >= start[:, None])).all(0)), start, end)]
    while todo:
        row, face, start, end = todo.pop()
        axis = int(np.argmax(end - start))
        if len(face) == 0 or len(row) == 0:
            continue
        if len(row) > _BLOCK and len(face) > _FEW and end[axis] - start[axis] > bound:
            middle = (start[axis] + end[axis]) / 2
            left, cut = points[row, axis] < middle, np.where(np.arange(3) == axis, middle, start)
            todo.append((row[~left], face[high[axis, face] >= middle], cut, end))
            todo.append((row[left], face[low[axis, face] <= middle], start, np.where(np.arange(3) == axis, middle, end)))
            continue
        used, local = np.unique(faces[face], return_inverse=True)
        local = local.reshape(-1, 3).astype(np.int64)
        result[row] = igl.signed_distance(points[row], vertices[used], local, kind, least, bound)[0]
    return result


class WindingNumber:
    """Winding numbers of oriented faces (Jacobson et al. 2013) from a tree (Barill et al. 2018)."""

    def __init__(self, vertices: np.ndarray, faces: np.ndarray) -> None:
        done = [faces[:0]]
        while len(faces):  # a tree of short faces answers twice as fast where some are long
            long = longest_edges(vertices, faces) > _LONG
            done.append(faces[~long])
            vertices, faces = split_longest(vertices, faces[long])
        self.tree = optional_import("igl").FastWindingNumberBVH()
        self.tree.init(vertices, np.concatenate(done))

    def __call__(self, points: np.ndarray, within: float | np.ndarray) -> np.ndarray:
        """[n] float64 at points [n,3]; off by up to 0.2 where it differs from 1/2 and -1/2 by more than `within` ([n] or one for all)."""
        points = np.ascontiguousarray(points)
        if np.isscalar(within) and np.isinf(within):
            return self.tree.winding_number(points)
        number = self.tree.winding_number(points, _ACCURACY)
        asked = np.abs(np.abs(number) - 0.5) <= within + ROUGH
        number[asked] = self.tree.winding_number(points[asked])
        return number
