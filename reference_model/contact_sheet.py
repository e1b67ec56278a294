"""One picture of a whole preparation: every volume as a render of its surface beside a slice through its values."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reference_model.cameras import Camera, bounding_radius, fitting_distance
from reference_model.cli import optional_import
from reference_model.render import on_background, render_view
from reference_model.repair import Surface
from reference_model.volume import CELL, Volume

TILE = 224
_INSIDE, _OUTSIDE, _LINE = np.array([38, 84, 124]), np.array([244, 240, 232]), np.array([24, 24, 24])


def save_preview(volume: Volume, surface: Surface, path: Path) -> None:
    """Write a PNG of 2 x 1 tiles: the surface that was measured from the front, and the middle slice across y seen from the front."""
    image = optional_import("PIL.Image")
    vertices = np.concatenate((surface.vertices, surface.hull_vertices))
    faces = np.concatenate((surface.faces, surface.sheets + len(surface.vertices)))
    camera = Camera(60.0, 20.0, fitting_distance(bounding_radius(vertices[faces].reshape(-1, 3)), 50.0))
    view = on_background(render_view(vertices, faces, camera, TILE))
    cut = image.fromarray(slice_picture(volume)).resize((TILE, TILE), image.Resampling.LANCZOS)
    part = path.with_name(f".{path.name}.part")
    image.fromarray(np.concatenate((view, np.asarray(cut)), 1)).save(part, "PNG")
    part.replace(path)


def save_sheet(rows: Sequence[Mapping[str, Any]], out: Path, columns: int = 4) -> None:
    """Write out/contact_sheet.png from the previews of these rows of the metadata, with name, tokens and repairs under each."""
    image, draw = optional_import("PIL.Image"), optional_import("PIL.ImageDraw")
    found = [(row, out / "previews" / f"{row['id']}.png") for row in rows]
    found = [(row, path) for row, path in found if path.exists()]
    if not found:
        return
    columns = min(columns, len(found))
    width, height = 2 * TILE + 16, TILE + 44
    sheet = image.new("RGB", (columns * width, -(-len(found) // columns) * height), "white")
    pen = draw.Draw(sheet)
    for place, (row, path) in enumerate(found):
        x, y = place % columns * width + 8, place // columns * height + 8
        sheet.paste(image.open(path), (x, y))
        state = "closed" if row["repaired"] == "false" else f"repaired: {row['sheets']} sheets, {row['caps']} caps, {row['turned']} turned"
        pen.text((x, y + TILE + 2), row["id"][:60], fill="black")
        pen.text((x, y + TILE + 15), f"{row['resolution']}: {row['tokens']:,} tokens, {row['voxels']:,} voxels; {state}", fill="gray")
    part = out / ".contact_sheet.png.part"
    sheet.save(part, "PNG")
    part.replace(out / "contact_sheet.png")


def slice_picture(volume: Volume) -> np.ndarray:
    """[R,R,3] uint8: values of the voxels y = R // 2, x to the right, z upwards; blue inside, light outside, paler where no latent is."""
    layer = volume.resolution // 2
    rows = np.flatnonzero((volume.latents[:, 1] == layer // CELL).numpy())
    grid = volume.resolution // CELL
    tiles = np.zeros((grid, CELL, grid, CELL), np.float32)
    cells = volume.latents[rows].numpy()
    inside = volume.inside[rows].numpy().reshape(-1, CELL, CELL, CELL)[:, :, layer % CELL]
    tiles[cells[:, 0], :, cells[:, 2]] = np.where(inside, -1.0, 1.0)
    sign = tiles.reshape(volume.resolution, volume.resolution)
    known = sign != 0
    last = np.maximum.accumulate(np.where(known, np.arange(volume.resolution)[:, None], -1), 0)
    full = np.where(last >= 0, np.take_along_axis(sign, np.maximum(last, 0), 0), 1.0)
    value = full.copy()
    here = volume.coords[:, 1] == layer
    x, _, z = volume.coords[here].numpy().T
    value[x, z] = volume.values[here].numpy()
    shade = np.where(full[..., None] < 0, _INSIDE, _OUTSIDE) + np.where(known, 0, 12)[..., None] * np.where(full < 0, 1, -1)[..., None]
    near = np.clip(1 - np.abs(value) * 2, 0, 1)[..., None]
    picture = shade * (1 - near) + _LINE * near
    return np.ascontiguousarray(np.clip(picture, 0, 255).astype(np.uint8).transpose(1, 0, 2)[::-1])
