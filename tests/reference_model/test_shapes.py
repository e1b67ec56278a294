"""Shapes by code: closed, repeatable, without self-intersections, and moved by every parameter."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

igl = pytest.importorskip("igl")
pytest.importorskip("manifold3d")
pytest.importorskip("embreex")

from reference_model import shapes  # noqa: E402
from reference_model.meshes import load_mesh  # noqa: E402
from reference_model.metrics import Surface  # noqa: E402
from reference_model.shapes import FAMILIES, make_shape  # noqa: E402
from reference_model.shapes_kit import rod, room, spline, superellipse  # noqa: E402


def volume(vertices, faces):
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    return np.einsum("ni,ni->n", a, np.cross(b, c)).sum() / 6


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    parameters = FAMILIES[family].parameters
    assert len(parameters) >= 6 and all(low < high for low, high in parameters.values())
    first, again, other = make_shape(family, 5), make_shape(family, 5), make_shape(family, 6)
    np.testing.assert_array_equal(first.vertices, again.vertices)
    np.testing.assert_array_equal(first.faces, again.faces)
    assert first.vertices.shape != other.vertices.shape or not np.array_equal(first.vertices, other.vertices)
    rng = np.random.default_rng(0)
    for shape in (first, other):
        assert all(parameters[name][0] <= value <= parameters[name][1] for name, value in shape.parameters.items())
        low, high = shape.vertices.min(0), shape.vertices.max(0)
        assert (high - low).max() == pytest.approx(1.9, abs=1e-4) and np.abs(low + high).max() < 1e-4
        topology = Surface(shape.vertices, shape.faces).topology
        assert topology.closed.all() and topology.genus.sum() == shape.genus
        assert volume(shape.vertices, shape.faces) > 1e-3
        points = rng.uniform(-1, 1, (4_000, 3))
        winding = igl.fast_winding_number(shape.vertices, shape.faces, points)
        assert np.minimum(np.abs(winding), np.abs(winding - 1)).max() < 0.2, "inside out or overlapping itself"


def test_a_shape_is_the_same_in_another_process():
    code = """if True:
        import hashlib
        from reference_model.shapes import make_shape
        for family in ("primitives", "tray", "rock"):
            shape = make_shape(family, 11)
            print(hashlib.sha256(shape.vertices.tobytes() + shape.faces.tobytes()).hexdigest())"""
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(runs) == 1 and len(set(runs.pop().split())) == 3


@pytest.mark.parametrize("which", ["gear width", "revolution belly", "creature leg", "bracket plate", "rock amplitude"])
def test_parameters_are_continuous(which):
    family, name = which.split()
    low, high = FAMILIES[family].parameters[name]
    values = [low + 0.5 * (high - low), low + 0.5001 * (high - low), low + 0.9 * (high - low)]
    volumes = [volume(s.vertices, s.faces) for s in (make_shape(family, 2, **{name: value}) for value in values)]
    assert 0 < abs(volumes[1] / volumes[0] - 1) < 2e-3 < abs(volumes[2] / volumes[0] - 1)


def test_known_genus():
    assert make_shape("knot", 0).genus == 1
    assert make_shape("sweep", 1, hollow=0.7).genus == 1 and make_shape("sweep", 1, hollow=0.1).genus == 0
    assert make_shape("bracket", 3, rib=0.0).genus == 4
    closed, open_ = make_shape("nested", 0, window=0.1), make_shape("nested", 0, window=0.4)
    assert len(Surface(closed.vertices, closed.faces).topology.genus) == 3 and closed.genus == 0
    assert len(Surface(open_.vertices, open_.faces).topology.genus) == 2 and open_.genus == 1


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="family='teapot'"):
        make_shape("teapot", 0)
    with pytest.raises(ValueError, match="no parameter 'colour'"):
        make_shape("gear", 0, colour=1.0)
    with pytest.raises(ValueError, match=r"width lies in \(0.1, 0.5\), got 7"):
        make_shape("gear", 0, width=7.0)


def test_command_writes_files_that_stay_closed(tmp_path, monkeypatch):
    out = tmp_path / "fo rmen [ü]"
    monkeypatch.setattr("sys.argv", ["shapes", f"out={out}", "families=tray+fins+lattice", "count=3", "seed=0", "format=ply"])
    assert shapes.main() == 0
    with open(out / "shapes.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [f"{f}_{s:06d}.ply" for f in ("tray", "fins", "lattice") for s in (0, 1, 2)]
    for row in rows:
        mesh = load_mesh(out / row["path"])
        topology = Surface(mesh.vertices, mesh.faces).topology
        assert topology.closed.all() and topology.genus.sum() == int(row["genus"]) and len(mesh.faces) == int(row["faces"])
        assert make_shape(row["family"], int(row["seed"])).parameters == json.loads(row["parameters"])


def test_room_knows_bends_and_neighbours():
    t = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    circle = np.stack([3 * np.cos(t), 3 * np.sin(t), 0 * t], 1)
    assert room(circle, closed=True) == pytest.approx(3.0, rel=0.02)
    there, turn = np.linspace(-9, 0, 200), np.linspace(0, np.pi, 42)[1:-1]
    x, y = np.concatenate([there, 0.5 * np.sin(turn), there[::-1]]), np.concatenate([0 * there + 0.5, 0.5 * np.cos(turn), 0 * there - 0.5])
    assert room(np.stack([x, y, 0 * x], 1)) == pytest.approx(0.5, rel=0.05)


def test_small_solids():
    solid = rod((1, 2, 3), (1, 2, 7), 0.5, segments=256)
    assert solid.volume() == pytest.approx(np.pi, rel=1e-3) and solid.bounding_box() == pytest.approx((0.5, 1.5, 3, 1.5, 2.5, 7))
    ellipse = superellipse(2.0, 1.0, 4.0)
    np.testing.assert_allclose(((np.abs(ellipse) / [2, 1]) ** 4).sum(1), 1)
    knots = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_allclose(spline(knots, 401)[::100], knots, atol=1e-9)
