"""Pictures of shapes whose pictures are known."""

import json
import math

import numpy as np
import pytest

trimesh = pytest.importorskip("trimesh")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("embreex")

from reference_model import render  # noqa: E402
from reference_model.cameras import Camera, bounding_radius, fitting_distance, metric_cameras, sample_cameras  # noqa: E402


@pytest.fixture(scope="module")
def ball():
    mesh = trimesh.creation.icosphere(subdivisions=5, radius=0.5)
    return render.Scene(mesh.vertices, mesh.faces)


def test_ball_depth_normal_and_alpha(ball):
    camera = Camera(azimuth=37.0, elevation=21.0, distance=4.0, focal=60.0)
    view = ball.render(camera, 65, samples=4, sky=16)
    assert view["depth"][32, 32] == pytest.approx(3.5, abs=1e-3)
    np.testing.assert_allclose(view["normal"][32, 32], [0, 0, 1], atol=0.05)
    tangent = 0.5 / math.sqrt(4.0**2 - 0.5**2)  # the outline is the cone that touches the ball
    assert view["alpha"].mean() == pytest.approx(math.pi * (tangent * 60 / 36) ** 2, rel=0.01)
    hit = view["depth"] > 0
    np.testing.assert_allclose(np.linalg.norm(view["normal"][hit], axis=1), 1, atol=1e-5)
    assert (view["normal"][~hit] == 0).all() and (view["normal"][hit][:, 2] > -0.01).all()
    up, right = view["normal"][5:32, 32], view["normal"][32, 33:60]
    assert up[up.any(1)][:, 1].mean() > 0.3 and right[right.any(1)][:, 0].mean() > 0.3
    assert np.isfinite(view["color"]).all() and 0 <= view["color"].min() and view["color"].max() <= 1


@pytest.mark.parametrize("azimuth, axis", [(0, [-1, 0, 0]), (90, [0, -1, 0]), (180, [1, 0, 0]), (270, [0, 1, 0])])
def test_azimuth_names_the_side_that_is_seen(azimuth, axis):
    np.testing.assert_allclose(Camera(azimuth, 0.0, 2.0).position, 2.0 * np.array(axis), atol=1e-12)
    np.testing.assert_allclose(Camera(azimuth, 90.0, 2.0).position, [0, 0, 2], atol=1e-12)
    right, down, forward = Camera(azimuth, 30.0, 2.0).rotation
    np.testing.assert_allclose(right, np.cross([0, 0, 1], np.array(axis)), atol=1e-12)
    assert down[2] < 0 and forward[2] < 0


def test_matrices_say_where_a_point_is_drawn():
    camera, point, size = Camera(130.0, 25.0, 3.0, 45.0), np.array([0.3, -0.2, 0.4]), 201
    marker = trimesh.creation.icosphere(subdivisions=2, radius=0.02).apply_translation(point)
    view = render.render_view(marker.vertices, marker.faces, camera, size)
    rows, columns = np.nonzero(view["depth"])
    in_camera = (camera.world_to_camera @ [*point, 1.0])[:3]
    u, v, w = camera.intrinsics(size) @ in_camera
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx((u / w, v / w), abs=0.3)
    assert view["depth"].max() == pytest.approx(in_camera[2], abs=0.021)
    np.testing.assert_allclose(camera.rotation @ camera.rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(camera.rotation) == pytest.approx(1.0)
    centre = camera.rays(size)[size * (size // 2) + size // 2]
    np.testing.assert_allclose(centre, camera.rotation[2], atol=1e-12)


def test_cameras_are_the_papers_fit_the_object_and_repeat():
    cameras = sample_cameras(500, seed=3, radius=0.8)
    assert cameras == sample_cameras(500, seed=3, radius=0.8) != sample_cameras(500, seed=4, radius=0.8)
    for name, low, high in (("azimuth", 0, 180), ("elevation", 10, 40), ("focal", 30, 100)):
        values = np.array([getattr(c, name) for c in cameras])
        assert low <= values.min() < low + 0.1 * (high - low) and high - 0.1 * (high - low) < values.max() <= high
    mesh = trimesh.creation.icosphere(subdivisions=4, radius=0.8)
    assert bounding_radius(mesh.vertices) == pytest.approx(0.8)
    alpha = render.render_view(mesh.vertices, mesh.faces, cameras[0], 128)["alpha"]
    border = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
    assert border.max() == 0 and alpha[:, 64].astype(bool).sum() > 115
    assert [c.azimuth for c in metric_cameras()] == [30, 120, 210, 300] and {c.elevation for c in metric_cameras()} == {30}


def test_shadow_falls_where_the_key_light_is_hidden():
    floor = trimesh.creation.box((1.8, 1.8, 0.1))
    ball = trimesh.creation.icosphere(subdivisions=4, radius=0.3).apply_translation([0, 0, 0.6])
    both = trimesh.util.concatenate([floor, ball])
    camera = Camera(90.0, 40.0, fitting_distance(1.4, 50.0))
    bare = render.render_view(floor.vertices, floor.faces, camera, 96)
    cast = render.render_view(both.vertices, both.faces, camera, 96)
    same = np.isclose(bare["depth"], cast["depth"], atol=1e-6) & (bare["depth"] > 0)
    darker = (bare["color"] - cast["color"]).mean(2)[same]
    assert darker.max() > 0.2 and darker.min() > -0.02 and (darker > 0.2).mean() < 0.3


def test_crease_keeps_edges_and_smooths_curves():
    box, ball = trimesh.creation.box(), trimesh.creation.icosphere(subdivisions=3)
    plain = render.Scene(ball.vertices, ball.faces, crease=0).render(Camera(0, 0, 3.0), 32, samples=1)
    assert np.abs(plain["color"] - render.Scene(ball.vertices, ball.faces).render(Camera(0, 0, 3.0), 32, samples=1)["color"]).max() > 0.01
    flat = render.Scene(box.vertices, box.faces)
    np.testing.assert_allclose(flat.corner_normals, np.repeat(flat.normals[:, None], 3, 1), atol=1e-12)
    scene = render.Scene(ball.vertices, ball.faces)
    true = np.asarray(ball.vertices)[ball.faces]
    assert np.abs(scene.corner_normals - true).max() < 0.02 < 0.05 < np.abs(scene.normals[:, None] - true).max()


def test_normals_face_the_viewer_whatever_the_winding(ball):
    camera = Camera(60.0, 10.0, 3.0)
    inverted = render.Scene(ball.vertices, ball.faces[:, ::-1])
    a, b = ball.render(camera, 48), inverted.render(camera, 48)
    np.testing.assert_allclose(a["normal"], b["normal"], atol=1e-5)


def test_command_writes_pictures_that_read_back(tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "a mésh (1) [x], {y}=z.ply", tmp_path / "out [é]"
    trimesh.creation.icosphere(subdivisions=3, radius=7.0).apply_translation([5, 6, 7]).export(source)
    monkeypatch.setattr("sys.argv", ["render", f"meshes={source}", f"out={out}", "views=2", "size=64"])
    assert render.main() == 0
    folder = out / source.name
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["cameras.json"] + [f"00{i}_{kind}.png" for i in range(2) for kind in ("color", "normal", "depth")]
    )
    record = json.loads((folder / "cameras.json").read_text(encoding="utf-8"))
    assert record["frame"]["scale"] == pytest.approx(1.9 / 14, rel=1e-3) and len(record["views"]) == 2
    depth = np.asarray(Image.open(folder / "001_depth.png")).astype(float) * record["depth_scale"]
    assert depth[32, 32] == pytest.approx(record["views"][1]["distance"] - 0.95, abs=0.01)
    color = np.asarray(Image.open(folder / "001_color.png"))
    assert color.shape == (64, 64, 4) and color[0, 0, 3] == 0 and color[32, 32, 3] == 255
    normal = np.asarray(Image.open(folder / "001_normal.png"))[32, 32] / 127.5 - 1
    np.testing.assert_allclose(normal, [0, 0, 1], atol=0.15)


def test_errors_name_the_value():
    with pytest.raises(ValueError, match=r"faces.shape=\(0, 3\)"):
        render.Scene(np.zeros((3, 3)), np.zeros((0, 3), int))
    with pytest.raises(ValueError, match="finite"):
        render.Scene(np.full((3, 3), np.nan), np.array([[0, 1, 2]]))
