"""Two pieces a cell: edges, walls and slits come back, smooth cells stay of one piece, sides are kept, turns and batches change nothing."""

import pytest
import torch
from analytic import box, sphere, torus, volume_of
from vae_inputs import TINY, shapes, small_batch

from reference_model import vae_crease
from reference_model.dataset import collate_volumes
from reference_model.symmetry import apply_symmetry
from reference_model.tiles import lattice
from reference_model.vae import SparseVAE, VAEConfig
from reference_model.vae_crease import PATCHES, crease_values, fit_creases
from reference_model.vae_loss import Targets, make_targets, reconstruction_terms
from reference_model.vae_patch import COEFFICIENTS, fit_patches, patch_values

X = (lattice(8).float() - 3.5) / 3.5  # children in the frame of the cell
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


def targets_of(values: torch.Tensor) -> Targets:
    band = values.abs() < 1
    return Targets(values.clamp(-1, 1), band, torch.zeros_like(band), torch.ones_like(values))


def planes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [count,512] of two planes that both pass near the middle of a cell, at 30 degrees and more."""
    generator = torch.Generator().manual_seed(seed)
    normals = torch.nn.functional.normalize(torch.randn(2, 20 * count, 3, generator=generator), dim=2)
    normals = normals[:, (normals[0] * normals[1]).sum(1) < 0.85][:, :count]
    offsets = 0.3 * torch.randn(2, count, 1, generator=generator)
    first, second = (n @ X.T * 0.8 + o for n, o in zip(normals, offsets, strict=True))
    return first, second


def near_error(latents: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[L] root mean square of the error of voxels near the surface."""
    near = (values.abs() < 0.5).float()
    error = (crease_values(latents) - values).square() * near
    return (error.sum(1) / near.sum(1).clamp(min=1)).sqrt()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("meet", [torch.maximum, torch.minimum])
def test_two_planes_come_back(meet, device: str):
    values = meet(*planes(200, 0)).to(device)
    values = values[((values.abs() < 0.5).sum(1) > 20) & ((values.abs() < 1).sum(1) > 150)]
    assert len(values) > 150
    targets = targets_of(values)
    latents = fit_creases(targets)
    errors, plain = near_error(latents, values), (patch_values(fit_patches(targets)) - values).abs()
    assert errors.median() < 0.0017 and errors.quantile(0.97) < 0.004
    assert plain[values.abs() < 0.5].median() > 4 * (crease_values(latents) - values).abs()[values.abs() < 0.5].median()
    creased = latents[:, 15] != 0
    assert creased.float().mean() > 0.8
    assert (latents[creased, 15] == (1 if meet is torch.maximum else -1)).float().mean() > 0.9
    beyond = (latents[creased, 10:15] @ vae_crease._bases(values.device).l.T > 0) & targets.band[creased]
    assert (beyond.sum(1) < 0.5 * targets.band[creased].sum(1)).float().mean() > 0.95  # a is the piece of more voxels


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_wall_and_a_slit_thinner_than_a_voxel_come_back(sign):
    """Along an axis and askew; 0.2 of the cell's half edge is 0.7 voxels."""
    for direction in ((1.0, 0.0, 0.0), (1.0, 0.7, 0.3)):
        normal = torch.nn.functional.normalize(torch.tensor(direction), dim=0)
        values = sign * ((X @ normal + 0.05).abs() - 0.1)[None]
        latents = fit_creases(targets_of(values))
        assert latents[0, 15] == sign
        assert (crease_values(latents) - values).abs()[values.abs() < 0.5].max() < 0.02


def test_smooth_cells_are_of_one_piece():
    """Where the band fills a cell; in corners of few voxels the sides of the others may ask for a second piece."""
    batch = collate_volumes([volume_of(sphere(0.5), 512), volume_of(torus(0.5, 0.25), 512)])
    targets = make_targets(batch)
    latents = fit_creases(targets)
    assert (latents[targets.band.sum(1) > 100, 15] == 0).float().mean() > 0.95
    smooth = latents[latents[:, 15] == 0]
    assert (smooth[:, 10:15] == torch.tensor([-1.5, 0, 0, 0, 0])).all()
    noisy = smooth + 0.03 * torch.randn(smooth.shape, generator=torch.Generator().manual_seed(0))
    noisy[:, :10] = smooth[:, :10]
    assert torch.equal(crease_values(noisy), crease_values(smooth))  # noise does not bring a crease to life
    assert reconstruction_terms(crease_values(latents), targets)["in"] < 0.01**2


def test_sides_are_kept():
    """Outside of the band nothing changes sides, of a box with its edges as of all small shapes."""
    for batch in (collate_volumes([volume_of(box(0.4), 256)]), small_batch()):
        targets = make_targets(batch)
        assert ((crease_values(fit_creases(targets)) * targets.values > 0)[~targets.band]).float().mean() > 0.999


@pytest.mark.parametrize("focus", [None, 0.5])
def test_latents_and_values_of_a_fresh_model_are_those_of_the_fit(focus):
    model, batch = SparseVAE(VAEConfig(**TINY, head="crease", focus=focus)), small_batch()
    latents = fit_creases(make_targets(batch, focus=focus))
    with torch.no_grad():
        assert torch.equal(model.encode(batch).mean, latents)
        assert torch.equal(model.decode(latents, batch.latents, 256), crease_values(latents).clamp(-1, 1))


def test_gradients_reach_every_weight():
    torch.manual_seed(0)
    model, batch = SparseVAE(VAEConfig(**TINY, head="crease", error="smooth_l1", focus=0.5)), small_batch()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    model.loss(batch, torch.Generator().manual_seed(0))["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())


def test_turned_with_the_volume():
    """The bases are their own image under the symmetries of the cube: the fit of an image is the image of the fit."""
    volume = shapes()[2]
    for symmetry in (7, 30, 47):
        errors = []
        for v in (volume, apply_symmetry(volume, symmetry)):
            targets = make_targets(collate_volumes([v]))
            errors.append(reconstruction_terms(crease_values(fit_creases(targets)), targets))
        assert errors[0]["in"].item() == pytest.approx(errors[1]["in"].item(), rel=1e-3), symmetry


def test_fitted_in_pieces_as_at_once(monkeypatch):
    targets = make_targets(small_batch())
    whole = fit_creases(targets)
    monkeypatch.setattr(vae_crease, "_ROWS", 7)
    torch.testing.assert_close(crease_values(fit_creases(targets)), crease_values(whole), rtol=0, atol=1e-3)


def test_nothing_at_all():
    none = targets_of(torch.zeros(0, 512))
    for patch in PATCHES.values():
        assert patch.fit(none).shape == (0, COEFFICIENTS)
        assert patch.values(torch.zeros(0, COEFFICIENTS)).shape == (0, 512)
