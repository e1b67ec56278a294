"""Mesh files in and out, and the frame of the project: right-handed, z-up, front = -y.

glTF is y-up with its front at +z: (x, y, z) → (x, -z, y) on reading, undone on writing. Other formats are taken as they are.
Files are read and written by trimesh; what it lets pass silently (strips, infinite numbers, dangling indices) is decoded or refused here.
"""

import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reference_model.cli import optional_import

SUFFIXES = (".obj", ".ply", ".stl", ".off", ".glb", ".gltf", ".3mf")
LONGEST_SIDE = 1.9
_MERGE = 2.0**-28  # of the longest side; 2**-22 already joins the smallest details of CAD files


class MeshError(ValueError):
    """A file that holds no usable surface; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Mesh:
    """A triangle mesh in the z-up frame, in the units of its file."""

    vertices: np.ndarray  # [V,3] float64, finite
    faces: np.ndarray  # [F,3] int64, F > 0, indices in range, corners distinct
    y_up: bool  # the file was y-up and has been turned
    name: str  # file name


def load_mesh(path: str | os.PathLike[str], y_up: bool | None = None) -> Mesh:
    """Read OBJ, PLY, STL, OFF, GLB, glTF or 3MF; scenes are merged with their transforms, equal vertices too.

    y_up None means glTF is y-up and everything else z-up. MeshError gives the reason a file cannot be used.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise MeshError(f"unknown format {suffix!r}, not one of {' '.join(SUFFIXES)}")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise MeshError(f"cannot be read: {error.strerror}") from error
    if size == 0:
        raise MeshError("empty file")
    parts = list(_read(path, suffix))
    if not parts:
        raise MeshError("no faces")
    counts = np.cumsum([0] + [len(v) for v, _ in parts[:-1]])
    vertices = np.concatenate([v for v, _ in parts])
    faces = np.concatenate([f + n for (_, f), n in zip(parts, counts, strict=True)])
    vertices, faces = clean_mesh(vertices, faces)
    turn = suffix in (".glb", ".gltf") if y_up is None else y_up
    return Mesh(turn_z_up(vertices) if turn else vertices, faces, turn, path.name)


def save_mesh(path: str | os.PathLike[str], vertices: np.ndarray, faces: np.ndarray, y_up: bool = False) -> None:
    """Write vertices [V,3] (z-up) and faces [F,3] to GLB, OBJ, PLY, STL or OFF; turned to y-up for GLB, and where y_up asks for it."""
    trimesh = optional_import("trimesh")
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".glb", ".obj", ".ply", ".stl", ".off"):
        raise MeshError(f"cannot write {suffix!r}, only .glb .obj .ply .stl .off")
    vertices = np.asarray(vertices, np.float64)
    mesh = trimesh.Trimesh(turn_y_up(vertices) if y_up or suffix == ".glb" else vertices, np.asarray(faces), process=False)
    data = mesh.export(file_type=suffix[1:])
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(part, path)


def normalize(mesh: Mesh) -> tuple[np.ndarray, float, tuple[float, float, float]]:
    """Longest side 1.9, centred on the bounding box: (vertices [V,3] in the unit cube, scale, offset), unit = mesh * scale + offset."""
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    scale = LONGEST_SIDE / float((high - low).max())
    offset = -(low + high) / 2 * scale
    return mesh.vertices * scale + offset, scale, (float(offset[0]), float(offset[1]), float(offset[2]))


def turn_z_up(vertices: np.ndarray) -> np.ndarray:
    """y-up to z-up: (x, y, z) → (x, -z, y)."""
    return np.stack((vertices[:, 0], -vertices[:, 2], vertices[:, 1]), 1)


def turn_y_up(vertices: np.ndarray) -> np.ndarray:
    """z-up to y-up: (x, y, z) → (x, z, -y)."""
    return np.stack((vertices[:, 0], vertices[:, 2], -vertices[:, 1]), 1)


def clean_mesh(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Check numbers and indices, merge equal vertices, drop faces with equal corners and unused vertices; MeshError if nothing is left."""
    if len(faces) == 0:
        raise MeshError("no faces")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise MeshError(f"face index out of range: {int(faces.min())}…{int(faces.max())} for {len(vertices)} vertices")
    used, inverse = np.unique(faces, return_inverse=True)
    vertices, faces = vertices[used], inverse.reshape(-1, 3)
    bad = ~np.isfinite(vertices).all(1)
    if bad.any():
        raise MeshError(f"{int(bad.sum())} of {len(vertices)} vertices are infinite or not a number")
    low = vertices.min(0)
    side = float((vertices.max(0) - low).max())
    if not 0 < side < np.inf:
        raise MeshError(f"no extent: longest side {side}")
    x, y, z = np.rint((vertices - low) / (side * _MERGE)).astype(np.int64).T
    _, pair = np.unique((x << 32) + y, return_inverse=True)
    _, first, inverse = np.unique((pair << 32) + z, return_index=True, return_inverse=True)
    faces = inverse.reshape(-1)[faces]
    faces = faces[(faces != np.roll(faces, 1, 1)).all(1)]
    if len(faces) == 0:
        raise MeshError("every face has equal corners")
    used, inverse = np.unique(faces, return_inverse=True)
    return np.ascontiguousarray(vertices[first[used]]), np.ascontiguousarray(inverse.reshape(-1, 3), np.int64)


def _read(path: Path, suffix: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Vertices and triangles of every part of a file, placed in its scene."""
    trimesh = optional_import("trimesh")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {"skip_materials": True} if suffix == ".obj" else {}
            if suffix == ".gltf":
                scene = trimesh.load_scene(str(path), process=False)
            else:
                scene = trimesh.load_scene(io.BytesIO(path.read_bytes()), file_type=suffix[1:], process=False, **options)
            parts = list(scene.dump(concatenate=False))
    except ImportError as error:
        raise ImportError(f'{error.name} is needed to read {suffix}: pip install "spatial-sparse-attention[reference]"') from error
    except Exception as error:  # readers fail in many ways on broken files; each is a reason, none a crash
        raise MeshError(f"cannot be read: {type(error).__name__}: {error}") from error
    for part in parts:
        vertices = np.asarray(getattr(part, "vertices", ()), np.float64)
        faces = np.asarray(getattr(part, "faces", ()), np.int64)
        raw = part.metadata.get("_ply_raw", {}).get("tristrips")
        if len(faces) == 0 and raw is not None:
            faces = _strip_faces(_strips(raw["data"]))
        if len(faces):
            yield vertices, faces


def _strips(data: Any) -> np.ndarray:
    """The indices of a PLY strip element, -1 between its lists: a record array of (count, list) if binary, else a dictionary of lists."""
    if isinstance(data, np.ndarray) and data.dtype.names:
        data = data[data.dtype.names[0]]
        lists = data[data.dtype.names[-1]] if data.dtype.names else data
    else:
        lists = next(iter(data.values()))
    return np.concatenate([np.append(np.ravel(x).astype(np.int64), -1) for x in lists])


def _strip_faces(strip: np.ndarray) -> np.ndarray:
    """Triangles [F,3] of strips joined by -1: every second triangle of a strip turns the other way."""
    triangles = np.stack((strip[:-2], strip[1:-1], strip[2:]), 1)
    place = np.arange(len(strip))
    breaks = np.where(strip < 0, place, -1)
    start = np.maximum.accumulate(breaks)[:-2] + 1
    odd = (place[:-2] - start) % 2 == 1
    triangles[odd] = triangles[odd][:, [1, 0, 2]]
    return triangles[(triangles >= 0).all(1)]
