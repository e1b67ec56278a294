"""Latents that are chosen by what they decode to: never farther than pieces alone, and with the topology of the true surface."""

from dataclasses import replace

import pytest
import torch
from vae_inputs import TINY, shapes, small_batch, tiny_model

from reference_model import vae_encode
from reference_model.dataset import collate_volumes
from reference_model.extract import extract_mesh
from reference_model.tiles import lattice
from reference_model.vae import SparseVAE, VAEConfig
from reference_model.vae_decode import decode_volume
from reference_model.vae_encode import encode_volume, keep_topology
from reference_model.vae_fit import closeness, fit_cells
from reference_model.vae_loss import make_targets
from reference_model.vae_pieces import closed, is_open, opened, piece_values
from reference_model.volume import Volume


def characteristic(latents: torch.Tensor, values: torch.Tensor) -> int:
    coords = (latents[:, None] * 8 + lattice(8)).flatten(0, 1).int()
    vertices, faces, _ = extract_mesh(coords, values.flatten(), 256, values < 0)
    return len(vertices) - len(faces) // 2


def test_cells_that_would_change_the_topology_get_other_pieces():
    """A bubble in a cell, one in the middle and one on its rim, as if the pieces had said so."""
    volume = shapes()[2]
    targets = make_targets(collate_volumes([volume]))
    z = closed(fit_cells(targets, 256))
    values = piece_values(z, 256)
    true = characteristic(volume.latents, targets.values)
    assert characteristic(volume.latents, values) == true
    same = keep_topology(z, values, targets, volume.latents, 256, planes=True)
    assert torch.equal(same, z)
    wrong = values.clone()
    deep = targets.values.view(-1, 8, 8, 8)[:, 2:6, 2:6, 2:6].amin((1, 2, 3)) >= 1  # cells whose middle lies well outside
    cells = deep.nonzero().flatten()[:2].tolist()
    assert len(cells) == 2
    for cell, child in zip(cells, (8 * 8 * 3 + 8 * 3 + 3, 8 * 8 * 4 + 8 * 4 + 4), strict=True):
        wrong[cell, child] = -0.5
    assert characteristic(volume.latents, wrong) == true + 4
    z[cells] += 0.01  # whatever said so
    kept = keep_topology(z, wrong, targets, volume.latents, 256, planes=True)
    assert sorted((kept != z).any(1).nonzero().flatten().tolist()) == sorted(cells)
    assert characteristic(volume.latents, piece_values(kept, 256)) == true and not is_open(kept[cells]).any()


def test_the_network_speaks_where_it_comes_nearer(monkeypatch):
    """Pieces off by as much as a drawn network adds: it is right about some cells, and wrong about others."""
    monkeypatch.setattr(vae_encode, "keep_topology", lambda z, *_: z)
    volume, model = shapes()[2], tiny_model()
    batch = collate_volumes([volume])
    targets = make_targets(batch)
    fitted = fit_cells(targets, 256)
    fitted[:, :15] += 0.1 * torch.randn(len(fitted), 15, generator=torch.Generator().manual_seed(0))
    fitted = opened(fitted, torch.arange(len(fitted)) % 3 > 0)
    batch = replace(batch, fit=fitted)
    mean = model.encode(batch).mean.detach()
    z = encode_volume(model, batch)
    alone, both = (closeness(x.view(-1, 512), targets, 256) for x in (piece_values(fitted, 256).clamp(-1, 1), decoded(model, mean, volume)))
    cells = is_open(z)
    assert torch.equal(cells, both < alone) and 5 < cells.sum() < is_open(fitted).sum() - 5
    assert torch.equal(z[cells], mean[cells]) and torch.equal(z[~cells], closed(fitted)[~cells])
    assert closeness(decoded(model, z, volume), targets, 256).mean() < torch.minimum(alone.mean(), both.mean())


def test_the_surface_hangs_together_as_the_true_one():
    """Of a box whose latents a drawn network spoils: what it decodes to has another Euler characteristic."""
    volume, model = shapes()[1], tiny_model()
    batch = collate_volumes([volume])
    targets = make_targets(batch)
    batch = replace(batch, fit=opened(fit_cells(targets, 256), torch.ones(len(volume.latents), dtype=torch.bool)))
    true = characteristic(volume.latents, targets.values)
    z = encode_volume(model, batch)
    assert characteristic(volume.latents, decoded(model, z, volume)) == true == 2


def decoded(model: SparseVAE, z: torch.Tensor, volume: Volume) -> torch.Tensor:
    """[L,512]"""
    return decode_volume(model, z, volume.latents, 256)[1].view(-1, 512)


def test_without_pieces_it_is_the_mean():
    model = tiny_model(head="clamp")
    batch = collate_volumes(shapes()[:1])
    assert torch.equal(encode_volume(model, batch), model.encode(batch).mean)


def test_one_sample_at_a_time():
    with pytest.raises(ValueError, match="one sample, got 3"):
        encode_volume(SparseVAE(VAEConfig(**TINY)), small_batch())
