"""Time and memory of surface extraction, resampling and a symmetry: `python -m benchmarks.extraction [--resolution 1024] [--device cuda]`.

The shape is a gyroid (period 0.48) in a ball of radius 0.62: 18.5 million band voxels at 1024, more than the surface of most objects has.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reference_model.extract import extract_mesh
from reference_model.resample import resample
from reference_model.symmetry import apply_symmetry
from reference_model.tiles import CELL, lattice
from reference_model.volume import TAU, Volume, group_voxels, voxel_centers


def gyroid(p: Tensor) -> Tensor:
    """Distance to first order, points [n,3] → [n]."""
    wave = 13.0
    sx, sy, sz = (p * wave).sin().unbind(-1)
    cx, cy, cz = (p * wave).cos().unbind(-1)
    slope = torch.stack((cx * cy - sz * sx, cy * cz - sx * sy, cz * cx - sy * sz)).norm(dim=0).clamp(min=0.3) * wave
    return torch.maximum((sx * cy + sy * cz + sz * cx) / slope, p.norm(dim=-1) - 0.62)


def gyroid_volume(resolution: int, margin: float, device: str) -> Volume:
    """Volume that holds |s| < tau + margin; nothing marked sharp, no signs outside the band."""
    reach = TAU + margin
    cells = lattice(resolution // CELL, device)
    cells = cells[gyroid(voxel_centers(cells, resolution // CELL)).abs() < 1.2 * reach + 2.5 * CELL / resolution]
    kept: list[tuple[Tensor, Tensor]] = []
    for part in cells.split(4096):
        points = (part[:, None] * CELL + lattice(CELL, device)).flatten(0, 1)
        s = gyroid(voxel_centers(points, resolution))
        band = s.abs() < reach
        kept.append((points[band].int(), s[band] / TAU))
    coords, values = (torch.cat(x) for x in zip(*kept, strict=True))
    order, latents, latent_index = group_voxels(coords, resolution)
    none = torch.zeros(len(coords), dtype=torch.bool, device=device)
    return Volume(resolution, coords[order], values[order], none, latents, latent_index, none.new_zeros(len(latents), CELL**3))


def timed(work: Callable[[], Any], device: str) -> tuple[Any, str]:
    if device != "cpu":
        torch.cuda.synchronize()
    begin, cpu = time.perf_counter(), time.process_time()
    result = work()
    if device != "cpu":
        torch.cuda.synchronize()
    return result, f"{time.perf_counter() - begin:.2f} s, {time.process_time() - cpu:.2f} CPU-s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    resolution, device = options.resolution, options.device
    name = torch.cuda.get_device_name() if device != "cpu" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}")
    volume = gyroid_volume(resolution, 0.0, device)
    for _ in range(1 if device == "cpu" else 2):  # the first call on a GPU loads its kernels
        (vertices, faces, report), seconds = timed(partial(extract_mesh, volume.coords, volume.values, resolution), device)
    print(f"extract   {report.voxels:,} voxels at {resolution} → {len(vertices):,} vertices, {len(faces):,} faces: {seconds}")
    print(f"          {report.open_vertices} vertices on openings")
    _, seconds = timed(partial(apply_symmetry, volume, 31), device)
    print(f"symmetry  {seconds}")
    del vertices, faces, volume
    peak = torch.cuda.max_memory_allocated() if device != "cpu" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak      {peak / 1e9:.1f} GB so far, the making of the volume included")
    source = gyroid_volume(resolution, 3**0.5 * 2 / resolution, device)
    for target in (r for r in (512, 384, 256) if r < resolution):
        found, seconds = timed(partial(resample, source, target), device)
        print(f"resample  {len(source.coords):,} voxels → {len(found.coords):,} at {target}: {seconds}")


if __name__ == "__main__":
    main()
