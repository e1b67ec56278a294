"""The cases of marching cubes, generated from one rule instead of typed in.

Corner c of a cell is (dx, dy, dz) with c = (dx * 2 + dy) * 2 + dz; bit c of a case is set where the corner is inside (s < 0).
Edge e = axis * 4 + k runs along `axis` from its lower corner; k counts the four lower corners in ascending order.

The rule: walk round each face; every edge where the walk enters the inside is joined by a directed segment to the edge where it leaves
again. A face with one sign on each diagonal (ambiguous) allows two pairings: inside corners kept apart, or joined. Whoever uses the table
decides from the four values of the face, so the two cells that share it draw the same segments, in opposite directions, and the surface
closes. The segments of a cell make loops, which are cut into triangles without a diagonal between two edges of one face: lying in the
face, it could be drawn by the neighbour too and be shared by four triangles. Loops of 8 edges and more allow no such cut: they become a
fan round a vertex of their own.
Marching cubes: Lorensen and Cline, SIGGRAPH 1987. Ambiguous faces: Nielson and Hamann, The asymptotic decider, Visualization 1991.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

CORNERS = [(c >> 2, c >> 1 & 1, c & 1) for c in range(8)]
EDGES = [(a, a | 4 >> axis) for axis in range(3) for a in range(8) if not a & 4 >> axis]  # (lower corner, upper corner)
EDGE_AXIS = [axis for axis in range(3) for _ in range(4)]

CENTRE = 12  # stands for the vertex in the middle of a loop, beside the edges 0 to 11

Polygon = tuple[int, ...]
Triangle = tuple[int, int, int]


class CaseTable(NamedTuple):
    """Triangles by variant = first[case] + the sum of weight[case, f] over the ambiguous faces f whose inside corners are joined."""

    triangles: Tensor  # [variants, most, 3] int64: cell edges or CENTRE, counter-clockwise from outside, padded with 0
    counts: Tensor  # [variants] int64
    fan: Tensor  # [variants,12] bool: the edges round CENTRE, none where it is not used
    first: Tensor  # [256] int64
    weight: Tensor  # [256,6] int64, 0 where the face is not ambiguous
    piece: Tensor  # [variants, most] int64: the loop of each triangle
    loop_of: Tensor  # [variants,12] int64: the loop of each cell edge, -1 where it is not crossed
    after: Tensor  # [variants,12] int64: the next edge of the loop

    def triangles_of(self, variant: Tensor) -> tuple[Tensor, Tensor]:
        """Cells of the variants [n] → (cell, column of `triangles`) of each of their triangles, in order."""
        count = self.counts[variant]
        cell = torch.arange(len(variant), device=variant.device).repeat_interleave(count)
        return cell, torch.arange(len(cell), device=variant.device) - (count.cumsum(0) - count)[cell]


def _faces() -> Iterator[list[int]]:
    """The six faces as cycles of corners, counter-clockwise seen from outside the cell."""
    for axis, side in product(range(3), (0, 1)):
        b, c = 4 >> (axis + 1) % 3, 4 >> (axis + 2) % 3
        start = (4 >> axis) * side
        cycle = [start, start | b, start | b | c, start | c]
        yield cycle if side else cycle[::-1]


FACES = list(_faces())
_EDGE_OF = {frozenset(ends): e for e, ends in enumerate(EDGES)}
_FACES_OF_EDGE = [{f for f, cycle in enumerate(FACES) if set(ends) <= set(cycle)} for ends in EDGES]


def ambiguous_faces(case: int) -> list[int]:
    """Faces whose inside corners are one diagonal."""
    return [f for f, (a, b, c, d) in enumerate(FACES) if case >> a & 1 == case >> c & 1 != case >> b & 1 == case >> d & 1]


def loops(case: int, joined: set[int]) -> list[Polygon]:
    """Closed loops of crossed edges, their normals pointing outwards; inside corners are joined on the ambiguous faces in `joined`."""
    successor: dict[int, int] = {}
    for f, cycle in enumerate(FACES):
        inside = [bool(case >> c & 1) for c in cycle]
        for i in range(4):
            if inside[i] and not inside[i - 1]:
                step = -1 if f in joined else 1
                j = i + step
                while not (inside[j % 4 - 1] and not inside[j % 4]):
                    j += step
                successor[_edge_before(cycle, i)] = _edge_before(cycle, j % 4)
    found = []
    while successor:
        first, edge = successor.popitem()
        loop = [first]
        while edge != first:
            loop.append(edge)
            edge = successor.pop(edge)
        found.append(tuple(loop))
    return sorted(found)


def _edge_before(cycle: list[int], i: int) -> int:
    return _EDGE_OF[frozenset((cycle[i - 1], cycle[i]))]


def _triangulations(polygon: Polygon) -> Iterator[list[Triangle]]:
    """All ways to cut a polygon into triangles without a diagonal in a face of the cell."""
    if len(polygon) < 3:
        yield []
        return
    last = len(polygon) - 1
    for k in range(1, last):  # the triangle on the side from the last vertex to the first
        if _is_allowed(polygon, 0, k) and _is_allowed(polygon, k, last):
            for left in _triangulations(polygon[: k + 1]):
                for right in _triangulations(polygon[k:]):
                    yield [(polygon[0], polygon[k], polygon[-1]), *left, *right]


def _is_allowed(polygon: Polygon, i: int, j: int) -> bool:
    return j - i == 1 or not _FACES_OF_EDGE[polygon[i]] & _FACES_OF_EDGE[polygon[j]]


def loop_triangles(loop: Polygon) -> list[Triangle]:
    """Triangles of a loop as triples of cell edges and CENTRE."""
    fan = [(CENTRE, a, b) for a, b in zip(loop, loop[1:] + loop[:1], strict=True)]
    return next(_triangulations(loop), fan)


@lru_cache(maxsize=1)
def case_table() -> CaseTable:
    """The whole table, on the CPU."""
    variants: list[list[Polygon]] = []
    first, weight = torch.zeros(256, dtype=torch.int64), torch.zeros(256, 6, dtype=torch.int64)
    for case in range(256):
        faces = ambiguous_faces(case)
        first[case] = len(variants)
        for bit, face in enumerate(faces):
            weight[case, face] = 1 << bit
        for mask in range(1 << len(faces)):
            variants.append(loops(case, {face for bit, face in enumerate(faces) if mask >> bit & 1}))
    cut = [[loop_triangles(loop) for loop in found] for found in variants]
    counts = torch.tensor([sum(map(len, triangles)) for triangles in cut])
    table, piece = torch.zeros(len(variants), int(counts.max()), 3, dtype=torch.int64), torch.zeros(len(variants), int(counts.max())).long()
    fan = torch.zeros(len(variants), 12, dtype=torch.bool)
    loop_of, after = torch.full((len(variants), 12), -1), torch.zeros(len(variants), 12, dtype=torch.int64)
    for row, (found, pieces) in enumerate(zip(variants, cut, strict=True)):
        triangles = [t for part in pieces for t in part]
        table[row, : len(triangles)] = torch.tensor(triangles, dtype=torch.int64).view(-1, 3)
        piece[row, : len(triangles)] = torch.tensor([i for i, part in enumerate(pieces) for _ in part], dtype=torch.int64)
        fan[row, [b for a, b, _ in triangles if a == CENTRE]] = True
        for number, loop in enumerate(found):
            loop_of[row, list(loop)] = number
            after[row, list(loop)] = torch.tensor(loop[1:] + loop[:1])
    return CaseTable(table, counts, fan, first, weight, piece, loop_of, after)
