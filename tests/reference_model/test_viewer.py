"""The page of a mesh: whole, offline, and holding that mesh."""

import base64
import io
import re

import numpy as np
import pytest

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("hydra")

from reference_model import viewer  # noqa: E402
from reference_model.meshes import save_mesh  # noqa: E402


def mesh_in(page):
    data = base64.b64decode(re.search(r'base64_data="([^"]+)"', page).group(1))
    return trimesh.load_scene(io.BytesIO(data), file_type="glb")


def test_page_holds_the_mesh_y_up_and_needs_no_network(tmp_path):
    box = trimesh.creation.box((1.0, 2.0, 4.0))
    source, out = tmp_path / "a <b> & (c).obj", tmp_path / "page [1].html"
    save_mesh(source, box.vertices, box.faces)
    assert viewer.main([f"in={source}", f"out={out}"]) == 0
    page = out.read_text(encoding="utf-8")
    assert "<title>a &lt;b&gt; &amp; (c).obj</title>" in page
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", page) and "import(" not in page
    assert "HemisphereLight(0xf0f6ff" in page
    header = base64.b64decode(re.search(r'base64_data="([^"]+)"', page).group(1))
    assert b'"NORMAL"' in header
    scene = mesh_in(page)
    mesh = scene.to_mesh()
    np.testing.assert_allclose(mesh.extents, [1.9 / 4, 1.9, 1.9 / 2], atol=1e-6)
    assert len(mesh.faces) == 12 and len(mesh.vertices) == 24, "a box keeps its sharp edges"


def test_page_shades_curves_smoothly_and_looks_from_the_front():
    ball = trimesh.creation.icosphere(subdivisions=3)
    scene = mesh_in(viewer.mesh_page(ball.vertices, ball.faces, "ball"))
    mesh = scene.to_mesh()
    assert len(mesh.vertices) == len(ball.vertices)
    pose = viewer._camera_pose(5.0)
    np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1.0)
    np.testing.assert_allclose(pose[:3, 2] * 5.0, pose[:3, 3], atol=1e-12)
    assert pose[1, 3] > 0 and pose[2, 3] > 0 and pose[1, 1] > 0.9, "from above, from glTF's front +z, upright"


def test_an_unusable_file_ends_with_its_reason(tmp_path, capsys):
    (tmp_path / "x.obj").write_bytes(b"")
    assert viewer.main([f"in={tmp_path / 'x.obj'}", f"out={tmp_path / 'x.html'}"]) == 1
    assert "empty file" in capsys.readouterr().err and not (tmp_path / "x.html").exists()
