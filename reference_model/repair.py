"""From the faces of a file to a surface that bounds a solid.

1. Copies of a face are dropped, faces are turned alike across shared edges: patches.
2. Rays from both sides of a patch say where the outside is (Takayama et al. 2014, "A simple method for correcting facet orientations in
   polygon meshes based on ray casting"): one side seen → the patch bounds a solid and is turned outwards; both → it is an open sheet;
   none → it lies within, and keeps the winding of the file if that proved right for the patches that are seen: so cavities stay cavities.
3. The solid is where the winding number exceeds 1/2 (Jacobson et al. 2013, Barill et al. 2018). Faces with the same on both sides
   (overlapping parts, things inside) bound nothing and are dropped; holes are closed by the level set 1/2 (`closing.py`).
4. Sheets become solids of a stated thickness, joined with the rest; so do flaps of no thickness, whose winding numbers average 0.

A closed mesh whose faces all bound passes unchanged and gets the exact sign by pseudonormals (Bærentzen and Aanæs 2005).
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from reference_model.cli import optional_import
from reference_model.closing import cap_holes, lone_faces
from reference_model.distance import WindingNumber, distance
from reference_model.meshes import MeshError
from reference_model.triangles import areas, longest_edges, normals, ray_scene, split_longest, unbalanced_edges

SEEN = 0.2  # an open patch is a sheet where this share of the rays that are free on one side are free on the other
_HIDDEN = 0.005  # below this on both sides a patch is not seen
_EPS = 2e-5  # distance of a test point from its face
_RAYS = 32
_SAMPLES = 20_000
_SPLIT = 1 / 64  # faces that bound only in part are split to this length
_ASKED = 4 * _SPLIT  # longer faces are split before their corners and centre may speak for the rest
_TRIED = 4096
_MOST_CAPS = 0.25  # area of caps to that of faces
_MOST_SPLIT = 40_000  # faces split at once: more are kept whole, which adds band voxels inside the solid but no boundary
_CENTER = [(1 / 3, 1 / 3, 1 / 3)]
_CORNERS = [(0.9, 0.05, 0.05), (0.05, 0.9, 0.05), (0.05, 0.05, 0.9)]


@dataclass(frozen=True, eq=False)
class Surface:
    """What bounds a solid in the unit cube; `signed` is its signed distance."""

    vertices: np.ndarray  # [V,3] float64
    faces: np.ndarray  # [F,3] int64, the boundary that distances are measured to
    within: np.ndarray  # [K,3] int64, faces with the solid on both sides
    hull_vertices: np.ndarray  # [H,3] float64
    hull: np.ndarray  # [G,3] int64, the oriented faces whose winding number tells inside from outside
    sheets: np.ndarray  # [S,3] int64 into hull_vertices: open sheets, made `thickness` thick
    thickness: float
    exact: bool  # pseudonormals of `faces` give the sign
    caps: np.ndarray  # [C,3] int64, the last of `faces`: those that close holes
    report: dict[str, str] = field(default_factory=dict)

    @cached_property
    def _winding(self) -> WindingNumber:
        return WindingNumber(self.hull_vertices, self.hull)

    def unsigned(self, points: np.ndarray, bound: float) -> np.ndarray:
        """Distance [n] float64 from points [n,3] to `faces`; NaN beyond `bound`."""
        return distance(points, self.vertices, self.faces, bound)

    def near_seams(self, points: np.ndarray, bound: float) -> np.ndarray:
        """[n] bool: both a cap and another face of the boundary lie within `bound` of these points."""
        near = ~np.isnan(distance(points, self.vertices, self.caps, bound))
        near[near] = ~np.isnan(distance(points[near], self.vertices, self.faces[: len(self.faces) - len(self.caps)], bound))
        return near

    def to_within(self, points: np.ndarray, bound: float) -> np.ndarray:
        """Distance [n] float64 from points [n,3] to `within`; NaN beyond `bound`."""
        return distance(points, self.vertices, self.within, bound)

    def near(self, points: np.ndarray, bound: float) -> np.ndarray:
        """[n] bool: a face or a sheet's surface may lie within `bound` of these points."""
        near = ~np.isnan(self.unsigned(points, bound))
        for more in (self.to_within, self.sheet_distance):
            near[~near] = ~np.isnan(more(points[~near], bound))
        return near

    def signed(self, points: np.ndarray, bound: float) -> np.ndarray:
        """Signed distance [n] float64 of an exact surface, negative inside; NaN where it exceeds `bound` in magnitude."""
        return distance(points, self.vertices, self.faces, bound, signed=True)

    def winding(self, points: np.ndarray, within: float | np.ndarray = np.inf) -> np.ndarray:
        """Winding number [n] float64 of the hull at points [n,3]; rough, and fast, where it is farther than `within` from 1/2 and -1/2."""
        return self._winding(points, within) if len(self.hull) else np.zeros(len(points))

    def sheet_distance(self, points: np.ndarray, bound: float) -> np.ndarray:
        """Signed distance [n] float64 of the thickened sheets; NaN beyond `bound`."""
        return distance(points, self.hull_vertices, self.sheets, bound + self.thickness / 2) - self.thickness / 2


def resolve_surface(vertices: np.ndarray, faces: np.ndarray, thickness: float) -> Surface:
    """Surface of a mesh in the unit cube: vertices [V,3] float64, faces [F,3] int64; `thickness` of open sheets.

    The report says `closed` (the input bounds a solid as it is) and counts what was turned, hidden, capped and thickened.
    """
    igl = optional_import("igl")
    _, first = np.unique(np.sort(faces, 1), axis=0, return_index=True)
    copies = len(faces) - len(first)
    faces = faces[np.sort(first)]
    area = areas(vertices, faces)
    if not area.sum() > 1e-9:
        raise MeshError(f"no area: {area.sum():.1e} in the unit cube")
    turned, patch = igl.bfs_orient(np.ascontiguousarray(faces))
    turned = _as_filed(turned, faces, patch, area)
    front, back = _openness(vertices, turned, patch, area)
    border = _border_patches(turned, patch)
    sheet = (np.minimum(front, back) > np.maximum(SEEN * np.maximum(front, back), _HIDDEN)) & border
    hidden = np.maximum(front, back) < _HIDDEN
    flip = (back > front) & ~sheet & ~hidden
    patch_area = np.bincount(patch, area, len(front))
    seen = ~sheet & ~hidden
    flipped = patch_area[flip].sum() / max(patch_area[seen].sum(), 1e-300)
    dropped = np.zeros_like(hidden)
    if 0.1 < flipped < 0.9:  # the file's winding means nothing: nothing hidden can be a cavity
        dropped = hidden
    elif flipped >= 0.9:
        flip |= hidden
    turned[flip[patch]] = turned[flip[patch]][:, [1, 0, 2]]
    sheet |= _encloses_nothing(vertices, turned, patch, border & ~sheet & ~dropped, ~sheet & ~dropped)
    hull = np.ascontiguousarray(turned[~sheet[patch] & ~dropped[patch]])
    sheets = np.ascontiguousarray(turned[sheet[patch]])
    report = {
        "copies": str(copies), "patches": str(len(front)), "turned": str(int(flip.sum())), "sheets": str(int(sheet.sum())),
        "dropped": str(int(dropped.sum())), "sheet_thickness": f"{thickness if len(sheets) else 0:.6g}",
    }  # fmt: skip
    border_edges = unbalanced_edges(hull)
    winding = Surface(vertices, hull, hull[:0], vertices, hull, sheets, thickness, False, hull[:0])
    bound_vertices, bound_faces, within, whole = _bounding_faces(winding, len(border_edges) + len(sheets) == 0)
    closed = whole and len(border_edges) + len(sheets) == 0
    report |= {"closed": str(closed).lower(), "border_edges": str(len(border_edges)), "bounding_faces": str(len(bound_faces))}
    if closed and areas(vertices, hull).min() > 1e-16:
        return Surface(vertices, hull, within, vertices, hull, sheets, thickness, True, within, report | {"lone_faces": "0", "caps": "0"})
    hull_vertices, lone = lone_faces(winding)
    sheets = np.concatenate((sheets, lone))
    report |= {"lone_faces": str(len(lone)), "sheet_thickness": f"{thickness if len(sheets) else 0:.6g}"}
    caps = within[:0]
    if len(border_edges) and len(hull):
        cap_vertices, cap_faces = cap_holes(winding, border_edges)
        cap_area, bound_area = areas(cap_vertices, cap_faces).sum(), areas(bound_vertices, bound_faces).sum()
        if cap_area > _MOST_CAPS * bound_area:
            raise MeshError(f"inside and outside cannot be told: {cap_area / (cap_area + bound_area):.0%} of the surface would be caps")
        caps = cap_faces + len(bound_vertices)
        bound_faces = np.concatenate((bound_faces, caps))
        bound_vertices = np.concatenate((bound_vertices, cap_vertices))
    if len(bound_faces) + len(sheets) == 0:
        raise MeshError("the faces bound no solid")
    report["caps"] = str(len(caps))
    return Surface(bound_vertices, bound_faces, within, hull_vertices, hull, sheets, thickness, False, caps, report)


def _as_filed(turned: np.ndarray, faces: np.ndarray, patch: np.ndarray, area: np.ndarray) -> np.ndarray:
    """Turn each patch the way most of its area was wound in the file."""
    ring = np.take_along_axis(turned, (np.argmax(turned == faces[:, :1], 1)[:, None] + np.arange(3)) % 3, 1)
    against = np.bincount(patch, np.where((ring == faces).all(1), -area, area)) > 0
    return np.where(against[patch][:, None], turned[:, [1, 0, 2]], turned)


def _border_patches(faces: np.ndarray, patch: np.ndarray) -> np.ndarray:
    """[P] bool: patches with an edge of their own that only one of their faces has."""
    edges = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), 1)
    keys = np.concatenate((np.repeat(patch, 3)[:, None], edges), 1)
    unique, counts = np.unique(keys, axis=0, return_counts=True)
    return np.bincount(unique[counts == 1, 0], minlength=int(patch.max()) + 1) > 0


def _openness(vertices: np.ndarray, faces: np.ndarray, patch: np.ndarray, area: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of rays that leave each patch freely from its front and from its back: two [P] float64."""
    rng = np.random.default_rng(0)
    count = int(patch.max()) + 1
    patch_area = np.bincount(patch, area, count)
    samples = np.clip(_SAMPLES * patch_area / area.sum(), 4, 512).astype(np.int64)
    order = np.argsort(patch, kind="stable")
    reach = np.cumsum(area[order])
    start = np.concatenate(([0.0], np.cumsum(patch_area)))
    owner = np.repeat(np.arange(count), samples)
    place = start[owner] + rng.random(len(owner)) * patch_area[owner]
    face = order[np.minimum(np.searchsorted(reach, place), len(order) - 1)]
    weights = rng.dirichlet((1.0, 1.0, 1.0), len(face))
    points = np.einsum("nk,nkd->nd", weights, vertices[faces[face]])
    normal = normals(vertices, faces)[face]
    scene = ray_scene(vertices, faces)
    shares = []
    for side in (1.0, -1.0):
        out = side * normal
        free = np.zeros(len(face))
        for _ in range(_RAYS):
            ray = rng.normal(size=out.shape)
            ray /= np.linalg.norm(ray, axis=1, keepdims=True)
            ray += out * 1.001  # cosine-weighted about the normal
            ray /= np.linalg.norm(ray, axis=1, keepdims=True)
            origin = (points + _EPS * out).astype(np.float32)
            free += scene.run(origin, ray.astype(np.float32), query="OCCLUDED") < 0
        shares.append(np.bincount(owner, free, count) / (_RAYS * np.bincount(owner, minlength=count)))
    return shares[0], shares[1]


def _encloses_nothing(vertices: np.ndarray, faces: np.ndarray, patch: np.ndarray, asked: np.ndarray, solid: np.ndarray) -> np.ndarray:
    """[P] bool: of the patches asked, those whose winding numbers before and behind average below 1/4 (a boundary 1/2, a lone sheet 0)."""
    nothing = np.zeros_like(asked)
    if not asked.any():
        return nothing
    hull = np.ascontiguousarray(faces[solid[patch]])
    surface = Surface(vertices, hull, hull[:0], vertices, hull, hull[:0], 0.0, False, hull[:0])
    of = np.flatnonzero(asked[patch])
    of = of[np.random.default_rng(0).permutation(len(of))]
    of = of[np.argsort(patch[of], kind="stable")]
    rank = np.arange(len(of)) - np.searchsorted(patch[of], patch[of])
    of = of[rank < 64]
    before = surface.winding(vertices[faces[of]].mean(1) + _EPS * normals(vertices, faces[of]))
    area = areas(vertices, faces[of])
    middle = np.bincount(patch[of], area * (before + 0.5), len(asked)) / np.maximum(np.bincount(patch[of], area, len(asked)), 1e-300)
    return asked & (middle < 0.25)


def _bounding_faces(surface: Surface, closed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """The hull by what its faces separate, split where that varies; faces with the outside on both sides are left out.

    (vertices, faces with the solid behind, faces with the solid on both sides, whether all have it behind).
    """
    vertices, faces = surface.hull_vertices, surface.hull
    if len(faces) == 0:
        return vertices, faces, faces, False
    area = areas(vertices, faces)
    if closed and len(faces) > _TRIED:  # a sample tells whether all is well
        some = np.random.default_rng(0).choice(len(faces), _TRIED, p=area / area.sum())
        if (np.abs(_winding_before(surface, vertices, faces[some], _CENTER)) < 0.5).mean() > 0.999:
            return vertices, faces, faces[:0], True
    before = _winding_before(surface, vertices, faces, _CENTER)[:, 0]
    if area[np.abs(before) >= 0.5].sum() < 1e-3 * area.sum():
        return vertices, faces, faces[:0], True
    kind = np.where(np.abs(before) < 0.5, 1, 2).astype(np.int8)
    mixed = np.zeros(len(vertices), np.int8)
    for bit in (1, 2):
        mixed[faces[kind == bit]] |= bit
    unsure = (mixed[faces] == 3).any(1) | (longest_edges(vertices, faces) > _ASKED)
    bound, within = [faces[~unsure & (kind == 1)]], [faces[~unsure & (before >= 0.5)]]
    faces = faces[unsure]
    while len(faces):
        before = _winding_before(surface, vertices, faces, _CENTER + _CORNERS)
        behind = np.abs(before) < 0.5
        length = longest_edges(vertices, faces)
        split = ((behind.any(1) & ~behind.all(1) & (length > _SPLIT)) | (length > _ASKED)) & (len(faces) < _MOST_SPLIT)
        bound.append(faces[~split & behind.any(1)])
        within.append(faces[~behind.any(1) & (before >= 0.5).any(1)])
        vertices, faces = split_longest(vertices, faces[split])
    return vertices, np.concatenate(bound), np.concatenate(within), False


def _winding_before(surface: Surface, vertices: np.ndarray, faces: np.ndarray, weights: list[tuple[float, float, float]]) -> np.ndarray:
    """[F,W] winding number just before the points of each face with these barycentric weights; just behind it is one more."""
    points = np.einsum("wk,fkd->fwd", np.array(weights), vertices[faces]) + _EPS * normals(vertices, faces)[:, None]
    return surface.winding(points.reshape(-1, 3), 0.0).reshape(len(faces), -1)


def wall_thickness(surface: Surface, samples: int = 4096) -> np.ndarray:
    """Thickness [n] of the solid's walls in the unit cube: from random points of its boundary straight in to the next face (2 if none).

    Sheets count with the thickness they are given.
    """
    rng = np.random.default_rng(0)
    area, sheet_area = areas(surface.vertices, surface.faces), areas(surface.hull_vertices, surface.sheets)
    total = area.sum() + 2 * sheet_area.sum()
    thin = round(samples * 2 * sheet_area.sum() / total)
    walls = np.full(samples, surface.thickness)
    if thin == samples:
        return walls
    face = rng.choice(len(area), samples - thin, p=area / area.sum())
    point = np.einsum("nk,nkd->nd", rng.dirichlet((1.0, 1.0, 1.0), len(face)), surface.vertices[surface.faces[face]])
    inward = -normals(surface.vertices, surface.faces)[face]
    hit = ray_scene(surface.vertices, surface.faces).run((point + _EPS * inward).astype(np.float32), inward.astype(np.float32), output=1)
    walls[thin:] = np.where(hit["primID"] >= 0, hit["tfar"], 2.0)
    return walls
