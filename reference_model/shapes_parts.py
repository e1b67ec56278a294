"""Families of made things: gears, brackets, bolts, wheels, furniture, lattices, sheets, thin walls and blades."""

import math
from types import SimpleNamespace

import numpy as np

from reference_model.shapes_kit import (
    ROUND,
    CrossSection,
    JoinType,
    Manifold,
    Solid,
    ball,
    box,
    family,
    largest,
    polygon,
    rings,
    rod,
    superellipse,
    tube,
    twisted,
    union,
)


def _disc(height: float, radius: float, segments: int = 96) -> Solid:
    return Manifold.cylinder(height, radius, -1, segments, True)


def _ring_of(solid: Solid, count: int, radius: float) -> Solid:
    """Copies of a solid on a circle about z."""
    return union([solid.translate([radius, 0, 0]).rotate([0, 0, 360.0 * i / count]) for i in range(count)])


@family(
    width=(0.1, 0.5), depth=(0.08, 0.2), flank=(0.2, 0.6), helix=(0.0, 30.0),
    bore=(0.1, 0.3), hub=(0.05, 0.2), web=(0.3, 1.0), hole=(0.05, 0.15),
)
def gear(p: SimpleNamespace, rng: np.random.Generator) -> Solid:
    """A spur or helical gear of radius 1 with hub, bore, keyway, a thinner web and holes in it."""
    teeth = int(rng.integers(9, 40))
    root = 1 - min(p.depth, 5.0 / teeth)
    pitch = 2 * np.pi / teeth
    corners = []
    for tooth in range(teeth):
        rise = [(p.flank / 2, root), (p.flank / 4, (1 + root) / 2), (p.flank / 9, 1.0)]
        corners.append((tooth, root))
        corners += [(tooth + 0.5 - width, radius) for width, radius in rise]
        corners += [(tooth + 0.5 + width, radius) for width, radius in reversed(rise)]
    turns, radii = np.array(corners).T
    profile = np.stack([radii * np.cos(turns * pitch), radii * np.sin(turns * pitch)], 1)
    turn = math.degrees(p.width * math.tan(math.radians(p.helix)))
    solid = Manifold.extrude(polygon(profile), p.width, 24, turn).translate([0, 0, -p.width / 2])
    hub = p.bore + p.hub
    rim = root - 0.12
    if rim - hub > 0.1 and p.web < 0.9:
        groove = _disc(p.width, rim) - _disc(p.width, hub)
        lift = p.width * (0.5 + p.web / 2)
        solid = solid - groove.translate([0, 0, lift]) - groove.translate([0, 0, -lift])
        if rim - hub > 2.6 * p.hole:
            solid -= _ring_of(_disc(1, p.hole, 48), int(rng.integers(3, 7)), (rim + hub) / 2)
    solid += _disc(p.width * 1.2, hub)
    return solid - _disc(2, p.bore) - box(0.06 + p.bore / 4, p.bore / 2, 2).translate([0, p.bore, 0])


@family(
    width=(0.6, 1.4), foot=(0.6, 1.4), height=(0.6, 1.4), plate=(0.08, 0.2), fillet=(0.03, 0.15),
    corner=(0.02, 0.25), hole=(0.05, 0.13), rib=(0.0, 0.2), slot=(0.0, 0.4),
)
def bracket(p: SimpleNamespace, rng: np.random.Generator) -> Solid:
    """An angle bracket: filleted profile, rounded corners, holes or slots in both plates, one or two ribs."""
    profile = CrossSection([[[0, 0], [p.foot, 0], [p.foot, p.plate], [p.plate, p.plate], [p.plate, p.height], [0, p.height]]])
    profile = profile.offset(p.fillet, JoinType.Round, 2.0, ROUND).offset(-p.fillet, JoinType.Round, 2.0, ROUND)
    solid = Manifold.extrude(profile, p.width).rotate([90, 0, 90]).translate([-p.width / 2, 0, 0])

    def sheet(length: float) -> Solid:
        soft = min(p.corner, 0.45 * min(p.width, length))
        flat = CrossSection.square((p.width - 2 * soft, 2 * length - 2 * soft), True).offset(soft, JoinType.Round, 2.0, ROUND)
        return Manifold.extrude(flat, 10).translate([0, 0, -5])

    solid ^= sheet(p.foot)
    solid ^= sheet(p.height).rotate([90, 0, 0])
    side = min(p.width / 2 - 1.7 * p.hole, 0.3 * p.width)
    for length, turned in ((p.foot, False), (p.height, True)):
        for x in (-side, side) if side > p.hole else (0.0,):
            end = np.array([x, min(p.slot * length / 2, length * 0.3), 0])
            bolt = Manifold.batch_hull([_disc(4, p.hole, 48), _disc(4, p.hole, 48).translate([0, -end[1], 0])])
            bolt = bolt.translate([x, length - 1.7 * p.hole - 0.03, 0])
            solid -= bolt.rotate([-90, 0, 0]).mirror([0, 0, 1]) if turned else bolt
    if p.rib > 0.04:
        reach = 0.75 * (min(p.foot, p.height) - p.plate)
        web = CrossSection([[[p.plate / 2, p.plate / 2], [p.plate + reach, p.plate / 2], [p.plate / 2, p.plate + reach]]])
        rib = Manifold.extrude(web, p.rib * p.width).rotate([90, 0, 90]).translate([-p.rib * p.width / 2, 0, 0])
        places = (0.0,) if rng.random() < 0.6 else (-(p.width - p.rib * p.width) / 2, (p.width - p.rib * p.width) / 2)
        solid += union([rib.translate([x, 0, 0]) for x in places])
    return solid.rotate([0, 0, 180])


@family(
    shank=(0.15, 0.35), length=(1.0, 2.4), pitch=(0.06, 0.16), thread=(0.04, 0.09),
    head=(0.4, 0.65), head_height=(0.15, 0.45), socket=(0.0, 0.3), plain=(0.0, 0.5),
)
def bolt(p: SimpleNamespace, rng: np.random.Generator) -> Solid:
    """A bolt: hexagonal, round or square head, a socket or none, a plain shank and a helical thread."""
    threaded = p.length * (1 - p.plain)
    angle = 2 * np.pi * np.arange(ROUND) / ROUND
    radius = p.shank + p.thread / 2 * (2 * np.abs(angle / np.pi - 1) - 1)
    section = polygon(np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1))
    turns = threaded / p.pitch
    solid = Manifold.extrude(section, threaded, int(turns * 24), 360 * turns)
    solid += Manifold.cylinder(p.length - threaded + 0.02, p.shank, -1, ROUND).translate([0, 0, threaded - 0.01])
    head = Manifold.cylinder(p.head_height, p.head, -1, int(rng.choice([4, 6, 6, 64])))
    dome = Manifold.cylinder(p.head_height + 0.25 * p.head, 1.25 * p.head, 0.8 * p.head, ROUND)
    solid += (head ^ dome).translate([0, 0, p.length])
    if p.socket > 0.1:
        solid -= Manifold.cylinder(p.head_height, p.socket, -1, 6).translate([0, 0, p.length + 0.4 * p.head_height])
    return solid


@family(
    width=(0.15, 0.5), rim=(0.06, 0.2), tread=(0.0, 0.06), hub=(0.1, 0.25),
    spoke=(0.03, 0.1), dish=(-0.15, 0.15), taper=(0.5, 1.0), bore=(0.02, 0.08),
)
def wheel(p: SimpleNamespace, rng: np.random.Generator) -> Solid:
    """A wheel of radius 1 with a round rim, tread blocks, tapering spokes and a hub."""
    section = superellipse(p.rim, p.width / 2, rng.uniform(2, 5), 48) + [1 - p.rim, 0]
    solid = Manifold.revolve(polygon(section), 128)
    if p.tread > 0.015:
        cut = box(3 * p.tread, 0.06, p.width)
        solid -= _ring_of(cut, int(rng.integers(16, 40)), 1.0)
    spokes = int(rng.integers(3, 14))
    spoke = rod((p.hub * 0.5, 0, p.dish), (1 - p.rim, 0, 0), p.spoke, p.spoke * p.taper)
    solid += union([spoke.rotate([0, 0, 360.0 * i / spokes]) for i in range(spokes)])
    solid += _disc(p.width * 0.9, p.hub, 64).translate([0, 0, p.dish])
    return (solid - _disc(4, p.bore, 48)).rotate([90, 0, 0])


@family(
    width=(0.8, 1.4), depth=(0.8, 1.4), seat_height=(0.6, 1.2), board=(0.05, 0.15), leg=(0.04, 0.1),
    splay=(0.0, 0.2), back=(0.0, 1.4), recline=(0.0, 0.25), stretcher=(0.1, 0.6),
)
def furniture(p: SimpleNamespace, rng: np.random.Generator) -> Solid:
    """A stool, table or chair: board, splayed legs, stretchers, a back of spindles or slats with a rail."""
    soft = superellipse(p.width / 2, p.depth / 2, rng.choice([2.0, 4.0, 16.0]), 96)
    solid = Manifold.extrude(polygon(soft), p.board).translate([0, 0, p.seat_height])
    inset = np.array([0.36 * p.width, 0.36 * p.depth])
    tops = [np.array([*(inset * s), p.seat_height + p.board / 2]) for s in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    feet = [np.array([*(t[:2] * (1 + p.splay)), 0.0]) for t in tops]
    parts = [rod(foot, top, p.leg * 0.8, p.leg) for top, foot in zip(tops, feet, strict=True)]
    middle = [f + p.stretcher * (t - f) for t, f in zip(tops, feet, strict=True)]
    parts += [rod(middle[i], middle[j], 0.6 * p.leg) for i, j in ((0, 1), (1, 2), (2, 3), (3, 0))]
    if p.back > 0.3:
        count = int(rng.integers(3, 8))
        base = np.array([[x, inset[1], p.seat_height] for x in np.linspace(-1, 1, count) * inset[0]])
        rise = np.array([0, p.recline * p.back, p.back])
        parts += [rod(b, b + rise, 0.5 * p.leg) for b in base]
        rail = [ball(1.3 * p.leg, 32).translate(base[0] + rise), ball(1.3 * p.leg, 32).translate(base[-1] + rise)]
        parts.append(Manifold.batch_hull(rail))
    return solid + union(parts)


@family(width=(0.7, 1.2), depth=(0.7, 1.2), height=(0.7, 1.2), strut=(0.02, 0.06), node=(1.0, 2.2), jitter=(0.0, 0.25), keep=(0.55, 1.0))
def lattice(p: SimpleNamespace, rng: np.random.Generator) -> Solid:
    """Struts and nodes on a jittered grid, some with diagonals, some struts left out."""
    n = rng.integers(2, 5, 3)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, k) for k in n), indexing="ij"), -1)
    places = (grid + p.jitter * rng.uniform(-1, 1, grid.shape) / n) * [p.width, p.depth, p.height]
    steps = [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    steps += [[(1, 1, 0), (0, 1, 1), (1, 0, 1)], [(1, 1, 1), (1, -1, 1), (-1, 1, 1), (1, 1, -1)], []][rng.integers(3)]
    parts = [ball(p.strut * p.node, 24).translate(place) for place in places.reshape(-1, 3)]
    for start in np.ndindex(*n):
        for step in steps:
            end = tuple(np.add(start, step))
            if all(0 <= e < k for e, k in zip(end, n, strict=True)) and rng.random() < p.keep:
                parts.append(rod(places[start], places[end], p.strut, segments=16))
    return largest(union(parts))


@family(
    cells=(1.0, 2.3), sheet=(0.25, 0.6), shift_x=(0.0, 6.28), shift_y=(0.0, 6.28),
    shift_z=(0.0, 6.28), level=(-0.3, 0.3), width=(0.6, 1.0), height=(0.6, 1.0),
)
def minimal(p: SimpleNamespace, rng: np.random.Generator) -> Solid:
    """A sheet around a gyroid, Schwarz P or diamond surface, or the body on one side of it, cut to a ball, box or cylinder."""
    kind, wave = rng.integers(3), math.pi * p.cells
    both = rng.random() < 0.7
    sin, cos = math.sin, math.cos

    def field(x: float, y: float, z: float) -> float:
        x, y, z = wave * x + p.shift_x, wave * y + p.shift_y, wave * z + p.shift_z
        if kind == 0:
            g = sin(x) * cos(y) + sin(y) * cos(z) + sin(z) * cos(x)
        elif kind == 1:
            g = cos(x) + cos(y) + cos(z)
        else:
            g = sin(x) * sin(y) * sin(z) + sin(x) * cos(y) * cos(z) + cos(x) * sin(y) * cos(z) + cos(x) * cos(y) * sin(z)
        return p.sheet - abs(g - p.level) if both else p.level - g

    body = [ball(1.0, 96), box(1.7, 1.7, 1.7), _disc(1.8, 0.95)][rng.integers(3)].scale([p.width, p.width, p.height])
    return largest(Manifold.level_set(field, [-1.02] * 3 + [1.02] * 3, 2.04 / 68) ^ body)


@family(
    width=(0.7, 1.3), depth=(0.7, 1.3), base=(0.04, 0.12), fin=(0.012, 0.05),
    height=(0.3, 0.9), lean=(0.0, 0.3), gap=(0.08, 0.2), post=(0.03, 0.1),
)
def fins(p: SimpleNamespace, rng: np.random.Generator) -> Solid:
    """Thin fins or pins on a plate: a heat sink, with screw posts in the corners."""
    solid = box(p.width, p.depth, p.base).translate([0, 0, p.base / 2])
    shear = np.array([[1, 0, p.lean, 0], [0, 1, 0, 0], [0, 0, 1, 0.99 * p.base]])
    xs = np.arange(-p.width / 2 + p.fin + 2 * p.post, p.width / 2 - p.fin - 2 * p.post, p.fin + p.gap)
    if rng.random() < 0.6:
        places, fin = [(x, 0) for x in xs], box(p.fin, p.depth * 0.96, p.height)
    else:
        ys = np.arange(-p.depth / 2 + p.fin + 2 * p.post, p.depth / 2 - p.fin - 2 * p.post, p.fin + p.gap)
        places, fin = [(x, y) for x in xs for y in ys], Manifold.cylinder(p.height, 1.2 * p.fin, -1, 16, True)
    upright = [fin.translate([x, y, p.height / 2]).transform(shear) for x, y in places]
    corners = [(sx * (p.width / 2 - p.post), sy * (p.depth / 2 - p.post)) for sx in (-1, 1) for sy in (-1, 1)]
    posts = [Manifold.cylinder(0.6 * p.height, p.post, -1, 32).translate([x, y, 0]) for x, y in corners]
    holes = [Manifold.cylinder(2 * p.height, 0.5 * p.post, -1, 32, True).translate([x, y, 0]) for x, y in corners]
    return solid + union(upright + posts) - union(holes)


@family(
    width=(0.7, 1.4), depth=(0.7, 1.4), height=(0.3, 1.0), wall=(0.015, 0.06),
    exponent=(2.0, 10.0), draft=(0.75, 1.15), divider=(0.2, 0.8), rib=(0.01, 0.04),
)
def tray(p: SimpleNamespace, rng: np.random.Generator) -> Solid:
    """A thin-walled tray, cup or housing with draft, dividers, stand-offs and slots in its walls."""
    outline = superellipse(p.width / 2, p.depth / 2, p.exponent, 128)
    inner = superellipse(p.width / 2 - p.wall, p.depth / 2 - p.wall, p.exponent, 128)
    scale = (p.draft, p.draft)
    solid = Manifold.extrude(polygon(outline), p.height, 0, 0, scale)
    cavity = Manifold.extrude(polygon(inner), p.height, 0, 0, scale).translate([0, 0, p.wall])
    tall = p.divider * p.height
    across = np.linspace(-1, 1, int(rng.integers(0, 4)) + 2)[1:-1] * p.width / 2
    fittings = [box(p.rib, 2 * p.depth, tall).translate([x, 0, tall / 2]) for x in across]
    fittings += [box(2 * p.width, p.rib, tall).translate([0, 0, tall / 2])] * int(rng.integers(0, 2))
    post = Manifold.cylinder(0.5 * p.height, 2 * p.wall, -1, 32) - Manifold.cylinder(p.height, p.wall, -1, 32).translate([0, 0, 2 * p.wall])
    places = rng.uniform(-0.3, 0.3, (int(rng.integers(0, 5)), 2)) * [p.width, p.depth]
    fittings += [post.translate([x, y, 0]) for x, y in places]
    solid -= cavity
    if fittings:
        solid += union(fittings) ^ (cavity + Manifold.extrude(polygon(outline), p.wall))
    slots = [box(0.05, 3, 0.4 * p.height).translate([x, 0, 0.55 * p.height]) for x in np.arange(-2, 3) * 0.12 * p.width]
    return solid - union(slots[: int(rng.integers(1, 6))]) if rng.random() < 0.5 else solid


@family(
    width=(0.03, 0.2), thickness=(0.002, 0.02), exponent=(0.9, 3.0), tip=(0.05, 0.8),
    bend=(0.0, 0.5), twist=(0.0, 1.2), grip=(0.03, 0.08), guard=(0.05, 0.3),
)
def blade(p: SimpleNamespace, rng: np.random.Generator) -> Solid:
    """Blades thinner than the voxels of most grids, of diamond to flat section: a sword, or up to four round a hub."""
    t = np.linspace(0, 1, 96)
    path = np.stack([2 * t, p.bend * t**2, 0.3 * p.bend * np.sin(3 * t)], 1)
    size = (1 - (1 - p.tip) * t ** rng.uniform(1, 4)) * np.minimum(1, 8 * (1 - t) + 0.1)
    angle = p.twist * t
    solid = tube(rings(path, twisted(superellipse(p.width, p.thickness, p.exponent, 48), angle, size)))
    blades = int(rng.integers(1, 5))
    if blades > 1:
        return union([solid.rotate([0, 0, 360.0 * i / blades]) for i in range(blades)] + [ball(2.5 * p.grip)])
    guard, pommel = box(0.06, 2 * p.guard, 2.5 * p.grip), ball(1.4 * p.grip).translate([-0.5, 0, 0])
    return union([solid, rod((-0.5, 0, 0), (0.1, 0, 0), p.grip), guard, pommel])


PARTS = {
    "gear": gear, "bracket": bracket, "bolt": bolt, "wheel": wheel, "furniture": furniture,
    "lattice": lattice, "minimal": minimal, "fins": fins, "tray": tray, "blade": blade,
}
