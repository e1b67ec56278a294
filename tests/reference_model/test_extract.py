import math

import pytest
import torch
from analytic import area, box, enclosed, euler, rim, rotation, sphere, torus, volume_of

from reference_model import mc_tables
from reference_model.extract import extract_mesh
from reference_model.tiles import lattice


def nested(p):
    return torch.maximum(sphere(0.5)(p), -sphere(0.3, (0.1, 0.0, 0.0))(p))


def sorted_rows(faces):
    return faces[(faces[:, 0] * faces.max() + faces[:, 1]).argsort()]


PI = math.pi
SHAPES = {  # distance, V - E + F, volume, area, length of sharp edges
    "sphere": (sphere(0.5), 2, 4 / 3 * PI * 0.5**3, 4 * PI * 0.5**2, 0),
    "torus": (torus(0.4, 0.15), 0, 2 * PI**2 * 0.4 * 0.15**2, 4 * PI**2 * 0.4 * 0.15, 0),
    "box": (box((0.5, 0.3, 0.2), rotation(1)), 2, 8 * 0.5 * 0.3 * 0.2, 8 * (0.15 + 0.1 + 0.06), 8),
    "nested": (nested, 4, 4 / 3 * PI * (0.5**3 - 0.3**3), 4 * PI * (0.5**2 + 0.3**2), 0),
}


@pytest.mark.parametrize("resolution", [256, 384, 512])
@pytest.mark.parametrize("shape", SHAPES)
def test_known_shapes_from_the_band_alone(shape, resolution):
    distance, characteristic, volume, surface, edges = SHAPES[shape]
    h = 2 / resolution
    source = volume_of(distance, resolution)
    vertices, faces, report = extract_mesh(source.coords, source.values, resolution)
    assert (vertices.dtype, faces.dtype) == (torch.float32, torch.int64)
    assert len(rim(faces)) == report.open_vertices == report.disagreeing_cells == 0
    assert report.voxels == len(source.coords)
    assert (report.missing_corners > 0) == (resolution < 512)
    assert euler(vertices, faces) == characteristic
    assert enclosed(vertices, faces) == pytest.approx(volume, rel=1e-3)
    assert area(vertices, faces) == pytest.approx(surface, rel=1e-3, abs=0.3 * h * edges)  # an edge is cut by about h / 4 a unit length
    assert distance(vertices.double()).abs().max() < (0.5 if edges else 0.01) * h
    if resolution > 256:
        return
    with_signs = extract_mesh(source.coords, source.values, resolution, source.inside)
    assert torch.equal(with_signs[0], vertices) and torch.equal(sorted_rows(with_signs[1]), sorted_rows(faces))


def test_a_shape_across_many_cells_at_1024():
    source = volume_of(torus(0.15, 0.06), 1024)
    vertices, faces, report = extract_mesh(source.coords, source.values, 1024)
    assert len(rim(faces)) == report.missing_corners == report.disagreeing_cells == 0 and euler(vertices, faces) == 0
    assert enclosed(vertices, faces) == pytest.approx(2 * PI**2 * 0.15 * 0.06**2, rel=1e-3)


@pytest.mark.parametrize("seed", [1, 2])
def test_walls_and_gaps_near_one_voxel_keep_their_genus(seed):
    wall = box((0.4, 0.3, 0.7 * 2 / 256), rotation(seed))  # 1.4 voxels thick
    source = volume_of(wall, 256)
    vertices, faces, _ = extract_mesh(source.coords, source.values, 256)
    assert len(rim(faces)) == 0 and euler(vertices, faces) == 2
    gap = box((0.3, 0.2, 0.6 * 2 / 256), rotation(seed))  # 1.2 voxels wide
    source = volume_of(lambda p: torch.maximum(sphere(0.5)(p), -gap(p)), 256)
    vertices, faces, _ = extract_mesh(source.coords, source.values, 256)
    assert len(rim(faces)) == 0 and euler(vertices, faces) == 4


def test_random_values_close_through_every_variant_of_the_table():
    resolution = 40
    points = lattice(resolution)
    values = torch.rand(len(points), generator=torch.Generator().manual_seed(0)) * 2 - 1
    values[((points == 0) | (points == resolution - 1)).any(1)] = 1.0
    vertices, faces, report = extract_mesh(points, values, resolution)
    assert len(rim(faces)) == 0 and len(faces.unique()) == len(vertices)
    assert (report.missing_corners, report.disagreeing_cells, report.open_vertices) == (0, 0, 0)
    # inside of the mesh = sum of the cells' inside shares: near the half that is negative
    assert 0.3 * 2**3 < enclosed(vertices, faces) < 0.6 * 2**3


def test_every_variant_is_drawn_without_a_diagonal_in_a_face():
    table = mc_tables.case_table()
    assert table.first[1:].diff().tolist() == [2 ** len(mc_tables.ambiguous_faces(case)) for case in range(1, 255)]
    shared = [[bool(set(a) | set(b) <= set(f)) for f in mc_tables.FACES] for a in mc_tables.EDGES for b in mc_tables.EDGES]
    in_one_face = torch.tensor(shared).any(1).view(12, 12)
    for case in range(256):
        signs = torch.tensor([case >> c & 1 for c in range(8)])
        crossed = {e for e, (a, b) in enumerate(mc_tables.EDGES) if signs[a] != signs[b]}
        for mask in range(2 ** len(mc_tables.ambiguous_faces(case))):
            row = int(table.first[case]) + mask
            triangles = table.triangles[row, : table.counts[row]].tolist()
            assert {e for t in triangles for e in t} - {mc_tables.CENTRE} == crossed
            directed = [(t[i - 1], t[i]) for t in triangles for i in range(3)]
            assert len(set(directed)) == len(directed)
            for a, b in directed:
                if (b, a) in directed and mc_tables.CENTRE not in (a, b):
                    assert not in_one_face[a, b]


def test_one_voxel_is_an_octahedron():
    points = lattice(3) + 6  # across eight latent cells
    values = torch.ones(27)
    values[13] = -1.0
    vertices, faces, _ = extract_mesh(points, values, 16)
    assert (len(vertices), len(faces)) == (6, 8) and len(rim(faces)) == 0
    assert enclosed(vertices, faces) == pytest.approx(4 / 3 * (1 / 16) ** 3, rel=1e-5)
    assert vertices.mean(0).tolist() == pytest.approx([-1 / 16] * 3, abs=1e-6)  # the centre of voxel 7 of 16


def test_values_of_zero_are_outside_and_leave_distinct_vertices():
    face = (2 * 400 + 1) / 512 - 1  # a plane of voxel centres
    source = volume_of(box((face, 0.2, 0.1)), 512)
    assert (source.values == 0).any()
    vertices, faces, report = extract_mesh(source.coords, source.values, 512)
    assert len(rim(faces)) == report.disagreeing_cells == 0 and euler(vertices, faces) == 2
    assert len(vertices.unique(dim=0)) == len(vertices)


@pytest.mark.parametrize("opening", ["cut", "border"])
def test_openings_are_counted(opening):
    source = volume_of(sphere(0.4, (0.0 if opening == "cut" else 0.7, 0.0, 0.0)), 256)
    kept = source.coords[:, 0] < 150 if opening == "cut" else torch.ones(len(source.coords), dtype=torch.bool)
    vertices, faces, report = extract_mesh(source.coords[kept], source.values[kept], 256)
    assert report.disagreeing_cells > 0
    assert report.open_vertices == len(rim(faces)) > 100
    assert len(faces.unique()) == len(vertices)


def test_single_holes_in_the_band_are_counted():
    source = volume_of(sphere(0.4), 256)
    lone = (source.coords % 5 == 2).all(1)
    vertices, faces, report = extract_mesh(source.coords[~lone], source.values[~lone], 256)
    assert report.disagreeing_cells > 100  # the crossings at the holes
    assert report.open_vertices == len(rim(faces))


def test_signs_outside_the_band_are_used_where_they_are_given():
    source = volume_of(sphere(0.3), 256)
    shown = source.values >= -0.5
    shown |= ~torch.isin(source.latent_index, source.latent_index[shown])  # no cell vanishes
    coords, values = source.coords[shown], source.values[shown]
    assert extract_mesh(coords, values, 256)[2].disagreeing_cells > 0
    vertices, faces, report = extract_mesh(coords, values, 256, source.inside)
    assert report.disagreeing_cells == len(rim(faces)) == 0 and euler(vertices, faces) == 2


def test_order_of_the_voxels_does_not_matter():
    source = volume_of(torus(0.3, 0.1), 256)
    shuffled = torch.randperm(len(source.coords), generator=torch.Generator().manual_seed(0))
    expected = extract_mesh(source.coords, source.values, 256)
    found = extract_mesh(source.coords[shuffled].long(), source.values[shuffled].double(), 256)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_nothing_gives_nothing():
    vertices, faces, report = extract_mesh(torch.zeros(0, 3, dtype=torch.int32), torch.zeros(0), 256)
    assert vertices.shape == faces.shape == (0, 3) and report.cells == 0


@pytest.mark.parametrize(
    ("coords", "values", "resolution", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int32), torch.ones(2), 256, "unique"),
        (torch.arange(6).view(2, 3), torch.tensor([1.0, torch.nan]), 256, "finite"),
        (torch.full((1, 3), 256), torch.ones(1), 256, r"\[0, 256\)"),
        (torch.full((1, 3), -1), torch.ones(1), 256, r"\[0, 256\)"),
        (torch.zeros(1, 3), torch.ones(1), 256, "integer"),
        (torch.zeros(1, 3, dtype=torch.int32), torch.ones(2), 256, "values.shape"),
        (torch.zeros(1, 3, dtype=torch.int32), torch.ones(1), 100, "multiple of 8"),
    ],
)
def test_bad_input_is_refused(coords, values, resolution, message):
    with pytest.raises(ValueError, match=message):
        extract_mesh(coords, values, resolution)


def test_signs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="inside must be bool"):
        extract_mesh(torch.zeros(1, 3, dtype=torch.int32), torch.ones(1), 256, torch.zeros(2, 512, dtype=torch.bool))
