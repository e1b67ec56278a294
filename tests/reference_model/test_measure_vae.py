"""The volumes that are measured, and the table."""

import json

import pytest
import torch
from analytic import sphere, volume_of

pytest.importorskip("hydra")

from reference_model import measure_vae  # noqa: E402


def test_spheres():
    got, expected = measure_vae.spheres([0.3], 256), volume_of(sphere(0.3), 256)
    assert torch.equal(got.latents, expected.latents) and torch.equal(got.coords, expected.coords)
    assert (got.values - expected.values).abs().max() < 1e-3 and torch.equal(got.inside, expected.inside)
    shells = measure_vae.spheres([0.3, 0.5], 256)
    assert len(shells.coords) > 2 * len(got.coords)
    r = ((2.0 * shells.coords + 1) / 256 - 1).norm(dim=1)
    assert torch.equal(shells.values < 0, (r > 0.3) & (r < 0.5))


def test_table(tmp_path, capsys):
    case = "cases=[{resolution: 256, radii: [0.08]}, {resolution: 512, radii: [0.05]}]"
    settings = ["vae=tiny", "repeats=1", "precisions=[fp32,bf16]", "device=cpu", "crop_from=512", "crop_latents=4", "chunk=3"]
    settings.append("checkpointing=false")
    assert measure_vae.main([f"out={tmp_path}", case, *settings]) == 0
    rows = json.loads((tmp_path / "measure.json").read_text(encoding="utf-8"))["rows"]
    steps = [("training step", "bf16"), ("training step, fits kept", "bf16")]
    kinds = [*steps, *((what, name) for name in ("fp32", "bf16") for what in ("encode", "encode and look", "decode"))]
    assert [(r["resolution"], r["what"], r["precision"]) for r in rows] == [(R, *kind) for R in (256, 512) for kind in kinds]
    assert all(r["ms"] > 0 for r in rows) and [r.get("crop") for r in rows[::8]] == [None, 4]
    assert rows[4]["largest_difference"] == 0 < rows[7]["largest_difference"] < 0.1
    model = measure_vae.SparseVAE(measure_vae.VAEConfig(channels=(8, 8, 16), hidden_size=32, num_layers=1, num_heads=2))
    batch = measure_vae.collate_volumes([measure_vae.spheres([0.08], 256)])
    assert rows[0]["tflops"] == pytest.approx(3e-9 * model.flops(batch) / rows[0]["ms"]), "nothing is recomputed"
    assert (tmp_path / "measure.md").read_text(encoding="utf-8").count("\n| ") == 17
