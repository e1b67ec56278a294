"""Decoding in chunks, pruning, and weight files."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from vae_inputs import shapes, tiny_model

from reference_model.extract import extract_mesh
from reference_model.tiles import lattice
from reference_model.vae_decode import chunks, decode_volume, load_vae, read_card, save_vae
from reference_model.volume import child_index


@pytest.fixture(scope="module")
def torus_latents():
    return shapes()[2].latents


@pytest.mark.parametrize("decoder", ["symmetric", "subpixel", "released"])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_change_nothing(decoder, chunk, torus_latents):
    model = tiny_model(decoder=decoder)
    z = torch.randn(len(torus_latents), 16, generator=torch.Generator().manual_seed(0))
    whole = decode_volume(model, z, torus_latents, 256)
    parts = decode_volume(model, z, torus_latents, 256, chunk=chunk)
    assert len(list(chunks(torch.nn.functional.pad(torus_latents, (1, 0)), chunk))) > 1
    assert whole[1].std() > 0.1 and (whole[1] - parts[1]).abs().max() <= 1e-5
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[2], parts[2])


@pytest.mark.parametrize("decoder", ["symmetric", "subpixel", "released"])
def test_the_halo_is_needed(decoder, torus_latents, monkeypatch):
    monkeypatch.setattr("reference_model.vae_decode.HALO", 0)
    model = tiny_model(decoder=decoder)
    z = torch.randn(len(torus_latents), 16, generator=torch.Generator().manual_seed(0))
    difference = decode_volume(model, z, torus_latents, 256)[1] - decode_volume(model, z, torus_latents, 256, chunk=2)[1]
    assert difference.abs().max() > 1e-2


def test_every_latent_lies_in_one_chunk(torus_latents):
    latents = torch.nn.functional.pad(torus_latents, (1, 0))
    held = torch.cat([rows[core] for rows, core in chunks(latents, 3)])
    assert torch.equal(held.sort().values, torch.arange(len(latents)))
    with pytest.raises(ValueError, match="chunk"):
        next(chunks(latents, 0))


def test_decoded_voxels(torus_latents):
    model = tiny_model()
    z = torch.randn(len(torus_latents), 16)
    coords, values, inside = decode_volume(model, z, torus_latents, 256)
    expected = model.decode(z, torch.nn.functional.pad(torus_latents, (1, 0)), 256)
    assert torch.equal(coords, (torus_latents[:, None] * 8 + lattice(8)).flatten(0, 1).int()) and not values.requires_grad
    assert (values - expected.flatten()).abs().max() < 1e-6  # by BLAS, not to the bit
    assert ((inside.flatten() == (expected.flatten() < 0)) | (expected.flatten().abs() < 1e-6)).all()
    assert torch.equal(child_index(coords).view(-1, 512)[0], torch.arange(512))
    extract_mesh(coords, values, 256, inside)
    with pytest.raises(ValueError, match=r"\[L,3\]"):
        decode_volume(model, z, torch.nn.functional.pad(torus_latents, (1, 0)), 256)


def test_pruning_leaves_out_improbable_cells(torus_latents):
    model = tiny_model(occupancy=True)
    z = torch.randn(len(torus_latents), 16)
    coords, values, _ = decode_volume(model, z, torus_latents, 256)
    everything = decode_volume(model, z, torus_latents, 256, prune=0.0)
    assert torch.equal(everything[0], coords) and (everything[1] - values).abs().max() < 1e-5 and everything[2] is None
    some_coords, some_values, _ = decode_volume(model, z, torus_latents, 256, prune=0.5)
    assert 0.05 * len(coords) < len(some_coords) < 0.95 * len(coords) and some_values.isfinite().all()
    cells = (some_coords // 2).unique(dim=0)
    assert len(some_coords) == 8 * len(cells)
    nothing = decode_volume(model, z, torus_latents, 256, prune=1.1)
    assert len(nothing[0]) == 0
    chunked = decode_volume(model, z, torus_latents, 256, chunk=3, prune=0.5)
    assert torch.equal(chunked[0], some_coords) and (chunked[1] - some_values).abs().max() < 1e-5


def test_weights_come_back(tmp_path):
    model, path = tiny_model(decoder="released", conv_backend="torch"), tmp_path / "w (1).safetensors"
    save_vae(model, path, commit="abc", steps=3)
    again = load_vae(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert again.config.decoder == "released" and again.config.conv_backend is None and not again.training
    assert load_vae(path, conv_backend="torch").config == model.config
    for name, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name
    card = read_card(path)
    assert card["commit"] == "abc" and card["steps"] == "3" and json.loads(card["config"])["channels"] == [4, 8, 16]
    save_vae(model, path, torch.bfloat16)
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    assert {p.dtype for p in load_vae(path).parameters()} == {torch.float32}


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"no")
    save_file({"x": torch.zeros(1)}, tmp_path / "b", {"format": "ssa-volume"})
    for name in "ab":
        with pytest.raises(ValueError, match="not "):
            load_vae(tmp_path / name)
    with pytest.raises(OSError):
        load_vae(tmp_path / "c")
