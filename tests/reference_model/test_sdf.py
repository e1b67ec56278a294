"""Signed distances with known answers, and what becomes of meshes that bound no solid."""

import numpy as np
import pytest
import torch
import trimesh

import ssa
from reference_model.extract import extract_mesh
from reference_model.meshes import MeshError
from reference_model.sdf import mesh_to_volume, sharp_edges
from reference_model.specks import find_specks
from reference_model.volume import RESAMPLING_MARGIN, TAU, Volume, voxel_centers, without_margin

SHIFT = np.array([0.0131, -0.0072, 0.0053])  # no face on a plane of voxel centres


def box(extents=(1.2, 0.8, 0.9), shift=SHIFT) -> tuple[np.ndarray, np.ndarray]:
    mesh = trimesh.creation.box(extents)
    return np.asarray(mesh.vertices) + shift, np.asarray(mesh.faces)


def box_distance(points: np.ndarray, extents=(1.2, 0.8, 0.9), shift=SHIFT) -> np.ndarray:
    q = np.abs(points - shift) - np.array(extents) / 2
    return np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(-1), 0)


def joined(*meshes: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    starts = np.cumsum([0] + [len(v) for v, _ in meshes[:-1]])
    return np.concatenate([v for v, _ in meshes]), np.concatenate([f + n for (_, f), n in zip(meshes, starts, strict=True)])


def ball(radius: float, subdivisions: int = 5) -> tuple[np.ndarray, np.ndarray]:
    mesh = trimesh.creation.icosphere(subdivisions, radius)
    return np.asarray(mesh.vertices), np.asarray(mesh.faces)


def children(volume: Volume) -> np.ndarray:
    child = torch.cartesian_prod(*(torch.arange(8),) * 3)
    return voxel_centers(volume.latents[:, None] * 8 + child, volume.resolution).double().numpy()


def extracted(volume: Volume) -> trimesh.Trimesh:
    vertices, faces, report = extract_mesh(volume.coords, volume.values, volume.resolution, volume.inside)
    assert report.open_vertices == 0
    return trimesh.Trimesh(vertices.numpy(), faces.numpy(), process=False)


@pytest.mark.parametrize("resolution", [64, 256])
def test_box_is_exact(resolution: int) -> None:
    volume = mesh_to_volume(*box(), resolution)
    s = box_distance(voxel_centers(volume.coords, resolution).double().numpy())
    np.testing.assert_allclose(volume.values.numpy(), s / TAU, atol=2e-4)
    np.testing.assert_array_equal(volume.inside.numpy(), box_distance(children(volume)) < 0)
    side = np.arange(resolution)
    dense = np.stack(np.meshgrid(side, side, side, indexing="ij"), -1).reshape(-1, 3)
    band = np.abs(box_distance((2.0 * dense + 1) / resolution - 1)) < TAU
    partition = ssa.partition_voxels(
        torch.from_numpy(np.pad(dense[band], ((0, 0), (1, 0)))), compression_block_size=8, selection_block_size=8
    )
    assert torch.equal(partition.coords[:, 1:], volume.coords)
    assert torch.equal(partition.selection.coords[:, 1:], volume.latents)
    assert volume.meta["closed"] == "true" and volume.meta["sign_conflicts"] == "0"


@pytest.mark.parametrize(("resolution", "at"), [(256, "centres"), (256, "faces"), (384, "centres"), (512, "centres")])  # of voxels
def test_a_box_on_the_grid_is_closed(resolution: int, at: str) -> None:
    half = np.array([0.75, 0.5, 0.25]) / 2 + (1 / resolution if at == "centres" else 0)
    vertices, faces = box(2 * half, 0)
    volume = mesh_to_volume(vertices, faces, resolution)
    mesh = extracted(volume)
    assert mesh.is_watertight and mesh.body_count == 1 and mesh.euler_number == 2
    edges = 8 * half.sum()  # marching cubes cut less than a voxel's square off each
    assert 8 * half.prod() - edges * 4 / resolution**2 < mesh.volume < 8 * half.prod()
    s = box_distance(voxel_centers(volume.coords.double(), resolution).numpy(), 2 * half, 0)
    np.testing.assert_allclose(volume.values.numpy(), s / TAU, atol=2e-6)
    assert volume.values.abs().max() <= 1


def test_a_margin_holds_what_lies_beyond_the_band() -> None:
    resolution, reach = 128, TAU + RESAMPLING_MARGIN * 2 / 128
    plain, wide = (mesh_to_volume(*box(), resolution, margin=m) for m in (0.0, RESAMPLING_MARGIN))
    s = box_distance(voxel_centers(wide.coords, resolution).double().numpy())
    np.testing.assert_allclose(wide.values.numpy(), s / TAU, atol=2e-4)
    assert np.abs(s).max() <= reach * 1.00001
    side = np.arange(resolution)
    dense = np.stack(np.meshgrid(side, side, side, indexing="ij"), -1).reshape(-1, 3)
    assert len(s) == np.count_nonzero(np.abs(box_distance((2.0 * dense + 1) / resolution - 1)) < reach)
    again = without_margin(wide)
    for name in ("coords", "values", "sharp", "latents", "latent_index", "inside"):
        assert torch.equal(getattr(again, name), getattr(plain, name)), name
    assert (plain.margin, wide.margin, again.margin) == (0, RESAMPLING_MARGIN, 0)


def test_sharp_voxels_lie_within_one_voxel_of_an_edge() -> None:
    resolution, half = 256, np.array([0.6, 0.4, 0.45])
    volume = mesh_to_volume(*box(), resolution)
    p = np.abs(voxel_centers(volume.coords, resolution).double().numpy() - SHIFT)
    gap = p - half
    axes = ((0, 1, 2), (1, 2, 0), (2, 0, 1))
    to_edges = [np.linalg.norm((gap[:, i], gap[:, j], np.maximum(gap[:, k], 0)), axis=0) for i, j, k in axes]
    np.testing.assert_array_equal(volume.sharp.numpy(), np.min(to_edges, 0) <= 2 / resolution)
    assert not mesh_to_volume(*box(), resolution, sharp_angle=91).sharp.any()
    assert len(sharp_edges(*box(), 15)) == 12


@pytest.mark.parametrize("resolution", [256, 384, 512])
def test_torus_and_nested_balls(resolution: int) -> None:
    torus = trimesh.creation.torus(0.4, 0.15, 96, 48)
    mesh = extracted(mesh_to_volume(np.asarray(torus.vertices), np.asarray(torus.faces), resolution))
    assert mesh.is_watertight and mesh.euler_number == 0 and mesh.body_count == 1
    assert mesh.volume == pytest.approx(torus.volume, rel=2e-3) and mesh.area == pytest.approx(torus.area, rel=2e-3)
    outer, (v, f) = ball(0.4), ball(0.2)
    shell = extracted(mesh_to_volume(*joined(outer, (v, f[:, ::-1])), resolution))
    assert shell.is_watertight and shell.body_count == 2 and shell.euler_number == 4
    assert shell.volume == pytest.approx(4 / 3 * np.pi * (0.4**3 - 0.2**3), rel=5e-3)


def test_inside_out_is_turned() -> None:
    v, f = box()
    right, wrong = mesh_to_volume(v, f, 128), mesh_to_volume(v, f[:, ::-1], 128)
    assert torch.equal(right.values, wrong.values) and torch.equal(right.inside, wrong.inside)
    outer, inner = ball(0.8, 4), ball(0.4, 4)
    cavity = mesh_to_volume(*joined((outer[0], outer[1][:, ::-1]), inner), 128)  # the shell above, inside out as a whole
    assert len(cavity.latents) == len(mesh_to_volume(*joined(outer, (inner[0], inner[1][:, ::-1])), 128).latents)


def test_mixed_windings_and_doubled_faces() -> None:
    v, f = box()
    mixed = f.copy()
    mixed[::3] = mixed[::3][:, ::-1]
    right = mesh_to_volume(v, f, 128)
    for faces in (mixed, np.concatenate((f, f[:, ::-1])), np.concatenate((f, f[::2]))):
        volume = mesh_to_volume(v, faces, 128)
        assert torch.equal(volume.values, right.values) and torch.equal(volume.inside, right.inside)


def test_overlapping_parts_become_one_solid() -> None:
    a, b = box((1, 0.5, 0.5)), box((0.5, 1, 0.5001), SHIFT * 2)
    volume = mesh_to_volume(*joined(a, b), 256)
    points = voxel_centers(volume.coords, 256).double().numpy()
    union = np.minimum(box_distance(points, (1, 0.5, 0.5)), box_distance(points, (0.5, 1, 0.5001), SHIFT * 2))
    np.testing.assert_array_equal(volume.values.numpy() < 0, union < 0)
    np.testing.assert_allclose(volume.values.numpy()[union > 0], union[union > 0] / TAU, atol=2e-4)
    buried = (union < -3 * TAU) & (np.abs(points - SHIFT).max(1) < 0.2)
    assert not buried.any()  # the faces of one box inside the other bound nothing
    mesh = extracted(volume)
    assert mesh.is_watertight and mesh.body_count == 1 and mesh.euler_number == 2


def test_specks_are_found_across_tiles() -> None:
    latents = np.stack(np.meshgrid([1, 2], [3], [5, 6], indexing="ij"), -1).reshape(-1, 3)
    dense = np.zeros((16, 8, 16), np.bool_)
    dense[7:9, 3:5, 7:9] = True  # 8 voxels round the corner of four cells
    dense[2:5, 3:6, 2:5] = True  # 27 voxels, a hole in each face of the next
    dense[10:14, 3:4, 1:8] = True  # 28 voxels
    dense[0, 0, 0] = dense[15, 7, 15] = True  # on the rim of what is known
    expected = np.zeros_like(dense)
    expected[7:9, 3:5, 7:9] = expected[2:5, 3:6, 2:5] = True

    def tiles(x: np.ndarray) -> np.ndarray:
        return x.reshape(2, 8, 1, 8, 2, 8).transpose(0, 2, 4, 1, 3, 5).reshape(4, 512)

    for inside in (dense, ~dense):
        found, count = find_specks(latents, tiles(inside), 128)
        np.testing.assert_array_equal(found, tiles(expected))
        assert count == 2


@pytest.mark.parametrize("layers", [0.0, 2e-4, -2e-4])  # of a fin: apart, or swapped
def test_flaps_without_thickness_become_sheets(layers: float) -> None:
    thick = 4 / 256
    (v, f), (fin, fin_faces) = box((1, 0.5, 0.5)), box((0.6, abs(layers), 0.8), [0, 0, 0])
    fin_faces = fin_faces[np.ptp(fin[fin_faces][:, :, 1], axis=1) == 0] if layers == 0 else fin_faces  # else the rim has no area
    fin_faces = fin_faces[:, ::-1] if layers < 0 else fin_faces
    volume = mesh_to_volume(*joined((v, f), (fin + [0.0123, 0.0231, 0.1], fin_faces), box((0.5, 0.3, 0.5001), SHIFT * 2)), 256)
    assert volume.meta["closed"] == "false" and float(volume.meta["sheet_thickness"]) == thick
    mesh = extracted(volume)
    assert mesh.is_watertight and mesh.body_count == 1 and mesh.euler_number == 2
    high = mesh.vertices[mesh.vertices[:, 2] > 0.4]
    assert high[:, 2].max() == pytest.approx(0.5 + thick / 2, abs=2 / 256 / 4)  # the round rim, one voxel in radius, loses its crest
    assert np.ptp(high[:, 1]) == pytest.approx(thick + abs(layers), abs=1e-3)
    assert np.ptp(high[:, 0]) == pytest.approx(0.6 + thick, abs=2 * 2 / 256 / 4)


def test_pockets_too_small_for_the_grid_are_filled_where_parts_overlap() -> None:
    h = 2 / 256
    cavities = [(v, f[:, ::-1]) for v, f in (box((2.5 * h,) * 3, [-0.3, 0, 0]), box((6 * h,) * 3, [0.3, 0, 0]))]
    alone = joined(box((1, 0.5, 0.5)), *cavities)
    closed = mesh_to_volume(*alone, 256)
    assert closed.meta["closed"] == "true" and extracted(closed).body_count == 3  # an exact mesh keeps what it has
    overlapping = mesh_to_volume(*joined(alone, box((0.5, 1, 0.5001), SHIFT * 2)), 256)
    assert (overlapping.meta["closed"], overlapping.meta["specks"]) == ("false", "1")
    assert extracted(overlapping).body_count == 2


def test_a_hole_is_closed() -> None:
    v, f = ball(0.8)
    gap = v[f].mean(1)[:, 2] < -0.7  # a round hole of radius 0.39
    volume = mesh_to_volume(v, f[~gap], 256)
    mesh = extracted(volume)
    assert mesh.is_watertight and mesh.body_count == 1 and mesh.euler_number == 2
    flat = np.pi * 0.1**2 * (3 * 0.8 - 0.1) / 3  # the cap of the ball below a flat lid
    whole = 4 / 3 * np.pi * 0.8**3
    assert whole - 2 * flat < mesh.volume < whole
    assert volume.meta["closed"] == "false" and int(volume.meta["caps"]) > 0
    near = voxel_centers(volume.coords, 256).double().numpy()
    above = near[:, 2] > -0.6
    np.testing.assert_allclose(volume.values.numpy()[above], (np.linalg.norm(near[above], axis=1) - 0.8) / TAU, atol=0.1)


def test_a_sheet_becomes_as_thick_as_stated() -> None:
    side = np.linspace(-0.5, 0.5, 5)
    v = np.array([[x, y, 0.003 + 0.3 * x] for x in side for y in side])
    f = np.array([t for i in range(4) for j in range(4) for a in [5 * i + j] for t in ([a, a + 5, a + 1], [a + 1, a + 5, a + 6])])
    for thickness in (0.03, None):
        volume = mesh_to_volume(v, f, 256, thickness=thickness)
        stated = thickness or 4 / 256
        mesh = extracted(volume)
        assert float(volume.meta["sheet_thickness"]) == pytest.approx(stated)
        assert mesh.is_watertight and mesh.body_count == 1 and mesh.euler_number == 2
        edge = np.hypot(1, 0.3)
        rim = np.pi * stated * (1 + edge) + np.pi * stated**2  # half tubes along four edges, quarter balls at the corners
        assert mesh.area == pytest.approx(2 * edge + rim, rel=0.01)


def test_what_bounds_nothing_is_refused() -> None:
    with pytest.raises(MeshError, match="no area"):
        mesh_to_volume(np.array([[0, 0, 0], [0.5, 0, 0], [0.9, 0, 0.0]]), np.array([[0, 1, 2]]), 64)
    with pytest.raises(ValueError, match=r"\[-1,1\]"):
        mesh_to_volume(box()[0] * 3, box()[1], 64)


def test_a_long_face_bounds_where_it_leaves_other_solids() -> None:
    """A rod through four blocks that hold the centre and the corners of each of its faces, and not what lies between."""
    rod = box((0.1, 0.1, 1.9))
    blocks = [box((0.5, 0.5, 0.25), SHIFT + [0, 0, z]) for z in (-0.825, -0.325, 0.325, 0.825)]
    volume = mesh_to_volume(*joined(rod, *blocks), 384)
    places = voxel_centers(volume.coords, 384).double().numpy()
    between = np.abs(np.abs(places[:, 2]) - 0.575) < 0.1
    assert between.sum() > 1000
    distance = box_distance(places[between], (0.1, 0.1, 1.9))
    assert np.abs(volume.values.numpy()[between] * TAU - distance).max() < 1e-3 * TAU
    assert extract_mesh(volume.coords, volume.values, 384, volume.inside)[2].open_vertices == 0
