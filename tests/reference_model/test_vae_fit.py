"""Pieces of surface a cell: edges, corners, walls and slits come back, smooth cells stay of one piece; sides are kept."""

from dataclasses import replace

import pytest
import torch
from analytic import box, sphere, torus, volume_of
from vae_inputs import TINY, shapes, small_batch

from reference_model import vae_fit
from reference_model.dataset import collate_volumes
from reference_model.symmetry import apply_symmetry
from reference_model.tiles import lattice
from reference_model.vae import SparseVAE, VAEConfig
from reference_model.vae_bases import bases_of
from reference_model.vae_descent import Wanted
from reference_model.vae_fit import fit_cells
from reference_model.vae_loss import BETA, Targets, make_targets, reconstruction_terms
from reference_model.vae_pieces import (
    COEFFICIENTS,
    FORMS,
    NUMBERS,
    ONE,
    PLANES,
    as_latents,
    closed,
    is_open,
    kind_of,
    kinds_of,
    opened,
    piece_values,
    slope_of,
)

X = (lattice(8).float() - 3.5) / 3.5  # children in the frame of the cell
FINE = 896  # where a distance grows by the step of X from child to child
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
    first, second = (n @ X.T + o for n, o in zip(normals, offsets, strict=True))
    return first, second


def near_error(latents: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[L] root mean square of the error of voxels near the surface."""
    near = (values.abs() < 0.5).float()
    error = (piece_values(latents, FINE) - values).square() * near
    return (error.sum(1) / near.sum(1).clamp(min=1)).sqrt()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("meet", [torch.maximum, torch.minimum])
def test_two_planes_come_back(meet, device: str):
    values = meet(*planes(200, 0)).to(device)
    values = values[((values.abs() < 0.5).sum(1) > 20) & ((values.abs() < 1).sum(1) > 150)]
    assert len(values) > 150
    targets = targets_of(values)
    latents = fit_cells(targets, FINE)
    errors = near_error(latents, values)
    assert errors.median() < 3e-4 and errors.quantile(0.97) < 1e-3
    parted = latents[:, 15] != 0
    assert parted.float().mean() > 0.95
    assert (latents[parted, 15].sign() == (1 if meet is torch.maximum else -1)).float().mean() > 0.9


def test_what_pieces_cannot_hold_spoils_little():
    """Two planes, and corners that others cut off: the two are found as if those were not there, which squares would not do."""
    values = torch.maximum(*planes(600, 0))
    generator, cut = torch.Generator().manual_seed(1), torch.zeros_like(values, dtype=torch.bool)
    for _ in range(3):
        other = torch.nn.functional.normalize(torch.randn(600, 3, generator=generator), dim=1) @ X.T
        other = other - other.amax(1, keepdim=True) + 0.45
        cut, values = cut | (other > values), torch.maximum(values, other)
    near = values.abs() < 0.25
    share = (cut & near).sum(1) / near.sum(1).clamp(min=1)
    rows = (near.sum(1) > 30) & (share > 0.03) & (share < 0.15) & ((values.abs() < 1).sum(1) > 150)
    assert rows.sum() > 130
    errors = (piece_values(fit_cells(targets_of(values[rows]), FINE), FINE) - values[rows]).abs()[(near & ~cut)[rows]]
    assert errors.median() < 0.007 and (errors < BETA / 4).float().mean() > 0.9


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_wall_and_a_slit_thinner_than_a_voxel_come_back(sign):
    """Along an axis and askew; 0.2 of the cell's half edge is 0.7 voxels."""
    for direction in ((1.0, 0.0, 0.0), (1.0, 0.7, 0.3)):
        normal = torch.nn.functional.normalize(torch.tensor(direction), dim=0)
        values = sign * ((X @ normal + 0.05).abs() - 0.1)[None]
        latents = fit_cells(targets_of(values), FINE)
        assert latents[0, 15].sign() == sign
        assert (piece_values(latents, FINE) - values).abs()[values.abs() < 0.5].max() < 0.02


def test_smooth_cells_are_of_one_piece():
    """Where the band fills a cell; in corners of few voxels the sides of the others may ask for a second piece."""
    batch = collate_volumes([volume_of(sphere(0.25), 512), volume_of(torus(0.2, 0.1), 512)])
    targets = make_targets(batch)
    latents = fit_cells(targets, 512)
    assert (latents[targets.band.sum(1) > 100, 15] == 0).float().mean() > 0.95
    smooth = latents[latents[:, 15] == 0]
    assert (smooth[:, 10:15] == 0).all()
    noisy = smooth + 0.03 * torch.randn(smooth.shape, generator=torch.Generator().manual_seed(0))
    noisy[:, :10] = smooth[:, :10]
    wanted = piece_values(smooth, 512)
    assert torch.equal(piece_values(noisy, 512)[wanted.abs() < 1], wanted[wanted.abs() < 1])  # noise does not bring other pieces to life
    assert reconstruction_terms(piece_values(latents, 512), targets)["in"] < 0.01**2


def test_sides_are_kept():
    """Outside of the band nothing changes sides, of a box with its edges as of all small shapes."""
    for batch in (collate_volumes([volume_of(box(0.4), 256)]), small_batch()):
        targets = make_targets(batch)
        assert ((piece_values(fit_cells(targets, 256), 256) * targets.values > 0)[~targets.band]).float().mean() > 0.999


@pytest.mark.parametrize("focus", [None, 0.5])
def test_latents_and_values_of_a_fresh_model_are_those_of_the_fit(focus):
    model, batch = SparseVAE(VAEConfig(**TINY, focus=focus)), small_batch()
    latents = fit_cells(make_targets(batch, focus=focus), 256)
    with torch.no_grad():
        assert torch.equal(model.encode(batch).mean, latents)
        assert torch.equal(model.decode(latents, batch.latents, 256), piece_values(latents, 256).clamp(-1, 1))


def test_gradients_reach_every_weight():
    torch.manual_seed(0)
    model, batch = SparseVAE(VAEConfig(**TINY, error="smooth_l1", focus=0.5)), small_batch()
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
            errors.append(reconstruction_terms(piece_values(fit_cells(targets, 256), 256), targets))
        assert errors[0]["in"].item() == pytest.approx(errors[1]["in"].item(), rel=1e-3), symmetry


def test_fitted_in_pieces_as_at_once(monkeypatch):
    targets = make_targets(small_batch())
    whole = fit_cells(targets, 256)
    monkeypatch.setitem(vae_fit._ROWS, "cpu", 7)
    monkeypatch.setitem(vae_fit._HARD, "cpu", 2)
    torch.testing.assert_close(piece_values(fit_cells(targets, 256), 256), piece_values(whole, 256), rtol=0, atol=1e-3)


def test_nothing_at_all():
    none = targets_of(torch.zeros(0, 512))
    assert fit_cells(none, 256).shape == (0, COEFFICIENTS)
    assert piece_values(torch.zeros(0, COEFFICIENTS), 256).shape == (0, 512)
    for kind in range(2 * ONE + 1):
        assert piece_values(as_latents(torch.zeros(1, NUMBERS), torch.tensor([kind])), 256).isfinite().all()


def test_bases_are_orthonormal():
    bases = bases_of(torch.device("cpu"))
    for basis in (bases.a[0], bases.b):
        assert (basis.T @ basis / 512 - torch.eye(basis.shape[1])).abs().max() < 1e-12


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


def test_the_head_needs_its_channels():
    with pytest.raises(ValueError, match="head pieces needs 16 latent channels, got self.latent_channels=8"):
        VAEConfig(**TINY, latent_channels=8)
    with pytest.raises(ValueError, match='ext_target "released" needs head'):
        VAEConfig(**TINY, ext_target="released")
    with pytest.raises(ValueError, match="head must be one of"):
        VAEConfig(**TINY, head="linear")


@pytest.mark.parametrize("outer", [torch.maximum, torch.minimum])
@pytest.mark.parametrize("inner", [torch.maximum, torch.minimum])
def test_corners_of_three_planes_come_back(outer, inner):
    """All three pass through the cell and are seen near the surface."""
    generator = torch.Generator().manual_seed(2)
    normals = torch.nn.functional.normalize(torch.randn(3, 400, 3, generator=generator), dim=2)
    planes = normals @ X.T + 0.2 * torch.randn(3, 400, 1, generator=generator)
    values = outer(planes[0], inner(planes[1], planes[2]))
    seen = ((planes == values) & (values.abs() < 0.25)).sum(2)
    values = values[(seen.amin(0) > 15) & ((values.abs() < 1).sum(1) > 150)]
    assert len(values) > 50
    errors = near_error(fit_cells(targets_of(values), FINE), values)
    assert errors.median() < 1e-3 and (errors < 5e-3).float().mean() > 0.75


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_bent_wall_comes_back(sign):
    """A tube of radius 1.5 and 0.15 thick, in half edges of the cell: both sides bend the same way."""
    distance = ((X[:, 0] + 1.4).square() + (X[:, 1] + 0.5).square()).sqrt() - 1.5
    values = sign * (distance.abs() - 0.075)[None]
    latents = fit_cells(targets_of(values), FINE)
    assert kind_of(latents).item() == ONE + 2 * sign and near_error(latents, values).item() < 0.01


def test_the_kind_of_a_cell_is_told_as_it_is():
    torch.manual_seed(0)
    model, batch = SparseVAE(VAEConfig(**TINY)), small_batch()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
        posterior, fitted = model.encode(batch), fit_cells(make_targets(batch), 256)
    assert torch.equal(posterior.mean[:, 15], fitted[:, 15]) and not torch.equal(posterior.mean[:, :15], fitted[:, :15])
    noisy = posterior.sample(torch.Generator().manual_seed(0))[:, 15]
    assert ((noisy - fitted[:, 15]).abs() < 0.1).all() and fitted[:, 15].unique().numel() > 2


def test_the_derivatives_of_pieces():
    """What Gauss-Newton steps follow, against autograd of the values, for all kinds."""
    generator = torch.Generator().manual_seed(0)
    numbers = 0.3 * torch.randn(27, NUMBERS, generator=generator)
    kind = 2 + torch.arange(27) % (2 * ONE - 3)  # but planes and corners

    def values(x: torch.Tensor) -> torch.Tensor:
        return piece_values(as_latents(x, kind), 512)

    y, piece, parts = vae_fit._linearised(numbers.double(), kind, slope_of(512))
    assert torch.allclose(y.float(), values(numbers), atol=1e-5)
    maps = kinds_of(y.device, y.dtype).maps[kind[:, None], piece]  # [27,512,10,15]
    wanted = torch.autograd.functional.jacobian(lambda x: values(x).sum(0), numbers, vectorize=True)  # [512,27,15]
    rows = vae_fit._by_coefficients(parts).mT  # [27,512,10]
    assert ((rows[:, :, None] @ maps)[:, :, 0] - wanted.transpose(0, 1)).abs().max() < 1e-3 * wanted.abs().max()
    assert set(piece[kind > ONE + 2].unique().tolist()) == {0, 1, 2}


def test_the_derivatives_of_planes():
    """As those of pieces, by the vector of the plane that a child sees."""
    generator = torch.Generator().manual_seed(0)
    numbers, kind = torch.randn(40, NUMBERS, generator=generator), torch.tensor([0, 1, 2 * ONE - 1, 2 * ONE]).repeat(10)

    def values(x: torch.Tensor) -> torch.Tensor:
        return piece_values(as_latents(x, kind), 512)

    y, own, rows = vae_fit._linearised_planes(numbers.unflatten(1, (PLANES, 3)).double(), kind, slope_of(512))
    assert torch.allclose(y.float(), values(numbers), atol=1e-5)
    assert (own.sum(1) == 1).all() and own.any(2).sum() > 100
    wanted = torch.autograd.functional.jacobian(lambda x: values(x).sum(0), numbers, vectorize=True)  # [512,40,15]
    found = (own.mT[..., None] * rows[:, :, None]).flatten(2)  # [40,512,15]
    assert (found - wanted.transpose(0, 1)).abs().max() < 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_tips_of_five_planes_come_back(sign):
    """Pyramids with a base in the cell, and hollows of the same form: nearer than with three pieces, almost all by planes."""
    generator = torch.Generator().manual_seed(1)
    normals = torch.nn.functional.normalize(torch.randn(5, 600, 3, generator=generator), dim=2)
    planes = normals @ X.T - 0.5
    values = sign * planes.amax(0)
    seen = ((planes == planes.amax(0)) & (values.abs() < 0.25)).sum(2)
    values = values[(seen.amin(0) > 10) & ((values.abs() < 1).sum(1) > 150)][:60]
    assert len(values) == 60
    found, without = (fit_cells(targets_of(values), FINE, planes) for planes in (True, False))
    assert (kind_of(without) - ONE).abs().max() < FORMS.index("planes")
    errors, before = near_error(found, values), near_error(without, values)
    assert ((kind_of(found) - ONE) == FORMS.index("planes") * sign).float().mean() > 0.8
    assert errors.median() < 1e-3 and errors.mean() < 0.25 * before.mean()


@pytest.mark.parametrize("outer", [torch.maximum, torch.minimum])
def test_two_corners_come_back(outer):
    """An edge beside a corner of three faces, all seen: nearer than with three pieces, most by corners."""
    inner = torch.minimum if outer is torch.maximum else torch.maximum
    generator = torch.Generator().manual_seed(2)
    normals = torch.nn.functional.normalize(torch.randn(5, 3000, 3, generator=generator), dim=2)
    planes = normals @ X.T + 0.6 * torch.rand(5, 3000, 1, generator=generator) - 0.3
    groups = [inner(planes[0], planes[1]), inner(inner(planes[2], planes[3]), planes[4])]
    values = outer(*groups)
    seen = ((planes == values) & (values.abs() < 0.25)).sum(2)
    values = values[seen.amin(0) > 12][:60]
    assert len(values) == 60
    found, without = (fit_cells(targets_of(values), FINE, planes) for planes in (True, False))
    errors, before = near_error(found, values), near_error(without, values)
    form = FORMS.index("corners") * (1 if outer is torch.maximum else -1)
    assert ((kind_of(found) - ONE) == form).float().mean() > 0.5
    assert errors.median() < 0.3 * before.median() and errors.mean() < 0.6 * before.mean()


def test_children_on_the_wrong_side_cost_more():
    """Of two fits that are as near, the one with the true sides is less."""
    target = 0.01 * torch.ones(1, 512)
    wanted = Wanted.of(targets_of(target), 0.1)
    right, wrong = (wanted.loss(target + step) for step in (0.02, -0.02))
    assert wrong > right + 0.02


def test_the_last_number_says_two_things():
    """Also where noise of the size that a posterior has is added."""
    kind, cells = torch.arange(90) % (2 * ONE + 1), torch.arange(90) % 2 == 1
    z = as_latents(torch.randn(90, NUMBERS, generator=torch.Generator().manual_seed(0)), kind)
    for noise in (-0.1, 0.0, 0.1):
        told = opened(z, cells) + noise
        assert torch.equal(kind_of(told), kind) and torch.equal(is_open(told), cells)
    assert torch.equal(closed(opened(z, cells)), z) and torch.equal(opened(opened(z, cells), ~cells), opened(z, ~cells))


def test_the_network_corrects_open_cells_alone():
    torch.manual_seed(0)
    model, batch = SparseVAE(VAEConfig(**TINY)), small_batch()
    fitted = fit_cells(make_targets(batch), 256)
    cells = torch.arange(len(fitted)) % 2 == 0
    fitted = opened(fitted, cells)
    batch = replace(batch, fit=fitted)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        mean = model.encode(batch).mean
        decoded, pieces = model.values(fitted, batch.latents, 256), piece_values(fitted, 256)
    for ours, theirs in ((mean, fitted), (decoded, pieces)):
        assert torch.equal(ours[~cells], theirs[~cells]) and not (ours[cells] == theirs[cells]).all(1).any()


def test_cells_are_open_where_pieces_come_not_near():
    """A plane, and noise."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cat((X[:, :1].T, 0.3 * torch.randn(3, 512, generator=generator)))
    assert is_open(fit_cells(targets_of(values), FINE)).tolist() == [False, True, True, True]


def test_a_sphere_is_nearer_as_distances():
    """A polynomial of degree 2 is zero on a sphere, and its distances are closer to those of the sphere than any polynomial."""
    targets = make_targets(collate_volumes([volume_of(sphere(0.1), 512)]))
    near = targets.band & (targets.values.abs() < 0.5)
    basis, weights = bases_of(near.device).a[0], near.double()[..., None]
    best = torch.linalg.pinv(basis.T @ (weights * basis)) @ (basis.T @ (weights * targets.values.double()[..., None]))
    polynomial, pieces = (basis @ best)[..., 0], piece_values(fit_cells(targets, 512), 512)
    errors = [(values - targets.values).abs()[near].mean() for values in (polynomial, pieces)]
    assert errors[1] < 0.5 * errors[0]
