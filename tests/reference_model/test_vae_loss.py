"""Every term against a loop over the voxels."""

import math

import pytest
import torch
from torch import Tensor
from vae_inputs import shapes, small_batch

from reference_model.dataset import collate_volumes
from reference_model.vae_loss import kl_divergence, make_targets, occupancy_loss, reconstruction_terms


def voxels(batch):
    """{(latent row, child): (t, sharp)} of the band."""
    found = {}
    columns = (x.tolist() for x in (batch.coords, batch.values, batch.sharp, batch.latent_index))
    for (_, x, y, z), t, sharp, row in zip(*columns, strict=True):
        found[(row, ((x % 8) * 8 + y % 8) * 8 + z % 8)] = (t, sharp)
    return found


def squared(e):
    return e**2


def smooth_l1(e):
    return abs(e) - 0.01 if abs(e) > 0.02 else e**2 / 0.04


@pytest.mark.parametrize("focus", [None, 0.5])
@pytest.mark.parametrize("form", [squared, smooth_l1])
def test_terms_by_hand(form, focus):
    def weight(t):
        return 1.0 if focus is None else 1 / (1 + (t / focus) ** 2)

    batch = small_batch()
    predicted = torch.rand(len(batch.latents), 512, generator=torch.Generator().manual_seed(0)) * 6 - 3
    predicted[:, ::2] = make_targets(batch).values[:, ::2] + predicted[:, ::2] * 0.01  # some errors are small
    band = voxels(batch)
    errors: dict[str, list[tuple[float, float]]] = {"in": [], "ext": [], "sharp": []}
    inside = batch.inside.tolist()
    for row, line in enumerate(predicted.tolist()):
        for child, value in enumerate(line):
            if (row, child) in band:
                t, sharp = band[(row, child)]
                errors["in"].append((form(value - t), weight(t)))
                if sharp:
                    errors["sharp"].append((form(value - t), weight(t)))
            else:
                side = -1.0 if inside[row][child] else 1.0
                errors["ext"].append((form(max(1.0 - side * value, 0.0)), 1.0))
    assert all(errors.values()) and any(inside[r][c] for r in range(len(inside)) for c in range(512) if (r, c) not in band)
    got = reconstruction_terms(predicted, make_targets(batch, focus=focus), form.__name__)
    for name, pairs in errors.items():
        mean = math.fsum(e * w for e, w in pairs) / math.fsum(w for _, w in pairs)
        assert got[name].item() == pytest.approx(mean, rel=1e-5), name
        assert got[name].dtype == torch.float32 and got[name].shape == ()


def test_targets():
    targets = make_targets(small_batch())
    assert (targets.values[~targets.band].abs() == 1).all() and (targets.sharp <= targets.band).all()
    exact = reconstruction_terms(targets.values, targets)
    assert all(x == 0 for x in exact.values())


def test_released_targets_are_positive_outside_the_band():
    batch = small_batch()
    ours, released = make_targets(batch), make_targets(batch, "released")
    assert (released.values[~ours.band] == 1).all() and torch.equal(released.values[ours.band], ours.values[ours.band])


def test_an_empty_set_is_zero():
    batch = collate_volumes(shapes()[:1])
    assert not batch.sharp.any()
    predicted = torch.zeros(len(batch.latents), 512, requires_grad=True)
    terms = reconstruction_terms(predicted, make_targets(batch))
    assert terms["sharp"] == 0 and terms["in"] > 0
    sum(terms.values(), start=Tensor([0.0])).sum().backward()
    assert predicted.grad is not None and predicted.grad.isfinite().all()


def test_kl():
    mean, logvar = torch.randn(5, 16), torch.randn(5, 16)
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    assert kl_divergence(mean, logvar).item() == pytest.approx(expected.item(), rel=1e-5)
    assert kl_divergence(mean[:0], logvar[:0]) == 0


def test_occupancy():
    band = torch.rand(3, 512, generator=torch.Generator().manual_seed(0)) < 0.02
    logits = {2: torch.randn(3, 8), 4: torch.randn(3, 64)}
    means = []
    for edge, logit in logits.items():
        size = 512 // edge**3
        terms = [
            math.log1p(math.exp(-v if band[r, c * size : (c + 1) * size].any() else v))
            for r, line in enumerate(logit.tolist())
            for c, v in enumerate(line)
        ]
        means.append(sum(terms) / len(terms))
    assert occupancy_loss(logits, band).item() == pytest.approx(sum(means) / 2, rel=1e-5)
