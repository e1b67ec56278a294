"""Patches: what is cut out of a volume, packed or not, and how batches of them are drawn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from analytic import check_equal, torus, volume_of

from reference_model.batches import BatchStream, PreparedSource
from reference_model.dataset import PreparedVolume
from reference_model.packed import read_packed
from reference_model.patches import draw_patch, select_latents, select_packed
from reference_model.symmetry import apply_symmetry
from reference_model.volume import load_volume, save_volume


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("patches") / "torus.safetensors"
    save_volume(volume_of(torus(0.5, 0.2), 192), path)
    return path, load_volume(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_selection_is_that_of_each_voxel(stored, share: float) -> None:
    path, volume = stored
    keep = torch.rand(len(volume.latents), generator=torch.Generator().manual_seed(0)) < share
    got = select_latents(volume, keep)
    check_equal(select_packed(read_packed(path), keep).unpack(), got)
    voxels = [i for i, row in enumerate(volume.latent_index.tolist()) if keep[row]]
    assert torch.equal(got.coords, volume.coords[voxels]) and torch.equal(got.sharp, volume.sharp[voxels])
    assert torch.equal(got.latents[got.latent_index.long()], got.coords // 8) and torch.equal(got.inside, volume.inside[keep])
    assert torch.equal(got.values, volume.values[voxels])


def test_patches_hold_what_lies_in_their_cube(stored) -> None:
    path, volume = stored
    rng, packed = np.random.default_rng(0), read_packed(path)
    seen, lows = torch.zeros(len(volume.latents), dtype=torch.bool), set()
    for _ in range(60):
        patch = draw_patch(packed, 8, rng).unpack()
        low = patch.latents[0] // 8 * 8
        inside = ((volume.latents >= low) & (volume.latents < low + 8)).all(1)
        check_equal(patch, select_latents(volume, inside))  # an edge of 8: the window itself
        seen |= inside
        lows.add(tuple(low.tolist()))
    assert seen.all() and len(lows) > 8
    wider = {draw_patch(volume, 16, rng).latents.numpy().tobytes() for _ in range(60)}
    assert len(lows) < len(wider)  # eight places around a latent


def test_batches_of_patches(stored) -> None:
    path, volume = stored
    source = PreparedSource((PreparedVolume(path, "torus", "torus", "train", 192, len(volume.latents), len(volume.coords)),))
    stream = BatchStream([(source, 1.0)], (192,), tokens=300, max_tokens=10**6, seed=1, patch_latents=16)
    batch, again = stream[4].to("cpu"), replace(stream)[4].to("cpu")
    assert batch.counts["tokens"] >= 300 and batch.counts["samples"] > 1 and torch.equal(batch.values, again.values)
    assert not torch.equal(batch.values[:50], stream[5].to("cpu").values[:50])
    for i, meta in enumerate(batch.meta):
        low, high = (int(x) for x in batch.cu_latents[i : i + 2])
        turned = apply_symmetry(volume, int(meta["symmetry"]))
        rows = {tuple(x) for x in turned.latents.tolist()}
        assert {tuple(x) for x in batch.latents[low:high, 1:].tolist()} <= rows
        n = slice(int(batch.cu_seqlens[i]), int(batch.cu_seqlens[i + 1]))
        places = {tuple(x): v for x, v in zip(turned.coords.tolist(), turned.values.tolist(), strict=True)}
        assert all(places[tuple(x)] == v for x, v in zip(batch.coords[n, 1:].tolist(), batch.values[n].tolist(), strict=True))
    assert len({meta["symmetry"] for i in range(6) for meta in stream[i].to("cpu").meta}) > 4
    plain = replace(stream, symmetries=False)[4].to("cpu")
    assert all("symmetry" not in meta for meta in plain.meta)


def test_small_volumes_give_as_much_as_large_ones(stored) -> None:
    path, volume = stored
    thin = select_latents(volume, (volume.latents == volume.latents[0]).all(1))
    save_volume(replace(thin, meta={"source": "thin"}), path.with_name("thin.safetensors"))
    sources = [
        (PreparedSource((PreparedVolume(path.with_name(f"{name}.safetensors"), name, name, "train", 192, 1, 1),)), 1.0)
        for name in ("torus", "thin")
    ]
    held = {"thin": 0, "": 0}
    stream = BatchStream(sources, (192,), tokens=300, max_tokens=10**6, patch_latents=8, patch_tokens=30)
    motions = set()
    for i in range(20):
        batch = stream[i].to("cpu")
        for meta, tokens in zip(batch.meta, batch.cu_latents.diff().tolist(), strict=True):
            held[meta.get("source", "")] += tokens
            motions.add(meta["symmetry"] if "source" in meta else None)
        assert 300 <= batch.counts["tokens"] < 300 + 30 + 8**3
    assert held["thin"] % 30 == 0 and 0.2 < held["thin"] / held[""] < 1  # one by one: below 0.03
    assert len(motions) > 20
    specks = replace(stream, sources=sources[1:], patch_tokens=1000, tokens=1)[0].to("cpu")
    assert specks.counts["samples"] == specks.counts["tokens"] == 32


@pytest.mark.parametrize(
    "values", [dict(patch_latents=12), dict(patch_latents=0), dict(patch_latents=8, patch_tokens=0), dict(patch_tokens=2)]
)
def test_what_patches_cannot_be(stored, values: dict) -> None:
    source = PreparedSource((PreparedVolume(stored[0], "torus", "torus", "train", 192, 1, 1),))
    with pytest.raises(ValueError, match="patch"):
        BatchStream([(source, 1.0)], (192,), tokens=1, max_tokens=1, **values)
