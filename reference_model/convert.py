"""One mesh file to one volume and its row of the metadata."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reference_model.contact_sheet import save_preview
from reference_model.meshes import Mesh, MeshError, load_mesh, normalize
from reference_model.repair import resolve_surface, wall_thickness
from reference_model.sdf import sheet_thickness, surface_to_volume
from reference_model.sources import Source, file_sha256, geometry_sha256
from reference_model.volume import save_volume, without_margin

COLUMNS = (
    "id", "source", "status", "reason", "split", "resolution", "tokens", "voxels", "sharp_voxels", "bytes", "seconds", "faces", "vertices",
    "components", "watertight", "repaired", "thickness", "sheet_thickness", "copies", "patches", "turned", "sheets", "dropped",
    "lone_faces", "border_edges", "caps", "sign_conflicts", "specks", "scale", "y_up", "geometry_sha256", "file_sha256", "licence",
)  # fmt: skip


class FilteredError(Exception):
    """A sound mesh that the filters leave out; the message is the reason."""


def prepare_one(source: Source, out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make the volume of one source below `out`; its row of the metadata. Never raises for what a file holds."""
    start = time.perf_counter()
    row: dict[str, Any] = {"source": str(source.path), "licence": source.licence, "resolution": settings["resolution"]}
    try:
        row |= _prepare(source, out, settings, row)
        row |= {"status": "ok", "reason": ""}
    except FilteredError as reason:
        row |= {"status": "filtered", "reason": str(reason)}
    except MeshError as reason:
        row |= {"status": "rejected", "reason": str(reason)}
    except MemoryError:
        row |= {"status": "rejected", "reason": "out of memory"}
    return row | {"seconds": round(time.perf_counter() - start, 2)}


def _prepare(source: Source, out: Path, settings: Mapping[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    resolution = settings["resolution"]
    row["file_sha256"] = file_sha256(source.path)
    if source.sha256 and source.sha256 != row["file_sha256"]:
        raise MeshError(f"sha256 differs from the manifest: {row['file_sha256']}")
    mesh = load_mesh(source.path, settings["y_up"])
    geometry = geometry_sha256(mesh)
    row |= {
        "geometry_sha256": geometry, "faces": len(mesh.faces), "vertices": len(mesh.vertices), "components": _components(mesh),
        "split": split_of(geometry, settings["val"], settings["test"]), "y_up": mesh.y_up,
    }  # fmt: skip
    limits = settings["filters"]
    _limit("faces", row["faces"], limits["min_faces"], limits["max_faces"])
    _limit("components", row["components"], None, limits["max_components"])
    vertices, scale, offset = normalize(mesh)
    surface = resolve_surface(vertices, mesh.faces, settings["thickness"] or sheet_thickness(resolution))
    walls = wall_thickness(surface)
    row |= {"thickness": round(float(np.quantile(walls, 0.05)), 6), "scale": scale}
    row |= {"watertight": surface.report["closed"], "repaired": str(not surface.exact).lower()}
    row |= {name: surface.report[name] for name in surface.report if name in COLUMNS}
    _limit("thickness in voxels", row["thickness"] * resolution / 2, limits["min_thickness"], None)
    meta = {"source": mesh.name, "sha256": row["file_sha256"], "geometry_sha256": geometry, "licence": source.licence}
    volume = surface_to_volume(
        surface, resolution, sharp_angle=settings["sharp_angle"], margin=settings["margin"], scale=scale, offset=offset,
        y_up=mesh.y_up, meta=meta | {"split": row["split"], "thickness": str(row["thickness"]), "repaired": row["repaired"]},
    )  # fmt: skip
    band = without_margin(volume)
    row |= {"tokens": len(band.latents), "voxels": len(band.coords), "sharp_voxels": int(band.sharp.sum())}
    row |= {name: volume.meta[name] for name in ("sign_conflicts", "specks")}
    if row["voxels"] == 0:
        raise MeshError("no voxel lies within the band")
    _limit("tokens", row["tokens"], None, limits["max_tokens"])
    row["id"] = f"{source.slug}-{geometry[:12]}"
    path = out / "volumes" / f"{row['id']}.safetensors"
    save_volume(volume, path)
    if settings["contact_sheet"]:
        save_preview(volume, surface, out / "previews" / f"{row['id']}.png")
    return row | {"bytes": path.stat().st_size}


def _limit(name: str, value: float, low: float | None, high: float | None) -> None:
    if low is not None and value < low:
        raise FilteredError(f"{name}: {value:g} < {low:g}")
    if high is not None and value > high:
        raise FilteredError(f"{name}: {value:g} > {high:g}")


def split_of(sha256: str, val: float, test: float) -> str:
    """train, val or test by the first 32 bits of a hash: the same in every run, whatever else is prepared."""
    place = int(sha256[:8], 16) / 2**32
    return "test" if place < test else "val" if place < test + val else "train"


def _components(mesh: Mesh) -> int:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    a, b = mesh.faces[:, [0, 1]].reshape(-1), mesh.faces[:, [1, 2]].reshape(-1)
    n = len(mesh.vertices)
    return int(connected_components(coo_matrix((np.ones(len(a), np.int8), (a, b)), (n, n)), directed=False)[0])
