"""Mesh files: formats, axes, scenes, and the files that are refused."""

import numpy as np
import pytest
import trimesh

from reference_model.meshes import MeshError, load_mesh, normalize, save_mesh, turn_y_up, turn_z_up


def box() -> tuple[np.ndarray, np.ndarray]:
    mesh = trimesh.creation.box((1.0, 2.0, 3.0))
    return np.asarray(mesh.vertices) + (10.0, -4.0, 0.5), np.asarray(mesh.faces)


def volume_of(vertices: np.ndarray, faces: np.ndarray) -> float:
    return float(np.einsum("fi,fi->f", vertices[faces[:, 0]], np.cross(vertices[faces[:, 1]], vertices[faces[:, 2]])).sum() / 6)


@pytest.mark.parametrize("suffix", ["obj", "ply", "stl", "off", "glb"])
def test_round_trip_keeps_frame_and_winding(tmp_path, suffix: str) -> None:
    vertices, faces = box()
    path = tmp_path / f"a (b) [c]{{d}}=,é ß.{suffix}"
    save_mesh(path, vertices, faces)
    mesh = load_mesh(path)
    assert mesh.y_up == (suffix == "glb") and mesh.name == path.name
    assert len(mesh.vertices) == 8 and len(mesh.faces) == 12
    np.testing.assert_allclose(mesh.vertices.min(0), vertices.min(0), atol=1e-5)
    np.testing.assert_allclose(mesh.vertices.max(0), vertices.max(0), atol=1e-5)
    assert volume_of(mesh.vertices, mesh.faces) == pytest.approx(6.0, rel=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_glb_is_y_up_on_disk(tmp_path) -> None:
    vertices, faces = box()
    save_mesh(tmp_path / "x.glb", vertices, faces)
    raw = trimesh.load_scene(tmp_path / "x.glb").to_mesh()
    np.testing.assert_allclose(raw.extents, (1, 3, 2), atol=1e-5)
    np.testing.assert_allclose(load_mesh(tmp_path / "x.glb", y_up=False).vertices.max(0), raw.vertices.max(0))
    save_mesh(tmp_path / "x.obj", vertices, faces, y_up=True)
    np.testing.assert_allclose(load_mesh(tmp_path / "x.obj", y_up=True).vertices.max(0), vertices.max(0), atol=1e-6)
    front = np.array([[0.0, -1.0, 0.0]])
    assert turn_y_up(front).tolist() == [[0, 0, 1]] and turn_z_up(turn_y_up(front)).tolist() == front.tolist()


def test_scenes_are_merged_with_their_transforms(tmp_path) -> None:
    scene = trimesh.Scene()
    unit = trimesh.creation.box((1, 1, 1))
    scene.add_geometry(unit, transform=trimesh.transformations.translation_matrix((5, 0, 0)))
    scene.add_geometry(unit, transform=trimesh.transformations.scale_matrix(2.0))
    scene.export(tmp_path / "scene.glb")
    mesh = load_mesh(tmp_path / "scene.glb")
    assert len(mesh.faces) == 24
    np.testing.assert_allclose(mesh.vertices.min(0), (-1, -1, -1), atol=1e-6)
    np.testing.assert_allclose(mesh.vertices.max(0), (5.5, 1, 1), atol=1e-6)
    assert volume_of(mesh.vertices, mesh.faces) == pytest.approx(9.0, rel=1e-6)


@pytest.mark.parametrize("suffix", ["gltf", "3mf"])
def test_other_formats_are_read(tmp_path, suffix: str) -> None:
    vertices, faces = box()
    files = trimesh.Trimesh(vertices, faces, process=False).scene().export(file_type=suffix)
    for name, data in ({f"x.{suffix}": files} if isinstance(files, bytes) else files).items():
        (tmp_path / (f"x.{suffix}" if name.endswith(suffix) else name)).write_bytes(data)
    mesh = load_mesh(tmp_path / f"x.{suffix}")
    assert mesh.y_up == (suffix == "gltf") and len(mesh.faces) == 12
    assert volume_of(mesh.vertices, mesh.faces) == pytest.approx(6.0, rel=1e-5)


def test_normalize_fits_and_is_undone(tmp_path) -> None:
    vertices, faces = box()
    save_mesh(tmp_path / "x.ply", vertices, faces)
    mesh = load_mesh(tmp_path / "x.ply")
    unit, scale, offset = normalize(mesh)
    np.testing.assert_allclose(unit.max(0), -unit.min(0), atol=1e-12)
    assert np.ptp(unit, axis=0).max() == pytest.approx(1.9)
    np.testing.assert_allclose((unit - offset) / scale, mesh.vertices, atol=1e-9)


def test_strips_are_decoded(tmp_path) -> None:
    header = (
        "ply\nformat ascii 1.0\nelement vertex 6\nproperty float x\nproperty float y\nproperty float z\n"
        "element tristrips 1\nproperty list int int vertex_indices\nend_header\n"
    )
    points = "0 0 0\n1 0 0\n0 1 0\n1 1 0\n0 2 0\n1 2 1\n"
    (tmp_path / "strip.ply").write_text(header + points + "9 0 1 2 3 -1 2 3 4 5\n")
    mesh = load_mesh(tmp_path / "strip.ply")
    corners = mesh.vertices[mesh.faces]
    up = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])[:, 2]
    assert len(mesh.faces) == 4 and (up > 0).all()


REFUSED = {
    "empty.obj": ("# nothing\n", "no faces"),
    "zero.off": ("", "empty file"),
    "lines.obj": ("v 0 0 0\nv 1 0 0\nv 0 1 0\nl 1 2 3\n", "no faces"),
    "range.obj": ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "cannot be read|out of range"),
    "infinite.obj": ("v 0 0 inf\nv 1 0 nan\nv 0 1 0\nf 1 2 3\n", "infinite"),
    "huge.off": ("OFF\n353535235358 2 0\n0 0 0\n", "cannot be read"),
    "point.obj": ("v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n", "no extent"),
    "line.obj": ("v 0 0 0\nv 1 1 1\nf 1 2 2\n", "equal corners"),
    "points.ply": ("ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\n"
                   "end_header\n0 0 0\n", "no faces"),
    "picture.png": ("x", "unknown format"),
    "noise.glb": ("glTF nonsense", "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_broken_files_end_in_a_reason(tmp_path, name: str) -> None:
    text, reason = REFUSED[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(MeshError, match=reason):
        load_mesh(tmp_path / name)


def test_missing_file(tmp_path) -> None:
    with pytest.raises(MeshError, match="cannot be read"):
        load_mesh(tmp_path / "no.obj")
