"""Batches of volumes, from a directory and from shards."""

import pytest
import torch
import trimesh

import ssa
from reference_model.dataset import VolumeDataset, collate_volumes, find_prepared, make_loader, shard_dataset
from reference_model.meshes import save_mesh
from reference_model.prepare import main
from reference_model.volume import Volume


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    (root / "in").mkdir()
    for i in range(5):
        mesh = trimesh.creation.icosphere(2, 1.0) if i % 2 else trimesh.creation.box((1.0, 1.0 + i, 2.0))
        save_mesh(root / "in" / f"{i}.ply", mesh.vertices * (1 + i), mesh.faces)
    assert main([f"meshes={root / 'in'}", f"out={root / 'out'}", "resolution=64", "contact_sheet=0", "shards=2", "val=0", "test=0"]) == 0
    return root / "out"


def test_batch_holds_its_volumes(prepared) -> None:
    dataset = VolumeDataset(prepared)
    volumes = [dataset[i] for i in range(5)]
    batch = collate_volumes(volumes)
    for i, volume in enumerate(volumes):
        rows = slice(int(batch.cu_seqlens[i]), int(batch.cu_seqlens[i + 1]))
        cells = slice(int(batch.cu_latents[i]), int(batch.cu_latents[i + 1]))
        assert torch.equal(batch.coords[rows, 1:], volume.coords) and (batch.coords[rows, 0] == i).all()
        assert torch.equal(batch.latents[cells, 1:], volume.latents) and (batch.latents[cells, 0] == i).all()
        assert torch.equal(batch.values[rows], volume.values) and torch.equal(batch.sharp[rows], volume.sharp)
        assert torch.equal(batch.inside[cells], volume.inside)
    index = batch.latent_index.long()
    assert torch.equal(batch.latents[index, 0], batch.coords[:, 0])
    assert torch.equal(batch.latents[index, 1:], batch.coords[:, 1:] // 8)
    partition = ssa.partition_voxels(batch.coords, compression_block_size=8, selection_block_size=8)
    assert torch.equal(partition.coords, batch.coords)
    assert torch.equal(batch.to("cpu").values, batch.values)


def test_mixed_resolutions_are_refused(prepared) -> None:
    volume = VolumeDataset(prepared)[0]
    other = Volume(**{**volume.__dict__, "resolution": 128})
    with pytest.raises(ValueError, match=r"\[64, 128\]"):
        collate_volumes([volume, other])


def test_counts_and_rows_of_the_metadata(prepared, tmp_path) -> None:
    found = find_prepared(prepared)
    dataset = VolumeDataset(prepared)
    batch = collate_volumes([dataset[i] for i in range(5)])
    assert batch.counts == {"tokens": sum(v.tokens for v in found), "voxels": sum(v.voxels for v in found), "samples": 5, "dropped": 0}
    assert [v.name for v in found] == list("01234") and {v.resolution for v in found} == {64} and len({v.geometry for v in found}) == 5
    assert find_prepared(prepared.parent) == found  # a directory of prepared directories
    with pytest.raises(ValueError, match="no prepared volume"):
        find_prepared(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_yields_every_volume_once(prepared, workers: int) -> None:
    dataset = VolumeDataset(prepared)
    expected = sorted(len(dataset[i].coords) for i in range(len(dataset)))
    for data in (dataset, shard_dataset(sorted((prepared / "shards").glob("*.tar")), shuffle=4)):
        batches = list(make_loader(data, batch_size=2, workers=workers))
        assert sorted(int(n) for b in batches for n in b.cu_seqlens.diff()) == expected
        assert sorted(m["source"] for b in batches for m in b.meta) == [f"{i}.ply" for i in range(5)]


def test_shuffle_follows_the_seed(prepared) -> None:
    dataset = VolumeDataset(prepared)
    orders = [[b.meta[0]["source"] for b in make_loader(dataset, 1, workers=0, seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert [b.meta[0]["source"] for b in make_loader(dataset, 1, workers=0, shuffle=False)] == [f"{i}.ply" for i in range(5)]


def test_transform_and_split(prepared) -> None:
    flipped = VolumeDataset(prepared, transform=lambda v: Volume(**{**v.__dict__, "sharp": ~v.sharp}))[0]
    assert torch.equal(flipped.sharp, ~VolumeDataset(prepared)[0].sharp)
    with pytest.raises(ValueError, match="no volume of split='test'"):
        VolumeDataset(prepared, "test")
