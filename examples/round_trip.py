"""Mesh → volume → latents → mesh, with scores and a picture: `python -m examples.round_trip [--mesh PATH] [--resolution 256]`.

The weights are those of the package unless `--weights` names others.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from examples.demo import trefoil
from reference_model.evaluate_vae import build_volume, run_network, score
from reference_model.reconstruct import load_network
from reference_model.volume import load_volume

ROWS = {
    "f1@0.005": ("F1@.005 %", 1.0), "f1@0.001": ("F1@.001 %", 1.0), "chamfer": ("Chamfer × 1e4", 1e4),
    "normal_consistency": ("normals %", 1.0), "area_ratio": ("area", 1.0),
}  # fmt: skip


def round_trip(
    mesh: Path, picture: Path, weights: str = "default", resolution: int = 256, y_up: bool | None = None
) -> dict[str, Any]:
    """Scores of one mesh through the network, the grid alone and the mesh itself; draws them to `picture`."""
    settings: dict[str, Any] = dict(samples=50_000, seed=0, size=384, grid=128, pictures=True, thickness=None, y_up=y_up)
    network = load_network(weights, None)
    if network is None:
        raise ValueError("weights must be a path or default, got none")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for name in ("volumes", "meshes", "pictures"):
            (out / name).mkdir()
        begin = time.perf_counter()
        path = build_volume(mesh, resolution, out / "volumes", settings)
        built = time.perf_counter()
        vertices, faces, facts = run_network(network, path, out / "meshes" / "result.ply", None)
        row = score(mesh, resolution, path, vertices, faces, out, settings)
        shutil.copyfile(next((out / "pictures").glob("*.png")), picture)
        facts |= {"voxels": len(load_volume(path).coords), "seconds_volume": built - begin}
    return row | {"network": facts}


def report(row: dict[str, Any], picture: Path) -> None:
    facts, resolution = row["network"], row["resolution"]
    print(f"\n{row['mesh']} at {resolution}³: {facts['voxels']:,} voxels in {facts['seconds_volume']:.1f} s", end="")
    print(f" → {facts['latents']:,} latents of 16 numbers → mesh in {facts['seconds_network']:.1f} s\n")
    print(f"{'':<16}{'through the VAE':>18}{'grid alone':>14}{'mesh itself':>14}")
    for name, (title, factor) in ROWS.items():
        values = [row["scores"][kind][name] * factor for kind in ("result", "ceiling", "floor")]
        print(f"{title:<16}{values[0]:>18.2f}{values[1]:>14.2f}{values[2]:>14.2f}")
    print(f"\nmesh, reconstruction and what the grid can hold: {picture}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mesh", type=Path, help="any file that reference_model.prepare reads; default: a trefoil knot")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--up", choices=("y", "z"), help="axis that points up in the file; default: y for glTF, else z")
    parser.add_argument("--out", type=Path, default=Path("round_trip.png"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mesh = args.mesh or Path(folder) / "trefoil.ply"
        if args.mesh is None:
            trefoil().export(mesh)
        y_up = None if args.up is None else args.up == "y"
        report(round_trip(mesh, args.out, args.weights, args.resolution, y_up), args.out)


if __name__ == "__main__":
    main()
