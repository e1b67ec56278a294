"""Meshes to training volumes: `python -m reference_model.prepare meshes=PATH out=DIRECTORY resolution=512`.

    out/volumes/ID.safetensors    one volume a mesh (`reference_model.volume`)
    out/rows/KEY.json             one row a source file: what a later run need not repeat
    out/metadata.csv              all rows: tokens, voxels, thickness, components, repairs, seconds, split, or the reason of a rejection
    out/previews/, contact_sheet.png, shards/, settings.json

ID is the file's stem and the sha256 of its geometry; the split follows the sha256, so copies land on one side. A run that was killed
goes on where it stopped; files appear complete or not at all. Exit status 1 only when no volume exists at the end.
"""

import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reference_model.cli import parse
from reference_model.contact_sheet import save_sheet
from reference_model.convert import COLUMNS
from reference_model.dataset import write_shards
from reference_model.sources import Source, find_sources
from reference_model.workers import run_all

_FREE = ("workers", "timeout", "rank", "world_size", "contact_sheet", "shards")  # settings that change no volume


def _row_path(out: Path, source: Source) -> Path:
    return out / "rows" / f"{source.key}.json"


def finish(source: Source, row: Mapping[str, Any], out: Path) -> None:
    """Write the row of one source: from now on it is done."""
    write_text(_row_path(out, source), json.dumps(row, indent=1))


def is_done(source: Source, out: Path) -> bool:
    """A row exists, and so does its volume."""
    try:
        row = json.loads(_row_path(out, source).read_text())
    except FileNotFoundError:
        return False
    return row["status"] != "ok" or (out / "volumes" / f"{row['id']}.safetensors").exists()


def write_text(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_metadata(out: Path) -> list[dict[str, Any]]:
    """Gather the rows of all runs and ranks in out/metadata.csv, in the order of their sources; they are returned."""
    rows = [json.loads(path.read_text()) for path in (out / "rows").glob("*.json")]
    rows.sort(key=lambda row: row["source"])
    part = out / f".metadata.{os.getpid()}.part"
    with part.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, restval="")
        table.writeheader()
        table.writerows(rows)
    os.replace(part, out / "metadata.csv")
    return rows


def _check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """A directory holds volumes of one kind: ValueError when it was begun with other settings."""
    path = out / "settings.json"
    kept = {name: value for name, value in settings.items() if name not in _FREE}
    if path.exists():
        old = json.loads(path.read_text())
        other = [f"{name}={kept.get(name)} (was {old.get(name)})" for name in {**old, **kept} if old.get(name) != kept.get(name)]
        if other:
            raise ValueError(f"{out} was begun with other settings: {', '.join(other)}")
    else:
        write_text(path, json.dumps(kept, indent=1))


def main(argv: Sequence[str] | None = None) -> int:
    from omegaconf import OmegaConf

    config, paths = parse("prepare", ("meshes", "out"), argv, required=("meshes", "out"))
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    out = Path(paths["out"])
    try:
        if settings["resolution"] % 8 or settings["resolution"] < 8 or not 0 <= settings["rank"] < settings["world_size"]:
            raise ValueError(f"resolution must be a multiple of 8 and rank below world_size, got {settings}")
        sources = find_sources(paths["meshes"], exclude=out)[settings["rank"] :: settings["world_size"]]
        for name in ("volumes", "rows", "previews"):
            (out / name).mkdir(parents=True, exist_ok=True)
        _check_settings(out, settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    todo = [source for source in sources if not is_done(source, out)]
    print(f"{len(sources)} files, {len(sources) - len(todo)} done before", file=sys.stderr)
    run_all(todo, out, settings, lambda source, row: finish(source, row, out))
    rows = write_metadata(out)
    good = [row for row in rows if row["status"] == "ok"]
    if settings["contact_sheet"] and good:
        save_sheet(good[: settings["contact_sheet"]], out)
    if settings["shards"] and good:
        write_shards(out, good, settings["shards"])
    counts = Counter((row["status"], row["reason"].split(":")[0]) for row in rows)
    print(f"{len(good)} volumes, {sum(row['tokens'] for row in good)} tokens; " + ", ".join(
        f"{n} {status} ({reason})" for (status, reason), n in sorted(counts.items()) if status != "ok"))  # fmt: skip
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
