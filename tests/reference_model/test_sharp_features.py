"""Sharp extraction against shapes with known edges and corners, and on values that are no distances at all."""

import pytest
import torch
from analytic import area, box, enclosed, euler, rim, rotation, sphere, torus, volume_of

from reference_model import extract
from reference_model.extract import extract_mesh
from reference_model.tiles import lattice
from reference_model.volume import TAU

HALF = (0.5, 0.3, 0.2)


@pytest.mark.parametrize("resolution", [256, 512])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_box_gets_its_edges_back(seed: int, resolution: int) -> None:
    distance = box(HALF, rotation(seed))
    source = volume_of(distance, resolution)
    surface, volume = 8 * (0.15 + 0.1 + 0.06), 8 * 0.5 * 0.3 * 0.2
    plain, triangles, _ = extract_mesh(source.coords, source.values, resolution, source.inside)
    vertices, faces, report = extract_mesh(source.coords, source.values, resolution, source.inside, sharp=True)
    assert len(rim(faces)) == report.open_vertices == 0 and euler(vertices, faces) == 2
    assert enclosed(vertices, faces) == pytest.approx(volume, rel=2e-4)
    assert abs(area(vertices, faces) - surface) < 0.4 * abs(area(plain, triangles) - surface)
    off = [distance(x.double()).abs() * resolution / 2 for x in (vertices[faces].mean(1), plain[triangles].mean(1))]
    assert off[0].mean() < 0.5 * off[1].mean() and off[0].quantile(0.99) < 0.5 * off[1].quantile(0.99)


def test_a_smooth_surface_stays_as_it_is() -> None:
    source = volume_of(sphere(0.5), 256)
    plain = extract_mesh(source.coords, source.values, 256)
    sharp = extract_mesh(source.coords, source.values, 256, sharp=True)
    assert torch.equal(plain[0], sharp[0]) and torch.equal(plain[1].sort(0).values, sharp[1].sort(0).values)


def test_a_tight_bend_keeps_its_genus_and_comes_nearer() -> None:
    """A tube of 2.5 voxels radius."""
    distance = torus(0.4, 2.5 * 2 / 256)
    source = volume_of(distance, 256)
    errors = []
    for sharp in (False, True):
        vertices, faces, _ = extract_mesh(source.coords, source.values, 256, sharp=sharp)
        assert len(rim(faces)) == 0 and euler(vertices, faces) == 0
        errors.append(distance(vertices[faces].double().mean(1)).abs().mean())
    assert errors[1] < 0.7 * errors[0]


def test_a_cut_sphere_has_its_circle() -> None:
    """Convex, concave: a ball with a step cut out of it."""
    step = box((0.3, 0.3, 0.3), rotation(3))
    source = volume_of(lambda p: torch.maximum(sphere(0.5, (0.2, 0.1, 0.0))(p), -step(p)), 256)
    vertices, faces, _ = extract_mesh(source.coords, source.values, 256, sharp=True)
    plain = extract_mesh(source.coords, source.values, 256)
    assert len(rim(faces)) == 0 and euler(vertices, faces) == euler(*plain[:2])
    assert area(vertices, faces) > area(*plain[:2])


@pytest.mark.parametrize("tau", [TAU, 0.04, 0.08])
def test_values_that_are_no_distances_still_close(tau: float, monkeypatch) -> None:
    """Every variant of the table. At tau = 1/128 values rise too little for a normal; at the others some have one that means nothing."""
    monkeypatch.setattr(extract, "TAU", tau)
    resolution = 40
    points = lattice(resolution)
    values = torch.rand(len(points)) * 2 - 1
    values[((points == 0) | (points == resolution - 1)).any(1)] = 1.0
    vertices, faces, report = extract_mesh(points, values, resolution, sharp=True)
    assert len(rim(faces)) == 0 and len(faces.unique()) == len(vertices) and report.open_vertices == 0
    plain = extract_mesh(points, values, resolution)
    assert euler(vertices, faces) == euler(*plain[:2])
    assert torch.equal(vertices[:1000], plain[0][:1000]) == (tau == TAU)  # only a plane moves a vertex


def test_nothing_in_nothing_out() -> None:
    for coords in (torch.zeros(0, 3, dtype=torch.int32), lattice(3)):
        vertices, faces, _ = extract_mesh(coords, torch.ones(len(coords)), 256, sharp=True)
        assert len(vertices) == len(faces) == 0
