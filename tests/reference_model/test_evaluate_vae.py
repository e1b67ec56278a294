"""The scores of a network whose answer is known: the true volume, moved outwards by a given distance."""

import json

import numpy as np
import pytest
import torch

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("PIL.Image")
pytest.importorskip("embreex")
pytest.importorskip("igl")
pytest.importorskip("hydra")

from vae_inputs import tiny_model  # noqa: E402

from reference_model import evaluate_vae  # noqa: E402
from reference_model.meshes import load_mesh, save_mesh  # noqa: E402
from reference_model.vae_decode import save_vae  # noqa: E402
from reference_model.vae_pieces import opened  # noqa: E402
from reference_model.volume import TAU  # noqa: E402

MOVE = 0.0015
LOST = 11  # band voxels, where pruning is asked for
LENGTH, RADIUS = 1.9, 0.04  # of a rod along z, in the cube


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A rod, a broken file and weights; the network gives the rod back with a radius that is larger by MOVE."""

    def answer(volume, network, prune, latents):
        assert latents == ("chosen" if prune is None else "mean")
        keep = slice(None) if prune is None else torch.arange(len(volume.coords)) >= LOST
        z = opened(torch.zeros(len(volume.latents), 16), torch.arange(len(volume.latents)) % 4 == 0)
        return z, (volume.coords[keep], volume.values[keep] - MOVE / TAU, volume.resolution, None)

    folder = tmp_path / "in [é]"
    folder.mkdir()
    rod = trimesh.creation.capsule(height=10 * (LENGTH - 2 * RADIUS), radius=10 * RADIUS, count=[64, 64])
    for name in ("rod.obj", "other.obj"):
        save_mesh(folder / name, np.asarray(rod.vertices) + (30, 20, 10), np.asarray(rod.faces))
    (folder / "broken.off").write_bytes(b"")
    save_vae(tiny_model(head="pieces"), tmp_path / "w.safetensors", commit="abc", step=7)
    monkeypatch.setattr(evaluate_vae, "rebuild", answer)
    return folder


@pytest.mark.parametrize(("workers", "resolution", "pruned"), [(1, 384, True), (2, [384, 392], False)])
def test_scores_of_a_moved_surface(inputs, tmp_path, workers, resolution, pruned):
    resolutions = [resolution] if isinstance(resolution, int) else resolution
    out = tmp_path / "out"
    common = [*["prune=0.5", "latents=mean"] * pruned, "commit=def", "names=[rod,broken]", "samples=5000", "size=64", "grid=32"]
    common.append(f"weights={tmp_path / 'w.safetensors'}")
    arguments = [f"meshes={inputs}", f"out={out}", f"resolution={resolution}".replace(" ", ""), f"workers={workers}", *common]
    assert evaluate_vae.main(arguments) == 0
    document = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert [(r["mesh"], r["resolution"]) for r in document["rows"]] == [("rod.obj", r) for r in resolutions]
    assert {(r["mesh"], r["resolution"]) for r in document["left_out"]} == {("broken.off", r) for r in resolutions}
    for row, gap in zip(document["rows"], document["gaps"], strict=True):
        scores = row["scores"]
        assert scores["result"]["chamfer"] == pytest.approx(MOVE, rel=0.1)
        assert scores["result"]["f1@0.001"] < 5 and scores["ceiling"]["f1@0.001"] > 99.9 and scores["result"]["f1@0.005"] == 100
        area = 100 * ((RADIUS + MOVE) * (LENGTH + 2 * MOVE) / (RADIUS * LENGTH) - 1)
        assert gap["area"] == gap["area_worst"] == pytest.approx(area, rel=0.1)
        assert gap["f1@0.001"] == pytest.approx(scores["ceiling"]["f1@0.001"] - scores["result"]["f1@0.001"])
        assert (gap["meshes"], gap["components"], gap["genus"]) == (1, 1, 1)
        mesh = load_mesh(out / "meshes" / f"rod_{row['resolution']}.ply")
        sides = mesh.vertices[abs(mesh.vertices[:, 2] - mesh.vertices[:, 2].mean()) < 5]
        radius = np.linalg.norm(sides[:, :2] - sides[:, :2].mean(0), axis=1)
        assert radius.mean() == pytest.approx(10 * (RADIUS + MOVE), abs=2e-3)
        assert (out / "pictures" / f"rod.obj_{row['resolution']}.png").stat().st_size > 1000
    text = (out / "scores.md").read_text(encoding="utf-8")
    assert (row["network"].get("band_lost") == LOST) == pruned and (f"| {LOST} |" in text) == pruned
    assert row["network"]["corrected_percent"] == pytest.approx(25, abs=0.5) and "| 25." in text
    assert "commit def, Python" in text and f"weights: commit abc, step 7; latents: {'mean' if pruned else 'chosen'};" in text
    assert "Gap to the ceiling" in text and text.count("| rod.obj |") == 2 * len(resolutions)


def test_volumes_ceilings_and_floors_are_kept(inputs, tmp_path, monkeypatch):
    common = [f"meshes={inputs / 'rod.obj'}", f"out={tmp_path / 'out'}", f"weights={tmp_path / 'w.safetensors'}", "pictures=false"]
    common += ["resolution=384", "samples=500", "size=64", "grid=32"]
    made, build = [], evaluate_vae.mesh_to_volume
    scored, compare = [], evaluate_vae.compare
    monkeypatch.setattr(evaluate_vae, "mesh_to_volume", lambda *a, **k: made.append(1) or build(*a, **k))
    monkeypatch.setattr(evaluate_vae, "compare", lambda *a, **k: scored.append(1) or compare(*a, **k))
    kept, rows = f"volumes={tmp_path / 'v'}", []
    calls = (([kept], 1, 3), ([kept], 1, 4), ([kept, "seed=1"], 1, 7), ([kept, "seed=0"], 1, 10), ([], 2, 13), ([], 3, 16))
    for arguments, volumes, scores in calls:
        assert evaluate_vae.main([*common, *arguments]) == 0
        assert (len(made), len(scored)) == (volumes, scores)
        rows.append(json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))["rows"][0]["scores"])
    assert rows[0] == rows[1] == rows[4] and rows[0]["ceiling"] != rows[2]["ceiling"]
    assert sorted(path.name for path in (tmp_path / "v").iterdir()) == ["rod.obj_384.json", "rod.obj_384.safetensors"]


def test_open_meshes_do_not_count_as_gaps():
    score = {"f1@0.005": 1.0, "f1@0.001": 1.0, "f1@0.0002": 1.0, "normal_consistency": 1.0, "area_ratio": 1.0, "components": 1, "genus": 0}
    rows = [{"resolution": 256, "closed": closed, "scores": {"result": score, "ceiling": score}} for closed in (True, False)]
    assert [g["meshes"] for g in evaluate_vae.gaps(rows)] == [1]
    assert evaluate_vae.gaps(rows[1:]) == []


def test_mistakes_end_with_a_message(tmp_path, capsys):
    for weights in ("none", str(tmp_path / "nothing")):
        assert evaluate_vae.main([f"meshes={tmp_path}", f"out={tmp_path / 'out'}", f"weights={weights}"]) == 2
        assert "error: weights:" in capsys.readouterr().err
    assert evaluate_vae.main([f"meshes={tmp_path}", f"out={tmp_path / 'out'}", "latents=best"]) == 2
    assert "error: latents must be one of ('chosen', 'mean'), got 'best'" in capsys.readouterr().err
