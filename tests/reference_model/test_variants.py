"""Turned and stretched copies of meshes."""

import numpy as np
import pytest

pytest.importorskip("trimesh")

from reference_model import variants  # noqa: E402
from reference_model.meshes import load_mesh, save_mesh  # noqa: E402
from reference_model.variants import main, random_rotation, roughen, vary  # noqa: E402

BOX = np.array([[x, y, z] for x in (0.0, 1.0) for y in (0.0, 2.0) for z in (0.0, 3.0)])
QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
FACES = np.array([(a, *pair) for a, b, c, d in QUADS for pair in ((b, c), (c, d))])


def volume(vertices, faces):
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    return np.einsum("ni,ni->n", a, np.cross(b, c)).sum() / 6


def motion(seed, least):
    """The matrix [3,3] of a copy: what the unit vectors become."""
    return vary(np.eye(3), "box", seed, least)


def test_rotations_are_proper_and_favour_no_direction():
    rng = np.random.default_rng(0)
    turns = np.stack([random_rotation(rng) for _ in range(2000)])
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), turns.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(turns), 1)
    assert np.abs(turns.mean(0)).max() < 0.06 and np.abs((turns**2).mean(0) - 1 / 3).max() < 0.04


def test_a_copy_follows_from_name_and_seed():
    first = vary(BOX, "box", 1, 0.4)
    np.testing.assert_array_equal(first, vary(BOX, "box", 1, 0.4))
    assert not np.allclose(first, vary(BOX, "box", 2, 0.4)) and not np.allclose(first, vary(BOX, "other", 1, 0.4))
    with pytest.raises(ValueError, match=r"least must lie in \(0, 1\], got 0"):
        vary(BOX, "box", 0, 0.0)


def test_a_copy_is_turned_stretched_and_turned_again():
    factors = []
    for seed in range(200):
        left, stretch, right = np.linalg.svd(motion(seed, 0.4))
        assert 0.4 <= stretch[-1] < stretch[1] < stretch[0] <= 1 and np.linalg.det(motion(seed, 0.4)) > 0
        assert min(np.abs(left).max(0).min(), np.abs(right).max(1).min()) < 0.999  # both turns are off the axes
        factors.append(stretch)
    logs = np.log(np.sort(factors, 1)) / np.log(0.4)
    np.testing.assert_allclose(logs.mean(0), [0.75, 0.5, 0.25], atol=0.05)  # of three uniform numbers in order
    turn = motion(3, 1.0)
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
    assert np.abs(turn).max() < 0.999


def test_bumps_follow_the_normals_of_a_closed_mesh():
    import trimesh

    sphere = trimesh.creation.icosphere(4, 7.0)
    rough, faces = roughen(sphere.vertices, sphere.faces, "ball", 3, 0.002)
    again, _ = roughen(sphere.vertices, sphere.faces, "ball", 3, 0.002)
    other, _ = roughen(sphere.vertices, sphere.faces, "ball", 4, 0.002)
    np.testing.assert_array_equal(rough, again)
    assert not np.allclose(rough, other) and trimesh.Trimesh(rough, faces).is_watertight
    unit = 1.9 / 14
    plain, _ = roughen(sphere.vertices, sphere.faces, "ball", 3, 0.0)
    height = (np.linalg.norm(rough, axis=1) - np.linalg.norm(plain, axis=1)) * unit
    assert 0.0015 < np.sqrt((height**2).mean()) < 0.0025 and abs(height.mean()) < 0.0005
    assert np.abs(np.linalg.norm(np.diff(rough[faces[:, :2]], axis=1), axis=2)).max() * unit < 0.02
    away = (rough - plain) / np.linalg.norm(rough - plain, axis=1, keepdims=True)
    assert (np.abs((away * plain / 7.0).sum(1)) > 0.99).mean() > 0.99


def test_bumps_end_where_triangles_would_be_too_many(monkeypatch):
    monkeypatch.setattr(variants, "_MOST_FACES", 12 * 4**3)
    rough, faces = roughen(BOX, FACES, "box", 0, 0.001)
    assert len(faces) == 12 * 4**3 and len(rough) == len(faces) // 2 + 2


def write(folder, **meshes):
    folder.mkdir(parents=True, exist_ok=True)
    for name, vertices in meshes.items():
        save_mesh(folder / f"{name}.obj", vertices, FACES)
    return [f"meshes={folder}", f"out={folder / 'out'}"]


def test_command_leaves_out_what_is_held_out(tmp_path, capsys):
    paths = write(tmp_path / "meshes", box=BOX, sword=2 * BOX, twin_of_sword=2 * BOX)
    (tmp_path / "meshes" / "broken.obj").write_text("v 0 0 0\n")
    assert main([*paths, "count=3", "least=1"]) == 0
    out = tmp_path / "meshes" / "out"
    assert sorted(path.name for path in out.iterdir()) == [f"box_v{i:03d}.ply" for i in range(3)]
    copy = load_mesh(out / "box_v002.ply")
    np.testing.assert_allclose(volume(copy.vertices, copy.faces), volume(BOX, FACES), rtol=1e-5)
    assert "broken.obj: " in capsys.readouterr().err
    assert main([*paths, "count=1", "seed=9", "least=1", "rough=0.002"]) == 0
    bumpy = load_mesh(out / "box_v009.ply")
    assert len(bumpy.faces) > 1000 and 0 < abs(volume(bumpy.vertices, bumpy.faces) / volume(BOX, FACES) - 1) < 0.02
    assert main([*paths, "skip=[box]", "count=1"]) == 0
    assert (out / "sword_v000.ply").exists() and (out / "twin_of_sword_v000.ply").exists()
    assert main([*paths, "skip=[box,sword]"]) == 1


def test_mistakes_are_named(tmp_path, capsys):
    paths = write(tmp_path / "a", box=BOX)
    wrong = {
        "least=2": "least must lie in (0, 1], got 2",
        "skip=box": "skip must be a list of stems",
        "rough=-1": "rough must lie in [0, 0.1), got -1",
    }
    for argument, message in wrong.items():
        assert main([*paths, argument]) == 2
        assert message in capsys.readouterr().err
    write(tmp_path / "a" / "b", box=BOX)
    assert main(paths) == 2
    assert "these names come more than once: box" in capsys.readouterr().err
