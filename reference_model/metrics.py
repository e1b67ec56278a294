"""How near one surface is to another: distances, normals, area, topology and normal pictures, all in the frame of the cube [-1,1]^3.

Every score is two-sided, point to surface. "Outer" scores keep the samples that can be reached from outside (`Surface.outer`), the
distance still goes to the whole other surface; picture scores see the outer surface only. Letters: P sample points, V vertices, F faces.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from reference_model.cameras import bounding_radius, metric_cameras
from reference_model.cli import optional_import
from reference_model.render import Scene

THRESHOLDS = (0.01, 0.005, 0.001, 0.0002)
_SHIFTS = np.array([[0.0137, 0.0291, 0.0213], [0.0361, 0.0417, 0.0119]])  # of two grids: a ray that slips through an edge does so in one


@dataclass(frozen=True, eq=False)
class Topology:
    """Connected pieces of a mesh; genus and closedness per piece."""

    piece: NDArray[np.int32]  # [F], of each face
    closed: NDArray[np.bool_]  # [pieces], every edge has two faces
    genus: NDArray[np.int64]  # [pieces], 1 - (V - E + F) / 2, meaningful where closed

    def summary(self, pieces: NDArray | None = None) -> dict[str, float | None]:
        """components, open_components, and the genus summed over them (None when one is open)."""
        chosen = np.arange(len(self.closed)) if pieces is None else pieces
        shut = bool(self.closed[chosen].all())
        return {
            "components": len(chosen),
            "open_components": int((~self.closed[chosen]).sum()),
            "genus": int(self.genus[chosen].sum()) if shut else None,
        }


class Surface:
    """A mesh prepared for comparison: vertices [V,3] float and faces [F,3] int in the cube [-1,1]^3; structures are built when first used.

    grid: nodes an edge in the search for the outside; gaps narrower than 2 / grid may count as closed.
    """

    def __init__(self, vertices: NDArray, faces: NDArray, grid: int = 192):
        self.grid = grid
        self.vertices = np.ascontiguousarray(vertices, dtype=np.float64)
        self.faces = np.ascontiguousarray(faces, dtype=np.int64)
        self.scene = Scene(self.vertices, self.faces, crease=30.0 if len(faces) < 1_000_000 else 0.0)  # finer faces than pixels
        self.normals = self.scene.normals

    @cached_property
    def area(self) -> float:
        """Sum of the faces' areas."""
        return float(self._areas.sum())

    @cached_property
    def _areas(self) -> NDArray:
        a, b, c = (self.vertices[self.faces[:, i]] for i in range(3))
        return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2

    @cached_property
    def _tree(self):
        tree = optional_import("igl").AABB()
        tree.init(self.vertices, self.faces)
        return tree

    def sample(self, count: int, seed: int) -> tuple[NDArray, NDArray]:
        """Points [P,3] spread evenly over the area and their faces [P]."""
        rng = np.random.default_rng(seed)
        total = np.cumsum(self._areas)
        face = np.searchsorted(total, rng.random(count) * total[-1], side="right").clip(max=len(total) - 1)
        u, v = rng.random((2, count, 1))
        fold = u + v > 1
        u, v = np.where(fold, 1 - u, u), np.where(fold, 1 - v, v)
        a, b, c = (self.vertices[self.faces[face, i]] for i in range(3))
        return a + u * (b - a) + v * (c - a), face

    def nearest(self, points: NDArray) -> tuple[NDArray, NDArray]:
        """Distance [P] to the surface and the nearest face [P]."""
        squared, face, _ = self._tree.squared_distance(self.vertices, self.faces, np.ascontiguousarray(points))
        return np.sqrt(np.maximum(squared, 0)), face

    def thin_share(self, limit: float, samples: int = 20_000) -> float:
        """Percent of the area behind which the next face, straight inwards, comes before `limit`."""
        points, face = self.sample(samples, seed=0)
        inward = -self.normals[face]
        return 100.0 * float((self.scene.cast(points + 1e-5 * inward, inward)[1] < limit).mean())

    @cached_property
    def topology(self) -> Topology:
        """Pieces joined by shared vertices (equal positions must be one vertex, as `load_mesh` makes them)."""
        sparse = optional_import("scipy.sparse")
        corners = self.faces
        tails, heads = corners.ravel(), np.roll(corners, -1, 1).ravel()
        size = len(self.vertices)
        key, counts = np.unique(np.minimum(tails, heads) * size + np.maximum(tails, heads), return_counts=True)
        low, high = key // size, key % size
        graph = sparse.coo_matrix((np.ones(len(key), bool), (low, high)), shape=(size, size))
        _, label = sparse.csgraph.connected_components(graph, directed=False)
        used = np.zeros(size, bool)
        used[corners] = True
        names, piece = np.unique(label[corners[:, 0]], return_inverse=True)
        number = np.full(label.max() + 1, -1)
        number[names] = np.arange(len(names))
        n = len(names)
        vertex_piece, edge_piece = number[label[used]], number[label[low]]
        euler = np.bincount(vertex_piece, minlength=n) - np.bincount(edge_piece, minlength=n) + np.bincount(piece, minlength=n)
        return Topology(piece.astype(np.int32), np.bincount(edge_piece, counts != 2, n) == 0, 1 - euler // 2)

    @cached_property
    def _outside(self) -> NDArray[np.bool_]:
        """[G,G,G]: grid nodes joined to the border by steps along the axes that cross no face."""
        label = optional_import("scipy.ndimage").label
        n = self.grid
        lattice = np.zeros((2 * n - 1,) * 3, np.uint8)
        lattice[::2, ::2, ::2] = 1
        for axis in range(3):
            links = [slice(None, None, 2)] * 3
            links[axis] = slice(1, None, 2)
            lattice[tuple(links)] = np.moveaxis(~self._crossed(axis), 0, axis)
        pieces, _ = label(lattice)
        return pieces[::2, ::2, ::2] == pieces[0, 0, 0]

    def _crossed(self, axis: int) -> NDArray[np.bool_]:
        """[G-1,G,G]: a face lies between neighbouring nodes along the axis (first); the other two axes follow in order."""
        n, step = self.grid, 2.0 / self.grid
        crossed = np.zeros((n - 1, n * n), bool)
        direction = np.eye(3)[axis]
        others = [i for i in range(3) if i != axis]
        for shift in _SHIFTS:
            lines = np.arange(n * n)
            node = np.zeros(n * n, np.int64)
            while len(lines):
                nodes = np.empty((len(lines), 3), np.int64)
                nodes[:, axis], nodes[:, others[0]], nodes[:, others[1]] = node, lines // n, lines % n
                origin = self._node_position(nodes, shift)
                face, distance, _ = self.scene.cast(origin, np.broadcast_to(direction, origin.shape))
                link = np.where(face >= 0, node + np.floor(np.minimum(distance, 4.0) / step).astype(np.int64), n)
                keep = link < n - 1
                lines, link = lines[keep], link[keep]
                crossed[link, lines] = True
                node = link + 1
        return crossed.reshape(n - 1, n, n)

    @cached_property
    def _nearest_outside(self) -> NDArray:
        """[3,G,G,G]: the outside node nearest to each node."""
        return optional_import("scipy.ndimage").distance_transform_edt(~self._outside, return_distances=False, return_indices=True)

    def _node_position(self, nodes: NDArray, shift: NDArray) -> NDArray:
        return -1.0 + (2.0 * nodes + 1.0 + 2.0 * shift) / self.grid

    def outer(self, points: NDArray, face: NDArray) -> NDArray[np.bool_]:
        """Which points [P,3] on faces [P] see a node of the outside near them: the skin, without cavities and inner parts."""
        step, last = 2.0 / self.grid, self.grid - 1
        base = np.floor((points + 1.0) / step - 0.5).astype(np.int64)
        corners = [base + np.array([i >> 2, i >> 1 & 1, i & 1]) for i in range(8)]
        normal = self.normals[face] * step
        beside = [np.rint((points + side * normal + 1.0) / step - 0.5).astype(np.int64) for side in (-1, 1)]
        nodes = [np.clip(c, 0, last) for c in corners]
        nodes += [self._nearest_outside[:, x, y, z].T for x, y, z in (np.clip(b, 0, last).T for b in beside)]
        found = np.zeros(len(points), bool)
        for node in nodes:
            rows = np.flatnonzero(~found & self._outside[tuple(node.T)])
            origin = self._node_position(node[rows], _SHIFTS[0])
            way = points[rows] - origin
            length = np.linalg.norm(way, axis=1, keepdims=True)
            _, distance, _ = self.scene.cast(origin, way / np.maximum(length, 1e-12))
            found[rows] = distance > length[:, 0] - 1e-4
        return found


def compare(
    truth: Surface, result: Surface, samples: int = 200_000, seed: int = 0, picture_size: int = 512
) -> dict[str, float | None]:
    """Scores of a result against the truth; `samples` points each way. Distances in units of the cube, F1 and normal scores in percent.

    chamfer: mean of the two mean distances. f1@d: harmonic mean of the shares of points nearer than d. normal_consistency: mean |cosine|
    between the normals of a point and of the nearest face; flipped: share whose cosine is negative. area_ratio: result / truth. components,
    open_components, genus (None when a component is open) of the result. sharp_edge_error and normal_psnr: see `picture_scores`.
    outer_*: the same from the samples that the outside reaches; outer components are those with such a sample; outer_share: the result's
    area that the outside reaches.
    """
    sampled = [s.sample(samples, seed + i) for i, s in enumerate((truth, result))]
    reached = [s.outer(*points) for s, points in zip((truth, result), sampled, strict=True)]
    there = _one_way(result, truth, *sampled[0])
    back = _one_way(truth, result, *sampled[1])
    scores: dict[str, float | None] = {**_two_way(there, back), "area_ratio": result.area / truth.area, **result.topology.summary()}
    skin = [d[reached[0]] for d in there], [d[reached[1]] for d in back]
    pieces = np.unique(result.topology.piece[sampled[1][1][reached[1]]])
    outer = {
        **_two_way(*skin),
        "area_ratio": result.area * float(reached[1].mean()) / max(truth.area * float(reached[0].mean()), 1e-12),
        **result.topology.summary(pieces),
        "share": 100.0 * float(reached[1].mean()),
    }
    return {**scores, **{f"outer_{name}": value for name, value in outer.items()}, **picture_scores(truth, result, picture_size)}


def picture_scores(truth: Surface, result: Surface, size: int = 512) -> dict[str, float]:
    """normal_psnr [dB] and sharp_edge_error over four views that fit the truth (azimuth 30, 120, 210, 300, elevation 30 degrees).

    Pictures hold (n + 1) / 2 of the faces' normals in the camera's frame, 0.5 in the background. normal_psnr is over all pixels, at most
    100. sharp_edge_error is 1e4 times the mean squared difference within two pixels of the Canny edges of the true picture: the sharp
    normal error of Dora-bench (arXiv 2412.17808), on these views.
    """
    dilate = optional_import("scipy.ndimage").binary_dilation
    errors, edge_errors = [], []
    for camera in metric_cameras(bounding_radius(truth.vertices)):
        true, seen = (s.scene.trace(camera, size)["normal"] * 0.5 + 0.5 for s in (truth, result))
        squared = ((true - seen) ** 2).mean(2)
        errors.append(squared.mean())
        edge_errors.append(squared[dilate(canny(true * 255.0), np.ones((5, 5), bool))])
    return {
        "normal_psnr": -10.0 * float(np.log10(max(float(np.mean(errors)), 1e-10))),
        "sharp_edge_error": 1e4 * float(np.concatenate(edge_errors).mean()),
    }


def canny(image: NDArray, low: float = 100.0, high: float = 200.0) -> NDArray[np.bool_]:
    """Edges [H,W] of a picture [H,W,C] in 0..255 (Canny 1986): largest |gx| + |gy| (Sobel) of the channels, thinned, with hysteresis."""
    ndimage = optional_import("scipy.ndimage")
    gx, gy = (np.stack([ndimage.sobel(image[..., c], axis) for c in range(image.shape[2])], 2) for axis in (1, 0))
    best = (np.abs(gx) + np.abs(gy)).argmax(2)[..., None]
    gx, gy = np.take_along_axis(gx, best, 2)[..., 0], np.take_along_axis(gy, best, 2)[..., 0]
    strength = np.abs(gx) + np.abs(gy)
    sector = np.rint(np.arctan2(gy, gx) / (np.pi / 4)).astype(int) % 4
    padded = np.pad(strength, 1)
    height, width = strength.shape
    peak = np.zeros(strength.shape, bool)
    for index, (dy, dx) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
        behind = padded[1 - dy : 1 - dy + height, 1 - dx : 1 - dx + width]
        peak |= (sector == index) & (strength > behind) & (strength >= ahead)
    labels, count = ndimage.label(peak & (strength > low), np.ones((3, 3)))
    strong = np.zeros(count + 1, bool)
    strong[labels[peak & (strength > high)]] = True
    strong[0] = False
    return strong[labels]


def _one_way(to: Surface, source: Surface, points: NDArray, face: NDArray) -> list[NDArray]:
    """Distance [P] and cosine [P] between the normals, from points on `source` to the surface `to`."""
    distance, nearest = to.nearest(points)
    return [distance, (source.normals[face] * to.normals[nearest]).sum(1)]


def _two_way(there: list[NDArray], back: list[NDArray]) -> dict[str, float | None]:
    if not len(there[0]) or not len(back[0]):
        return {name: None for name in ("chamfer", *(f"f1@{t}" for t in THRESHOLDS), "normal_consistency", "flipped")}
    scores: dict[str, float | None] = {"chamfer": float(there[0].mean() + back[0].mean()) / 2}
    for threshold in THRESHOLDS:
        recall, precision = (float((d[0] < threshold).mean()) for d in (there, back))
        scores[f"f1@{threshold}"] = 100.0 * 2 * precision * recall / max(precision + recall, 1e-12)
    scores["normal_consistency"] = 50.0 * float(np.abs(there[1]).mean() + np.abs(back[1]).mean())
    scores["flipped"] = 50.0 * float((there[1] < 0).mean() + (back[1] < 0).mean())
    return scores
