"""Blocks of points and rough winding numbers against one tree asked exactly."""

import igl
import numpy as np
import pytest
import trimesh

from reference_model import distance as module
from reference_model.distance import ROUGH, WindingNumber, distance


def knot() -> tuple[np.ndarray, np.ndarray]:
    mesh = trimesh.creation.torus(0.4, 0.15, 96, 48)
    return np.asarray(mesh.vertices), np.asarray(mesh.faces)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bound", [0.02, 0.3])
def test_blocks_change_no_distance(bound: float, signed: bool) -> None:
    vertices, faces = knot()
    points = np.random.default_rng(0).uniform(-0.7, 0.7, (5 * module._BLOCK, 3))
    offsets = 0.1 * np.random.default_rng(1).uniform(-1, 1, (1000, 1)) * bound  # along normals: where a corner is the nearest point
    points[:1000] = vertices[:1000] + offsets * igl.per_vertex_normals(vertices, faces)[:1000]
    kind, least = (igl.SIGNED_DISTANCE_TYPE_PSEUDONORMAL, -bound) if signed else (igl.SIGNED_DISTANCE_TYPE_UNSIGNED, 0.0)
    plain = igl.signed_distance(points, vertices, faces, kind, least, bound)[0]
    assert 0.05 < np.isnan(plain).mean() < 0.99 and (np.nanmin(plain) < 0) == signed
    np.testing.assert_array_equal(distance(points, vertices, faces, bound, signed), plain)


def test_the_edges() -> None:
    vertices, faces = knot()
    same = np.full((2 * module._BLOCK, 3), 0.4)  # no box to halve
    assert len(np.unique(distance(same, vertices, faces, 1.0))) == 1
    assert np.isnan(distance(same[:5], vertices, faces[:0], 1.0)).all()
    assert distance(same[:0], vertices, faces, 1.0).shape == (0,)


def test_flat_faces_are_edges() -> None:
    vertices, faces = knot()
    edges = igl.edges(faces)
    points = np.random.default_rng(1).uniform(-0.7, 0.7, (5000, 3))
    tree = igl.AABB()
    tree.init(vertices, edges)
    exact = np.sqrt(tree.squared_distance(vertices, edges, points)[0])
    np.testing.assert_allclose(distance(points, vertices, edges[:, [0, 1, 1]], 2.0), exact, rtol=1e-12)


def test_rough_winding_numbers_keep_their_side_and_their_bound() -> None:
    vertices, faces = knot()
    faces = faces[vertices[faces].mean(1)[:, 0] < 0.3]  # open: all numbers between 0 and 1 occur
    winding = WindingNumber(vertices, faces)
    points = np.random.default_rng(2).uniform(-0.7, 0.7, (50_000, 3))
    exact = winding(points, np.inf)
    for within in (0.0, np.full(len(points), 0.2)):
        rough = winding(points, within)
        assert np.abs(rough - exact).max() < ROUGH
        assert (rough[np.abs(exact - 0.5) <= within] == exact[np.abs(exact - 0.5) <= within]).all()
        np.testing.assert_array_equal(rough > 0.5, exact > 0.5)
    assert (rough != exact).any()
