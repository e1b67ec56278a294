"""Closed shapes made by code, as many as one likes: (family, seed) names each of them, and names it again tomorrow.

`python -m reference_model.shapes out=DIRECTORY [families=all] [count=10] [seed=0] [format=ply]` writes `FAMILY_SEED.ply` for `count` seeds
of each family and `shapes.csv` with the parameters. Every family has at least six continuous parameters; all shapes are closed manifolds by
construction (manifold3d), their longest side is 1.9, centred, z up, front = -y.
"""

import csv
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from reference_model.cli import parse
from reference_model.meshes import LONGEST_SIDE, save_mesh
from reference_model.shapes_kit import Family
from reference_model.shapes_parts import PARTS
from reference_model.shapes_solids import SOLIDS

FAMILIES: dict[str, Family] = {**SOLIDS, **PARTS}
_TRIES = 20
_SHORTEST = 2e-5  # edges below this are the slivers that booleans leave; they collapse


@dataclass(frozen=True, eq=False)
class Shape:
    """A closed mesh in the cube [-1,1]^3 and what it was made of."""

    vertices: NDArray[np.float64]  # [V,3], longest side of the bounds 1.9, centred
    faces: NDArray[np.int64]  # [F,3], outward
    parameters: dict[str, float]
    genus: int  # summed over the pieces


def make_shape(family: str, seed: int, **parameters: float) -> Shape:
    """The shape (family, seed); parameters given by name replace drawn ones, the others and all places stay as the seed has them.

    A draw that leaves nothing (a body cut away), or parts too near each other for float32 files, is followed by the next of the same seed.
    ValueError for an unknown family or parameter, for a parameter outside its range, and when `parameters` fail however often it is drawn.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown {family=}, one of {' '.join(FAMILIES)}")
    ranges = FAMILIES[family].parameters
    for name, value in parameters.items():
        if name not in ranges:
            raise ValueError(f"{family} has no parameter {name!r}, only {' '.join(ranges)}")
        if not ranges[name][0] <= value <= ranges[name][1]:
            raise ValueError(f"{family}: {name} lies in {ranges[name]}, got {value}")
    for attempt in range(_TRIES):
        rng = np.random.default_rng([zlib.crc32(family.encode()), seed, attempt])
        drawn = {name: float(rng.uniform(low, high)) for name, (low, high) in ranges.items()} | parameters
        solid = FAMILIES[family].build(SimpleNamespace(**drawn), rng)
        if solid.status().name == "NoError" and not solid.is_empty() and solid.volume() > 1e-4:
            low, high = (np.array(corner) for corner in (solid.bounding_box()[:3], solid.bounding_box()[3:]))
            solid = solid.translate(-(low + high) / 2).scale([LONGEST_SIDE / (high - low).max()] * 3)
            solid = solid.simplify(_SHORTEST)
            pieces, mesh = solid.decompose(), solid.to_mesh64()
            vertices = mesh.vert_properties[:, :3].astype(np.float32).astype(np.float64)  # as float32 files hold them
            if len(np.unique(vertices, axis=0)) < len(vertices):
                continue
            return Shape(vertices, np.asarray(mesh.tri_verts, dtype=np.int64), drawn, sum(piece.genus() for piece in pieces))
    raise ValueError(f"{family} makes no closed solid of {parameters} and {seed=}")


def main() -> int:
    config, paths = parse("shapes", ("out",), required=("out",))
    names = list(FAMILIES) if config.families == "all" else str(config.families).split("+")
    out = Path(paths["out"])
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "shapes.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "family", "seed", "faces", "genus", "parameters"])
        for name in names:
            for seed in range(config.seed, config.seed + config.count):
                shape = make_shape(name, seed)
                path = f"{name}_{seed:06d}.{config.format}"
                save_mesh(out / path, shape.vertices, shape.faces)
                table.writerow([path, name, seed, len(shape.faces), shape.genus, json.dumps(shape.parameters)])
            print(f"{name}: {config.count} shapes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
