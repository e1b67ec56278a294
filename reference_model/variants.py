"""Copies of meshes, turned and stretched at random: what the 48 symmetries of the cube cannot add.

`python -m reference_model.variants meshes=PATH out=DIRECTORY [count=8] [least=0.4]` writes `STEM_vSEED.ply`. A flip or a quarter turn puts
every surface on the same places of the grid again; a turn by any angle does not, and a stretch makes walls thinner and edges blunter.
A copy has another geometry, so nothing later knows whose it is: meshes that are held out get none.
"""

import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reference_model.cli import parse
from reference_model.meshes import MeshError, load_mesh, save_mesh
from reference_model.sources import find_sources


def random_rotation(rng: np.random.Generator) -> NDArray[np.float64]:
    """[3,3] with determinant 1, each as likely: the Q of a normal matrix with the signs of R taken out."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else q[:, [1, 0, 2]]


def vary(vertices: NDArray[np.float64], name: str, seed: int, least: float) -> NDArray[np.float64]:
    """Vertices [V,3] of copy `seed` of the mesh `name`: turned, stretched along the axes, turned again.

    The three factors are log-uniform in [least, 1]. ValueError for another least.
    """
    if not 0 < least <= 1:
        raise ValueError(f"least must lie in (0, 1], got {least}")
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    stretch = np.exp(rng.uniform(np.log(least), 0, 3))
    return vertices @ (random_rotation(rng) * stretch @ random_rotation(rng)).T.copy()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where no copy was written, 2 for a mistake on the command line."""
    config, paths = parse("variants", ("meshes", "out"), argv, required=("meshes", "out"))
    skip = parse("train_vae", (), [])[0].held_out if config.skip is None else config.skip
    out = Path(paths["out"])
    written = 0
    try:
        sources = [source for source in find_sources(paths["meshes"], exclude=out) if source.path.stem not in skip]
        out.mkdir(parents=True, exist_ok=True)
        for source in sources:
            try:
                mesh = load_mesh(source.path)
            except MeshError as reason:
                print(f"{source.path.name}: {reason}", file=sys.stderr)
                continue
            for seed in range(config.seed, config.seed + config.count):
                turned = vary(mesh.vertices, source.path.stem, seed, config.least)
                save_mesh(out / f"{source.slug}_v{seed:03d}.ply", turned, mesh.faces)
            written += config.count
            print(f"{source.path.name}: {config.count} copies", flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(not written)


if __name__ == "__main__":
    raise SystemExit(main())
