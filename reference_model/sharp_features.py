"""Sharp edges for marching cubes (Kobbelt et al., Feature Sensitive Surface Extraction from Volume Data, SIGGRAPH 2001).

Vertices of marching cubes lie on the surface, its triangles cut across what bends inside a cell. Where the normals round a loop of a cell
differ, the tangent planes at its vertices meet in a point: the loop becomes a fan round that point, and an edge between two such fans is
turned to join their points. Nothing is added or lost but triangles: a closed surface stays closed, of the same genus.

Normals come from the distances alone. A difference quotient that reaches across a crease has not the length 1, so each voxel takes the
one of central and one-sided differences whose length is nearest to 1, and each vertex the end of its edge whose plane passes nearest:
there it moves onto that plane.
Lengths are voxel edges. Letters: V vertices, n cells.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from reference_model.mc_tables import CaseTable
from reference_model.tiles import Tiles

_LOOPS = 4  # of a cell, at most
_BEND = 0.997  # cosine between a normal and the mean of its loop below which the loop gets a point: 4.4 degrees
_REACH = 0.75  # voxel edges from the middle of the cell, along each axis: beyond it the planes do not meet in this cell
_DAMPING = 0.05  # added to the squares: what no plane fixes stays in the middle of the loop
_CENTRAL = 0.01  # error of length up to which central differences are taken: they are exact to second order
_WORST = 0.2  # error of length from which a voxel has no normal
_STEEP = 0.3  # least cosine between an edge and a normal whose plane may move the vertex
_APART = 0.02  # voxel edges between vertex and plane up to which they agree
_CHUNK = 1 << 18


def tangent_planes(tiles: Tiles, points: Tensor, axis: Tensor, way: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Planes of vertices that lie `way` [V] of the edge from voxels points [V,3] along axis [V]: normals [V,3], 0 where there is none,
    and the way [V] to where the plane cuts the edge, which is right where the other end lies nearest to another face.

    unit: voxel edges of a value of 1. Values of ±1 and beyond are clamped or filled in, and no distances.
    """
    normals, ways = [], []
    step = torch.eye(3, dtype=torch.int64, device=points.device)
    for p, a, t in zip(points.split(_CHUNK), axis.split(_CHUNK), way.split(_CHUNK), strict=True):
        normal, cut, least = torch.zeros(len(p), 3, device=p.device), t, torch.full_like(t, torch.inf)
        for end, from_end in ((p.long(), t), (p.long() + step[a], t - 1)):
            gradient, distance = _gradients(tiles, end, unit)
            along = gradient.gather(1, a[:, None])[:, 0]
            height = along * from_end + distance
            nearer = height.abs() < least  # false for NaN
            normal = torch.where(nearer[:, None], gradient, normal)
            cut = torch.where(nearer, t - torch.where((along.abs() > _STEEP) & (height.abs() > _APART), height / along, 0), cut)
            least = torch.where(nearer, height.abs(), least)
        normals.append(normal)
        ways.append(cut)
    return torch.cat(normals), torch.cat(ways)


def _gradients(tiles: Tiles, points: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Unit gradients [m,3] at voxels and their distances [m], NaN where no difference quotient has about the length 1."""

    def known(at: Tensor) -> Tensor:
        value = tiles.at(at)
        return torch.where(value.abs() < 1, value * unit, torch.nan)

    step = torch.eye(3, dtype=torch.int64, device=points.device)
    distance = known(points)
    forward = known(points[:, None] + step) - distance[:, None]
    backward = distance[:, None] - known(points[:, None] - step)
    best = (forward + backward) / 2
    error = (best.norm(dim=1) - 1).abs().nan_to_num(torch.inf)
    error = torch.where(error < _CENTRAL, -1.0, error)
    for sides in product((True, False), repeat=3):
        other = torch.where(torch.tensor(sides, device=points.device), forward, backward)
        its = (other.norm(dim=1) - 1).abs()
        better = its < error
        best = torch.where(better[:, None], other, best)
        error = torch.where(better, its, error)
    return torch.where((error < _WORST)[:, None], best / best.norm(dim=1, keepdim=True), torch.nan), distance


def sharp_faces(vertices: Tensor, normals: Tensor, ids: Tensor, variant: Tensor, table: CaseTable) -> tuple[Tensor, Tensor]:
    """Points [F,3] to be added behind `vertices`, and all triangles, of cells whose edges carry the vertices ids [n,12], -1 = none.

    vertices [V,3] in voxel edges; normals as `tangent_planes`; variant [n]: of the table. Loops that the table draws round a vertex of
    their own get a point in any case.
    """
    points, faces, fans = [vertices[:0]], [], [ids.new_zeros(0, 3)]
    count = len(vertices)
    for own, kind in zip(ids.split(_CHUNK), variant.split(_CHUNK), strict=True):
        place, x = _meeting_points(vertices, normals, own, table.loop_of[kind], table.fan[kind])
        point = own.new_full((len(own) * _LOOPS,), -1)
        point[place] = torch.arange(count, count + len(x), dtype=own.dtype, device=own.device)
        points.append(x)
        count += len(x)
        plain, fan = _draw(own, kind, point, table)
        faces.append(plain)
        fans.append(fan)
    added = torch.cat(points)
    return added, torch.cat((*faces, *_turn_edges(torch.cat((vertices, added)), torch.cat(fans))))


def _draw(ids: Tensor, variant: Tensor, point: Tensor, table: CaseTable) -> tuple[Tensor, Tensor]:
    """Triangles of loops without a point, and those (point, a, b) of the others; point [n * _LOOPS], -1 = none."""
    cell, slot = table.triangles_of(variant)
    plain = point[cell * _LOOPS + table.piece[variant[cell], slot]] < 0
    cell, slot = cell[plain], slot[plain]
    faces = ids[cell[:, None], table.triangles[variant[cell], slot]]
    loop = table.loop_of[variant]
    cell, edge = (loop >= 0).nonzero().unbind(1)
    top = point[cell * _LOOPS + loop[cell, edge]]
    cell, edge, top = cell[top >= 0], edge[top >= 0], top[top >= 0]
    return faces, torch.stack((top, ids[cell, edge], ids[cell, table.after[variant[cell], edge]]), 1)


def _meeting_points(vertices: Tensor, normals: Tensor, ids: Tensor, loop: Tensor, fan: Tensor) -> tuple[Tensor, Tensor]:
    """(cell * _LOOPS + loop, point where its tangent planes meet) of the loops that bend, in order; the middle of other `fan`s.

    A normal of 0 bends a loop too: where distances say nothing its planes, or its middle if there are none, stand for the surface.
    """
    cell, edge = (loop >= 0).nonzero().unbind(1)
    number = cell * _LOOPS + loop[cell, edge]
    always = torch.zeros(len(ids) * _LOOPS, dtype=torch.bool, device=ids.device).index_fill_(0, number[fan[cell, edge]], True)
    vertex = ids[cell, edge].long()
    position, normal = vertices[vertex], normals[vertex]

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(len(ids) * _LOOPS, *x.shape[1:]).index_add_(0, number, x)

    size = total(torch.ones_like(position[:, :1])).clamp(min=1)
    middle = total(position) / size
    mean = torch.nn.functional.normalize(total(normal), dim=1)
    cosine = (normal * mean[number]).sum(1)
    least = torch.ones(len(ids) * _LOOPS, device=ids.device).scatter_reduce_(0, number, cosine, "amin")
    wanted = (least < _BEND) | always
    bent, chosen = wanted.nonzero().flatten(), wanted[number]
    number, normal, position = number[chosen], normal[chosen], position[chosen]
    height = ((position - middle[number]) * normal).sum(1, keepdim=True)
    square = total(normal[:, :, None] * normal[:, None, :])[bent]
    square += _DAMPING * torch.eye(3, device=ids.device)
    way = torch.linalg.solve(square, total(normal * height)[bent, :, None])[..., 0]
    point = middle[bent] + way
    centre = (middle[bent] - 0.5).floor() + 1.0  # voxel centres lie at k + 1/2
    near = ((point - centre).abs() < _REACH).all(1, keepdim=True)
    point = torch.where(near, point, middle[bent])
    kept = near[:, 0] | always[bent]
    return bent[kept], point[kept]


def _turn_edges(vertices: Tensor, fans: Tensor) -> list[Tensor]:
    """Triangles (point, a, b) of fans; where two share the edge a b, that edge gives way to one between their points."""
    ends = fans[:, 1:].long()
    key, order = torch.sort(ends.amin(1) * len(vertices) + ends.amax(1), stable=True)
    fans = fans[order]
    first = (key[1:] == key[:-1]).nonzero().flatten()
    f, p, q = fans[first].unbind(1)
    g = fans[first + 1, 0]
    turned = torch.stack((torch.stack((f, p, g), 1), torch.stack((f, g, q), 1)))
    before = _normals(vertices, fans[first]) + _normals(vertices, fans[first + 1])
    upright = ((_normals(vertices, turned) * before).sum(-1) > 0).all(0)
    both = torch.minimum(f, g).long() * len(vertices) + torch.maximum(f, g)
    _, pair, uses = torch.unique(both, return_inverse=True, return_counts=True)
    turn = upright & (uses[pair] == 1)  # two such edges between the same points would be shared by four triangles
    kept = torch.ones(len(fans), dtype=torch.bool, device=fans.device)
    kept[first[turn]] = kept[first[turn] + 1] = False
    return [fans[kept], turned[:, turn].flatten(0, 1)]


def _normals(vertices: Tensor, faces: Tensor) -> Tensor:
    a, b, c = vertices[faces].unbind(-2)
    return torch.linalg.cross(b - a, c - a)
