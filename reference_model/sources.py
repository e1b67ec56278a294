"""Which files a preparation reads, and how they are told apart."""

import csv
import glob
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reference_model.meshes import SUFFIXES, Mesh


@dataclass(frozen=True)
class Source:
    """One file to prepare; sha256 (of the file, lower case) and licence come from a manifest."""

    path: Path
    sha256: str = ""
    licence: str = ""

    @property
    def key(self) -> str:
        """Name of its row: a hash of its place."""
        return hashlib.sha256(str(self.path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:24]

    @property
    def slug(self) -> str:
        """The stem in letters that every tool can take."""
        return re.sub(r"[^A-Za-z0-9_-]+", "_", self.path.stem)[:64]


def find_sources(text: str, exclude: Path | None = None) -> list[Source]:
    """Sources of `meshes=`: a file, a directory (searched to its bottom, without `exclude`), a CSV manifest or a glob; in order.

    What exists under the very name is taken before the name is read as a glob. A manifest has a column path, relative to itself,
    and may have sha256 and licence. ValueError where nothing is found.
    """
    path = Path(text)
    if path.is_dir():
        skip = exclude.resolve() if exclude else None
        found = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
        sources = [Source(p) for p in found if skip is None or skip not in p.resolve().parents]
    elif path.suffix.lower() == ".csv" and path.is_file():
        sources = _read_manifest(path)
    elif path.is_file():
        sources = [Source(path)]
    else:
        sources = [Source(Path(p)) for p in sorted(glob.glob(text, recursive=True)) if Path(p).is_file()]
    if not sources:
        raise ValueError(f"no mesh found: {text}")
    return sources


def _read_manifest(path: Path) -> list[Source]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        if "path" not in (table.fieldnames or ()):
            raise ValueError(f"{path}: a manifest needs a column path, got {table.fieldnames}")
        return [
            Source(path.parent / row["path"], (row.get("sha256") or "").strip().lower(), (row.get("licence") or "").strip())
            for row in table
            if row["path"]
        ]


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes; an unreadable one is left to the reader: empty text."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def geometry_sha256(mesh: Mesh) -> str:
    """Hash of the triangles as float32 numbers in the z-up frame: the order of vertices and faces and the file format do not count."""
    vertices = mesh.vertices.astype(np.float32) + np.float32(0)
    unique, inverse = np.unique(vertices, axis=0, return_inverse=True)
    faces = inverse.reshape(-1)[mesh.faces]
    first = np.argmin(faces, 1)[:, None]
    faces = np.take_along_axis(faces, (first + np.arange(3)) % 3, 1)
    faces = faces[np.lexsort(faces.T[::-1])]
    return hashlib.sha256(unique.tobytes() + faces.astype("<i8").tobytes()).hexdigest()
