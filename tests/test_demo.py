"""The README's example and the demo: the pieces of `make demo` on sizes that a test can afford."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import trimesh
from matplotlib.colors import to_rgb

import ssa
from benchmarks.voxels import surface_voxels
from examples import ablate_vae, demo, picture, plot_training, round_trip, train_full
from reference_model.cli import parse
from reference_model.vae import VAEConfig

matplotlib.use("Agg")


def test_readme_examples_run():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(block, scope)
    assert scope["y"].shape == scope["x"].shape


def test_default_mesh_is_closed_and_every_branch_sees_a_strict_subset():
    mesh = demo.trefoil()
    assert mesh.is_watertight and mesh.volume > 0 and mesh.euler_number == 0  # one closed tube, outward faces
    coords, resolution = demo.voxelise(mesh)
    assert len(coords) >= demo.MIN_VOXELS and coords[:, 1:].max() < resolution
    partition = ssa.partition_voxels(coords)
    assert demo.TOPK < len(partition.selection) / 4
    assert len(partition.compression) < len(coords) / 4
    assert torch.diff(partition.window.offsets).max() < len(coords) / 4


def test_position_code_tells_voxels_apart():
    xyz = torch.cartesian_prod(*[torch.arange(12)] * 3)
    code = demo.position_code(xyz, 128)
    assert code.shape == (12**3, 128) and not code[:, 126:].any()
    torch.testing.assert_close(code[:, [0, 21]], torch.stack([xyz[:, 0].sin(), xyz[:, 0].cos()], 1))
    gaps = torch.cdist(code.double(), code.double()) + 9 * torch.eye(len(code))
    assert gaps.min() > 0.1


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    coords = surface_voxels(demo.trefoil(), 16)
    layers = [ssa.SpatialSparseAttention(32, 2, 1, topk=2, impl=impl) for impl in ("torch", "naive")]
    layers[1].load_state_dict(layers[0].state_dict())
    partition = layers[0].partition(coords)
    return layers, demo.position_code(partition.coords[:, 1:], 32), partition


def test_comparison_with_the_dense_reference(small):
    layers, x, partition = small
    error = demo.compare(layers[0], layers[1], x, partition)[0]
    assert set(error) == {"y", "dx", *dict(layers[0].named_parameters())}
    assert max(error.values()) < 1e-5

    with torch.no_grad():
        layers[1].proj_v.weight[0] *= 1.01
    error = demo.compare(layers[0], layers[1], x, partition)[0]
    assert error["y"] > 1e-4, "a wrong weight must show"


def test_picture_shows_all_three_branches(small, tmp_path):
    layers, x, partition = small
    demo.draw(tmp_path / "demo.png", "a knot", layers[0], x, partition)
    image = matplotlib.image.imread(tmp_path / "demo.png")[..., :3]
    assert image.shape == (1350, 2400, 3)
    for color, panel in ((picture.WEIGHT(0.75)[:3], 0), (picture.CHOSEN, 1), (picture.WINDOW, 2)):
        hue = np.array(to_rgb(color)) / np.linalg.norm(to_rgb(color))
        panels = np.split(image[250:1070], 3, axis=1)  # between the subtitle and the captions
        alike = [(((p @ hue) / np.linalg.norm(p, axis=-1).clip(1e-6)) > 0.99).sum() for p in panels]
        assert alike[panel] > 300 and alike[panel] == max(alike), f"{color} belongs to panel {panel}, found {alike}"


def test_voxelise_refuses_a_mesh_too_small_for_the_grid(monkeypatch):
    monkeypatch.setattr(demo, "MIN_VOXELS", 10**7)
    monkeypatch.setattr(demo, "FINEST", 40)
    with pytest.raises(ValueError, match="must pass through 10000000 cells"):
        demo.voxelise(demo.trefoil())


def test_round_trip_scores_and_draws_what_the_network_gives(monkeypatch, tmp_path, capsys):
    """With a network that answers a sphere of the right size, one tenth off."""
    mesh = trimesh.creation.icosphere(3)
    mesh.export(tmp_path / "ball.ply")
    answer = trimesh.creation.icosphere(3, radius=0.855)
    monkeypatch.setattr(round_trip, "load_network", lambda name, device: object())
    monkeypatch.setattr(
        round_trip, "run_network", lambda *_: (answer.vertices, answer.faces, {"latents": 1, "seconds_network": 0.0})
    )
    row = round_trip.round_trip(tmp_path / "ball.ply", tmp_path / "ball.png")
    assert row["scores"]["result"]["f1@0.005"] == 0 and row["scores"]["ceiling"]["f1@0.005"] == 100
    assert row["scores"]["result"]["area_ratio"] == pytest.approx(0.81, abs=0.01)
    assert (tmp_path / "ball.png").stat().st_size > 10_000 and len(list(tmp_path.iterdir())) == 2
    round_trip.report(row, tmp_path / "ball.png")
    assert "→ 1 latents of 16 numbers" in capsys.readouterr().out


def test_round_trip_without_weights_says_so(tmp_path):
    with pytest.raises(ValueError, match="no weights at"):
        round_trip.round_trip(tmp_path / "ball.ply", tmp_path / "ball.png", weights=str(tmp_path / "none.safetensors"))


def test_runs_are_drawn_one_after_another(tmp_path):
    rows = [{"step": s, "kind": k, "in": 1 / s, "total": 2 / s} for s in (10, 20) for k in ("train", "validation")]
    logs = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for log in logs:
        log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 30, "ki')
    joined, starts = plot_training.read_runs(logs)
    assert starts == [0, 20] and [row["step"] for row in joined] == [10, 10, 20, 20, 30, 30, 40, 40]
    plot_training.draw(logs, tmp_path / "curve.png", beside=logs[0])
    assert (tmp_path / "curve.png").stat().st_size > 5_000


def test_every_variant_of_the_ablation_is_a_model_and_has_a_row():
    for training, scoring in ablate_vae.VARIANTS.values():
        config, _ = parse("train_vae", ("out",), [*ablate_vae.BASE, *training])
        assert VAEConfig(**config.vae).occupancy == bool(scoring), "pruning needs the head"
        parse("evaluate_vae", ("out",), scoring)
    gaps = {name: 1.5 for name in ("f1@0.005", "f1@0.001", "f1@0.0002", "normal_consistency", "area")} | {"components": 2, "meshes": 4}
    row = {"name": "a variant", "loss": {"step": 7, "in": 0.1, "ext": 0.2, "sharp": 0.3}, "gaps": gaps}
    last = ablate_vae.table([row], 0.5).splitlines()[-1]
    assert last == "| a variant | 7 | 0.1000 | 0.2000 | 0.3000 | 1.50 | 1.50 | 1.50 | 1.50 | 1.50 | 2 of 4 |"


def test_the_full_training_keeps_held_out_meshes_first_and_mixes_the_rest(tmp_path, monkeypatch):
    for name in ("meshes/spot.obj", "meshes/a.obj", "shapes/x/b.ply", "copies/0/c.ply", "copies/0/d.ply"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    paths = [tmp_path / f"list_{seed}.csv" for seed in range(6)]
    for seed, path in enumerate(paths):
        train_full.write_list(tmp_path / "meshes", tmp_path, ["spot"], 4, seed, path)
    found = [[Path(line).stem for line in path.read_text().splitlines()[1:]] for path in paths]
    assert all(stems[0] == "spot" and len(set(stems)) == 4 for stems in found) and len({tuple(stems) for stems in found}) > 1
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    several = train_full.launch("out=x")
    assert several[several.index("--nproc-per-node") + 1] == "2" and several[-2:] == ["reference_model.train_vae", "out=x"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert train_full.launch("out=x")[1:] == ["-m", "reference_model.train_vae", "out=x"]
    config, _ = parse("train_vae", ("out",), train_full.RECIPE)
    assert config.patch_latents == 24 and VAEConfig(**config.vae).hidden_size == 512
