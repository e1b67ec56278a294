"""Whole preparations: odd names, bad files, splits, filters, resumption, ranks."""

import csv
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import trimesh

from reference_model import convert
from reference_model.meshes import load_mesh, save_mesh
from reference_model.prepare import main
from reference_model.resample import resample
from reference_model.sources import Source, find_sources, geometry_sha256
from reference_model.volume import load_volume
from reference_model.workers import run_all

ODD = "a (1) [x]{y}=,é ß $z"


def write_meshes(folder: Path) -> None:
    (folder / ODD).mkdir(parents=True)
    ball, box = trimesh.creation.icosphere(3, 2.0), trimesh.creation.box((1.0, 2.0, 3.0))
    save_mesh(folder / ODD / f"{ODD}.obj", ball.vertices, ball.faces)
    save_mesh(folder / "box.stl", box.vertices, box.faces)
    save_mesh(folder / "copy.ply", box.vertices, np.roll(box.faces[::-1], 1, 1))
    (folder / "empty.obj").write_text("# nothing\n")
    (folder / "broken.glb").write_bytes(b"glTF nonsense")
    (folder / "notes.txt").write_text("not a mesh")


def table(out: Path) -> dict[str, dict[str, str]]:
    with (out / "metadata.csv").open(newline="", encoding="utf-8") as file:
        return {Path(row["source"]).name: row for row in csv.DictReader(file)}


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_run_and_its_resumption(tmp_path, monkeypatch) -> None:
    meshes, out = tmp_path / "in", tmp_path / f"out {ODD}"
    write_meshes(meshes)
    before = files(meshes)
    monkeypatch.chdir(tmp_path)
    arguments = [f"meshes={meshes}", f"out={out}", "resolution=64", "workers=2", "shards=1"]
    assert main(arguments) == 0
    rows = table(out)
    assert {name: row["status"] for name, row in rows.items()} == {
        f"{ODD}.obj": "ok", "box.stl": "ok", "copy.ply": "ok", "empty.obj": "rejected", "broken.glb": "rejected",
    }  # fmt: skip
    assert rows["empty.obj"]["reason"] == "no faces" and rows["broken.glb"]["reason"].startswith("cannot be read")
    assert rows["box.stl"]["split"] == rows["copy.ply"]["split"]
    assert rows["box.stl"]["geometry_sha256"] == rows["copy.ply"]["geometry_sha256"] != rows[f"{ODD}.obj"]["geometry_sha256"]
    box = rows["box.stl"]
    assert (box["faces"], box["vertices"], box["components"], box["watertight"], box["repaired"]) == ("12", "8", "1", "true", "false")
    assert float(box["thickness"]) == pytest.approx(1.9 / 3, rel=1e-3)
    volume = load_volume(out / "volumes" / f"{box['id']}.safetensors")
    assert (len(volume.coords), len(volume.latents)) == (int(box["voxels"]), int(box["tokens"]))
    assert volume.meta["source"] == "box.stl" and volume.scale == pytest.approx(1.9 / 3)
    for name in ("contact_sheet.png", "settings.json"):
        assert (out / name).exists()
    assert len(list((out / "shards").glob("*.tar"))) == 3 and len(list((out / "previews").glob("*.png"))) == 3
    assert files(meshes) == before and {p.name for p in tmp_path.iterdir()} == {"in", out.name}
    assert not [name for name in files(out) if name.endswith(".part")]

    first = files(out)
    (out / "volumes" / f"{box['id']}.safetensors").unlink()
    assert main(arguments) == 0
    changed = {name for name, stamp in files(out).items() if first[name] != stamp and "/" in name and "shards" not in name}
    assert len([name for name in changed if name.startswith("rows")]) == 1 and f"volumes/{box['id']}.safetensors" in changed
    assert main([*arguments[:2], "resolution=128"]) == 2


def test_a_killed_run_goes_on(tmp_path) -> None:
    meshes, out = tmp_path / "in", tmp_path / "out"
    meshes.mkdir()
    for i in range(6):
        ball = trimesh.creation.icosphere(4, 1.0 + i)
        save_mesh(meshes / f"{i}.ply", ball.vertices + i, ball.faces)
    arguments = [f"meshes={meshes}", f"out={out}", "resolution=128", "contact_sheet=0"]
    process = subprocess.Popen([sys.executable, "-m", "reference_model.prepare", *arguments], stderr=subprocess.DEVNULL)
    for _ in range(600):
        if len(list((out / "rows").glob("*.json"))) >= 2 or process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    time.sleep(0.5)  # its worker ends with it
    done = files(out / "rows")
    assert 2 <= len(done) < 6
    for path in (out / "volumes").glob("*.safetensors"):
        load_volume(path)
    assert main(arguments) == 0
    assert {name: stamp for name, stamp in files(out / "rows").items() if name in done} == done
    assert [row["status"] for row in table(out).values()] == ["ok"] * 6
    assert not [name for name in files(out) if name.endswith(".part")]


def test_ranks_share_the_work(tmp_path) -> None:
    write_meshes(tmp_path / "in")
    for rank in (0, 1):
        main([f"meshes={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "resolution=64", "contact_sheet=0", f"rank={rank}", "world_size=2"])
        assert len(table(tmp_path / "out")) == (3, 5)[rank]


def test_a_margin_is_kept_for_resampling(tmp_path) -> None:
    write_meshes(tmp_path / "in")
    arguments = [f"meshes={tmp_path / 'in' / 'box.stl'}", "resolution=256", "contact_sheet=0"]
    assert main([*arguments, f"out={tmp_path / 'plain'}"]) == main([*arguments, f"out={tmp_path / 'wide'}", "margin=1.7321"]) == 0
    plain, wide = (next((tmp_path / name / "volumes").iterdir()) for name in ("plain", "wide"))
    assert len(load_volume(plain).coords) == len(load_volume(wide).coords) < len(load_volume(wide, margin=True).coords)
    assert len(resample(load_volume(wide, margin=True), 384).coords) > 2 * len(load_volume(wide).coords)
    row, bytes_ = table(tmp_path / "plain")["box.stl"], plain.stat().st_size
    assert bytes_ == int(row["bytes"]) <= 4 * int(row["voxels"])


def test_filters_name_their_reason(tmp_path) -> None:
    write_meshes(tmp_path / "in")
    out = tmp_path / "out"
    limits = ["filters.min_faces=13", "filters.max_tokens=10"]
    assert main([f"meshes={tmp_path / 'in'}", f"out={out}", "resolution=64", "contact_sheet=0", *limits]) == 1
    rows = table(out)
    assert rows["box.stl"]["status"] == "filtered" and rows["box.stl"]["reason"] == "faces: 12 < 13"
    assert rows[f"{ODD}.obj"]["reason"].startswith("tokens: ") and not list((out / "volumes").iterdir())


def stall_or_die(source: Source, out: Path, settings: dict) -> dict:
    if source.path.name == "dies":
        os._exit(1)
    if source.path.name == "stalls":
        time.sleep(600)
    return {"status": "ok", "reason": source.path.name}


def test_a_stalled_or_dead_process_costs_one_row(tmp_path) -> None:
    reasons = []
    settings = {"workers": 1, "timeout": 20, "resolution": 64}
    names = ("a", "dies", "b", "stalls", "c")
    run_all([Source(Path(n)) for n in names], tmp_path, settings, lambda source, row: reasons.append(row["reason"]), stall_or_die)
    assert reasons == ["a", "its process died, perhaps for memory", "b", "took longer than 20 s", "c"]


def test_manifest_checks_sha256_and_keeps_the_licence(tmp_path) -> None:
    write_meshes(tmp_path)
    good = convert.file_sha256(tmp_path / "box.stl")
    (tmp_path / "list.csv").write_text(f"path,sha256,licence\nbox.stl,{good.upper()},CC0\ncopy.ply,{'0' * 64},\nno.obj,,\n")
    assert main([f"meshes={tmp_path / 'list.csv'}", f"out={tmp_path / 'out'}", "resolution=64", "contact_sheet=0"]) == 0
    rows = table(tmp_path / "out")
    assert rows["box.stl"]["status"] == "ok" and rows["box.stl"]["licence"] == "CC0"
    assert rows["copy.ply"]["reason"].startswith("sha256 differs") and rows["no.obj"]["reason"].startswith("cannot be read")


def test_sources_take_names_before_globs(tmp_path) -> None:
    write_meshes(tmp_path)
    literal = tmp_path / ODD / f"{ODD}.obj"
    assert [s.path for s in find_sources(str(literal))] == [literal]
    assert [s.path.name for s in find_sources(str(tmp_path / "*.[sp]??"))] == ["box.stl", "copy.ply"]
    assert len(find_sources(str(tmp_path))) == 5 and len(find_sources(str(tmp_path), exclude=tmp_path / ODD)) == 4
    with pytest.raises(ValueError, match="no mesh found"):
        find_sources(str(tmp_path / "nothing"))


def test_split_is_stable_and_fair() -> None:
    hashes = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(20000)]
    splits = [convert.split_of(h, 0.05, 0.1) for h in hashes]
    assert splits.count("val") == pytest.approx(1000, abs=120) and splits.count("test") == pytest.approx(2000, abs=160)
    wider = [convert.split_of(h, 0.1, 0.1) for h in hashes]
    assert all(b == a or (a, b) == ("train", "val") for a, b in zip(splits, wider, strict=True))


def test_geometry_hash_knows_copies_only(tmp_path) -> None:
    box = trimesh.creation.box((1.0, 2.0, 3.0))
    seen = set()
    for name, vertices, faces in (
        ("a.stl", box.vertices, box.faces), ("b.obj", box.vertices, box.faces[::-1]), ("c.glb", box.vertices, np.roll(box.faces, 1, 1)),
    ):  # fmt: skip
        save_mesh(tmp_path / name, vertices, faces)
        seen.add(geometry_sha256(load_mesh(tmp_path / name)))
    assert len(seen) == 1
    save_mesh(tmp_path / "d.stl", box.vertices * 1.001, box.faces)
    save_mesh(tmp_path / "e.stl", box.vertices, box.faces[:, ::-1])
    assert len(seen | {geometry_sha256(load_mesh(tmp_path / name)) for name in ("d.stl", "e.stl")}) == 3


@pytest.mark.parametrize("arguments", ["out=x", "meshes=x out=y resolution=100", "meshes=x out=y", "meshes=x out=y nosuch=1"])
def test_mistakes_end_with_status_2(tmp_path, monkeypatch, arguments: str) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments.split())
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and not list(tmp_path.iterdir())
