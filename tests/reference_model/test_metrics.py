"""Scores of shapes whose scores are known."""

import numpy as np
import pytest

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("igl")
pytest.importorskip("embreex")

from reference_model import metrics  # noqa: E402
from reference_model.metrics import Surface, canny, picture_scores  # noqa: E402


def surface(*meshes):
    mesh = trimesh.util.concatenate(meshes)
    return Surface(mesh.vertices, mesh.faces, grid=64)


def compare(truth, result):
    return metrics.compare(truth, result, samples=20_000, picture_size=128)


def ball(radius, inward=False, at=(0, 0, 0)):
    mesh = trimesh.creation.icosphere(subdivisions=5, radius=radius).apply_translation(at)
    if inward:
        mesh.invert()
    return mesh


@pytest.fixture(scope="module")
def truth():
    return surface(ball(0.8))


def test_a_surface_against_itself_is_the_floor(truth):
    scores = compare(truth, truth)
    assert scores["chamfer"] < 1e-7 and scores["flipped"] < 0.1
    for name in ("f1@0.01", "f1@0.005", "f1@0.001", "f1@0.0002", "outer_f1@0.0002", "outer_share"):
        assert scores[name] == pytest.approx(100), name
    assert scores["normal_consistency"] == pytest.approx(100, abs=1e-2)
    assert scores["area_ratio"] == pytest.approx(1) and scores["outer_area_ratio"] == pytest.approx(1)
    assert scores["normal_psnr"] == 100 and scores["sharp_edge_error"] == 0


def test_larger_ball(truth):
    scores = compare(truth, surface(ball(0.802)))
    assert scores["chamfer"] == pytest.approx(0.002, rel=0.02)
    assert scores["f1@0.005"] == 100 and scores["f1@0.001"] == 0
    assert scores["area_ratio"] == pytest.approx((0.802 / 0.8) ** 2, rel=1e-6)
    assert (scores["components"], scores["open_components"], scores["genus"]) == (1, 0, 0)


def test_half_a_ball_has_all_precision_and_half_the_recall(truth):
    mesh = ball(0.8)
    keep = mesh.triangles_center[:, 2] > 0
    half = Surface(mesh.vertices, mesh.faces[keep], grid=64)
    scores = compare(truth, half)
    assert scores["f1@0.0002"] == pytest.approx(200 * 0.5 / 1.5, abs=1.0)
    assert scores["area_ratio"] == pytest.approx(0.5, abs=0.02)
    assert (scores["components"], scores["open_components"], scores["genus"]) == (1, 1, None)


def test_an_inverted_copy_is_flipped_but_consistent(truth):
    scores = compare(truth, Surface(truth.vertices, truth.faces[:, ::-1], grid=64))
    assert scores["flipped"] > 99.9 and scores["normal_consistency"] == pytest.approx(100, abs=1e-2) and scores["normal_psnr"] == 100


def test_normal_consistency_is_the_mean_cosine():
    flat = trimesh.creation.box((1.0, 1.0, 0.2))
    ridges = trimesh.Trimesh(*ridged_plate(slope=0.01))
    scores = compare(surface(flat), surface(ridges))
    steep = compare(surface(flat), surface(trimesh.Trimesh(*ridged_plate(slope=0.2))))
    share = 2.0 / (2.0 + 4 * 0.2)  # of the area that is ridged: two plates of 1 and four sides of 0.2
    for slope, got in ((0.01, scores), (0.2, steep)):
        expected = 100 * (1 - share + share / np.sqrt(1 + slope**2))
        assert got["normal_consistency"] == pytest.approx(expected, abs=0.15)


def ridged_plate(slope, teeth=200):
    """The box of 1 x 1 x 0.2 whose top and bottom are a fine saw of this slope."""
    x = np.linspace(-0.5, 0.5, 2 * teeth + 1)
    z = 0.1 + np.where(np.arange(len(x)) % 2, slope / (2 * teeth), 0)
    outline = np.concatenate([np.stack([x, z], 1), np.stack([x, -z], 1)[::-1]])
    manifold3d = pytest.importorskip("manifold3d")
    solid = manifold3d.Manifold.extrude(manifold3d.CrossSection([outline[::-1]]), 1.0).to_mesh64()
    vertices = solid.vert_properties[:, [0, 2, 1]] * [1, 1, 1] - [0, 0.5, 0]
    return vertices, solid.tri_verts[:, ::-1]


def test_topology_of_torus_and_nested_balls():
    torus = trimesh.creation.torus(0.6, 0.2)
    topology = surface(torus, ball(0.1), ball(0.05, inward=True)).topology
    assert sorted(topology.genus.tolist()) == [0, 0, 1] and topology.closed.all()
    assert topology.summary() == {"components": 3, "open_components": 0, "genus": 1}
    unused = Surface(np.concatenate([np.zeros((5, 3)), torus.vertices]), torus.faces + 5)
    assert unused.topology.summary() == {"components": 1, "open_components": 0, "genus": 1}


def test_outer_scores_do_not_see_a_cavity(truth):
    hollow = surface(ball(0.8), ball(0.5, inward=True))
    scores = compare(hollow, truth)
    recall = 0.8**2 / (0.8**2 + 0.5**2)
    assert scores["f1@0.001"] == pytest.approx(200 * recall / (1 + recall), abs=1.0)
    assert scores["outer_f1@0.001"] == 100 and scores["outer_area_ratio"] == pytest.approx(1, rel=0.01)
    doubled = compare(truth, hollow)
    assert (doubled["components"], doubled["outer_components"]) == (2, 1) and doubled["outer_share"] == pytest.approx(100 * recall, abs=1.0)


def test_outer_is_exact_for_walls_thinner_than_the_grid():
    shell = surface(ball(0.8), ball(0.797, inward=True))
    points, face = shell.sample(20_000, 0)
    radius = np.linalg.norm(points, axis=1)
    assert (shell.outer(points, face) == (radius > 0.7985)).mean() > 0.9995


def test_outer_follows_an_opening_and_knows_both_sides_of_a_sheet():
    manifold3d = pytest.importorskip("manifold3d")
    bore = manifold3d.Manifold.cylinder(1.5, 0.45, -1, 64, True).translate([0, 0, 0.1])
    mesh = (manifold3d.Manifold.cylinder(1.6, 0.5, -1, 64, True) - bore).to_mesh64()
    for vertices, faces in ((mesh.vert_properties[:, :3], mesh.tri_verts), (np.eye(3) * 0.9, np.array([[0, 1, 2]]))):
        opened = Surface(vertices, faces)
        assert opened.outer(*opened.sample(5_000, 0)).mean() > 0.999


def test_sampling_is_even_over_the_area_and_repeats(truth):
    points, face = truth.sample(50_000, 1)
    assert np.abs((points / 0.8).mean(0)).max() < 0.02
    np.testing.assert_allclose((points / 0.8).T @ (points / 0.8) / len(points), np.eye(3) / 3, atol=0.01)
    np.testing.assert_array_equal(points, truth.sample(50_000, 1)[0])
    plate = Surface(np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0.5, -0.1, 0]], float), np.array([[0, 1, 2], [0, 3, 1]]))
    assert (plate.sample(50_000, 2)[1] == 0).mean() == pytest.approx(0.5 / 0.55, abs=0.01)


def test_sharp_edges_notice_rounding_that_the_mean_dilutes():
    box, manifold3d = trimesh.creation.box((1, 1, 1)), pytest.importorskip("manifold3d")
    small = manifold3d.Manifold.sphere(0.05, 32)
    corners = [small.translate([x, y, z]) for x in (-0.45, 0.45) for y in (-0.45, 0.45) for z in (-0.45, 0.45)]
    rounded = manifold3d.Manifold.batch_hull(corners).to_mesh64()
    turned = trimesh.creation.box((1, 1, 1)).apply_transform(trimesh.transformations.rotation_matrix(0.2, (0, 0, 1)))
    ratio = {}
    for name, mesh in (("rounded", (rounded.vert_properties[:, :3], rounded.tri_verts)), ("turned", (turned.vertices, turned.faces))):
        scores = picture_scores(surface(box), Surface(*mesh))
        ratio[name] = scores["sharp_edge_error"] * 1e-4 / 10 ** (-scores["normal_psnr"] / 10)
    assert ratio["rounded"] > 10 > 5 > ratio["turned"]  # rounding is all in the edges, turning is everywhere
    assert picture_scores(surface(box), surface(box)) == {"normal_psnr": 100.0, "sharp_edge_error": 0.0}


def test_normal_psnr_of_a_picture_that_is_missing(truth):
    speck = surface(ball(1e-4, at=(5, 5, 5)))
    error = []
    for camera in metrics.metric_cameras(0.8):
        normal = truth.scene.trace(camera, 256)["normal"]
        error.append(((normal / 2) ** 2).mean())
    expected = -10 * np.log10(np.mean(error))
    assert picture_scores(truth, speck, 256)["normal_psnr"] == pytest.approx(expected, abs=1e-3)
    assert expected == pytest.approx(-10 * np.log10(0.25 / 3 * np.pi / 4 / 1.05**2), abs=0.2)  # |n|^2 / 4 / 3 over the ball's disc


def test_canny_finds_a_step_and_a_ring_once():
    step = np.zeros((40, 40, 3))
    step[:, 20:, 1] = 120.0
    edges = canny(step)
    assert edges[5:-5].sum(1).tolist() == [1] * 30 and edges[10].argmax() in (19, 20)
    assert not canny(step * 0.1).any()
    y, x = np.mgrid[:80, :80] - 40.0
    ring = canny(np.repeat((np.hypot(x, y) < 25)[..., None] * 255.0, 3, 2))
    assert np.abs(np.hypot(*np.nonzero(ring) - np.array([[40], [40]])) - 25).max() < 1.6 and 120 < ring.sum() < 220
