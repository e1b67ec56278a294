"""Copies of meshes, turned, stretched and roughened at random: what the 48 symmetries of the cube cannot add.

`python -m reference_model.variants meshes=PATH out=DIRECTORY [count=8] [least=0.4] [rough=0]` writes `STEM_vSEED.ply`. A flip or a quarter
turn puts every surface on the same places of the grid again; a turn by any angle does not, and a stretch makes walls thinner and edges
blunter. Bumps (`rough`) are what scans and worn things have and shapes made by code have not: detail of the size of the grid.
A copy has another geometry, so nothing later knows whose it is: held-out meshes, and those of the same geometry, get none, and
`reference_model.prepare` may put copies of one mesh in different splits.
"""

import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reference_model.cli import optional_import, parse
from reference_model.meshes import LONGEST_SIDE, Mesh, MeshError, load_mesh, save_mesh
from reference_model.sources import Source, find_sources, geometry_sha256

_WAVES = (0.015, 0.15)  # lengths of the shortest and the longest bump: 4 and 38 voxels at 512
_COUNT = 32  # of waves
_MOST_FACES = 400_000


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
    first, last = random_rotation(rng), random_rotation(rng)
    return ((vertices @ first) * stretch) @ last


def roughen(
    vertices: NDArray[np.float64], faces: NDArray[np.int64], name: str, seed: int, height: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The mesh with bumps along its normals: waves of all directions, 0.015 to 0.15 long, together of rms `height`.

    Lengths are those of the normal cube, where the longest side is LONGEST_SIDE. Triangles are cut in four, all of them, while edges are
    longer than a third of the shortest wave, so closed meshes stay closed; at 400,000 faces that ends, and the finest bumps are lost.
    """
    mesh = optional_import("trimesh").Trimesh(vertices, faces, process=False)
    unit = LONGEST_SIDE / mesh.extents.max()
    while 4 * len(mesh.faces) <= _MOST_FACES and mesh.edges_unique_length.max() * unit > _WAVES[0] / 3:
        mesh = mesh.subdivide()
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed, 1])
    directions = rng.normal(size=(_COUNT, 3))
    lengths = np.exp(rng.uniform(np.log(_WAVES[0]), np.log(_WAVES[1]), _COUNT))
    waves = 2 * np.pi * directions / (np.linalg.norm(directions, axis=1) * lengths)[:, None]
    bumps = np.sin(mesh.vertices * unit @ waves.T + rng.uniform(0, 2 * np.pi, _COUNT)).sum(1) * (2 / _COUNT) ** 0.5
    return np.asarray(mesh.vertices + mesh.vertex_normals * (bumps * height / unit)[:, None]), np.asarray(mesh.faces)


def read_mesh(source: Source) -> Mesh | None:
    """None where the file is no mesh, with the reason on stderr."""
    try:
        return load_mesh(source.path)
    except MeshError as reason:
        print(f"{source.path.name}: {reason}", file=sys.stderr)
        return None


def meshes_to_vary(sources: Sequence[Source], skip: Sequence[str]) -> Iterator[tuple[Source, Mesh]]:
    """Readable sources but those whose stem is in `skip` and those of the same geometry; ValueError where two would share a name."""
    slugs = Counter(source.slug for source in sources)
    if twice := sorted(slug for slug, count in slugs.items() if count > 1):
        raise ValueError(f"copies are named after the mesh, and these names come more than once: {' '.join(twice)}")
    skipped = [mesh for source in sources if source.path.stem in skip and (mesh := read_mesh(source))]
    held = {geometry_sha256(mesh) for mesh in skipped}
    for source in sources:
        if source.path.stem not in skip and (mesh := read_mesh(source)) and not (held and geometry_sha256(mesh) in held):
            yield source, mesh


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where no copy was written, 2 for a mistake on the command line."""
    config, paths = parse("variants", ("meshes", "out"), argv, required=("meshes", "out"))
    skip = parse("train_vae", (), [])[0].held_out if config.skip is None else config.skip
    out = Path(paths["out"])
    written = 0
    try:
        if not 0 <= config.rough < 0.1:
            raise ValueError(f"rough must lie in [0, 0.1), got {config.rough}")
        if isinstance(skip, (str, int, float)):
            raise ValueError(f"skip must be a list of stems, as [spot,sword], got {skip!r}")
        out.mkdir(parents=True, exist_ok=True)
        for source, mesh in meshes_to_vary(find_sources(paths["meshes"], exclude=out), [str(name) for name in skip]):
            for seed in range(config.seed, config.seed + config.count):
                moved, faces = vary(mesh.vertices, source.path.stem, seed, config.least), mesh.faces
                if config.rough:
                    moved, faces = roughen(moved, faces, source.path.stem, seed, config.rough)
                save_mesh(out / f"{source.slug}_v{seed:03d}.ply", moved, faces)
                written += 1
            print(f"{source.path.name}: {config.count} copies", flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(not written)


if __name__ == "__main__":
    raise SystemExit(main())
