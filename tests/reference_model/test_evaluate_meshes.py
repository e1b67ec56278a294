"""The tables of `evaluate_meshes`: round trips and given results of shapes whose scores are known."""

import json

import numpy as np
import pytest

trimesh = pytest.importorskip("trimesh")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("embreex")
pytest.importorskip("igl")
pytest.importorskip("hydra")

from reference_model import evaluate_meshes, score_tables  # noqa: E402
from reference_model.meshes import save_mesh  # noqa: E402

QUICK = ["samples=10000", "size=96", "grid=48"]


def ball(radius=5.0, at=(30.0, 20.0, 10.0)):
    mesh = trimesh.creation.icosphere(subdivisions=4, radius=radius).apply_translation(at)
    return np.asarray(mesh.vertices), np.asarray(mesh.faces)


def scores_of(out):
    document = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    return document, {(row["mesh"], row["resolution"]): row for row in document["rows"]}


def test_round_trip_table(tmp_path):
    source, out = tmp_path / "in [é]", tmp_path / "out (1)"
    source.mkdir()
    rod = trimesh.creation.capsule(height=6.0, radius=0.6, count=[48, 48]).apply_translation((30, 20, 10))
    save_mesh(source / "rod.obj", rod.vertices, rod.faces)
    box = trimesh.creation.box((3, 0.5, 0.4))
    save_mesh(source / "box.glb", box.vertices, box.faces)
    (source / "broken.off").write_bytes(b"")
    assert evaluate_meshes.main([f"meshes={source}", f"out={out}", "resolution=[256,320]", *QUICK]) == 0
    document, rows = scores_of(out)
    assert set(rows) == {(name, r) for name in ("rod.obj", "box.glb") for r in (256, 320)}
    assert [entry["mesh"] for entry in document["left_out"]] == ["broken.off"] * 2
    for (name, resolution), row in rows.items():
        result, floor = row["scores"]["result"], row["scores"]["floor"]
        assert row["closed"] and row["thin_share"] == 0 and set(row["scores"]) == {"result", "floor"}
        assert (result["components"], result["genus"], result["open_components"]) == (1, 0, 0)
        assert floor["f1@0.0002"] == 100 and floor["normal_psnr"] == 100
        assert result["f1@0.001"] > (99.9 if name == "rod.obj" else 96) and result["flipped"] < 0.1
        # marching cubes alone cut about 0.44 h of area off each unit of a right-angled edge
        lost = 0.0 if name == "rod.obj" else 0.44 * 2 / resolution * 4 * (3 + 0.5 + 0.4) * (3 / 1.9) / (2 * (1.5 + 1.2 + 0.2))
        assert 1 - 0.4 * lost - 0.002 < result["area_ratio"] < 1.002
        assert row["round_trip"]["open_vertices"] == 0 and row["round_trip"]["voxels"] > 1000
        picture = np.asarray(Image.open(out / "pictures" / f"{name}_{resolution}.png"))
        assert picture.shape[1] == 3 * 448 and 400 < picture.shape[0] < 3 * 448
        assert [(picture[40:, x * 448 : (x + 1) * 448] < 250).any(2).mean() > 0.05 for x in range(3)] == [True] * 3
    for name in ("rod.obj", "box.glb"):
        coarse, fine = (rows[name, r]["scores"]["result"] for r in (256, 320))
        assert fine["chamfer"] < 0.9 * coarse["chamfer"]
    text = (out / "scores.md").read_text(encoding="utf-8")
    assert text.count("\n| rod.obj | 256 | yes | 0.0 |") == 2 and f"meshes={source}" in text
    assert "| broken.off | empty file |" in text and "## Goals" not in text and "## Repaired" not in text
    assert rows["rod.obj", 256]["crease_share"] == 0
    # the tape along the edges of the box, one voxel wide on either side
    tape = 8 * (3 + 0.5 + 0.4) * (2 / 256) / (1.9 / 3)
    assert rows["box.glb", 256]["crease_share"] == pytest.approx(100 * tape / (2 * (1.5 + 1.2 + 0.2)), rel=0.1)


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    save_mesh(source / "a.ply", *ball())
    arguments = [f"meshes={source}", f"out={out}", "pictures=false", *QUICK]
    assert evaluate_meshes.main([*arguments, "resolution=64"]) == 0
    _, first = scores_of(out)
    vertices, faces = ball()
    save_mesh(source / "b.ply", vertices, faces[vertices[faces].mean(1)[:, 2] < 14.0])  # open at the top
    (source / "c.off").write_bytes(b"")
    asked = []
    evaluate = evaluate_meshes.evaluate
    monkeypatch.setattr(evaluate_meshes, "evaluate", lambda path, *rest: asked.append((path.name, rest[1])) or evaluate(path, *rest))
    for _ in range(2):
        assert evaluate_meshes.main([*arguments, "resolution=[64,72]"]) == 0
    assert asked == [("b.ply", 64), ("c.off", 64), ("a.ply", 72), ("b.ply", 72), ("c.off", 72)]
    document, rows = scores_of(out)
    assert list(rows) == [("a.ply", 64), ("a.ply", 72), ("b.ply", 64), ("b.ply", 72)] and rows["a.ply", 64] == first["a.ply", 64]
    text = (out / "scores.md").read_text(encoding="utf-8")
    assert "\n| b.ply | 64 | 1 (1) |" in text and "\n| a.ply | 64 | 1 (0) |" not in text and text.count("| c.off |") == 1
    assert evaluate_meshes.main([*arguments, "resolution=64", "seed=1"]) == 0  # other settings: all again
    assert asked[5:] == [("a.ply", 64), ("b.ply", 64), ("c.off", 64)]


def test_verdicts_name_what_falls_short():
    score = {"f1@0.001": 99.5, "f1@0.0002": 97.5, "normal_consistency": 99.5, "area_ratio": 0.995}
    row = {"mesh": "m", "resolution": 512, "closed": True, "thin_share": 0.2, "crease_share": 3.0, "scores": {"result": score}}
    assert score_tables._verdict(row, cad=True) == "holds"
    assert score_tables._verdict(row, cad=False) == "short: normals % 99.50 < 99.8"
    score |= {"f1@0.0002": 96.0, "area_ratio": 0.98}
    assert score_tables._verdict(row, cad=True) == "short: F1@2e-4 96.00 < 97, area 0.9800"
    assert score_tables._verdict({**row, "thin_share": 1.5}, cad=True).startswith("thin: ")
    assert score_tables._verdict({**row, "resolution": 1024}, cad=True).startswith("short: F1@.001 99.50 < 99.9")


def test_given_results_are_scored_in_the_frame_of_the_truth(tmp_path):
    truth, results, out = tmp_path / "truth", tmp_path / "results", tmp_path / "out"
    truth.mkdir(), results.mkdir()
    save_mesh(truth / "ball.obj", *ball())
    save_mesh(truth / "same.ply", *ball())
    save_mesh(truth / "alone.ply", *ball())
    save_mesh(results / "ball.ply", *ball(radius=5.0 * 1.01))
    save_mesh(results / "same.glb", *ball())
    command = [f"meshes={truth}", f"results={results}", f"out={out}", "resolution=64", "pictures=false", *QUICK]
    assert evaluate_meshes.main(command) == 0
    document, rows = scores_of(out)
    assert [entry["mesh"] for entry in document["left_out"]] == ["alone.ply"]
    larger, same = rows["ball.obj", 64]["scores"], rows["same.ply", 64]["scores"]
    assert larger["result"]["chamfer"] == pytest.approx(0.0095, rel=0.02)
    assert larger["result"]["area_ratio"] == pytest.approx(1.01**2, rel=1e-4)
    assert larger["result"]["f1@0.01"] == 100 and larger["result"]["f1@0.005"] == 0
    assert same["result"]["f1@0.0002"] == 100 and same["result"]["normal_psnr"] > 60
    assert 0 < same["ceiling"]["f1@0.0002"] < 100 and not (out / "pictures").exists()
    assert "A cell is result / ceiling / floor" in (out / "scores.md").read_text(encoding="utf-8")
    assert evaluate_meshes.main([*command, "ceiling=false"]) == 0
    assert set(scores_of(out)[1]["same.ply", 64]["scores"]) == {"result", "floor"}


def test_thin_walls_are_counted(tmp_path):
    plate = trimesh.creation.box((2, 2, 0.02))
    save_mesh(tmp_path / "plate.ply", plate.vertices, plate.faces)
    command = [f"meshes={tmp_path / 'plate.ply'}", f"out={tmp_path / 'out'}", "resolution=128", "pictures=false", *QUICK]
    assert evaluate_meshes.main(command) == 0
    _, rows = scores_of(tmp_path / "out")
    assert rows["plate.ply", 128]["thin_share"] == pytest.approx(100 * 8 / (8 + 4 * 0.04), abs=0.5)
    assert "meshes)" not in (tmp_path / "out" / "scores.md").read_text(encoding="utf-8")


def test_nothing_scored_is_a_failure(tmp_path):
    (tmp_path / "empty.obj").write_bytes(b"")
    assert evaluate_meshes.main([f"meshes={tmp_path}", f"out={tmp_path / 'out'}"]) == 1
