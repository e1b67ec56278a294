"""Families of free forms: booleans of primitives, revolutions, thin shells, sweeps, knots, noise, creatures, nested bodies."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from reference_model.shapes_kit import (
    ROUND,
    Manifold,
    Solid,
    ball,
    box,
    chain,
    family,
    largest,
    noise,
    polygon,
    rings,
    room,
    spline,
    superellipse,
    tube,
    twisted,
    union,
)


def _primitive(rng: np.random.Generator, size: float, aspect: float) -> Solid:
    """A box, ball, cylinder, cone, torus or prism of about this size, stretched and turned."""
    stretch = size * np.exp(rng.uniform(-aspect, aspect, 3))
    kind = rng.integers(6)
    if kind == 0:
        solid = box(1.6, 1.6, 1.6)
    elif kind == 1:
        solid = ball(1.0)
    elif kind == 2:
        solid = Manifold.cylinder(2.0, 0.8, -1, ROUND, True)
    elif kind == 3:
        solid = Manifold.cylinder(2.0, 1.0, 0.2, ROUND, True)
    elif kind == 4:
        solid = Manifold.revolve(polygon(superellipse(0.3, 0.3, 2.0, 32) + [0.8, 0]), ROUND)
    else:
        solid = Manifold.cylinder(2.0, 0.9, -1, int(rng.integers(3, 8)), True)
    return solid.scale(stretch).rotate(90.0 * rng.integers(0, 4, 3) if rng.random() < 0.6 else rng.uniform(0, 360, 3))


@family(
    width=(0.6, 1.4), depth=(0.6, 1.4), height=(0.6, 1.4), part_size=(0.3, 0.7),
    cut_size=(0.2, 0.5), spread=(0.4, 0.9), aspect=(0.0, 0.6),
)
def primitives(p: SimpleNamespace, rng: np.random.Generator) -> Solid:
    """A body, some primitives added, some taken away."""
    extent = np.array([p.width, p.depth, p.height])
    solid = _primitive(rng, 1.0, 0.0).scale(extent)
    for _ in range(rng.integers(1, 5)):
        solid += _primitive(rng, p.part_size, p.aspect).translate(rng.uniform(-1, 1, 3) * extent * p.spread)
    for _ in range(rng.integers(1, 5)):
        solid -= _primitive(rng, p.cut_size, p.aspect).translate(rng.uniform(-1, 1, 3) * extent)
    return largest(solid)


def _fluted(p: SimpleNamespace, rng: np.random.Generator) -> Callable[[NDArray], NDArray]:
    """Flutes about z that fade out at both ends, for `warp_batch`."""
    flutes, turn = int(rng.integers(5, 25)), np.radians(p.twist) * rng.choice([-1, 1])

    def flute(v: NDArray) -> NDArray:
        angle = np.arctan2(v[:, 1], v[:, 0]) + turn * v[:, 2] / p.height
        rise = np.clip(np.minimum(v[:, 2], p.height - v[:, 2]) / (0.15 * p.height), 0, 1)
        return v * np.column_stack([*[1 + p.flute * rise * np.cos(flutes * angle)] * 2, np.ones(len(v))])

    return flute


@family(
    foot=(0.2, 0.6), belly=(0.3, 0.9), neck=(0.12, 0.5), lip=(0.2, 0.7), height=(1.0, 3.0),
    shoulder=(0.35, 0.75), wall=(0.03, 0.12), flute=(0.0, 0.08), twist=(0, 90),
)
def revolution(p: SimpleNamespace, rng: np.random.Generator) -> Solid:
    """A vase, bottle, bowl or baluster: a profile turned about z, hollow or full, with flutes that may twist."""
    heights = np.array([0.0, 0.3 * p.shoulder, p.shoulder, 0.5 + p.shoulder / 2, 1.0])
    radii = np.array([p.foot, (p.foot + p.belly) / 2 * rng.uniform(0.8, 1.2), p.belly, p.neck, p.lip])
    profile = spline(np.stack([radii, heights * p.height], 1), 96)
    profile[:, 0] = np.maximum(profile[:, 0], 1.5 * p.wall)
    profile[:, 1] = np.maximum.accumulate(profile[:, 1])
    body = Manifold.revolve(polygon(np.concatenate([[[0, 0]], profile, [[0, profile[-1, 1]]]])), 192)
    solid = body.warp_batch(_fluted(p, rng))
    if rng.random() < 0.6:
        inner = np.column_stack([np.maximum(profile[:, 0] * (1 - p.flute) - p.wall, 0.2 * p.wall), profile[:, 1]])
        inner = inner[inner[:, 1] > 2 * p.wall]
        top = [[inner[-1, 0], p.height + 1], [0, p.height + 1], [0, inner[0, 1]]]
        solid -= Manifold.revolve(polygon(np.concatenate([inner, top])), 96)
    return solid


@family(
    foot=(0.15, 0.6), belly=(0.3, 0.9), neck=(0.15, 0.6), lip=(0.2, 0.8), height=(0.4, 2.5),
    wall=(0.003, 0.03), flute=(0.0, 0.1), twist=(0, 90),
)
def shell(p: SimpleNamespace, rng: np.random.Generator) -> Solid:
    """Bowls, cups, vases and tubes of one thin wall, which flutes bend and do not thicken; some without a floor."""
    radius = spline(np.array([[p.foot], [p.belly], [p.belly * rng.uniform(0.7, 1.2)], [p.neck], [p.lip]]), 48)[:, 0]
    outer = np.column_stack([np.maximum(radius, 0.08), np.linspace(0, p.height, 48)])
    inner = outer - [p.wall, 0]
    if rng.random() < 0.7:
        inner[:, 1] = np.maximum(inner[:, 1], p.wall)
        inner = np.concatenate([[[0, 0], [0, p.wall]], inner[np.flatnonzero(inner[:, 1] > p.wall)[0] - 1 :]])
    solid = Manifold.revolve(polygon(np.concatenate([outer[::-1], inner])), 192)
    return solid.warp_batch(_fluted(p, rng))


@family(
    width=(0.08, 0.3), height=(0.08, 0.3), exponent=(1.2, 6.0), taper=(0.3, 1.0),
    twist=(0.0, 6.0), swing=(0.4, 1.0), rise=(0.0, 1.2), hollow=(0.0, 0.8),
)
def sweep(p: SimpleNamespace, rng: np.random.Generator) -> Solid:
    """A superellipse carried along a smooth path, twisting and tapering; a pipe when it is hollow."""
    knots = rng.uniform(-1, 1, (int(rng.integers(4, 7)), 3)) * [0.2, p.swing, 0.4]
    knots[:, 0] += 1.5 * np.linspace(-1, 1, len(knots))
    knots[:, 2] += np.linspace(0, p.rise, len(knots))
    count = 160
    path = spline(knots, count)
    slim = min(1.0, 0.8 * room(path) / math.hypot(p.width, p.height))
    angle, size = p.twist * np.linspace(0, 1, count), slim * np.linspace(1, p.taper, count)
    sections = twisted(superellipse(p.width, p.height, p.exponent), angle, size)
    solid = tube(rings(path, sections))
    if p.hollow > 0.35:
        along = path.copy()
        along[0] += (path[0] - path[1]) * 2
        along[-1] += (path[-1] - path[-2]) * 2
        solid -= tube(rings(along, sections * p.hollow))
    return solid


@family(
    tube_radius=(0.06, 0.16), hole=(0.55, 0.75), swell=(0.0, 0.25), flatten=(0.6, 1.0),
    exponent=(1.6, 5.0), twist=(0.0, 4.0), height=(0.6, 1.4),
)
def knot(p: SimpleNamespace, rng: np.random.Generator) -> Solid:
    """A torus knot or link strand (2,3), (3,2), (2,5), (3,4), (5,2) or (1,3) with a section that swells, flattens and turns."""
    around, through = [(2, 3), (3, 2), (2, 5), (3, 4), (5, 2), (1, 3)][rng.integers(6)]
    count = 400
    t = 2 * np.pi * np.arange(count) / count
    minor = 1 - p.hole
    radius = p.hole + minor * np.cos(through * t)
    path = np.stack([radius * np.cos(around * t), radius * np.sin(around * t), -p.height * minor * np.sin(through * t)], 1)
    thick = min(p.tube_radius, 0.8 * room(path, closed=True) / (1 + p.swell))
    size = thick * (1 + p.swell * np.sin(through * t))
    angle = np.round(p.twist) * t
    return tube(rings(path, twisted(superellipse(1.0, p.flatten, p.exponent, 40), angle, size), closed=True), closed=True)


@family(
    width=(0.6, 1.0), depth=(0.6, 1.0), height=(0.5, 1.2), amplitude=(0.05, 0.3),
    frequency=(1.5, 5.0), gain=(0.3, 0.65), ridge=(0.0, 1.0), twist=(0.0, 1.5),
)
def rock(p: SimpleNamespace, rng: np.random.Generator) -> Solid:
    """A ball displaced along its radius by noise, from pebbles to crags, stretched and twisted."""

    def displace(v: np.ndarray) -> np.ndarray:
        way = v / np.linalg.norm(v, axis=1, keepdims=True)
        smooth = noise(way, np.random.default_rng(stream), p.frequency, 5, p.gain)
        shape = (1 - p.ridge) * smooth + p.ridge * (0.5 - np.abs(smooth))
        v = way * np.maximum(1 + p.amplitude * shape, 0.2)[:, None] * [p.width, p.depth, p.height]
        angle = p.twist * v[:, 2]
        c, s = np.cos(angle), np.sin(angle)
        return np.stack([c * v[:, 0] - s * v[:, 1], s * v[:, 0] + c * v[:, 1], v[:, 2]], 1)

    stream = int(rng.integers(2**31))
    return ball(1.0, 256).warp_batch(displace)


@family(
    length=(0.8, 1.8), girth=(0.25, 0.5), leg=(0.3, 1.0), leg_girth=(0.06, 0.16), neck=(0.1, 0.7),
    head=(0.18, 0.35), tail=(0.0, 1.0), ear=(0.08, 0.3), arch=(-0.15, 0.2),
)
def creature(p: SimpleNamespace, rng: np.random.Generator) -> Solid:
    """An animal of limbs: spine, legs in pairs, neck, head, ears, tail; it looks to the front (-y)."""
    spine = np.linspace(p.length / 2, -p.length / 2, 6)
    lift = p.leg + p.arch * np.cos(np.linspace(-np.pi / 2, np.pi / 2, 6))
    fat = p.girth * (1 - 0.35 * np.linspace(-1, 1, 6) ** 2) * rng.uniform(0.85, 1.15, 6)
    parts = [chain([(0, y, z) for y, z in zip(spine, lift, strict=True)], fat, 40)]
    for y in np.linspace(0.42, -0.42, int(rng.integers(2, 4))) * p.length:
        knee = rng.uniform(-0.1, 0.1)
        for side in (-1, 1):
            hip, foot = side * p.girth * 0.6, side * p.girth * rng.uniform(0.7, 0.9)
            points = [(hip, y, p.leg), (side * p.girth * 0.8, y + knee, p.leg / 2), (foot, y, 0), (foot, y - 0.12, -0.02)]
            parts.append(chain(points, np.array([1.5, 1.0, 0.8, 0.7]) * p.leg_girth))
    skull = np.array([0, -p.length / 2 - 0.6 * p.neck - 0.1, p.leg + p.neck])
    parts.append(chain([np.array([0, -p.length / 2, p.leg]), skull], [0.6 * p.girth, 0.7 * p.head], 32))
    parts.append(chain([skull, skull + [0, -p.head, -0.25 * p.head]], [p.head, 0.6 * p.head], 40))
    for side in (-1, 1):
        root = skull + [side * 0.6 * p.head, 0.2 * p.head, 0.6 * p.head]
        parts.append(chain([root, root + np.array([side * 0.5, 0.2, 1.0]) * p.ear], [0.5 * p.ear, 0.15 * p.ear]))
    if p.tail > 0.1:
        tip = np.array([[0, 0, 0], [0, 0.5, 0.2], [0, 0.9, 0.7]]) * p.tail + [0, p.length / 2, p.leg]
        parts.append(chain(spline(tip, 8), np.linspace(0.4 * p.girth, 0.04, 8)))
    return union(parts)


@family(
    width=(0.6, 1.0), depth=(0.6, 1.0), height=(0.6, 1.0), exponent=(2.0, 8.0),
    wall=(0.06, 0.2), core=(0.3, 0.75), window=(0.0, 0.5), offset=(0.0, 0.1),
)
def nested(p: SimpleNamespace, rng: np.random.Generator) -> Solid:
    """A closed shell around a cavity with another body inside it; some have windows through the shell."""

    def superball(size: float) -> Solid:
        def bulge(v: np.ndarray) -> np.ndarray:
            way = v / np.linalg.norm(v, axis=1, keepdims=True)
            return size * way / ((np.abs(way) ** p.exponent).sum(1) ** (1 / p.exponent))[:, None] * [p.width, p.depth, p.height]

        return ball(1.0, 128).warp_batch(bulge)

    inside = 1 - p.wall / min(p.width, p.depth, p.height)
    shell = superball(1.0) - superball(inside)
    core = superball(inside * p.core).rotate(rng.uniform(0, 90, 3) if p.core < 0.5 else (0.0, 0.0, 0.0))
    if p.window > 0.15:
        shell -= rod_along(int(rng.integers(3)), p.window * min(p.width, p.depth, p.height))
    return shell + core.translate(rng.uniform(-1, 1, 3) * p.offset * inside * (1 - p.core))


def rod_along(axis: int, radius: float) -> Solid:
    """A long cylinder through the origin along x, y or z."""
    return Manifold.cylinder(4.0, radius, -1, ROUND, True).rotate([(0.0, 90.0, 0.0), (90.0, 0.0, 0.0), (0.0, 0.0, 0.0)][axis])


SOLIDS = {
    "primitives": primitives, "revolution": revolution, "sweep": sweep, "knot": knot, "rock": rock, "creature": creature, "nested": nested,
    "shell": shell,
}
