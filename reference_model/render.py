"""Pictures of a mesh without display or GPU: colour, normal, depth and alpha by ray casting (Embree).

`python -m reference_model.render meshes=PATH out=DIRECTORY [views=45] [size=1024] [seed=0] [samples=2]` writes a directory for every mesh:
`NNN_color.png` (RGBA, straight alpha), `NNN_normal.png` (8 bit, n = 2 v/255 - 1), `NNN_depth.png` (16 bit, depth = v * depth_scale),
and `cameras.json` with the matrices and the convention.
"""

import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reference_model.cameras import CONVENTION, Camera, bounding_radius, sample_cameras
from reference_model.cli import optional_import, parse
from reference_model.meshes import MeshError, load_mesh, normalize
from reference_model.sources import find_sources

CLAY = np.array([0.62, 0.57, 0.52])  # linear reflectance
KEY = np.array([-0.45, -0.70, -0.55])  # towards the lights, in the camera's frame (x right, y down, z forward)
RIM = np.array([0.75, -0.30, 0.45])
DEPTH_SCALE = 2e-4  # a fitted 100 mm camera stands at most 12.1 away, 65535 steps reach 13.1


class Scene:
    """A mesh ready for rays; build it once, look at it often.

    vertices [V,3] float and faces [F,3] int, in the unit cube. Faces whose normals differ by less than `crease` degrees are shaded as one
    smooth surface in colour (0: none are); the normal picture always shows the faces themselves.
    """

    def __init__(self, vertices: NDArray, faces: NDArray, crease: float = 30.0):
        vertices, faces = np.asarray(vertices, dtype=np.float64), np.asarray(faces, dtype=np.int64)
        if vertices.ndim != 2 or vertices.shape[1] != 3 or faces.ndim != 2 or faces.shape[1] != 3 or len(faces) == 0:
            raise ValueError(f"a scene needs vertices [V,3] and at least one face [F,3], got {vertices.shape=} {faces.shape=}")
        if not np.isfinite(vertices).all():
            raise ValueError("a scene needs finite vertices")
        self.vertices, self.faces = vertices, faces
        weighted = _weighted_normals(vertices, faces)
        self.normals = weighted / np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-300)
        self.crease = crease
        self.embree = optional_import("embreex.rtcore_scene").EmbreeScene()
        optional_import("embreex.mesh_construction").TriangleMesh(self.embree, vertices.astype(np.float32), faces.astype(np.int32))

    @cached_property
    def corner_normals(self) -> NDArray:
        """[F,3,3]: per corner the normal of its smooth surface."""
        return _corner_normals(self.vertices, self.faces, self.normals, self.crease)

    def cast(self, origins: NDArray, directions: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        """First hits of rays [N,3], [N,3]: face [N] int32 (-1: none), distance [N] in lengths of the direction (inf), barycentric [N,3]."""
        hit = self.embree.run(_float32(origins), _float32(directions), output=1)
        face = hit["primID"]
        distance = np.where(face >= 0, hit["tfar"], np.inf).astype(np.float64)
        return face, distance, np.stack([1.0 - hit["u"] - hit["v"], hit["u"], hit["v"]], 1)

    def blocked(self, origins: NDArray, directions: NDArray) -> NDArray[np.bool_]:
        """[N] bool: something lies on the ray, however far."""
        return self.embree.run(_float32(origins), _float32(directions), query="OCCLUDED") >= 0

    def trace(self, camera: Camera, size: int) -> dict[str, NDArray]:
        """The normal and depth of `render` alone, one ray a pixel."""
        rays = camera.rays(size)
        face, distance, _ = self.cast(np.broadcast_to(camera.position, rays.shape), rays)
        hit = face >= 0
        normal, depth = np.zeros((size * size, 3), np.float32), np.zeros(size * size, np.float32)
        facing = _towards_viewer(self.normals[face[hit]], rays[hit])
        normal[hit] = facing @ (camera.rotation * [[1.0], [-1.0], [-1.0]]).T
        depth[hit] = distance[hit] * (rays[hit] @ camera.rotation[2])
        return {"normal": normal.reshape(size, size, 3), "depth": depth.reshape(size, size)}

    def render(self, camera: Camera, size: int, samples: int = 2, sky: int = 48) -> dict[str, NDArray]:
        """One picture of size x size pixels.

        -> color [H,W,3] float32, sRGB in 0..1, not multiplied by alpha; alpha [H,W] float32, the share of samples^2 rays that hit;
        normal [H,W,3] float32 of the face in the pixel's centre, in the camera's frame with x right, y up, z towards the viewer, turned
        towards the viewer, 0 where nothing is hit; depth [H,W] float32 along the camera's axis, 0 where nothing is hit.
        Clay under a key light and a rim light that turn with the camera and a sky of `sky` directions that does not, all with shadows.
        """
        light, alpha = np.zeros((size * size, 3)), np.zeros(size * size)
        grid = (np.arange(samples) + 0.5) / samples
        for index, shift in enumerate((x, y) for y in grid for x in grid):
            directions = _sphere(sky)[index :: samples**2]  # each ray of a pixel looks at its own part of the sky
            seen, radiance = self._radiance(camera, camera.rays(size, shift), directions)
            light[seen] += radiance
            alpha += seen
        light /= np.maximum(alpha, 1)[:, None]
        return {
            **self.trace(camera, size),
            "color": _srgb(light).astype(np.float32).reshape(size, size, 3),
            "alpha": (alpha / samples**2).astype(np.float32).reshape(size, size),
        }

    def _radiance(self, camera: Camera, rays: NDArray, sky: NDArray) -> tuple[NDArray[np.bool_], NDArray]:
        """Which rays [N,3] hit, and the linear light [hits,3] they bring back."""
        face, distance, weights = self.cast(np.broadcast_to(camera.position, rays.shape), rays)
        seen = face >= 0
        face, rays = face[seen], rays[seen]
        flat = _towards_viewer(self.normals[face], rays)
        smooth = flat
        if self.crease > 0:
            smooth = np.einsum("nc,ncx->nx", weights[seen], self.corner_normals[face])
            smooth = _towards_viewer(smooth / np.maximum(np.linalg.norm(smooth, axis=1, keepdims=True), 1e-12), rays)
        start = _float32(camera.position + rays * distance[seen, None] + flat * (2e-4 * camera.distance))
        flat, smooth = _float32(flat), _float32(smooth)

        def lit(direction: NDArray) -> NDArray:
            direction = _float32(direction)
            cosine = smooth @ direction
            cosine[flat @ direction <= 0] = 0
            reached = np.flatnonzero(cosine > 0)
            hidden = self.blocked(start[reached], np.broadcast_to(direction, (len(reached), 3)))
            light = np.zeros_like(cosine)
            light[reached[~hidden]] = cosine[reached[~hidden]]
            return light

        towards = [(v / np.linalg.norm(v)) @ camera.rotation for v in (KEY, RIM)]
        light = 1.05 * lit(towards[0])[:, None] * [1.0, 0.96, 0.90] + 0.35 * lit(towards[1])[:, None] * [0.80, 0.90, 1.0]
        for direction in sky:
            height = 0.5 + 0.5 * direction[2]
            light += lit(direction)[:, None] * (np.array([0.25, 0.24, 0.23]) + height * np.array([0.62, 0.70, 0.80])) * (2.6 / len(sky))
        return seen, light * CLAY


def render_view(vertices: NDArray, faces: NDArray, camera: Camera, size: int) -> dict[str, NDArray]:
    """One picture of a mesh: color, normal, depth, alpha as `Scene.render` gives them. For several views of one mesh build a `Scene`."""
    return Scene(vertices, faces).render(camera, size)


def save_view(view: dict[str, NDArray], path_stem: Path) -> None:
    """Write `STEM_color.png`, `STEM_normal.png` and `STEM_depth.png`; ValueError where a depth exceeds 16 bits of `DEPTH_SCALE`."""
    if view["depth"].max() > 65535 * DEPTH_SCALE:
        raise ValueError(f"depth above {65535 * DEPTH_SCALE:.2f} does not fit a 16-bit picture, got {view['depth'].max():.2f}")
    Image = optional_import("PIL.Image")
    rgba = np.concatenate([view["color"], view["alpha"][..., None]], 2)
    Image.fromarray(to_bytes(rgba)).save(f"{path_stem}_color.png")
    Image.fromarray(to_bytes(view["normal"] * 0.5 + 0.5)).save(f"{path_stem}_normal.png")
    Image.fromarray(np.round(view["depth"] / DEPTH_SCALE).astype(np.uint16)).save(f"{path_stem}_depth.png")


def on_background(view: dict[str, NDArray], background: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> NDArray[np.uint8]:
    """The colour picture over a plain background, [H,W,3] uint8."""
    alpha = view["alpha"][..., None]
    return to_bytes(view["color"] * alpha + np.asarray(background) * (1.0 - alpha))


def to_bytes(image: NDArray) -> NDArray[np.uint8]:
    """0..1 -> 0..255."""
    return np.round(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)


def _float32(array: NDArray) -> NDArray[np.float32]:
    return np.ascontiguousarray(array, dtype=np.float32)


def _towards_viewer(normals: NDArray, rays: NDArray) -> NDArray:
    return np.where((normals * rays).sum(1, keepdims=True) > 0, -normals, normals)


def _srgb(linear: NDArray) -> NDArray:
    toned = linear / (1.0 + linear / 5.0)  # a soft shoulder instead of clipped highlights
    return np.where(toned <= 0.0031308, 12.92 * toned, 1.055 * np.clip(toned, 0.0031308, 1.0) ** (1 / 2.4) - 0.055)


def _sphere(count: int) -> NDArray:
    """[count,3] evenly spread directions (Fibonacci spiral)."""
    z = 1.0 - 2.0 * (np.arange(count) + 0.5) / count
    angle = np.arange(count) * (np.pi * (3.0 - np.sqrt(5.0)))
    return np.stack([np.sqrt(1 - z * z) * np.cos(angle), np.sqrt(1 - z * z) * np.sin(angle), z], 1)


def _weighted_normals(vertices: NDArray, faces: NDArray) -> NDArray:
    """[F,3], as long as twice the faces' areas."""
    return np.cross(vertices[faces[:, 1]] - vertices[faces[:, 0]], vertices[faces[:, 2]] - vertices[faces[:, 0]])


def _corner_normals(vertices: NDArray, faces: NDArray, normals: NDArray, crease: float) -> NDArray:
    """[F,3,3]: per corner the area-weighted sum over the faces at its vertex that differ by less than `crease` degrees."""
    weighted = _weighted_normals(vertices, faces)
    order = np.argsort(faces.ravel(), kind="stable")
    vertex, face = faces.ravel()[order], order // 3
    total = weighted[face].copy()
    near = np.cos(np.radians(crease))
    first = np.arange(len(order) - 1)
    step = 1
    while len(first := first[vertex[first] == vertex[first + step]]):
        a, b = face[first], face[first + step]
        like = (normals[a] * normals[b]).sum(1) > near
        total[first[like]] += weighted[b[like]]
        total[first[like] + step] += weighted[a[like]]
        step += 1
        first = first[first + step < len(order)]
    total /= np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-300)
    corners = np.empty_like(total)
    corners[order] = total
    return corners.reshape(-1, 3, 3)


def render_file(path: Path, out: Path, views: int, size: int, seed: int, samples: int, y_up: bool | None = None) -> None:
    """Pictures of one mesh file and their cameras into the directory out; a directory that has `cameras.json`, written last, is whole."""
    vertices, scale, offset = normalize(mesh := load_mesh(path, y_up))
    scene = Scene(vertices, mesh.faces)
    out.mkdir(parents=True, exist_ok=True)
    records = []
    for index, camera in enumerate(sample_cameras(views, seed, bounding_radius(vertices))):
        save_view(scene.render(camera, size, samples), out / f"{index:03d}")
        matrices = {"intrinsics": camera.intrinsics(size).tolist(), "world_to_camera": camera.world_to_camera.tolist()}
        records.append({"stem": f"{index:03d}", **asdict(camera), **matrices})
    frame = {"scale": scale, "offset": offset, "meaning": "world = mesh (z up) * scale + offset", "y_up": mesh.y_up}
    document = {"convention": CONVENTION, "mesh": path.name, "frame": frame, "size": size, "seed": seed, "depth_scale": DEPTH_SCALE}
    (out / "cameras.json").write_text(json.dumps({**document, "views": records}, indent=1), encoding="utf-8")


def main() -> int:
    config, paths = parse("render", ("meshes", "out"), required=("meshes", "out"))
    failed = 0
    for path in (files := [source.path for source in find_sources(paths["meshes"])]):
        try:
            render_file(path, Path(paths["out"]) / path.name, config.views, config.size, config.seed, config.samples, config.y_up)
            print(f"{path.name}: {config.views} views")
        except MeshError as error:
            failed += 1
            print(f"{path.name}: {error}")
    return int(failed == len(files))


if __name__ == "__main__":
    raise SystemExit(main())
