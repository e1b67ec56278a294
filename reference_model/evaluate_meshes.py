"""Tables of how well meshes are reproduced.

`python -m reference_model.evaluate_meshes meshes=TRUTH out=DIRECTORY [resolution=[512,1024]]` sends every mesh through a volume and back
without a network. With `results=PATH` (a file, or a directory with files of the same stem, in the frame of the true ones) it scores those,
and the round trip beside them as the ceiling. Beside every score stands the sampling floor: the true mesh against itself, by other points.
Writes `scores.json`, `scores.md` and `pictures/*.png`; scores are explained in `reference_model.metrics.compare`.
A run with the same settings goes on where it stopped; all meshes of one resolution come before the next.
"""

import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference_model.cameras import bounding_radius, metric_cameras
from reference_model.cli import optional_import, parse
from reference_model.extract import extract_mesh
from reference_model.meshes import SUFFIXES, MeshError, load_mesh, normalize
from reference_model.metrics import Surface, compare
from reference_model.render import on_background, to_bytes
from reference_model.repair import resolve_surface, wall_thickness
from reference_model.score_tables import markdown
from reference_model.sdf import sharp_edges, sheet_thickness, surface_to_volume
from reference_model.sources import find_sources


def round_trip(
    unit: NDArray, faces: NDArray, resolution: int, thickness: float | None, grid: int, sharp: bool
) -> tuple[Surface, dict[str, Any]]:
    """The surface of a mesh's volume, both in the unit cube, and what was counted and timed on the way."""
    start, start_cpu = time.perf_counter(), time.process_time()
    solid = resolve_surface(unit, faces, sheet_thickness(resolution) if thickness is None else thickness)
    volume = surface_to_volume(solid, resolution)
    built, built_cpu = time.perf_counter(), time.process_time()
    vertices, out_faces, report = extract_mesh(volume.coords, volume.values, resolution, volume.inside, sharp)
    if len(out_faces) == 0:
        raise MeshError(f"no surface left at {resolution=}")
    facts = {
        "voxels": len(volume.coords), "latents": len(volume.latents), "seconds_build": round(built - start, 2),
        "cpu_seconds_build": round(built_cpu - start_cpu, 2), "cpu_seconds_extract": round(time.process_time() - built_cpu, 2),
        "seconds_extract": round(time.perf_counter() - built, 2), "missing_corners": report.missing_corners,
        "thin_walls": 100.0 * float((wall_thickness(solid, 20_000) < 4.0 / resolution).mean()),
        "disagreeing_cells": report.disagreeing_cells, "open_vertices": report.open_vertices, **volume.meta,
    }  # fmt: skip
    return Surface(vertices.cpu().numpy(), out_faces.cpu().numpy(), grid), facts


def evaluate(path: Path, result: Path | None, resolution: int, config: Any, pictures: Path | None) -> dict[str, Any]:
    """One row: facts and scores of a mesh file, its result (None: the round trip), the ceiling and the floor. MeshError as `load_mesh`."""
    mesh = load_mesh(path, config.y_up)
    unit, scale, offset = normalize(mesh)
    truth = Surface(unit, mesh.faces, config.grid)
    closed = bool(truth.topology.closed.all())
    row: dict[str, Any] = {
        "mesh": path.name, "faces": len(mesh.faces), "resolution": resolution, "closed": closed, "truth": truth.topology.summary(),
        "thin_share": truth.thin_share(4.0 / resolution) if closed else None,
        "crease_share": crease_share(truth, 2.0 / resolution),
    }  # fmt: skip
    shown = {"truth": truth}
    if result is None:
        shown["result"], row["round_trip"] = round_trip(unit, mesh.faces, resolution, config.thickness, config.grid, config.sharp)
    else:
        other = load_mesh(result, config.y_up)
        row["result"] = result.name
        shown["result"] = Surface(other.vertices * scale + offset, other.faces, config.grid)
        if config.ceiling:
            shown["ceiling"], row["round_trip"] = round_trip(unit, mesh.faces, resolution, config.thickness, config.grid, config.sharp)
    if not closed and "round_trip" in row:
        row["thin_share"] = row["round_trip"]["thin_walls"]
    scored = {**shown, "floor": truth}
    del scored["truth"]
    row["scores"] = {name: compare(truth, surface, config.samples, config.seed, config.size) for name, surface in scored.items()}
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
        save_side_by_side(shown, pictures / f"{path.name}_{resolution}.png", f"{path.name} at {resolution}")
    return row


def crease_share(surface: Surface, reach: float, samples: int = 20_000) -> float:
    """Percent of the area within `reach` of an edge whose faces' normals differ by over 30 degrees: what marching cubes cut off."""
    edges = sharp_edges(surface.vertices, surface.faces, 30.0)
    if len(edges) == 0:
        return 0.0
    tree = optional_import("igl").AABB()
    tree.init(surface.vertices, edges)
    points, _ = surface.sample(samples, seed=0)
    return 100.0 * float((tree.squared_distance(surface.vertices, edges, points)[0] < reach**2).mean())


def save_side_by_side(surfaces: Mapping[str, Surface], path: Path, title: str, size: int = 448) -> None:
    """A PNG with a column a surface: colour and normals from the front, normals from behind; last the angle to the truth's normals."""
    image, draw = optional_import("PIL.Image"), optional_import("PIL.ImageDraw")
    font = optional_import("PIL.ImageFont").load_default(18)
    truth = surfaces["truth"]
    front, _, _, back = metric_cameras(bounding_radius(truth.vertices))
    columns, normals = [], {}
    for name, surface in surfaces.items():
        view = surface.scene.render(front, size)
        normals[name] = [view["normal"], surface.scene.trace(back, size)["normal"]]
        columns.append([on_background(view)] + [_on_white(n) for n in normals[name]])
    for name in list(surfaces)[1:]:
        errors = [_angle_picture(t, n) for t, n in zip(normals["truth"], normals[name], strict=True)]
        columns.append([np.full((size, size, 3), 255, np.uint8), *errors])
    bands = [_used_rows([column[y] for column in columns]) for y in range(3)]
    tops = np.cumsum([36] + [band.stop - band.start for band in bands]).tolist()
    sheet = image.new("RGB", (size * len(columns), tops[-1]), "white")
    pen = draw.Draw(sheet)
    labels = [*surfaces, *(f"{name} off by: grey 0°, red 15° and more" for name in list(surfaces)[1:])]
    for x, (label, column) in enumerate(zip(labels, columns, strict=True)):
        pen.text((x * size + 10, 8), f"{title}: {label}" if x == 0 else label, fill="black", font=font)
        for top, band, picture in zip(tops, bands, column, strict=False):
            sheet.paste(image.fromarray(picture[band]), (x * size, top))
    sheet.save(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 where nothing could be scored."""
    config, paths = parse("evaluate_meshes", ("meshes", "results", "out"), argv, required=("meshes", "out"))
    out, results = Path(paths["out"]), Path(paths["results"]) if "results" in paths else None
    versions = [f"{name} {optional_import(name).__version__}" for name in ("numpy", "torch", "trimesh")]
    command = ["python -m reference_model.evaluate_meshes", *(sys.argv[1:] if argv is None else argv)]
    settings: dict[str, Any] = {"command": " ".join(command), "samples": config.samples, "results": results is not None}
    settings["versions"] = ", ".join([f"Python {platform.python_version()}", *versions])
    settings["config"] = {name: config[name] for name in config if name not in ("resolution", "cad")}
    settings["cad"] = list(config.cad)
    out.mkdir(parents=True, exist_ok=True)
    rows, left_out = _rows_before(out / "scores.json", settings)
    resolutions = [config.resolution] if isinstance(config.resolution, int) else list(config.resolution)
    done = {(row["mesh"], row["resolution"]) for row in rows + left_out}
    for resolution in resolutions if results is None else resolutions[:1]:
        for source in find_sources(paths["meshes"], exclude=out):
            if (source.path.name, resolution) in done:
                continue
            try:
                result = None if results is None else _result_of(source.path, results)
                rows.append(evaluate(source.path, result, resolution, config, out / "pictures" if config.pictures else None))
            except MeshError as reason:
                left_out.append({"mesh": source.path.name, "resolution": resolution, "reason": str(reason)})
                print(f"{source.path.name}: {reason}", file=sys.stderr)
            else:
                scores = rows[-1]["scores"]["result"]
                print(f"{source.path.name} at {resolution}: F1@.001 {scores['f1@0.001']:.2f}, area {scores['area_ratio']:.4f}", flush=True)
            rows.sort(key=lambda row: (row["mesh"], row["resolution"]))
            _write(out, settings, rows, left_out)
    _write(out, settings, rows, left_out)
    return int(not rows)


def _write(out: Path, settings: dict[str, Any], rows: list[dict[str, Any]], left_out: list[dict[str, Any]]) -> None:
    document = {"settings": settings, "rows": rows, "left_out": left_out}
    (out / "scores.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    (out / "scores.md").write_text(markdown(rows, left_out, settings), encoding="utf-8")


def _rows_before(path: Path, settings: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and left-out meshes of an earlier run with these settings."""
    if not path.exists():
        return [], []
    document = json.loads(path.read_text(encoding="utf-8"))
    same = all(document["settings"].get(name) == settings[name] for name in ("config", "results", "samples", "versions"))
    return (document["rows"], document["left_out"]) if same else ([], [])


def _result_of(path: Path, results: Path) -> Path:
    if results.is_file():
        return results
    found = sorted(p for p in results.iterdir() if p.stem == path.stem and p.suffix.lower() in SUFFIXES)
    if len(found) != 1:
        raise MeshError(f"{results} holds {len(found)} meshes of that stem, one is needed")
    return found[0]


def _used_rows(pictures: Sequence[NDArray], margin: int = 16) -> slice:
    """The rows where any picture is not white, and a margin."""
    rows = np.flatnonzero(np.any([(picture < 255).any((1, 2)) for picture in pictures], axis=0))
    return slice(max(int(rows[0]) - margin, 0), int(rows[-1]) + margin + 1)


def _on_white(normal: NDArray) -> NDArray[np.uint8]:
    return to_bytes(np.where(normal.any(2, keepdims=True), normal * 0.5 + 0.5, 1.0))


def _angle_picture(true: NDArray, seen: NDArray) -> NDArray[np.uint8]:
    """Angle between normals: grey 0, red 15 degrees, dark red where only one of the two is seen."""
    angle = np.degrees(np.arccos(np.clip((true * seen).sum(2), -1, 1)))
    one, any_ = true.any(2) != seen.any(2), true.any(2) | seen.any(2)
    share = np.clip(angle / 15.0, 0, 1)[..., None]
    picture = np.array([0.93, 0.93, 0.93]) * (1 - share) + np.array([0.85, 0.12, 0.10]) * share
    picture[one] = [0.45, 0.0, 0.0]
    picture[~any_] = 1.0
    return to_bytes(picture)


if __name__ == "__main__":
    raise SystemExit(main())
