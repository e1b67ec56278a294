"""Polynomials of cells: exact where the distance is one, on the right side elsewhere, and turned with the volume."""

import pytest
import torch
from analytic import sphere, torus, volume_of
from vae_inputs import TINY, shapes, small_batch

from reference_model.dataset import collate_volumes
from reference_model.symmetry import apply_symmetry
from reference_model.vae import SparseVAE, VAEConfig
from reference_model.vae_loss import Targets, make_targets, reconstruction_terms
from reference_model.vae_patch import COEFFICIENTS, fit_patches, patch_basis, patch_values

CPU = torch.device("cpu")


def targets_of(values, band=None, weights=None):
    band = values.abs() < 1 if band is None else band
    return Targets(values.clamp(-1, 1), band, torch.zeros_like(band), torch.ones_like(values) if weights is None else weights)


def test_basis_is_orthonormal():
    basis = patch_basis(CPU).double()
    assert basis.shape == (512, COEFFICIENTS)
    assert (basis.T @ basis / 512 - torch.eye(COEFFICIENTS)).abs().max() < 1e-6


def test_a_polynomial_comes_back():
    """Many band voxels: the ridge hardly shows, and what is clamped plays no part."""
    generator = torch.Generator().manual_seed(0)
    coefficients = 0.4 * torch.randn(200, COEFFICIENTS, generator=generator)
    values = patch_values(coefficients)
    kept = ((values.abs() < 1).float().mean(1) > 0.5).nonzero().flatten()
    assert len(kept) > 50
    found = patch_values(fit_patches(targets_of(values[kept]))).clamp(-1, 1)
    assert (found - values[kept].clamp(-1, 1)).square().mean() < 1e-4


def test_the_sum_of_squares_is_least():
    """Against least squares in float64, row by row, over the band alone (nothing lies outside it)."""
    generator = torch.Generator().manual_seed(1)
    values = 0.3 * torch.randn(4, 512, generator=generator).clamp(-3, 3)
    weights = 0.01 + torch.rand(4, 512, generator=generator)
    latents = fit_patches(targets_of(values, torch.ones(4, 512, dtype=torch.bool), weights))
    basis = patch_basis(CPU).double()
    shares = weights.double() / weights.double().sum(1, keepdim=True)
    for row, share, z in zip(values.double(), shares, latents.double(), strict=True):
        stacked = torch.cat((share.sqrt()[:, None] * basis, 1e-3**0.5 * torch.eye(COEFFICIENTS).double()))
        wanted = torch.cat((share.sqrt() * row, torch.zeros(COEFFICIENTS).double()))
        coefficients = torch.linalg.lstsq(stacked, wanted[:, None]).solution[:, 0]
        assert (z - 2 * coefficients).abs().max() < 2e-5


def test_a_focus_moves_errors_away_from_the_surface():
    batch = small_batch()
    plain, focused = (make_targets(batch, focus=focus) for focus in (None, 0.5))
    near = plain.band & (plain.values.abs() < 0.5)
    far = plain.band & ~near
    errors = [(patch_values(fit_patches(t)) - t.values).abs() for t in (plain, focused)]
    assert errors[1][near].mean() < 0.95 * errors[0][near].mean()
    assert errors[1][far].mean() > errors[0][far].mean()


@pytest.mark.parametrize("resolution", [256, 512])
def test_smooth_surfaces_need_no_network(resolution):
    """A fresh model decodes what it encodes: the distance to a tenth of a voxel, and every child on its side."""
    torch.manual_seed(0)
    model = SparseVAE(VAEConfig(**TINY))
    batch = collate_volumes([volume_of(sphere(0.3, (0.2, 0.1, 0.0)), resolution), volume_of(torus(0.3, 0.15), resolution)])
    with torch.no_grad():
        decoded = model.decode(model.encode(batch).mean, batch.latents, resolution)
    targets = make_targets(batch)
    voxel = 256 / resolution  # in units of the band's half width
    assert reconstruction_terms(decoded, targets)["in"] < (0.1 * voxel) ** 2
    assert (decoded * targets.values > 0)[~targets.band].float().mean() > 0.999


@pytest.mark.parametrize("focus", [None, 0.5])
def test_latents_are_the_coefficients_at_first(focus):
    model, batch = SparseVAE(VAEConfig(**TINY, focus=focus)), small_batch()
    assert torch.equal(model.encode(batch).mean, fit_patches(make_targets(batch, focus=focus)))


def test_turned_with_the_volume():
    """The set of monomials is its own image under the symmetries of the cube: the fit of an image is the image of the fit."""
    volume = shapes()[2]
    for symmetry in (7, 30, 47):
        turned = apply_symmetry(volume, symmetry)
        errors = []
        for v in (volume, turned):
            targets = make_targets(collate_volumes([v]))
            errors.append(reconstruction_terms(patch_values(fit_patches(targets)), targets))
        for name in ("in", "ext"):
            assert errors[0][name].item() == pytest.approx(errors[1][name].item(), rel=1e-3), (symmetry, name)


def test_nothing_at_all():
    none = targets_of(torch.zeros(0, 512))
    assert fit_patches(none).shape == (0, COEFFICIENTS)
    assert patch_values(torch.zeros(0, COEFFICIENTS)).shape == (0, 512)


def test_the_head_needs_its_channels():
    with pytest.raises(ValueError, match="head polynomial needs 16 latent channels, got self.latent_channels=8"):
        VAEConfig(**TINY, latent_channels=8)
    with pytest.raises(ValueError, match='ext_target "released" needs head'):
        VAEConfig(**TINY, ext_target="released")
    with pytest.raises(ValueError, match="head must be one of"):
        VAEConfig(**TINY, head="linear")
