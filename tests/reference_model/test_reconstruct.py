import numpy as np
import pytest
import torch
from analytic import box, enclosed, rim, rotation, volume_of

from reference_model.meshes import load_mesh, save_mesh
from reference_model.reconstruct import main, volume_to_mesh
from reference_model.symmetry import apply_symmetry

HALF = np.array([3.0, 2.0, 1.0])  # in the units of the file
CENTRE = np.array([10.0, -20.0, 5.0])
TURN = rotation(2).numpy()


def write_box(path):
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = np.array([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))])
    save_mesh(path, corners * HALF @ TURN.T + CENTRE, faces)


@pytest.mark.parametrize("suffix", [".obj", ".ply", ".stl", ".glb"])
def test_a_box_comes_back_where_it_was(tmp_path, capsys, suffix):
    source, target = tmp_path / f"in (1) [a],{{b}}=ü{suffix}", tmp_path / f"out = é{suffix}"
    write_box(source)
    assert main([f"in={source}", f"out={target}", "resolution=256", "network=none"]) == 0
    before, after = load_mesh(source), load_mesh(target)
    longest = (before.vertices.max(0) - before.vertices.min(0)).max()
    h = longest / 1.9 * 2 / 256
    distance = box(tuple(HALF), torch.from_numpy(TURN))(torch.from_numpy(after.vertices - CENTRE))
    assert distance.abs().max() < 0.5 * h and distance.abs().mean() < 0.01 * h
    assert np.abs(after.vertices.max(0) - before.vertices.max(0)).max() < h
    faces = torch.from_numpy(after.faces)
    assert len(rim(faces)) == 0
    assert enclosed(torch.from_numpy(after.vertices - CENTRE), faces) == pytest.approx(8 * HALF.prod(), rel=3e-3)
    assert "vertices on openings: 0" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {source.name, target.name}


def test_the_output_has_the_frame_of_the_input(tmp_path):
    source, target = tmp_path / "box.glb", tmp_path / "box.ply"
    write_box(source)
    assert main([f"in={source}", f"out={target}"]) == 0
    assert np.abs(load_mesh(target, y_up=True).vertices.mean(0) - CENTRE).max() < 0.1


def test_a_moved_volume_gives_the_mesh_of_its_source():
    shape = box((0.4, 0.2, 0.3), rotation(4))
    volume = volume_of(lambda p: shape(p - 0.1), 256)
    expected, _, _ = volume_to_mesh(volume)
    for index in (5, 40):
        vertices, faces, report = volume_to_mesh(apply_symmetry(volume, index))
        order, other = (np.lexsort(v.round(6).T) for v in (vertices, expected))
        assert report.open_vertices == 0
        assert np.abs(vertices[order].mean(0) - expected[other].mean(0)).max() < 1e-6
        assert enclosed(torch.from_numpy(vertices), torch.from_numpy(faces)) == pytest.approx(8 * 0.4 * 0.2 * 0.3, rel=3e-3)
        assert shape(torch.from_numpy(vertices) - 0.1).abs().max() < 0.5 * 2 / 256


@pytest.mark.parametrize("latents", ["chosen", "mean"])
def test_a_rod_through_the_network_of_the_package(tmp_path, latents):
    trimesh = pytest.importorskip("trimesh")
    rod = trimesh.creation.capsule(height=18.2, radius=0.4, count=[64, 64])
    save_mesh(tmp_path / "rod.obj", rod.vertices + CENTRE, rod.faces)
    arguments = [f"in={tmp_path / 'rod.obj'}", "resolution=256", "network=default", "device=cpu", f"latents={latents}"]
    for name in ("first.ply", "second.ply"):
        assert main([*arguments, f"out={tmp_path / name}"]) == 0
    assert (tmp_path / "first.ply").read_bytes() == (tmp_path / "second.ply").read_bytes()
    after = load_mesh(tmp_path / "first.ply")
    local = after.vertices - CENTRE - rod.bounds.mean(0)
    local[:, 2] = np.maximum(abs(local[:, 2]) - 9.1, 0)
    h = 10 * 2 / 256
    distance = np.linalg.norm(local, axis=1) - 0.4
    assert 0 < abs(distance).max() < 0.5 * h and abs(distance).mean() < 0.05 * h
    assert len(rim(torch.from_numpy(after.faces))) == 0


def test_mistakes_end_with_a_message(tmp_path, capsys):
    source = tmp_path / "box.obj"
    write_box(source)
    assert main([f"in={tmp_path / 'none.obj'}", f"out={tmp_path / 'x.obj'}"]) == 1
    assert "none.obj: cannot be read" in capsys.readouterr().err
    assert main([f"in={source}", f"out={tmp_path / 'x.txt'}"]) == 1
    assert main([f"in={source}", f"out={tmp_path / 'x.obj'}", "network=vae"]) == 2
    assert main([f"in={source}", f"out={tmp_path / 'x.obj'}", "network=default", "latents=best"]) == 1
    assert "latents must be one of ('chosen', 'mean'), got 'best'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([f"in={source}"])
    assert stop.value.code == 2 and "out=" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["box.obj"]
