"""The whole model: batches, crops, gradients, precision and what it costs."""

import dataclasses
import importlib.util

import pytest
import torch
from torch import nn
from vae_inputs import TINY, random_latents, shapes, small_batch, tiny_model

from reference_model import vae, vae_grid
from reference_model.dataset import collate_volumes
from reference_model.sparse_conv import SparseConv3d
from reference_model.symmetry import apply_symmetry
from reference_model.vae import SparseVAE, VAEConfig
from reference_model.vae_bases import bases_of
from reference_model.vae_blocks import AttentionBlock
from reference_model.vae_loss import kl_divergence, make_targets, reconstruction_terms

FORMS = [
    dict(decoder="symmetric", pooling="mean", head="clamp"),
    dict(decoder="subpixel", pooling="subpixel", head="pieces"),
    dict(decoder="released", pooling="released", head="tanh"),
]
TERMS = {"in": 1.0, "ext": 0.1, "sharp": 1.0, "kl": 1e-3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_is_its_samples(form):
    model, volumes = tiny_model(**form), shapes()
    batch = collate_volumes(volumes)
    together = model.encode(batch)
    assert together.mean.shape == (len(batch.latents), 16) and together.mean.dtype == together.logvar.dtype == torch.float32
    z = torch.randn(len(batch.latents), 16, generator=seeded())
    decoded = model.decode(z, batch.latents, 256)
    assert decoded.shape == (len(z), 512) and decoded.dtype == torch.float32 and decoded.abs().max() <= 1 and decoded.std() > 0.05
    for i, volume in enumerate(volumes):
        rows = slice(*batch.cu_latents[i : i + 2].tolist())
        alone = collate_volumes([volume])
        posterior = model.encode(alone)
        assert (posterior.mean - together.mean[rows]).abs().max() < 1e-5 * together.mean.abs().max()
        assert (posterior.logvar - together.logvar[rows]).abs().max() < 1e-5 * together.logvar.abs().max()
        assert (model.decode(z[rows], alone.latents, 256) - decoded[rows]).abs().max() < 1e-5


def test_first_variance_follows_the_weight_of_the_kl():
    """The noise of z costs in proportion to its variance, the KL gains its logarithm: the best variance is in proportion to the weight.

    A small error costs 25 times as much in smooth L1.
    """
    fresh = {weight: SparseVAE(VAEConfig(**TINY, head="pieces", lambda_kl=weight)) for weight in (1e-3, 1e-5, 0.0)}
    first = {weight: model.encode(small_batch()).logvar[:, :-1].unique() for weight, model in fresh.items()}
    assert first[1e-3].tolist() == [-9] and first[1e-5].item() == pytest.approx(-13.605, abs=1e-3) and -30 < first[0.0].item() < -20
    steep = SparseVAE(VAEConfig(**TINY, head="pieces", error="smooth_l1")).encode(small_batch()).logvar[:, :-1].unique()
    assert steep.item() == pytest.approx(-12.219, abs=1e-3)


@pytest.mark.parametrize("form", [*FORMS, dict(error="smooth_l1", focus=0.5)])
def test_loss_is_the_sum_of_its_terms(form):
    model, batch = tiny_model(**form), small_batch()
    terms = model.loss(batch, seeded(1))
    posterior = model.encode(batch)
    predicted = model.values(posterior.sample(seeded(1)), batch.latents, 256)
    plain = reconstruction_terms(predicted, make_targets(batch, focus=model.config.focus), model.config.error)
    plain |= {"kl": kl_divergence(posterior.mean, posterior.logvar)}
    assert set(terms) == {*TERMS, "total"}
    for name in TERMS:
        assert terms[name].item() == pytest.approx(plain[name].item(), rel=1e-4), name
    assert terms["total"].item() == pytest.approx(sum(w * plain[n].item() for n, w in TERMS.items()), rel=1e-4)
    terms["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_a_crop_is_part_of_the_whole(form, monkeypatch):
    """Inside the crop nothing differs from the whole, and the loss is that of the crop alone."""
    model, batch = tiny_model(**form), small_batch()
    corner = torch.tensor([[18, 16, 14], [13, 14, 15], [13, 12, 15]])
    monkeypatch.setattr(vae, "_crop_corner", lambda *_: corner)
    edge = 3
    step = batch.latents[:, 1:] - corner[batch.latents[:, 0].long()]
    core = ((step >= 0) & (step < edge)).all(1)
    assert 3 < core.sum() < len(core) - 3
    terms = model.loss(batch, seeded(1), crop_latents=edge)
    predicted = model.values(model.encode(batch).sample(seeded(1)), batch.latents, 256)
    plain = reconstruction_terms(predicted[core], make_targets(batch).rows(core.nonzero().flatten()))
    for name in ("in", "ext", "sharp"):
        assert terms[name].item() == pytest.approx(plain[name].item(), rel=1e-4, abs=1e-7), name


def test_crops_are_drawn_inside_the_grid():
    batch = small_batch()
    corners = torch.stack([vae._crop_corner(batch, 5, seeded(i)) for i in range(50)])
    assert corners.min() >= 0 and corners.max() <= 32 - 5 and len(corners[:, 2].unique(dim=0)) > 10
    for low in corners:
        step = batch.latents[:, 1:] - low[batch.latents[:, 0].long()]
        held = batch.latents[((step >= 0) & (step < 5)).all(1), 0]
        assert held.unique().tolist() == [0, 1, 2]
    assert (vae._crop_corner(batch, 40, seeded()) == 0).all()
    full, cropped = (tiny_model().loss(batch, seeded(3), crop_latents=c) for c in (None, 32))
    assert full["kl"] == cropped["kl"] and full["in"].item() == pytest.approx(cropped["in"].item(), rel=1e-5)


def test_an_empty_sample():
    volumes = shapes()[:2]
    empty = dataclasses.replace(
        volumes[0], coords=volumes[0].coords[:0], values=volumes[0].values[:0], sharp=volumes[0].sharp[:0],
        latents=volumes[0].latents[:0], latent_index=volumes[0].latent_index[:0], inside=volumes[0].inside[:0],
    )  # fmt: skip
    model = tiny_model()
    nothing = model.decode(torch.zeros(0, 16), torch.zeros(0, 4, dtype=torch.int32), 256)
    assert nothing.shape == (0, 512)
    for batch in ([volumes[0], empty, volumes[1]], [volumes[0], volumes[1], empty]):
        packed = collate_volumes(batch)
        assert (model.encode(packed).mean - model.encode(collate_volumes(volumes)).mean).abs().max() < 1e-4
        terms = model.loss(packed, seeded(), crop_latents=8)
        assert all(x.isfinite() for x in terms.values())


def test_checkpointing_changes_nothing():
    batch, outcome = small_batch(), []
    for checkpointing in (False, True):
        model = tiny_model(occupancy=True)
        model.activation_checkpointing = checkpointing
        terms = model.loss(batch, seeded())
        terms["total"].backward()
        outcome.append((terms["total"], [p.grad for p in model.parameters()]))
    assert outcome[0][0] == outcome[1][0]
    assert all(torch.equal(a, b) for a, b in zip(outcome[0][1], outcome[1][1], strict=True))


def test_a_loss_repeats_with_its_generator():
    model, batch = tiny_model(), small_batch()
    first, again, other = (model.loss(batch, seeded(i), crop_latents=6)["total"] for i in (0, 0, 1))
    assert first == again != other


def test_gradient_by_differences():
    """The derivative of the loss along a random direction, by differences."""
    volumes = shapes()[:1]
    batch = collate_volumes(volumes)
    model = tiny_model(lambda_kl=1e-2)
    parameters = list(model.parameters())
    direction = [torch.randn(p.shape, generator=seeded(5)) * p.abs().mean() for p in parameters]
    grads = torch.autograd.grad(model.loss(batch, seeded())["total"], parameters)
    expected = sum((g * d).sum() for g, d in zip(grads, direction, strict=True)).item()
    totals = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(step * d)
            totals.append(model.loss(batch, seeded())["total"].item())
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(step * d)
    assert (totals[0] - totals[1]) / 2e-2 == pytest.approx(expected, rel=0.05)


def train(backend, autocast, steps=12):
    torch.manual_seed(0)
    model = SparseVAE(VAEConfig(**TINY, head="clamp", conv_backend=backend))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    batch, losses = collate_volumes(shapes()[:1]), []
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.loss(batch, seeded(step))["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("backend", ["torch", *(["spconv"] if importlib.util.find_spec("spconv") else [])])
def test_the_curve_of_bf16_training(backend):
    exact, curve = train("torch", False), train(backend, True)
    assert exact[-1] < 0.8 * exact[0]
    assert (curve - exact).abs().max() < 0.01 * exact[0]


def test_resolutions_share_the_frame(monkeypatch):
    """A place in the cube has one position code at every resolution."""
    seen = []
    monkeypatch.setattr("reference_model.vae_decoder.position_code", lambda c, n, f: seen.append(c * f) or torch.zeros(len(c), n))
    model, latents = tiny_model(), random_latents(20)
    for scale in (1, 2):
        grid = latents.clone()
        grid[:, 1:] *= scale
        model.decode(torch.zeros(len(latents), 16), grid, 256 * scale)
    assert torch.equal(seen[0], seen[1])


def test_symmetric_input_of_another_frame_differs():
    """The model is not blind to direction: a mirrored volume has other latents."""
    volume = shapes()[1]
    model = tiny_model()
    a, b = (model.encode(collate_volumes([v])).mean for v in (volume, apply_symmetry(volume, 30)))
    assert (a.sort(0).values[: len(b)] - b.sort(0).values[: len(a)]).abs().max() > 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_windows_shift_in_turn(form, monkeypatch):
    shifts = []
    monkeypatch.setattr(AttentionBlock, "forward", lambda self, x, p: shifts.append((p.window.size, p.window_shift)) or x)
    tiny_model(**form, num_layers=3).loss(small_batch())
    assert shifts == [(8, 0), (8, 4), (8, 0)] * 2


@pytest.mark.parametrize("crop", [None, 3])
@pytest.mark.parametrize("form", FORMS)
def test_flops(form, crop, monkeypatch):
    """Counted again from what the layers are given."""
    monkeypatch.setattr(vae, "_crop_corner", lambda batch, edge, generator: batch.latents[batch.cu_latents[:-1].long(), 1:].long())
    model, batch = tiny_model(**form), small_batch()
    total = 0

    def linear(module, inputs, output):
        nonlocal total
        total += 2 * inputs[0].shape[0] * module.in_features * module.out_features

    def conv(module, inputs, output):
        nonlocal total
        total += 2 * int((inputs[1].neighbors >= 0).sum()) * module.kernel[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Linear, SparseConv3d)):
            module.register_forward_hook(linear if isinstance(module, nn.Linear) else conv)
    model.loss(batch, seeded(), crop_latents=crop)
    total += 2 * len(batch.coords) * 4  # Linear 1 → 4 of every voxel, done by hand in Lift
    for shift in (0, 4):  # one layer of each in each half: q k and p v, 32 wide
        window = torch.cat((batch.latents[:, :1], torch.div(batch.latents[:, 1:] + shift, 8, rounding_mode="floor")), 1)
        total += 2 * 4 * 32 * int(window.unique(dim=0, return_counts=True)[1].square().sum())
    assert model.flops(batch, crop) == total


def test_training_after_inference():
    of_slots = (vae_grid.slot_coords, vae_grid.slots_of_children, vae_grid.children_of_slots)
    for function in (*of_slots, vae_grid._beside, vae_grid._around, bases_of):
        function.cache_clear()
    model, batch = tiny_model(), small_batch()
    with torch.inference_mode():
        model.loss(batch)
    model.loss(batch)["total"].backward()


def test_mistakes_are_named():
    model, latents = tiny_model(), random_latents(5)
    z = torch.zeros(len(latents), 16)
    cases = [((z[1:], latents, 256), "z must be"), ((z, latents.flip(0), 256), "order"), ((z, latents, 250), "multiple of 8")]
    for arguments, rule in cases:
        with pytest.raises(ValueError, match=rule):
            model.decode(*arguments)
    with pytest.raises(ValueError, match="lie in"):
        model.decode(z, latents, 16)
    with pytest.raises(ValueError, match="crop_latents"):
        model.loss(small_batch(), crop_latents=0)
    mistakes = dict(decoder="dense", pooling="max", ext_target="in", error="cubes", focus=0.0, hidden_size=60)
    for rule, value in mistakes.items():
        with pytest.raises(ValueError, match=rule):
            VAEConfig(**{rule: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="occupancy head"):
        model.decoder.upsample(torch.zeros(len(latents), 32), torch.zeros(len(latents), 16), latents, 32, prune=0.5)


def test_paper_sizes():
    """Shapes of the paper's model, without allocating it."""
    with torch.device("meta"):
        model = SparseVAE(VAEConfig(decoder="symmetric", pooling="mean"))
    assert [tuple(b.conv1.kernel.shape) for b in model.encoder.down] == [(27, 32, 64), (27, 64, 128), (27, 128, 512)]
    assert [tuple(b.conv1.kernel.shape) for b in model.decoder.up] == [(27, 512, 128), (27, 128, 64), (27, 64, 32)]
    assert model.encoder.moments.out_features == 32 and len(model.encoder.blocks) == len(model.decoder.blocks) == 4
    assert model.decoder.blocks[0].mlp[0].out_features == 2048
