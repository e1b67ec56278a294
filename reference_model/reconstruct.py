"""One file there and back: `python -m reference_model.reconstruct in=MESH out=MESH resolution=256 network=none|default|PATH`.

mesh → unit cube → volume (→ latents → volume, with a network) → surface at 0 → frame and units of the file. Without a network it
shows what the grid can hold. With one, latents have no noise, so the same file gives the same mesh: those of `encode_volume`, or with
latents=mean the mean of the posterior.
"""

import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reference_model.cli import parse
from reference_model.dataset import collate_volumes
from reference_model.extract import ExtractionReport, extract_mesh
from reference_model.meshes import MeshError, load_mesh, normalize, save_mesh
from reference_model.sdf import mesh_to_volume
from reference_model.symmetry import symmetries
from reference_model.vae import SparseVAE
from reference_model.vae_decode import DEFAULT_WEIGHTS, decode_volume, load_vae
from reference_model.vae_encode import encode_volume
from reference_model.volume import Volume

LATENTS = ("chosen", "mean")  # by `encode_volume`; of the posterior


def volume_to_mesh(
    volume: Volume, network: SparseVAE | None = None, sharp: bool | None = None, latents: str = "chosen"
) -> tuple[np.ndarray, np.ndarray, ExtractionReport]:
    """Surface of a volume, or of what a network makes of it, in the z-up frame and units of its source.

    sharp: edges inside cells, as `extract_mesh`; None: where there is no network, whose values are no exact distances.
    latents: as `rebuild`.
    Returns vertices [V,3] float64, faces [F,3] int64 and the report.
    """
    vertices, faces, report = unit_mesh(volume, network, network is None if sharp is None else sharp, latents)
    motion = symmetries()[int(volume.meta.get("symmetry", 0))].double()
    if torch.det(motion) < 0:
        faces = faces.flip(1)
    unit = vertices.cpu().double() @ motion
    return ((unit - torch.tensor(volume.offset).double()) / volume.scale).numpy(), faces.cpu().numpy(), report


def unit_mesh(volume: Volume, network: SparseVAE | None, sharp: bool, latents: str) -> tuple[Tensor, Tensor, ExtractionReport]:
    """As `extract_mesh`, in the unit cube; with a network from its decoded values at all children of the volume's latents."""
    if network is None:
        return extract_mesh(volume.coords, volume.values, volume.resolution, volume.inside, sharp)
    return extract_mesh(*rebuild(volume, network, latents=latents)[1], sharp)


@torch.no_grad()
def rebuild(
    volume: Volume, network: SparseVAE, prune: float | None = None, latents: str = "chosen"
) -> tuple[Tensor, tuple[Tensor, Tensor, int, Tensor | None]]:
    """volume → its latents z [L,16] and what they decode to, (coords, values, resolution, inside) as `decode_volume`.

    latents: "chosen" by `encode_volume`, or the "mean" of the posterior; ValueError for others. Tensors are on the network's device.
    """
    if latents not in LATENTS:
        raise ValueError(f"latents must be one of {LATENTS}, got {latents!r}")
    batch = collate_volumes([volume]).to(next(network.parameters()).device)
    z = encode_volume(network, batch) if latents == "chosen" else network.encode(batch).mean
    coords, values, inside = decode_volume(network, z, batch.latents[:, 1:], volume.resolution, prune=prune)
    return z, (coords, values, volume.resolution, inside)


def load_network(name: str, device: str | None) -> SparseVAE | None:
    """"none", "default" (the weights in the package) or a path; device None: the GPU where there is one. ValueError for other files."""
    if name == "none":
        return None
    path = DEFAULT_WEIGHTS if name == "default" else name
    try:
        return load_vae(path, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except OSError as error:
        raise ValueError(f"no weights at {path}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 where the mesh cannot be used, 2 for a mistake on the command line."""
    config, paths = parse("reconstruct", ("in", "out", "network"), argv, required=("in", "out"))
    try:
        network = load_network(paths.get("network", "none"), config.device)
    except ValueError as error:
        print(f"error: network: {error}", file=sys.stderr)
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
        vertices, faces, report = volume_to_mesh(volume, network, config.sharp, config.latents)
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
