"""What families of shapes are made of: parameters, and the solids that manifold3d does not name. Lengths are free, z is up, front = -y."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reference_model.cli import optional_import

Solid = Any  # manifold3d.Manifold
Build = Callable[[SimpleNamespace, np.random.Generator], Solid]
_kit = optional_import("manifold3d")
Manifold, CrossSection, JoinType = _kit.Manifold, _kit.CrossSection, _kit.JoinType
ROUND = 64  # corners of a circle


@dataclass(frozen=True)
class Family:
    """Continuous parameters with their ranges, and how to build a closed solid of them; the generator settles counts and places."""

    parameters: Mapping[str, tuple[float, float]]  # name: lowest, highest
    build: Build


def family(**parameters: tuple[float, float]) -> Callable[[Build], Family]:
    """Turn a build function into a `Family` with these parameter ranges."""
    return lambda build: Family(parameters, build)


def box(x: float, y: float, z: float) -> Solid:
    return Manifold.cube((x, y, z), True)


def ball(radius: float, segments: int = ROUND) -> Solid:
    return Manifold.sphere(radius, segments)


def rod(start: ArrayLike, end: ArrayLike, radius: float, end_radius: float = -1.0, segments: int = 24) -> Solid:
    """A cylinder or cone between two points."""
    origin, way = np.asarray(start, dtype=np.float64), np.subtract(end, start)
    length = float(np.linalg.norm(way))
    return Manifold.cylinder(length, radius, end_radius, segments).transform(np.column_stack([_frame(way / length), origin]))


def union(parts: Sequence[Solid]) -> Solid:
    return Manifold.batch_boolean(list(parts), _kit.OpType.Add)


def chain(points: ArrayLike, radii: ArrayLike, segments: int = 24) -> Solid:
    """Balls along a path, each joined to the next by their hull: limbs."""
    places, sizes = np.asarray(points, dtype=np.float64), np.asarray(radii, dtype=np.float64)
    balls = [ball(size, segments).translate(place) for place, size in zip(places, sizes, strict=True)]
    return union([Manifold.batch_hull(pair) for pair in zip(balls, balls[1:], strict=False)])


def tube(rings: Sequence[NDArray], closed: bool = False) -> Solid:
    """The skin over rings [K,3] of one size, each joined to the next, with flat ends or closed on itself. The path must not meet itself."""
    count, corners = len(rings), len(rings[0])
    index = np.arange(count * corners).reshape(count, corners)
    here, ahead = (index, np.roll(index, -1, 0)) if closed else (index[:-1], index[1:])
    faces = [np.stack([here, np.roll(here, -1, 1), np.roll(ahead, -1, 1)], -1), np.stack([here, np.roll(ahead, -1, 1), ahead], -1)]
    if not closed:
        fan = np.stack([np.zeros(corners - 2, int), np.arange(1, corners - 1), np.arange(2, corners)], 1)
        faces += [index[0][fan[:, ::-1]], index[-1][fan]]
    triangles = np.concatenate([f.reshape(-1, 3) for f in faces]).astype(np.uint64)
    return Manifold(_kit.Mesh64(np.concatenate(rings), triangles))


def room(path: NDArray, closed: bool = False) -> float:
    """The radius a tube about a path [N,3] may have: less than its bends, and than half the way to any other part of it."""
    ahead, behind = np.roll(path, -1, 0), np.roll(path, 1, 0)
    a, b, c = (np.linalg.norm(x, axis=1) for x in (ahead - path, path - behind, ahead - behind))
    bend = a * b * c / np.maximum(2 * np.linalg.norm(np.cross(ahead - path, path - behind), axis=1), 1e-12)
    along = np.concatenate([[0], np.cumsum(a)])
    apart = np.abs(along[:-1, None] - along[None, :-1])
    if closed:
        apart = np.minimum(apart, along[-1] - apart)
    distance = np.linalg.norm(path[:, None] - path[None], axis=2)
    other = distance[apart > 1.6 * distance]  # reached by a detour: another part of the path
    radius = float((bend if closed else bend[1:-1]).min())
    return min(radius, float(other.min()) / 2) if len(other) else radius


def rings(path: NDArray, sections: NDArray, closed: bool = False) -> list[NDArray]:
    """Sections [N,K,2] carried along a path [N,3] in frames that turn as little as they can, and on a closed path end as they began."""
    tangent = np.roll(path, -1, 0) - np.roll(path, 1, 0) if closed else np.gradient(path, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    side = _frame(tangent[0])[:, 0]
    frames = []
    for direction in tangent:
        side = side - direction * (side @ direction)
        side /= np.linalg.norm(side)
        frames.append(np.stack([side, np.cross(direction, side)]))
    if closed:
        last = side - tangent[0] * (side @ tangent[0])
        miss = math.atan2(last @ frames[0][1], last @ frames[0][0]) / len(path)
        frames = [_turn(-miss * i) @ frame for i, frame in enumerate(frames)]
    return [p + s @ f for p, s, f in zip(path, sections, frames, strict=True)]


def superellipse(width: float, height: float, exponent: float, count: int = 40) -> NDArray[np.float64]:
    """Corners [count,2] of |x / width|^e + |y / height|^e = 1."""
    angle = 2 * np.pi * np.arange(count) / count
    c, s = np.cos(angle), np.sin(angle)
    radius = (np.abs(c) ** exponent + np.abs(s) ** exponent) ** (-1 / exponent)
    return np.stack([width * radius * c, height * radius * s], 1)


def twisted(section: NDArray, angle: NDArray, size: NDArray) -> NDArray[np.float64]:
    """Copies [N,K,2] of a section [K,2], each turned by its angle [N] and scaled by its size [N]."""
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1).reshape(-1, 2, 2)
    return section @ (turn * size[:, None, None])


def spline(points: NDArray, count: int, closed: bool = False) -> NDArray[np.float64]:
    """[count,D] points of a cubic spline through [N,D]."""
    CubicSpline = optional_import("scipy.interpolate").CubicSpline
    knots = np.concatenate([points, points[:1]]) if closed else points
    curve = CubicSpline(np.arange(len(knots)), knots, bc_type="periodic" if closed else "natural")
    return curve(np.linspace(0, len(knots) - 1, count, endpoint=not closed))


def noise(points: NDArray, rng: np.random.Generator, frequency: float, octaves: int, gain: float, waves: int = 24) -> NDArray[np.float64]:
    """Smooth noise [P] of about -1..1 at points [P,3]: plane waves of random direction and phase, octave by octave."""
    total = np.zeros(len(points))
    for octave in range(octaves):
        direction = rng.normal(size=(waves, 3))
        direction *= frequency * 2**octave / np.linalg.norm(direction, axis=1, keepdims=True)
        phase = rng.uniform(0, 2 * np.pi, waves)
        total += gain**octave * np.sin(points @ direction.T + phase).sum(1) * np.sqrt(2 / waves)
    return total / 2


def polygon(points: NDArray) -> Any:
    """CrossSection of corners [N,2], whichever way they turn."""
    x, y = points.T
    area = (x * np.roll(y, -1) - np.roll(x, -1) * y).sum()
    return CrossSection([points if area > 0 else points[::-1]])


def largest(solid: Solid) -> Solid:
    """The piece with the largest volume."""
    return max(solid.decompose(), key=lambda piece: piece.volume())


def _turn(angle: float) -> NDArray[np.float64]:
    return np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


def _frame(axis: NDArray) -> NDArray[np.float64]:
    """Rotation [3,3] whose last column is the unit vector axis."""
    helper = np.eye(3)[np.abs(axis).argmin()]
    side = np.cross(helper, axis)
    side /= np.linalg.norm(side)
    return np.column_stack([side, np.cross(axis, side), axis])
