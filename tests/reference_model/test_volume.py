"""The volume's order, its file and what the file refuses."""

import dataclasses

import numpy as np
import pytest
import torch
from analytic import sphere, volume_of
from safetensors.torch import load_file, save_file

import ssa
from reference_model.volume import RESAMPLING_MARGIN, TAU, Volume, group_voxels, load_volume, save_volume, voxel_centers


def ball_volume(resolution: int = 256, radius: float = 0.3) -> Volume:
    side = torch.arange(int((0.95 - radius) * resolution / 2) - 8, int((1.05 + radius) * resolution / 2) + 8)
    coords = torch.cartesian_prod(side, side, side)
    s = voxel_centers(coords, resolution).norm(dim=1) - radius
    band = s.abs() < TAU
    coords, s = coords[band], s[band]
    coords, s = coords[(perm := torch.randperm(len(s), generator=torch.Generator().manual_seed(0)))], s[perm]
    order, latents, index = group_voxels(coords, resolution)
    child = torch.cartesian_prod(*(torch.arange(8),) * 3)
    inside = voxel_centers(latents[:, None] * 8 + child, resolution).norm(dim=-1) - radius < 0
    return Volume(
        resolution, coords[order].int(), (s[order] / TAU).clamp(-1, 1).float(), s[order] > 0.004, latents, index, inside,
        scale=0.25, offset=(0.1, -2.0, 1e-9), y_up=True, meta={"source": "é [1]=.obj", "thickness": "0.5"},
    )  # fmt: skip


def test_centers_nest() -> None:
    coarse, fine = voxel_centers(torch.arange(4), 4), voxel_centers(torch.arange(8), 8)
    assert coarse.tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert torch.equal(coarse, fine.view(4, 2).mean(1))


def test_order_is_that_of_the_partition() -> None:
    volume = ball_volume()
    coords = torch.cat((torch.zeros(len(volume.coords), 1, dtype=torch.int32), volume.coords), 1)
    partition = ssa.partition_voxels(coords, compression_block_size=8, selection_block_size=8)
    assert torch.equal(partition.coords, coords)
    assert torch.equal(partition.selection.coords[:, 1:], volume.latents)
    assert torch.equal(volume.latents[volume.latent_index.long()], volume.coords // 8)
    assert torch.equal(volume.inside[volume.latent_index.long(), volume.child_index], volume.values < 0)


@pytest.mark.parametrize("resolution", [256, 512])
def test_round_trip_in_at_most_four_bytes_a_voxel(tmp_path, resolution: int) -> None:
    volume, path = ball_volume(resolution), tmp_path / "é [1]=,{x}.safetensors"
    save_volume(volume, path)
    again = load_volume(path)
    for name in ("coords", "sharp", "latents", "latent_index", "inside"):
        assert torch.equal(getattr(volume, name), getattr(again, name)), name
    for name in ("resolution", "scale", "offset", "y_up", "meta"):
        assert getattr(volume, name) == getattr(again, name), name
    assert (volume.values - again.values).abs().max() <= 1 / 32767
    assert torch.equal(volume.values < 0, again.values < 0)
    assert path.stat().st_size <= 4 * len(volume.coords)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_margin_survives_the_file_and_is_left_out_unless_asked_for(tmp_path) -> None:
    wide, plain = (volume_of(sphere(0.3), 256, margin) for margin in (RESAMPLING_MARGIN, 0.0))
    save_volume(wide, tmp_path / "v")
    again, band = load_volume(tmp_path / "v", margin=True), load_volume(tmp_path / "v")
    step = again.margin * 2 / 256 / TAU / 32767
    for name in ("coords", "sharp", "latents", "latent_index", "inside"):
        assert torch.equal(getattr(wide, name), getattr(again, name)), name
        assert torch.equal(getattr(plain, name), getattr(band, name)), name
    assert (wide.values - again.values).abs().max() <= step < 2e-4
    assert (plain.values - band.values).abs().max() <= step
    assert torch.equal(again.values.abs() <= 1, wide.values.abs() <= 1)
    assert (again.margin, band.margin) == (RESAMPLING_MARGIN, 0)
    with pytest.raises(ValueError, match="values must lie below tau"):
        save_volume(dataclasses.replace(wide, margin=0.0), tmp_path / "w")


def test_empty_volume(tmp_path) -> None:
    none = torch.zeros(0, 3, dtype=torch.int32)
    flags = torch.zeros(0, dtype=torch.bool)
    save_volume(Volume(64, none, torch.zeros(0), flags, none, torch.zeros(0, dtype=torch.int32), flags.view(0, 512)), tmp_path / "v")
    assert len(load_volume(tmp_path / "v").coords) == 0


def _remove_voxel(t):
    t["band"][0] = 0


def _swap_latents(t):
    t["latents"] = t["latents"].flip(0).contiguous()


def _leave_grid(t):
    t["latents"][-1] = 1000


def _floats(t):
    t["values"] = t["values"].float()


def _shorten(t):
    t["sharp"] = t["sharp"][:-1].clone()


def _lose(t):
    del t["inside"]


@pytest.mark.parametrize("harm", [_remove_voxel, _swap_latents, _leave_grid, _floats, _shorten, _lose])
def test_schema_is_checked(tmp_path, harm) -> None:
    save_volume(ball_volume(), tmp_path / "v")
    tensors = load_file(tmp_path / "v")
    from safetensors import safe_open

    with safe_open(tmp_path / "v", "pt") as file:
        header = file.metadata()
    save_file(tensors, tmp_path / "same", header)
    load_volume(tmp_path / "same")
    harm(tensors)
    save_file(tensors, tmp_path / "harmed", header)
    with pytest.raises(ValueError, match="harmed"):
        load_volume(tmp_path / "harmed")


def test_other_files_are_refused(tmp_path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    (tmp_path / "noise").write_bytes(np.random.default_rng(0).bytes(1000))
    (tmp_path / "nothing").write_bytes(b"")
    for name in ("other", "noise", "nothing"):
        with pytest.raises(ValueError, match=f"{name}: not a volume"):
            load_volume(tmp_path / name)


def test_signs_must_agree(tmp_path) -> None:
    volume = ball_volume()
    with pytest.raises(ValueError, match="agree in sign"):
        save_volume(dataclasses.replace(volume, inside=~volume.inside), tmp_path / "v")
    with pytest.raises(ValueError, match="values must be torch.float32"):
        dataclasses.replace(volume, values=volume.values.double())
    with pytest.raises(ValueError, match="multiple of 8"):
        dataclasses.replace(volume, resolution=100)
