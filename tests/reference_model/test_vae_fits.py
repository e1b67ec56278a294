"""Fits that are kept: turned like the cells they belong to, cut with them, and used by the model instead of its own."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from analytic import box, rotation, volume_of
from vae_inputs import TINY, stirred

from reference_model import vae_fits
from reference_model.batches import BatchStream, PreparedSource
from reference_model.dataset import PreparedVolume, VolumeBatch, collate_volumes
from reference_model.distributed import Ranks
from reference_model.packed import PackedBatch, PackedVolume
from reference_model.symmetry import _tables
from reference_model.vae import SparseVAE, VAEConfig
from reference_model.vae_fit import fit_cells
from reference_model.vae_fits import keep_fits, read_fit
from reference_model.vae_loss import make_targets
from reference_model.vae_pieces import NUMBERS, ONE, as_latents, piece_values, turn_latents, turning
from reference_model.volume import load_volume, save_volume

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


@pytest.fixture
def volume(tmp_path: Path) -> PreparedVolume:
    path = tmp_path / "box.safetensors"
    save_volume(volume_of(box((0.3, 0.2, 0.12), rotation(5)), 128), path)
    stored = load_volume(path)
    return PreparedVolume(path, "box", "0" * 64, "train", 128, len(stored.latents), len(stored.coords))


def fit_of(batch: VolumeBatch) -> torch.Tensor:
    return fit_cells(make_targets(batch), batch.resolution)


@pytest.mark.parametrize("kind", range(2 * ONE + 1))
def test_turned_latents_say_the_same_of_turned_cells(kind: int) -> None:
    came_from = _tables(torch.device("cpu"))[1]
    numbers = 0.3 * torch.randn(48, NUMBERS, generator=torch.Generator().manual_seed(kind))
    z = as_latents(numbers, torch.full((48,), kind))
    turned = turn_latents(z, turning(came_from), torch.arange(48))
    said = piece_values(z, 256)
    assert (piece_values(turned, 256) - said.gather(1, came_from)).abs().max() < 1e-4 * said.abs().max()
    assert torch.equal(turned[:, NUMBERS:], z[:, NUMBERS:]) and (turned - z).abs().amax(1)[1:].min() > 0.01


@pytest.mark.parametrize("device", DEVICES)
def test_a_drawn_batch_has_the_fit_of_its_cells(tmp_path: Path, volume: PreparedVolume, device: str) -> None:
    keep_fits([volume], tmp_path / "fits", torch.device(device), Ranks())
    source = PreparedSource((volume,), tmp_path / "fits")
    for patch, symmetries in ((None, False), (8, False), (8, True)):
        stream = BatchStream([(source, 1.0)], [128], tokens=600, max_tokens=1000, symmetries=symmetries, patch_latents=patch)
        batch = stream[0].to(device)
        assert batch.fit.device.type == device and len(batch.meta) > 1 and len(batch.fit) == len(batch.latents)
        targets = make_targets(batch)
        near = targets.band & (targets.values.abs() < 0.5)
        error, own = ((piece_values(z, 128) - targets.values).abs()[near].mean() for z in (batch.fit, fit_of(batch)))
        assert error < 1.02 * own + 1e-5  # turned, one of two that fit as well may be the other
        if not symmetries:
            assert (batch.fit - fit_of(batch)).abs().max() < 1e-3


def test_the_model_begins_with_what_is_kept(tmp_path: Path, volume: PreparedVolume, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = stirred(SparseVAE(VAEConfig(**TINY)))
    keep_fits([volume], tmp_path / "fits", torch.device("cpu"), Ranks())
    batch = collate_volumes([load_volume(volume.path)])
    kept = replace(batch, fit=read_fit(tmp_path / "fits", volume))
    expected = model.encode(batch)
    monkeypatch.setattr("reference_model.vae.fit_cells", None)
    found = model.encode(kept)
    assert torch.equal(found.mean, expected.mean) and torch.equal(found.logvar, expected.logvar)
    other = model.encode(replace(kept, fit=kept.fit + 0.5))
    assert (other.mean - expected.mean).abs().max() > 0.4
    without = stirred(SparseVAE(VAEConfig(**TINY, head="clamp")))
    assert torch.equal(without.encode(kept).mean, without.encode(batch).mean)


def test_only_what_is_missing_is_fitted(tmp_path: Path, volume: PreparedVolume, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "fits"
    bare = PreparedSource((volume,))
    packed = bare.read(volume, 128)
    assert isinstance(packed, PackedVolume) and packed.fit is None and bare.identity != PreparedSource((volume,), folder).identity
    with pytest.raises(ValueError, match="does not exist: fits must be kept"):
        PreparedSource((volume,), folder).read(volume, 128)
    save_volume(volume_of(box((0.3, 0.2, 0.12)), 128, margin=0.1), tmp_path / "wide.safetensors")
    wide = replace(volume, path=tmp_path / "wide.safetensors")
    keep_fits([volume, wide], folder, torch.device("cpu"), Ranks())
    assert [p.name for p in folder.iterdir()] == ["box_128.safetensors"]
    assert not isinstance(PreparedSource((wide,), folder).read(wide, 128), PackedVolume)
    fitted = PreparedSource((volume,), folder).read(volume, 128)
    assert isinstance(fitted, PackedVolume) and PackedBatch.of([fitted]).fit is not None
    assert PackedBatch.of([fitted, packed]).fit is None
    monkeypatch.setattr(vae_fits, "fit_cells", None)
    keep_fits([volume, wide], folder, torch.device("cpu"), Ranks())
    with pytest.raises(ValueError, match=r"must hold \[7,16\] numbers, got \["):
        read_fit(folder, replace(volume, tokens=7))


def test_fits_of_another_version_are_made_anew(tmp_path: Path, volume: PreparedVolume, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = partial(keep_fits, [volume], tmp_path, torch.device("cpu"), Ranks())
    with monkeypatch.context() as other:
        other.setattr(vae_fits, "VERSION", "of before")
        other.setattr(vae_fits, "fit_cells", lambda targets, *_: torch.zeros(len(targets.values), 16))
        kept()
        assert not read_fit(tmp_path, volume).any()
    with pytest.raises(ValueError, match="must be of version .* got of before"):
        read_fit(tmp_path, volume)
    kept()
    assert read_fit(tmp_path, volume).any()
