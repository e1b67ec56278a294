"""Cameras that look at the unit cube, and the one convention that every picture follows.

The paper renders its condition images with elevation 10-40 degrees, azimuth 0-180 degrees and focal lengths of 30-100 mm
(arXiv 2505.17412, training data); it does not say how azimuth is counted. `CONVENTION` says what is meant here.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SENSOR_MM = 36.0
CONVENTION = (
    "Right-handed world, z up, object front = -y, the mesh scaled into [-1,1]^3. Azimuth turns counter-clockwise seen from above: "
    "0 looks from -x, 90 from -y (the front), 180 from +x. Elevation is above the xy plane, both in degrees; focal is in mm on a 36 mm "
    "square sensor, distance from the origin in world units. Camera axes as OpenCV: x right, y down, z forward; "
    "p_camera = world_to_camera @ p_world; pixel = intrinsics @ p_camera / z, the centre of the first pixel at (0.5, 0.5), rows downward. "
    "Depth is z_camera in world units, 0 = background. Normals are in the camera's frame with x right, y up, z towards the viewer."
)


@dataclass(frozen=True)
class Camera:
    """A pinhole that looks at the origin: angles in degrees, distance in units of the cube, focal length in mm on a 36 mm square sensor."""

    azimuth: float
    elevation: float
    distance: float
    focal: float = 50.0

    @property
    def position(self) -> NDArray[np.float64]:
        """[3], in the world."""
        azimuth, elevation = math.radians(self.azimuth), math.radians(self.elevation)
        return self.distance * np.array(
            [-math.cos(azimuth) * math.cos(elevation), -math.sin(azimuth) * math.cos(elevation), math.sin(elevation)]
        )

    @property
    def rotation(self) -> NDArray[np.float64]:
        """[3,3]: rows are the camera's right, down and forward in the world."""
        azimuth = math.radians(self.azimuth)
        forward = -self.position / self.distance
        right = np.array([math.sin(azimuth), -math.cos(azimuth), 0.0])
        return np.stack([right, np.cross(forward, right), forward])

    @property
    def world_to_camera(self) -> NDArray[np.float64]:
        """[4,4]."""
        matrix = np.eye(4)
        matrix[:3, :3] = self.rotation
        matrix[:3, 3] = -self.rotation @ self.position
        return matrix

    def intrinsics(self, size: int) -> NDArray[np.float64]:
        """[3,3] for a picture of size x size pixels."""
        focal = self.focal / SENSOR_MM * size
        return np.array([[focal, 0.0, size / 2], [0.0, focal, size / 2], [0.0, 0.0, 1.0]])

    def rays(self, size: int, shift: tuple[float, float] = (0.5, 0.5)) -> NDArray[np.float64]:
        """Unit directions [size*size, 3] in the world through (column, row) + shift of each pixel, row by row."""
        pixel = (np.arange(size) - size / 2) * SENSOR_MM / (self.focal * size)
        step = SENSOR_MM / (self.focal * size)
        x, y = np.meshgrid(pixel + shift[0] * step, pixel + shift[1] * step)
        directions = np.stack([x.ravel(), y.ravel(), np.ones(size * size)], 1)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        return directions @ self.rotation


def fitting_distance(radius: float, focal: float, margin: float = 1.05) -> float:
    """The distance at which a ball of this radius about the origin, times margin, just fits the picture."""
    return margin * radius / math.sin(math.atan(SENSOR_MM / (2 * focal)))


def bounding_radius(vertices: NDArray) -> float:
    """Largest distance of a vertex [V,3] from the origin."""
    return float(np.sqrt((np.asarray(vertices, dtype=np.float64) ** 2).sum(1).max()))


def sample_cameras(views: int, seed: int, radius: float = math.sqrt(3.0)) -> list[Camera]:
    """The paper's cameras: elevation 10-40, azimuth 0-180 degrees, focal 30-100 mm, each uniform; a ball of `radius` fits."""
    rng = np.random.default_rng(seed)
    draws = rng.uniform((0.0, 10.0, 30.0), (180.0, 40.0, 100.0), (views, 3))
    return [Camera(a, e, fitting_distance(radius, f), f) for a, e, f in draws.tolist()]


def metric_cameras(radius: float = math.sqrt(3.0), focal: float = 50.0) -> list[Camera]:
    """The four views of the picture metrics: azimuth 30, 120, 210, 300 degrees, elevation 30 degrees."""
    return [Camera(a, 30.0, fitting_distance(radius, focal), focal) for a in (30.0, 120.0, 210.0, 300.0)]
