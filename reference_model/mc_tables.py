"""The 256 cases of marching cubes, generated from one rule instead of typed in.

Corner c of a cell is (dx, dy, dz) with c = (dx * 2 + dy) * 2 + dz; bit c of a case is set where the corner is inside (s < 0).
Edge e = axis * 4 + k runs along `axis` from its lower corner; k counts the four lower corners in ascending order.

The rule: on each face of the cell, walk round the corners; every run of inside corners is cut off by one directed segment, from the
edge where the walk enters the run to the edge where it leaves it. The rule reads the four signs of that face only, so the two cells that share
a face draw the same segments (in opposite directions) and the surface closes. The segments of a cell join into loops, which are triangulated
without a diagonal between two edges of one face: a diagonal lying in a face could be drawn by the neighbour too and be shared by four triangles.
On an ambiguous face (inside corners on one diagonal) inside corners are therefore kept apart.
Marching cubes: Lorensen and Cline, SIGGRAPH 1987; why a face needs one rule: Dürst, Computer Graphics 22(2), 1988.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

CORNERS: list[tuple[int, int, int]] = list(product((0, 1), repeat=3))
EDGES: list[tuple[int, int]] = [(a, a | (4 >> axis)) for axis in range(3) for a in range(8) if not a & (4 >> axis)]  # (lower corner, upper corner)
EDGE_AXIS: list[int] = [axis for axis in range(3) for _ in range(4)]
_EDGE_OF = {frozenset(ends): e for e, ends in enumerate(EDGES)}

Polygon = tuple[int, ...]
Triangle = tuple[int, int, int]


def _faces() -> Iterator[list[int]]:
    """The six faces as cycles of corners, counter-clockwise seen from outside the cell."""
    for axis, side in product(range(3), (0, 1)):
        b, c = 4 >> (axis + 1) % 3, 4 >> (axis + 2) % 3
        start = (4 >> axis) * side
        cycle = [start, start | b, start | b | c, start | c]
        yield cycle if side else cycle[::-1]


FACES = list(_faces())
FACES_OF_EDGE = [{f for f, cycle in enumerate(FACES) if set(ends) <= set(cycle)} for ends in EDGES]


def _loops(case: int) -> list[Polygon]:
    """Closed loops of crossed edges, wound so that their normals point from inside to outside."""
    successor: dict[int, int] = {}
    for cycle in FACES:
        inside = [case >> c & 1 for c in cycle]
        for i in range(4):
            if inside[i] and not inside[i - 1]:  # a run of inside corners begins here
                j = i
                while inside[(j + 1) % 4]:
                    j += 1
                entry = _EDGE_OF[frozenset((cycle[i - 1], cycle[i]))]
                leave = _EDGE_OF[frozenset((cycle[j % 4], cycle[(j + 1) % 4]))]
                successor[entry] = leave
    loops = []
    while successor:
        first, edge = successor.popitem()
        loop = [first]
        while edge != first:
            loop.append(edge)
            edge = successor.pop(edge)
        loops.append(tuple(loop))
    return sorted(loops)


def _triangulations(polygon: Polygon) -> Iterator[list[Triangle]]:
    if len(polygon) < 3:
        yield []
        return
    for k in range(1, len(polygon) - 1):  # the triangle that holds the side from the last vertex to the first
        for left in _triangulations(polygon[: k + 1]):
            for right in _triangulations(polygon[k:]):
                yield [(polygon[0], polygon[k], polygon[-1]), *left, *right]


def _diagonals_in_faces(polygon: Polygon, triangles: list[Triangle]) -> int:
    sides = {frozenset(pair) for pair in zip(polygon, polygon[1:] + polygon[:1], strict=True)}
    drawn = {frozenset((t[i], t[i - 1])) for t in triangles for i in range(3)}
    return sum(bool(FACES_OF_EDGE[a] & FACES_OF_EDGE[b]) for a, b in drawn - sides)


def case_triangles(case: int) -> list[Triangle]:
    """Triangles of one case as triples of cell edges."""
    return [t for loop in _loops(case) for t in min(_triangulations(loop), key=lambda ts: _diagonals_in_faces(loop, ts))]


@lru_cache(maxsize=1)
def triangle_table() -> tuple[Tensor, Tensor]:
    """(triangles [256, 5 or so, 3] int64, edges of the cell, padded with 0; counts [256] int64)."""
    cases = [case_triangles(case) for case in range(256)]
    counts = torch.tensor([len(triangles) for triangles in cases])
    table = torch.zeros(256, int(counts.max()), 3, dtype=torch.int64)
    for case, triangles in enumerate(cases):
        if triangles:
            table[case, : len(triangles)] = torch.tensor(triangles)
    return table, counts
