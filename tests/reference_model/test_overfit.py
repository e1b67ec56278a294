"""From a mesh to latents and back, with a network that has seen nothing else: the whole way through the commands."""

import json
import re

import pytest
import torch

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("igl")
pytest.importorskip("hydra")

from reference_model import evaluate_vae, reconstruct  # noqa: E402
from reference_model.dataset import collate_volumes  # noqa: E402
from reference_model.meshes import load_mesh, normalize, save_mesh  # noqa: E402
from reference_model.sdf import mesh_to_volume  # noqa: E402
from reference_model.vae import SparseVAE, VAEConfig  # noqa: E402
from reference_model.vae_decode import save_vae  # noqa: E402

STEPS = 140


@pytest.fixture(scope="module")
def rod(tmp_path_factory):
    """A mesh file and the weights of a small network trained on it alone."""
    folder = tmp_path_factory.mktemp("rod")
    mesh = trimesh.creation.capsule(height=30.0, radius=0.5, count=[32, 32])
    save_mesh(folder / "rod.obj", mesh.vertices + (3, 2, 1), mesh.faces)
    loaded = load_mesh(folder / "rod.obj")
    batch = collate_volumes([mesh_to_volume(normalize(loaded)[0], loaded.faces, 256)])
    torch.manual_seed(0)
    model = SparseVAE(VAEConfig(channels=(8, 16, 32), hidden_size=64, num_heads=2, num_layers=2, head="tanh", lambda_kl=1e-4))
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, STEPS)
    generator = torch.Generator().manual_seed(0)
    first = last = None
    for _ in range(STEPS):
        last = model.loss(batch, generator)["total"]
        first = first or last.item()
        optimizer.zero_grad()
        last.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert last.item() < 0.1 * first
    save_vae(model, folder / "weights.safetensors", torch.bfloat16)
    return folder


def test_the_network_reaches_the_ceiling(rod):
    out = rod / "scores"
    arguments = [f"meshes={rod / 'rod.obj'}", f"out={out}", f"weights={rod / 'weights.safetensors'}", "resolution=256", "samples=50000"]
    assert evaluate_vae.main([*arguments, "grid=64", "size=128"]) == 0
    document = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    (row,) = document["rows"]
    scores = row["scores"]
    assert scores["ceiling"]["f1@0.001"] > 95
    assert scores["result"]["f1@0.005"] >= 0.99 * scores["ceiling"]["f1@0.005"]
    assert scores["result"]["components"] == 1 and scores["result"]["genus"] == 0 and row["network"]["open_vertices"] == 0
    assert abs(scores["result"]["area_ratio"] / scores["ceiling"]["area_ratio"] - 1) < 0.05


def test_reconstruct_with_a_network(rod, capsys):
    arguments = [f"in={rod / 'rod.obj'}", f"network={rod / 'weights.safetensors'}"]
    for name in ("a.ply", "b.ply"):
        assert reconstruct.main([*arguments, f"out={rod / name}"]) == 0
    assert (rod / "a.ply").read_bytes() == (rod / "b.ply").read_bytes()
    before, after = load_mesh(rod / "rod.obj"), load_mesh(rod / "a.ply")
    for bound in (lambda m: m.vertices.max(0), lambda m: m.vertices.min(0)):
        assert abs(bound(before) - bound(after)).max() < 0.1
    text = capsys.readouterr().out
    assert re.search(r"cells in disagreement: [\d,]+, vertices on openings: 0", text)
