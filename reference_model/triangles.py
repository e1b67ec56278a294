"""Small sums over the triangles of a mesh: vertices [V,3] float64, faces [F,3] int64."""

from typing import Any

import numpy as np

from reference_model.cli import optional_import


def areas(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """[F] area of each face."""
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


def normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """[F,3] unit normal of each face, 0 where it has no area."""
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    normal = np.cross(b - a, c - a)
    return normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-300)


def longest_edges(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """[F] length of the longest edge of each face."""
    corners = vertices[faces]
    return np.linalg.norm(corners - np.roll(corners, 1, 1), axis=2).max(1)


def split_longest(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each face into two at the middle of its longest edge."""
    corners = vertices[faces]
    edge = np.argmax(np.linalg.norm(corners - np.roll(corners, -1, 1), axis=2), 1)
    a, b, c = np.take_along_axis(faces, (edge[:, None] + np.arange(3)) % 3, 1).T
    middle = len(vertices) + np.arange(len(faces))
    halves = np.stack((np.stack((a, middle, c), 1), np.stack((middle, b, c), 1)), 1)
    return np.concatenate((vertices, (vertices[a] + vertices[b]) / 2)), halves.reshape(-1, 3)


def unbalanced_edges(faces: np.ndarray) -> np.ndarray:
    """Edges [E,2] int64 that oriented faces [F,3] run along more often one way than the other: empty for a closed surface."""
    if len(faces) == 0:
        return np.zeros((0, 2), np.int64)
    directed = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
    edges, inverse = np.unique(np.sort(directed, 1), axis=0, return_inverse=True)
    balance = np.bincount(inverse.reshape(-1), np.where(directed[:, 0] < directed[:, 1], 1, -1), len(edges))
    return edges[balance != 0]


def ray_scene(vertices: np.ndarray, faces: np.ndarray) -> Any:
    """Embree's scene of a mesh, to run rays in."""
    scene = optional_import("embreex.rtcore_scene").EmbreeScene()
    optional_import("embreex.mesh_construction").TriangleMesh(scene, vertices.astype(np.float32), faces.astype(np.int32))
    return scene
