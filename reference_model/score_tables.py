"""The Markdown of `reference_model.evaluate_meshes`: scores, goals and repairs."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
_COLUMNS = {
    "f1@0.001": ("F1@.001", 1.0, 2), "f1@0.0002": ("F1@2e-4", 1.0, 2), "f1@0.005": ("F1@.005", 1.0, 2), "f1@0.01": ("F1@.01", 1.0, 2),
    "chamfer": ("Chamfer e-4", 1e4, 3), "normal_consistency": ("normals %", 1.0, 2), "area_ratio": ("area", 1.0, 4),
    "components": ("pieces", 1, 0), "genus": ("genus", 1, 0),
    "sharp_edge_error": ("sharp edges e-4", 1.0, 1), "normal_psnr": ("PSNR-N dB", 1.0, 1),
}  # fmt: skip
_PICTURE_SCORES = ("sharp_edge_error", "normal_psnr")
_THIN = 1.0  # percent of the area on walls under two voxels: no goal is set for such a mesh
# least F1@.001, F1@2e-4, normal consistency (of CAD), largest distance of the area ratio from 1
_GOALS = {512: (99.0, 97.0, 99.8, 99.4, 0.01), 1024: (99.9, 99.0, 99.9, 99.7, 0.005)}


def markdown(rows: Sequence[Row], left_out: Sequence[Row], settings: Mapping[str, Any]) -> str:
    """The tables: goals and repairs (of round trips), scores of all surfaces and of the outer ones, and what could not be scored."""
    kinds = [kind for kind in ("result", "ceiling", "floor") if any(kind in row["scores"] for row in rows)]
    text = ["# Meshes: " + ("given results" if settings["results"] else "there and back without a network"), ""]
    text += [f"`{settings['command']}`", "", f"{settings['versions']}; {settings['samples']:,} points each way, point to surface.", ""]
    text += [f"A cell is {' / '.join(kinds)}; the floor is the true mesh against itself.", ""]
    text += ["thin: area with walls under 2 voxels; creased: area within a voxel of an edge bent by over 30 degrees.", ""]
    if not settings["results"]:
        text += _goals(rows, settings["cad"]) + _repairs(rows)
    for prefix, title in (("", "All surfaces"), ("outer_", "Outer surface only")):
        names = [name for name in _COLUMNS if not (prefix and name in _PICTURE_SCORES)]
        text += [f"## {title}", "", "| mesh | R | closed | thin % | creased % | " + " | ".join(_COLUMNS[name][0] for name in names) + " |"]
        text += ["|---|---:|---|---:|---:|" + "---|" * len(names)]
        for row in rows:
            cells = [" / ".join(_cell(row["scores"].get(kind, {}).get(prefix + name), name) for kind in kinds) for name in names]
            shares = [_share(row["thin_share"]), _share(row["crease_share"])]
            text.append("| " + " | ".join([row["mesh"], str(row["resolution"]), "yes" if row["closed"] else "no", *shares, *cells]) + " |")
        text.append("")
    if left_out:
        text += ["## Left out", "", "| mesh | reason |", "|---|---|"]
        text += [f"| {mesh} | {reason} |" for mesh, reason in sorted({(row["mesh"], row["reason"]) for row in left_out})]
    return "\n".join(text).rstrip() + "\n"


def _goals(rows: Sequence[Row], cad: Sequence[str]) -> list[str]:
    """Meshes that bound a solid as they are against the goals of their resolution."""
    judged = [row for row in rows if row["closed"] and row["round_trip"]["closed"] == "true" and row["resolution"] in _GOALS]
    if not judged:
        return []
    text = ["## Goals of the closed meshes", ""]
    for resolution in sorted({row["resolution"] for row in judged}):
        f1, fine, normals, flat, area = _GOALS[resolution]
        text.append(f"- {resolution}: F1@.001 >= {f1}, F1@2e-4 >= {fine}, normals >= {normals} (CAD {flat}), area within {100 * area:g} %")
    text += ["", "| mesh | R | F1@.001 | F1@2e-4 | normals % | area | thin % | creased % | verdict |"]
    text += ["|---|---:|---:|---:|---:|---:|---:|---:|---|"]
    for row in judged:
        score = row["scores"]["result"]
        numbers = [_cell(score[name], name) for name in ("f1@0.001", "f1@0.0002", "normal_consistency", "area_ratio")]
        shares = [_share(row["thin_share"]), _share(row["crease_share"])]
        text.append("| " + " | ".join([row["mesh"], str(row["resolution"]), *numbers, *shares, _verdict(row, row["mesh"] in cad)]) + " |")
    return [*text, ""]


def _verdict(row: Row, cad: bool) -> str:
    score, (f1, fine, normals, flat, area) = row["scores"]["result"], _GOALS[row["resolution"]]
    least = {"f1@0.001": f1, "f1@0.0002": fine, "normal_consistency": flat if cad else normals}
    missed = [f"{_COLUMNS[name][0]} {_cell(score[name], name)} < {goal:g}" for name, goal in least.items() if score[name] < goal]
    if abs(score["area_ratio"] - 1) > area:
        missed.append(f"area {score['area_ratio']:.4f}")
    if not missed:
        return "holds"
    return ("thin: " if row["thin_share"] >= _THIN else "short: ") + ", ".join(missed)


def _repairs(rows: Sequence[Row]) -> list[str]:
    """What became of the meshes that bound no solid as they are."""
    repaired = [row for row in rows if row["round_trip"]["closed"] == "false"]
    if not repaired:
        return []
    text = ["## Repaired meshes", "", "Outer pieces are those the outside reaches, the others are cavities and walled-in pockets."]
    text += ["Copies: faces dropped as doubles; turned, sheets: patches; lone faces: parts of flaps without thickness;"]
    text += ["caps: triangles over holes; specks: pieces of up to 27 voxels that were filled; area: result / file.", ""]
    names = ("copies", "turned", "sheets", "lone_faces", "caps", "specks", "open_vertices")
    text += ["| mesh | R | pieces of the file (open) | thin % | " + " | ".join(name.replace("_", " ") for name in names)]
    text[-1] += " | outer pieces | all | genus | area | outer area |"
    text.append("|---|---:|---|" + "---:|" * (len(names) + 6))
    for row in repaired:
        score, truth = row["scores"]["result"], row["truth"]
        cells = [f"{truth['components']} ({truth['open_components']})", _share(row["thin_share"])]
        cells += [str(row["round_trip"][name]) for name in names]
        cells += [_cell(score[name], name.removeprefix("outer_")) for name in ("outer_components", "components", "genus")]
        cells += [_cell(score[name], "area_ratio") for name in ("area_ratio", "outer_area_ratio")]
        text.append("| " + " | ".join([row["mesh"], str(row["resolution"]), *cells]) + " |")
    return [*text, ""]


def _cell(value: float | None, name: str) -> str:
    _, factor, digits = _COLUMNS[name]
    return "–" if value is None else f"{value * factor:.{digits}f}"


def _share(percent: float | None) -> str:
    return "–" if percent is None else f"{percent:.1f}"
