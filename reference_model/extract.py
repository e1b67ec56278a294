"""Marching cubes at level 0 straight from sparse signed-distance voxels (no R^3 array; the same torch code on CPU and GPU).

A grid edge whose ends differ in sign carries one vertex; every cell of 2^3 voxels round such an edge draws triangles by the table of
`mc_tables`. The band |s| < tau holds both ends of every such edge of an exact distance at R >= 256 (an end is no farther from the surface
than the edge is long, and 2 / R <= tau). So a cell corner outside the band has the sign of its neighbours along grid edges: it takes ±1
with that sign, and nothing else is ever guessed. Where neighbours disagree (values that are no distance, a surface that leaves the voxels)
the cells are counted and the rim stays open. Ambiguous cell faces go by the sign of the bilinear interpolant at its saddle.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from reference_model.mc_tables import CORNERS, EDGE_AXIS, EDGES, FACES, CaseTable, case_table
from reference_model.sharp_features import sharp_faces, tangent_planes
from reference_model.tiles import CELL, Tiles, lattice, local_index
from reference_model.volume import TAU

_CHUNK = 2048  # tiles handled at once: a halo of 9^3 floats each is 6 MB
_MARGIN = 1e-3  # least distance of a vertex from a grid point, in edges: vertices of different edges never coincide
_HALO = CELL + 1


@dataclass(frozen=True)
class ExtractionReport:
    """What was found, and what could not be closed: a closed surface has open_vertices = 0."""

    voxels: int
    cells: int  # sign-changing cells
    missing_corners: int  # their corners without a value, which took the sign of a neighbour
    disagreeing_cells: int  # cells with a crossing at a missing corner: its neighbours differ in sign
    open_vertices: int  # vertices on the rim of an opening


def extract_mesh(
    coords: Tensor, values: Tensor, resolution: int, inside: Tensor | None = None, sharp: bool = False
) -> tuple[Tensor, Tensor, ExtractionReport]:
    """Zero level set of sparse voxels as an indexed triangle mesh in the cube [-1,1]^3.

    coords [N,3] integer, unique, in [0, R), any order; values [N] float, negative inside. inside [L,512] bool (optional, as
    `Volume.inside`): signs of the children of the cells coords // 8 in lexicographic order, used where a child has no value.
    sharp: values are distances / tau, and edges inside cells are found from them (`sharp_features`).
    Returns vertices [V,3] float32, faces [F,3] int64 (counter-clockwise from outside) and a report, on the device of coords.
    A vertex lies where the values of its edge interpolate to 0, at least 1e-3 of the edge from either end (a few cells have one more in
    their middle; if sharp, every cell that bends has one). ValueError for malformed input.
    """
    if coords.device != values.device:
        raise ValueError(f"coords and values must share a device, got {coords.device=} {values.device=}")
    tiles = Tiles.build(coords, values, resolution)
    if inside is not None:
        if inside.shape != (len(tiles.latents), CELL**3) or inside.dtype != torch.bool:
            raise ValueError(f"inside must be bool [{len(tiles.latents)},{CELL**3}], got {inside.shape=} {inside.dtype=}")
        known = tiles.values[:-1]
        known.copy_(torch.where(known.isnan(), 1 - 2 * inside.to(known), known))
    surface = _Surface(tiles, sharp)
    surface.find_vertices()
    surface.find_faces()
    return surface.result(len(coords))


@dataclass(eq=False)
class _Surface:
    tiles: Tiles
    sharp: bool = False
    edges: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # of each vertex, if sharp: from voxel, axis, way along it
    vertices: list[Tensor] = field(default_factory=list)
    faces: list[Tensor] = field(default_factory=list)
    fans: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # cells that may get a vertex: vertices [n,12], variants [n]
    num_vertices: int = 0
    num_cells: int = 0
    counts: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        device = self.tiles.values.device
        point = lattice(_HALO, device)
        octant = ((point == CELL) * torch.tensor([4, 2, 1], device=device)).sum(1)
        self.halo = (octant, local_index(point))  # where each point of a 9^3 halo lies: tile among OCTANTS, place in it
        self.stride = torch.tensor([_HALO**2, _HALO, 1], device=device)
        self.corners = torch.tensor(CORNERS, device=device)
        self.ends = torch.tensor(EDGES, device=device)
        self.edge_axis = torch.tensor(EDGE_AXIS, device=device)
        self.cycles = torch.tensor(FACES, device=device)
        self.table = CaseTable(*(x.to(device) for x in case_table()))
        shape = (len(self.tiles.values), 3 * CELL**3)
        self.vertex_of = torch.full(shape, -1, dtype=torch.int32, device=device)  # [L+1, axis * 512 + lower end]
        self.cell_tiles = self.tiles.latents
        self.scale = self.tiles.resolution / 2  # voxel edges in a unit of the cube

    def halos(self, rows: Tensor) -> Tensor:
        """Values [n,9,9,9] of tiles and their upper neighbours, from rows [n,8]."""
        octant, local = self.halo
        return self.tiles.values.view(-1)[rows[:, octant] * CELL**3 + local].view(-1, _HALO, _HALO, _HALO)

    def find_vertices(self) -> None:
        """Number every crossed edge between known voxels, and find the empty tiles where the cells around such edges begin."""
        tiles = self.tiles
        wanted = torch.zeros_like(tiles.table, dtype=torch.bool)
        wanted = wanted.view(*3 * (tiles.resolution // CELL + 2,))
        for first in range(0, len(tiles.latents), _CHUNK):
            latents = tiles.latents[first : first + _CHUNK]
            v = self.halos(tiles.octants(latents))
            inside, outside = v < 0, v >= 0
            crossed = torch.empty(len(latents), 3, CELL, CELL, CELL, dtype=torch.bool, device=v.device)
            low = (slice(None), *3 * (slice(0, CELL),))
            for axis in range(3):
                high = _shifted(axis)
                crossed[:, axis] = (inside[low] & outside[high]) | (outside[low] & inside[high])
                b, c = (axis + 1) % 3, (axis + 2) % 3
                for lowered in ((b,), (c,), (b, c)):
                    rim = [slice(None), slice(None), slice(None), slice(None)]
                    step = torch.zeros(3, dtype=torch.int64, device=v.device)
                    for other in lowered:
                        rim[1 + other], step[other] = slice(0, 1), 1
                    x, y, z = (latents[crossed[:, axis][tuple(rim)].flatten(1).any(1)] - step + 1).unbind(1)
                    wanted[x, y, z] = True
            place = crossed.view(-1).nonzero().flatten()
            numbers = torch.arange(self.num_vertices, self.num_vertices + len(place), dtype=torch.int32, device=v.device)
            self.vertex_of.view(-1)[first * 3 * CELL**3 + place] = numbers
            tile, axis_of, local = place // (3 * CELL**3), place // CELL**3 % 3, place % CELL**3
            point = torch.stack((local // 64, local // 8 % 8, local % 8), 1)
            start = (point * self.stride).sum(1) + tile * _HALO**3
            self.add_vertices(latents[tile] * CELL + point, axis_of, v.view(-1)[start], v.view(-1)[start + self.stride[axis_of]])
        extra = wanted.view(-1) & (tiles.table == len(tiles.latents))
        cells = extra.view_as(wanted).nonzero() - 1
        self.cell_tiles = torch.cat((tiles.latents, cells))

    def add_vertices(self, points: Tensor, axis: Tensor, lower: Tensor, upper: Tensor) -> None:
        """Vertices on edges from points [n,3] along axis [n], with the values of both ends."""
        t = (lower / (lower - upper)).clamp(_MARGIN, 1 - _MARGIN)
        position = points.float()
        position.scatter_add_(1, axis[:, None], t[:, None])
        self.vertices.append((2 * position + 1) / self.tiles.resolution - 1)
        if self.sharp:
            self.edges.append((points.int(), axis, t))
        self.num_vertices += len(points)

    def find_faces(self) -> None:
        around = (self.corners * self.stride).sum(1)
        later: list[tuple[Tensor, Tensor, Tensor]] = []
        for first in range(0, len(self.cell_tiles), _CHUNK):
            latents = self.cell_tiles[first : first + _CHUNK]
            rows = self.tiles.octants(latents)
            v = self.halos(rows)
            changing = _any_corner(v < 0) & _any_corner(v >= 0)
            tile, x, y, z = changing.nonzero().unbind(1)
            self.num_cells += len(tile)
            base = (x * _HALO + y) * _HALO + z
            corners = v.view(-1)[(tile * _HALO**3 + base)[:, None] + around]  # [n,8]
            ids = self.vertex_ids(rows, tile, base)
            incomplete = corners.isnan().any(1)
            if incomplete.any():
                cells = latents[tile] * CELL + torch.stack((x, y, z), 1)
                later.append((cells[incomplete], corners[incomplete], ids[incomplete]))
                corners, ids = corners[~incomplete], ids[~incomplete]
            self.add_faces(corners, ids)
        if later:
            cells, corners, ids = (torch.cat(x) for x in zip(*later, strict=True))
            self.complete(cells, corners, ids)

    def vertex_ids(self, rows: Tensor, tile: Tensor, base: Tensor) -> Tensor:
        """Vertices [n,12] on the edges of cells, -1 = none: rows [c,8] of their tiles, tile [n], place of the cell in the 9^3 halo [n]."""
        octant, local = self.halo
        start = base[:, None] + (self.corners[self.ends[:, 0]] * self.stride).sum(1)
        row = rows.view(-1)[tile[:, None] * 8 + octant[start]]
        return self.vertex_of.view(-1)[row * (3 * CELL**3) + local[start] + self.edge_axis * CELL**3]

    def add_faces(self, corners: Tensor, ids: Tensor) -> None:
        """Triangles of cells from the values of their corners [n,8] and the vertices on their edges [n,12]."""
        case = ((corners < 0) * (1 << torch.arange(8, device=corners.device))).sum(1)
        weight = self.table.weight[case]
        variant = self.table.first[case]
        rare = weight.any(1).nonzero().flatten()
        a, b, c, d = corners[rare][:, self.cycles].unbind(2)
        joined = torch.where(a < 0, a * c > b * d, b * d > a * c)  # the bilinear interpolant is negative at its saddle
        variant[rare] += (weight[rare] * joined).sum(1)
        own = self.table.fan[variant].any(1) | self.sharp
        self.fans.append((ids[own], variant[own]))
        self.faces.append(self.triangles_of(ids[~own], variant[~own]))

    def triangles_of(self, ids: Tensor, variant: Tensor) -> Tensor:
        cell, slot = self.table.triangles_of(variant)
        return ids[cell[:, None], self.table.triangles[variant[cell], slot]]

    def complete(self, cells: Tensor, corners: Tensor, ids: Tensor) -> None:
        """Faces of cells [n,3] some of whose corners [n,8] are NaN."""
        missing = corners.isnan()
        points = (cells[:, None] + self.corners)[missing]
        keys, inverse = torch.unique(self.point_key(points), return_inverse=True)
        corners[missing] = self.signs_of(keys)[inverse]
        inside = corners < 0
        a, b = self.ends.unbind(1)
        extra = (inside[:, a] != inside[:, b]) & (missing[:, a] | missing[:, b])
        cell, edge = extra.nonzero().unbind(1)
        start = cells[cell] + self.corners[a[edge]]
        _, inverse, uses = torch.unique(self.point_key(start) * 3 + self.edge_axis[edge], return_inverse=True, return_counts=True)
        one = torch.empty_like(uses).scatter_(0, inverse, torch.arange(len(cell), device=cell.device))
        ids[cell, edge] = (self.num_vertices + inverse).int()
        cell, edge = cell[one], edge[one]
        self.add_vertices(start[one], self.edge_axis[edge], corners[cell, a[edge]], corners[cell, b[edge]])
        self.add_faces(corners, ids)
        self.counts = (len(keys), int(extra.any(1).sum()), int((uses < 4).sum()))

    def point_key(self, points: Tensor) -> Tensor:
        x, y, z = (points + CELL).unbind(-1)
        size = self.tiles.resolution + 2 * CELL
        return (x * size + y) * size + z

    def signs_of(self, keys: Tensor) -> Tensor:
        """±1 for missing points, keys [m] ascending: the sign of the sum of the neighbours along grid edges, known ones first."""
        size = self.tiles.resolution + 2 * CELL
        points = torch.stack((keys // size**2, keys // size % size, keys % size), 1) - CELL
        step = torch.eye(3, dtype=torch.int64, device=keys.device)
        around = points[:, None] + torch.cat((step, -step))  # [m,6,3]
        signs = _sign_of_sum(self.tiles.at(around))
        key = self.point_key(around)
        place = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
        second = _sign_of_sum(torch.where(keys[place] == key, signs[place], torch.nan))
        return torch.where(signs.isnan(), second, signs)

    def result(self, voxels: int) -> tuple[Tensor, Tensor, ExtractionReport]:
        device = self.tiles.values.device
        vertices = torch.cat([torch.empty(0, 3, device=device), *self.vertices])
        self.vertices.clear()
        if self.fans:
            ids, variant = (torch.cat(x) for x in zip(*self.fans, strict=True))
            if self.sharp:
                points, axis, way = (torch.cat(x) for x in zip(*self.edges, strict=True))
                normals, found = tangent_planes(self.tiles, points, axis, way, TAU * self.scale)
                moved = found.clamp(_MARGIN, 1 - _MARGIN) - way
                vertices.scatter_add_(1, axis[:, None], moved[:, None] / self.scale)
                grid_points, faces = sharp_faces((vertices + 1) * self.scale, normals, ids, variant, self.table)
                added = grid_points / self.scale - 1
            else:
                round_it = self.table.fan[variant].to(vertices)
                added = (vertices[ids.clamp(min=0)] * round_it[..., None]).sum(1) / round_it.sum(1, keepdim=True)
                number = torch.arange(len(vertices), len(vertices) + len(ids), dtype=torch.int32, device=device)
                faces = self.triangles_of(torch.cat((ids, number[:, None]), 1), variant)
            self.faces.append(faces)
            vertices = torch.cat((vertices, added))
        faces = torch.cat([torch.empty(0, 3, dtype=torch.int32, device=device), *self.faces])
        self.faces.clear()
        return vertices, faces.long(), ExtractionReport(voxels, self.num_cells, *self.counts)


def _shifted(axis: int) -> tuple[slice, ...]:
    return (slice(None), *(slice(1, _HALO) if a == axis else slice(0, CELL) for a in range(3)))


def _any_corner(x: Tensor) -> Tensor:
    """[n,9,9,9] bool of points → [n,8,8,8] bool of cells with one such corner at least."""
    x = x[:, 1:] | x[:, :-1]
    x = x[:, :, 1:] | x[:, :, :-1]
    return x[..., 1:] | x[..., :-1]


def _sign_of_sum(values: Tensor) -> Tensor:
    """[m,6] with NaN for none → [m]: -1 where the sum is negative, else 1; NaN where there is no value at all."""
    sign = torch.where(values.nansum(1) < 0, -1.0, 1.0)
    return torch.where(values.isnan().all(1), torch.nan, sign)
