"""How well a network reproduces meshes.

`python -m reference_model.evaluate_vae meshes=TRUTH out=DIRECTORY [weights=PATH] [resolution=[256,512]]`: every mesh goes mesh → volume →
latents (`rebuild`) → decoded voxels → marching cubes at 0. Beside each score stand the ceiling (the same volume without the
network) and the floor (the true mesh against itself, by other points). Writes `scores.json`, `scores.md`, `volumes/`, `meshes/` and
`pictures/`; scores are explained in `reference_model.metrics.compare`.
"""

import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reference_model.checkpoint import git_commit
from reference_model.cli import optional_import, parse
from reference_model.evaluate_meshes import save_side_by_side
from reference_model.extract import extract_mesh
from reference_model.meshes import MeshError, load_mesh, normalize, save_mesh
from reference_model.metrics import Surface, compare
from reference_model.reconstruct import LATENTS, load_network, rebuild
from reference_model.sdf import mesh_to_volume
from reference_model.sources import find_sources
from reference_model.vae import SparseVAE
from reference_model.vae_decode import DEFAULT_WEIGHTS, read_card
from reference_model.vae_pieces import is_open
from reference_model.volume import CELL, load_volume, save_volume

_FIXED = ("samples", "seed", "size", "grid", "thickness", "y_up")  # settings that ceiling and floor follow from
_GAPS = {"f1@0.005": "F1@.005", "f1@0.001": "F1@.001", "f1@0.0002": "F1@2e-4", "normal_consistency": "normals"}
_SCORES = {
    "f1@0.001": ("F1@.001", 1.0, 2), "f1@0.0002": ("F1@2e-4", 1.0, 2), "f1@0.005": ("F1@.005", 1.0, 2), "chamfer": ("Chamfer e-4", 1e4, 3),
    "normal_consistency": ("normals %", 1.0, 2), "area_ratio": ("area", 1.0, 4), "components": ("pieces", 1.0, 0),
    "genus": ("genus", 1.0, 0), "sharp_edge_error": ("sharp edges e-4", 1.0, 1), "normal_psnr": ("PSNR-N dB", 1.0, 1),
}  # fmt: skip


def build_volume(path: Path, resolution: int, folder: Path, settings: Mapping[str, Any], kept: bool = False) -> Path:
    """The volume of a mesh file, as a file of its own in the folder; kept: made unless it is there. MeshError as `load_mesh`."""
    target = folder / f"{path.name}_{resolution}.safetensors"
    if kept and target.exists():
        return target
    mesh = load_mesh(path, settings["y_up"])
    unit, scale, offset = normalize(mesh)
    volume = mesh_to_volume(unit, mesh.faces, resolution, thickness=settings["thickness"], scale=scale, offset=offset, y_up=mesh.y_up)
    part = target.with_name(f".{os.getpid()}.{target.name}")  # evaluations may share a folder
    save_volume(volume, part)
    part.replace(target)
    return target


def run_network(
    network: SparseVAE, path: Path, target: Path, prune: float | None = None, latents: str = "chosen"
) -> tuple[NDArray, NDArray, dict[str, Any]]:
    """Decoded surface in the unit cube, also written to `target` in the frame of its source; and what was counted and timed.

    latents, prune: as `rebuild`. Counted with pieces: the share of cells that the network corrects; with prune: how much of the children
    was decoded, and how many of the true band voxels were left out.
    """
    volume = load_volume(path)
    begin = time.perf_counter()
    z, (coords, values, resolution, inside) = rebuild(volume, network, prune, latents)
    if values.is_cuda:
        torch.cuda.synchronize()
    decoded = time.perf_counter()
    vertices, faces, report = extract_mesh(coords, values, resolution, inside)
    if len(faces) == 0:
        raise MeshError(f"no surface decoded at {resolution=}")
    facts = {"latents": len(volume.latents), "seconds_network": round(decoded - begin, 3), **asdict(report)}
    if network.config.head == "pieces":
        facts["corrected_percent"] = 100 * float(is_open(z).float().mean())
    if prune is not None:
        key = torch.tensor([resolution**2, resolution, 1])
        kept = torch.isin((volume.coords.long() * key).sum(1), (coords.cpu().long() * key).sum(1))
        facts |= {"decoded_percent": 100 * len(coords) / (CELL**3 * len(volume.latents)), "band_lost": int((~kept).sum())}
    points, triangles = vertices.cpu().numpy().astype(np.float64), faces.cpu().numpy()
    save_mesh(target, (points - volume.offset) / volume.scale, triangles, volume.y_up)
    return points, triangles, facts


def score(
    path: Path, resolution: int, volume_path: Path, vertices: NDArray, faces: NDArray, out: Path, settings: Mapping[str, Any],
    kept: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One row: facts and scores of the decoded surface, the ceiling and the floor; kept: the last two may lie beside the volume."""
    mesh = load_mesh(path, settings["y_up"])
    grid = settings["grid"]
    truth = Surface(normalize(mesh)[0], mesh.faces, grid)
    volume = load_volume(volume_path)
    ceiling_vertices, ceiling_faces, _ = extract_mesh(volume.coords, volume.values, resolution, volume.inside)
    shown = {"truth": truth, "result": Surface(vertices, faces, grid)}
    shown["ceiling"] = Surface(ceiling_vertices.numpy(), ceiling_faces.numpy(), grid)
    closed = bool(truth.topology.closed.all())
    if settings["pictures"]:
        save_side_by_side(shown, out / "pictures" / f"{path.name}_{resolution}.png", f"{path.name} at {resolution}", size=384)
    against = partial(compare, truth, samples=settings["samples"], seed=settings["seed"], picture_size=settings["size"])
    scores = {"result": against(shown["result"])}
    scores |= _limits(volume_path, kept, settings, lambda: {"ceiling": against(shown["ceiling"]), "floor": against(truth)})
    return {
        "mesh": path.name, "faces": len(mesh.faces), "resolution": resolution, "closed": closed, "truth": truth.topology.summary(),
        "thin_share": truth.thin_share(4.0 / resolution) if closed else None, "volume": dict(volume.meta),
        "scores": scores,
    }  # fmt: skip


def _limits(volume: Path, kept: bool, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Scores of ceiling and floor; kept: those in the file beside the volume if they belong to it and to these settings, else new ones."""
    if not kept:
        return make()
    path, facts = volume.with_suffix(".json"), volume.stat()
    fixed = {name: settings[name] for name in _FIXED} | {"volume": [facts.st_size, facts.st_mtime_ns]}
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["settings"] == fixed:
            return known["scores"]
    scores = make()
    part = path.with_name(f".{os.getpid()}.{path.name}")
    part.write_text(json.dumps({"settings": fixed, "scores": scores}), encoding="utf-8")
    part.replace(path)
    return scores


def gaps(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each resolution, over closed meshes: mean of ceiling minus result of each score, mean and largest |area / ceiling's area - 1|
    in percent, and how many have the ceiling's components and genus."""
    found = []
    for resolution in sorted({row["resolution"] for row in rows}):
        pairs = [(r["scores"]["result"], r["scores"]["ceiling"]) for r in rows if r["resolution"] == resolution and r["closed"]]
        if not pairs:
            continue
        area = [100 * abs(s["area_ratio"] / c["area_ratio"] - 1) for s, c in pairs]
        found.append({
            "resolution": resolution, "meshes": len(pairs), **{n: float(np.mean([c[n] - s[n] for s, c in pairs])) for n in _GAPS},
            "area": float(np.mean(area)), "area_worst": max(area),
            **{name: sum(s[name] == c[name] for s, c in pairs) for name in ("components", "genus")},
        })  # fmt: skip
    return found


def report(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """Markdown: the gap to the ceiling, what the decoding met, all scores."""
    text = ["# Meshes through the VAE", "", f"`{settings['command']}`", ""]
    facts = f"{settings['versions']}; weights: {settings['card']}; latents: {settings['latents']}"
    text += [f"{facts}; {settings['samples']:,} points each way, point to surface.", ""]
    text += ["## Gap to the ceiling, mean over closed meshes", ""]
    text += ["| R | meshes | " + " | ".join(_GAPS.values()) + " | area off by % (worst) | components equal | genus equal |"]
    text += ["|---:" * 9 + "|"]
    for g in gaps(rows):
        cells = [f"{g[name]:.2f}" for name in _GAPS] + [f"{g['area']:.2f} ({g['area_worst']:.2f})"]
        text.append(f"| {g['resolution']} | {g['meshes']} | {' | '.join(cells)} | {g['components']} | {g['genus']} |")
    text += ["", "| mesh | R | latents | encode + decode s | corners outside | cells in disagreement | vertices on openings |"]
    text[-1] += " corrected by the network % | decoded % | band voxels lost |"
    text += ["|---|" + "---:|" * 9]
    for row in rows:
        n = row["network"]
        counts = [n[name] for name in ("latents", "seconds_network", "missing_corners", "disagreeing_cells", "open_vertices")]
        counts.append(f"{n['corrected_percent']:.1f}" if "corrected_percent" in n else None)
        counts += [f"{n['decoded_percent']:.1f}", n["band_lost"]] if "band_lost" in n else ["100", 0]
        text.append(f"| {row['mesh']} | {row['resolution']} | " + " | ".join("–" if x is None else str(x) for x in counts) + " |")
    text += ["", "## Scores: result / ceiling / floor", "", "thin: area with walls under 2 voxels.", ""]
    text += ["| mesh | R | closed | thin % | " + " | ".join(title for title, _, _ in _SCORES.values()) + " |"]
    text += ["|---|---:|---|---:|" + "---|" * len(_SCORES)]
    for row in rows:
        cells = [row["mesh"], str(row["resolution"]), *(("yes", f"{row['thin_share']:.1f}") if row["closed"] else ("no", ""))]
        for name, (_, factor, digits) in _SCORES.items():
            values = [row["scores"][kind][name] for kind in ("result", "ceiling", "floor")]
            cells.append(" / ".join("–" if v is None else f"{v * factor:.{digits}f}" for v in values))
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


class _Here(Executor):
    """An executor without processes."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except MeshError as error:
            future.set_exception(error)
        return future


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 where nothing could be scored, 2 for a mistake on the command line."""
    config, paths = parse("evaluate_vae", ("meshes", "weights", "volumes", "out"), argv, required=("meshes", "out"))
    out = Path(paths["out"])
    weights = paths.get("weights", "default")
    try:
        network = load_network(weights, config.device)
        if network is None:
            raise ValueError("weights must be a path or default")
        card = read_card(DEFAULT_WEIGHTS if weights == "default" else weights)
    except ValueError as error:
        print(f"error: weights: {error}", file=sys.stderr)
        return 2
    if config.latents not in LATENTS:
        print(f"error: latents must be one of {LATENTS}, got {config.latents!r}", file=sys.stderr)
        return 2
    volumes = Path(paths.get("volumes", out / "volumes"))
    for folder in (volumes, out / "meshes", out / "pictures"):
        folder.mkdir(parents=True, exist_ok=True)
    versions = [f"commit {config.commit or git_commit()}", f"Python {platform.python_version()}"]
    versions += [f"{name} {optional_import(name).__version__}" for name in ("numpy", "torch", "trimesh")]
    settings: dict[str, Any] = {name: config[name] for name in ("samples", "seed", "size", "grid", "pictures", "thickness", "y_up")}
    settings |= {"command": " ".join(["python -m reference_model.evaluate_vae", *(sys.argv[1:] if argv is None else argv)])}
    settings["card"] = ", ".join(f"{name} {card[name]}" for name in ("commit", "step", "parameters") if name in card) or weights
    settings |= {"versions": ", ".join(versions), "weights": weights, "latents": config.latents}
    sources = [s.path for s in find_sources(paths["meshes"], exclude=out) if config.names is None or s.path.stem in config.names]
    resolutions = [config.resolution] if isinstance(config.resolution, int) else list(config.resolution)
    jobs = [(path, resolution) for resolution in resolutions for path in sources]
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.workers, spawn) if config.workers > 1 else _Here() as pool:
        built = [pool.submit(build_volume, path, resolution, volumes, settings, "volumes" in paths) for path, resolution in jobs]
        waiting = []
        for (path, resolution), future in zip(jobs, built, strict=True):
            try:
                volume_path = future.result()
                target = out / "meshes" / f"{path.stem}_{resolution}.ply"
                vertices, faces, facts = run_network(network, volume_path, target, config.prune, config.latents)
            except MeshError as reason:
                left_out.append({"mesh": path.name, "resolution": resolution, "reason": str(reason)})
                print(f"{path.name}: {reason}", file=sys.stderr)
                continue
            scored = pool.submit(score, path, resolution, volume_path, vertices, faces, out, settings, "volumes" in paths)
            waiting.append((scored, facts))
        for scored, facts in waiting:
            row = scored.result() | {"network": facts}
            rows.append(row)
            result, ceiling = row["scores"]["result"], row["scores"]["ceiling"]
            shares = ", ".join(f"{_GAPS[name]} {result[name]:.2f} of {ceiling[name]:.2f}" for name in ("f1@0.001", "f1@0.0002"))
            print(f"{row['mesh']} at {row['resolution']}: {shares}", flush=True)
            document = {"settings": settings, "gaps": gaps(rows), "rows": rows, "left_out": left_out}
            (out / "scores.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
            (out / "scores.md").write_text(report(rows, settings), encoding="utf-8")
    return int(not rows)


if __name__ == "__main__":
    raise SystemExit(main())
