"""A mesh as one HTML file that any browser opens without a network: `python -m reference_model.viewer in=MESH out=PAGE.html`.

The page holds the mesh as GLB and three.js (trimesh's viewer): drag to turn, wheel to zoom, right button to move.
"""

import html
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reference_model.cameras import Camera, bounding_radius, fitting_distance
from reference_model.cli import optional_import, parse
from reference_model.meshes import MeshError, load_mesh, normalize, turn_y_up

_VIEW = Camera(azimuth=60.0, elevation=20.0, distance=1.0, focal=50.0)
_LIGHTS = (  # one glaring lamp in trimesh's page; a softer one and a sky here
    "tracklight=new THREE.DirectionalLight(0xffffff,1.75);",
    "tracklight=new THREE.DirectionalLight(0xfff6ec,0.75);scene.add(new THREE.HemisphereLight(0xf0f6ff,0x8a8078,0.55));",
)


def mesh_page(vertices: NDArray, faces: NDArray, title: str, crease: float = 30.0) -> str:
    """The page's text for vertices [V,3] (z up, in the unit cube) and faces [F,3]; edges sharper than `crease` degrees stay sharp."""
    trimesh = optional_import("trimesh")
    clay = {"baseColorFactor": [196, 188, 178, 255], "metallicFactor": 0.0, "roughnessFactor": 0.75, "doubleSided": True}
    mesh = trimesh.Trimesh(turn_y_up(np.asarray(vertices, np.float64)), faces, process=False)
    mesh = trimesh.graph.smooth_shade(mesh, angle=np.radians(crease))
    assert len(mesh.vertex_normals)  # computed now, for trimesh writes only normals it has
    mesh.visual = trimesh.visual.TextureVisuals(material=trimesh.visual.material.PBRMaterial(**clay))
    scene = trimesh.Scene(mesh)
    scene.camera_transform = _camera_pose(fitting_distance(bounding_radius(vertices), _VIEW.focal))
    scene.camera.fov = (2 * np.degrees(np.arctan(18.0 / _VIEW.focal)),) * 2
    page = optional_import("trimesh.viewer.notebook").scene_to_html(scene)
    page = page.replace(*_LIGHTS)
    return page.replace("<title>trimesh: threejs viewer</title>", f"<title>{html.escape(title)}</title>")


def _camera_pose(distance: float) -> NDArray[np.float64]:
    """glTF's camera to world, y up: x right, y up, z back."""
    pose = np.eye(4)
    pose[:3, :3] = turn_y_up(_VIEW.rotation * [[1.0], [-1.0], [-1.0]]).T
    pose[:3, 3] = turn_y_up(_VIEW.position[None] * distance)[0]
    return pose


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 where the mesh cannot be used."""
    config, paths = parse("viewer", ("in", "out"), argv, required=("in", "out"))
    try:
        mesh = load_mesh(paths["in"], config.y_up)
    except MeshError as reason:
        print(f"error: {paths['in']}: {reason}", file=sys.stderr)
        return 1
    vertices, _, _ = normalize(mesh)
    Path(paths["out"]).write_text(mesh_page(vertices, mesh.faces, mesh.name, config.crease), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
