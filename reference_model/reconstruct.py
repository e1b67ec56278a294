"""The round trip of one file: `python -m reference_model.reconstruct in=MESH out=MESH resolution=256 network=none`.

mesh → unit cube → volume → marching cubes → frame and units of the file. Without a network it shows what the grid can hold.
"""

import sys
import time
from collections.abc import Sequence

import numpy as np
import torch

from reference_model.cli import parse
from reference_model.extract import ExtractionReport, extract_mesh
from reference_model.meshes import MeshError, load_mesh, normalize, save_mesh
from reference_model.sdf import mesh_to_volume
from reference_model.symmetry import symmetries
from reference_model.volume import Volume


def volume_to_mesh(volume: Volume) -> tuple[np.ndarray, np.ndarray, ExtractionReport]:
    """Surface of a volume in the z-up frame and units of its source: vertices [V,3] float64, faces [F,3] int64, and the report."""
    vertices, faces, report = extract_mesh(volume.coords, volume.values, volume.resolution, volume.inside)
    motion = symmetries()[int(volume.meta.get("symmetry", 0))].double()
    if torch.det(motion) < 0:
        faces = faces.flip(1)
    unit = vertices.cpu().double() @ motion
    return ((unit - torch.tensor(volume.offset).double()) / volume.scale).numpy(), faces.cpu().numpy(), report


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 where the mesh cannot be used, 2 for a mistake on the command line."""
    config, paths = parse("reconstruct", ("in", "out"), argv, required=("in", "out"))
    if config.network != "none":
        print(f"error: network must be none, got {config.network}", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    try:
        mesh = load_mesh(paths["in"], config.y_up)
        unit, scale, offset = normalize(mesh)
        volume = mesh_to_volume(
            unit, mesh.faces, config.resolution, thickness=config.thickness, sharp_angle=config.sharp_angle,
            scale=scale, offset=offset, y_up=mesh.y_up, meta={"source": mesh.name},
        )  # fmt: skip
        built = time.perf_counter()
        vertices, faces, report = volume_to_mesh(volume)
        if len(faces) == 0:
            raise MeshError(f"no surface left at {config.resolution=}")
        extracted = time.perf_counter()
        save_mesh(paths["out"], vertices, faces, mesh.y_up)
    except ValueError as error:
        print(f"error: {paths['in']}: {error}", file=sys.stderr)
        return 1
    print(f"in      {len(mesh.vertices):,} vertices, {len(mesh.faces):,} faces")
    print(f"volume  {len(volume.coords):,} voxels, {len(volume.latents):,} latents at {volume.resolution}, {built - begin:.1f} s")
    for key, value in volume.meta.items():
        print(f"        {key}: {value}")
    print(f"out     {len(vertices):,} vertices, {len(faces):,} faces, {extracted - built:.1f} s")
    print(f"        corners outside the band: {report.missing_corners:,}, cells in disagreement: {report.disagreeing_cells:,}", end="")
    print(f", vertices on openings: {report.open_vertices:,}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
