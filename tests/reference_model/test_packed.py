"""Packed volumes: bit for bit what the CPU's reader gives, alone and in batches."""

from dataclasses import replace

import pytest
import torch
from analytic import check_equal, sphere, torus, volume_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from reference_model.batches import DrawnBatch
from reference_model.dataset import collate_volumes
from reference_model.packed import PackedBatch, read_packed
from reference_model.patches import select_packed
from reference_model.symmetry import apply_symmetry
from reference_model.volume import RESAMPLING_MARGIN, load_volume, save_volume

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("margin", [0.0, RESAMPLING_MARGIN])
def test_unpacked_is_loaded(tmp_path, device: str, margin: float) -> None:
    path = tmp_path / "a.safetensors"
    save_volume(volume_of(torus(0.3, 0.1), 128, margin=margin), path)
    check_equal(read_packed(path).unpack(device), load_volume(path, margin=True))


@pytest.mark.parametrize("device", DEVICES)
def test_a_packed_batch_is_the_batch_of_its_volumes(tmp_path, device: str) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, shape in zip(paths, (torus(0.3, 0.1), sphere(0.3, (0.2, 0.1, 0.0))), strict=True):
        save_volume(volume_of(shape, 64), path)
    volumes = [load_volume(path) for path in paths]
    packed = PackedBatch.of([*map(read_packed, paths)])
    assert packed.counts == collate_volumes(volumes).counts and packed.resolution == 64
    check_equal(DrawnBatch(packed, ()).to(device), collate_volumes(volumes))
    turned = [apply_symmetry(v, i) for v, i in zip(volumes, (5, 30), strict=True)]
    moved = DrawnBatch(packed, (5, 30)).to(device)
    check_equal(moved, collate_volumes(turned))
    assert {x.device.type for x in vars(moved).values() if torch.is_tensor(x)} == {device}
    save_volume(volume_of(sphere(0.3), 128), tmp_path / "c")
    with pytest.raises(ValueError, match=r"one resolution, got \[64, 128\]"):
        PackedBatch.of([read_packed(paths[0]), read_packed(tmp_path / "c")])


@pytest.mark.parametrize("device", DEVICES)
def test_bits_and_levels_are_joined_volume_by_volume(tmp_path, device: str) -> None:
    kinds = [(sphere(0.31, (0.2, 0.1, 0.03)), 0.0), (torus(0.3, 0.1), RESAMPLING_MARGIN), (sphere(0.2, (0.01, 0.1, 0.0)), 0.0)]
    paths = [tmp_path / str(i) for i in range(3)]
    for path, (shape, margin) in zip(paths, kinds, strict=True):
        save_volume(volume_of(shape, 64, edges=lambda p: p[:, 0].abs(), margin=margin), path)
    packed, volumes = [*map(read_packed, paths)], [load_volume(path, margin=True) for path in paths]
    assert len({v.levels for v in packed}) == 2 and len(volumes[0].coords) % 8 and 0 < volumes[2].sharp.sum() < len(volumes[2].sharp)
    check_equal(PackedBatch.of(packed, 2).unpack(device), replace(collate_volumes(volumes), dropped=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_empty_volumes_among_others(tmp_path, workers: int) -> None:
    """In batches that workers may have sent."""
    path = tmp_path / "a"
    save_volume(volume_of(sphere(0.3, (0.2, 0.1, 0.0)), 64), path)
    packed, loaded = read_packed(path), load_volume(path)
    none = select_packed(packed, torch.zeros(len(packed.latents), dtype=torch.bool))
    batches = [DrawnBatch(PackedBatch.of([none, packed, none]), (3, 5, 9)), DrawnBatch(PackedBatch.of([none]), ())]
    wanted = [[apply_symmetry(none.unpack(), 3), apply_symmetry(loaded, 5), apply_symmetry(none.unpack(), 9)], [none.unpack()]]
    got = DataLoader(batches, batch_size=None, num_workers=workers, multiprocessing_context="spawn" if workers else None)
    for batch, volumes in zip(got, wanted, strict=True):
        check_equal(batch.to("cpu"), collate_volumes(volumes))


def test_files_that_do_not_fit_are_named(tmp_path) -> None:
    path = tmp_path / "a"
    save_volume(volume_of(sphere(0.3), 64), path)
    tensors, (header, latents) = load_file(path), (safe_open(path, "pt").metadata(), load_file(path)["latents"])
    broken = {
        "'sharp' is missing": {name: x for name, x in tensors.items() if name != "sharp"},
        "sharp must be": tensors | {"sharp": tensors["sharp"][:-1]},
        "band must mark": tensors | {"band": torch.zeros_like(tensors["band"])},
        "lexicographic": tensors | {"latents": latents.flip(0).contiguous()},
    }
    for match, parts in broken.items():
        save_file(parts, path, header)
        with pytest.raises(ValueError, match=match):
            read_packed(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a volume of version 2"):
        read_packed(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="not a volume"):
        read_packed(path)
