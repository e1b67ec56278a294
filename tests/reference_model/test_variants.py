"""Turned and stretched copies of meshes."""

import numpy as np
import pytest

pytest.importorskip("trimesh")

from reference_model.meshes import load_mesh, save_mesh  # noqa: E402
from reference_model.variants import main, random_rotation, vary  # noqa: E402

BOX = np.array([[x, y, z] for x in (0.0, 1.0) for y in (0.0, 2.0) for z in (0.0, 3.0)])
QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
FACES = np.array([(a, *pair) for a, b, c, d in QUADS for pair in ((b, c), (c, d))])


def volume(vertices, faces):
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    return np.einsum("ni,ni->n", a, np.cross(b, c)).sum() / 6


def test_rotations_are_proper_and_favour_no_direction():
    rng = np.random.default_rng(0)
    turns = np.stack([random_rotation(rng) for _ in range(2000)])
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), turns.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(turns), 1)
    assert np.abs(turns.mean(0)).max() < 0.06 and np.abs((turns**2).mean(0) - 1 / 3).max() < 0.04


def test_a_copy_follows_from_name_and_seed_and_keeps_its_side():
    first = vary(BOX, "box", 1, 0.4)
    np.testing.assert_array_equal(first, vary(BOX, "box", 1, 0.4))
    assert not np.allclose(first, vary(BOX, "box", 2, 0.4)) and not np.allclose(first, vary(BOX, "other", 1, 0.4))
    volumes = np.array([volume(vary(BOX, "box", seed, 0.4), FACES) for seed in range(50)]) / volume(BOX, FACES)
    assert 0.4**3 <= volumes.min() < 0.2 and 0.6 < volumes.max() <= 1
    edges = np.linalg.norm(np.diff(vary(BOX, "box", 3, 1.0), axis=0), axis=1)
    np.testing.assert_allclose(edges, np.linalg.norm(np.diff(BOX, axis=0), axis=1))
    with pytest.raises(ValueError, match=r"least must lie in \(0, 1\], got 0"):
        vary(BOX, "box", 0, 0.0)


def test_command_leaves_out_what_is_held_out(tmp_path, capsys):
    (tmp_path / "meshes").mkdir()
    for name in ("box", "sword"):
        save_mesh(tmp_path / "meshes" / f"{name}.obj", BOX, FACES)
    (tmp_path / "meshes" / "broken.obj").write_text("v 0 0 0\n")
    assert main([f"meshes={tmp_path / 'meshes'}", f"out={tmp_path / 'out'}", "count=3", "least=1"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"box_v{i:03d}.ply" for i in range(3)]
    copy = load_mesh(tmp_path / "out" / "box_v002.ply")
    np.testing.assert_allclose(abs(volume(copy.vertices, copy.faces)), 6, rtol=1e-5)
    assert "broken.obj: " in capsys.readouterr().err
    assert main([f"meshes={tmp_path / 'meshes'}", f"out={tmp_path / 'out'}", "least=2"]) == 2
