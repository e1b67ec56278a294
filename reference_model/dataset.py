"""Prepared volumes for training: from a directory or from webdataset shards, packed into batches by worker processes."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from reference_model.cli import optional_import
from reference_model.volume import Volume, load_volume, volume_from_bytes

Transform = Callable[[Volume], Volume]


@dataclass(frozen=True, eq=False)
class VolumeBatch:
    """B volumes of one resolution, rows one after another: sample, then the order of `Volume`, which is that of `ssa.partition_voxels`."""

    resolution: int
    coords: Tensor  # [T,4] int32 (sample, x, y, z)
    values: Tensor  # [T] float32
    sharp: Tensor  # [T] bool
    latents: Tensor  # [L,4] int32 (sample, x, y, z), cells of 8^3
    latent_index: Tensor  # [T] int32, row of latents of each voxel
    inside: Tensor  # [L,512] bool
    cu_seqlens: Tensor  # [B+1] int32, bounds of the samples among voxels
    cu_latents: Tensor  # [B+1] int32, bounds of the samples among latents
    meta: tuple[Mapping[str, str], ...]
    dropped: int = 0  # volumes drawn for it and left out for their size
    fit: Tensor | None = None  # [L,16] float32, what `vae_fit` says of the cells, where it is kept (`vae_fits`)

    @property
    def counts(self) -> dict[str, int]:
        """What a trainer adds up: tokens (latents), voxels, samples, dropped."""
        return {"tokens": len(self.latents), "voxels": len(self.coords), "samples": len(self.meta), "dropped": self.dropped}

    def pin_memory(self) -> "VolumeBatch":
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "VolumeBatch":
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "VolumeBatch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: function(x) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def collate_volumes(volumes: Sequence[Volume]) -> VolumeBatch:
    """Pack volumes of one resolution; ValueError for several."""
    resolutions = {volume.resolution for volume in volumes}
    if len(resolutions) != 1:
        raise ValueError(f"a batch needs volumes of one resolution, got {sorted(resolutions)}")
    tokens = torch.tensor([0] + [len(v.coords) for v in volumes]).cumsum(0)
    latents = torch.tensor([0] + [len(v.latents) for v in volumes]).cumsum(0)
    return VolumeBatch(
        resolution=volumes[0].resolution,
        coords=torch.cat([_numbered(v.coords, i) for i, v in enumerate(volumes)]),
        values=torch.cat([v.values for v in volumes]),
        sharp=torch.cat([v.sharp for v in volumes]),
        latents=torch.cat([_numbered(v.latents, i) for i, v in enumerate(volumes)]),
        latent_index=torch.cat([v.latent_index + int(start) for v, start in zip(volumes, latents, strict=False)]),
        inside=torch.cat([v.inside for v in volumes]),
        cu_seqlens=tokens.int(),
        cu_latents=latents.int(),
        meta=tuple(v.meta for v in volumes),
    )


@dataclass(frozen=True)
class PreparedVolume:
    """One volume that `reference_model.prepare` made, by its row of the metadata."""

    path: Path
    name: str  # stem of the mesh file
    geometry: str  # sha256
    split: str  # train, val, test
    resolution: int
    tokens: int
    voxels: int


def find_prepared(root: str | os.PathLike[str]) -> list[PreparedVolume]:
    """Volumes of a prepared directory, or of all that lie in it, in order; ValueError where there is none."""
    root = Path(root)
    folders = [root] if (root / "metadata.csv").exists() else sorted(path.parent for path in root.glob("*/metadata.csv"))
    found = []
    for folder in folders:
        with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
            found += [
                PreparedVolume(
                    folder / "volumes" / f"{row['id']}.safetensors", Path(row["source"]).stem, row["geometry_sha256"], row["split"],
                    int(row["resolution"]), int(row["tokens"]), int(row["voxels"]),
                )
                for row in csv.DictReader(file)
                if row["status"] == "ok"
            ]  # fmt: skip
    if not found:
        raise ValueError(f"{root}: no prepared volume")
    return found


class VolumeDataset(Dataset[Volume]):
    """Volumes of a directory made by `reference_model.prepare`: those of one split ("train", "val", "test" or None for all)."""

    def __init__(self, root: str | os.PathLike[str], split: str | None = "train", transform: Transform | None = None):
        self.paths = [volume.path for volume in find_prepared(root) if split in (None, volume.split)]
        if not self.paths:
            raise ValueError(f"{root}: no volume of {split=}")
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Volume:
        volume = load_volume(self.paths[index])
        return self.transform(volume) if self.transform else volume


def make_loader(dataset: Dataset[Volume], batch_size: int, workers: int = 2, shuffle: bool | None = None, seed: int = 0) -> DataLoader:
    """Batches (`VolumeBatch`) from `workers` processes, four ahead each, in pinned memory where a GPU is.

    A map dataset is shuffled unless told otherwise, shards are drawn from as `shard_dataset` says.
    """
    iterable = isinstance(dataset, torch.utils.data.IterableDataset)
    return DataLoader(
        dataset, batch_size, shuffle=False if iterable else shuffle is not False, collate_fn=collate_volumes, num_workers=workers,
        pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0, prefetch_factor=4 if workers else None,
        generator=torch.Generator().manual_seed(seed), drop_last=False,
    )  # fmt: skip


def write_shards(out: Path, rows: Iterable[Mapping[str, Any]], count: int) -> list[Path]:
    """Write out/shards/SPLIT-NNNNNN.tar with `count` volumes each (ID.volume, ID.json); whole files or none. The paths are returned."""
    wds = optional_import("webdataset")
    folder = out / "shards"
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.tar"):
        stale.unlink()
    written = []
    unique = {row["id"]: row for row in rows}
    for split in ("train", "val", "test"):
        group = sorted((row for row in unique.values() if row["split"] == split), key=lambda row: row["geometry_sha256"])
        for number, start in enumerate(range(0, len(group), count)):
            path = folder / f"{split}-{number:06d}.tar"
            part = folder / f".{path.name}.part"
            with part.open("wb") as file, wds.TarWriter(file) as tar:
                for row in group[start : start + count]:
                    data = (out / "volumes" / f"{row['id']}.safetensors").read_bytes()
                    tar.write({"__key__": row["id"], "volume": data, "json": json.dumps(row).encode()})
            part.replace(path)
            written.append(path)
    return written


def shard_dataset(paths: Sequence[str | os.PathLike[str]], shuffle: int = 0, seed: int = 0, transform: Transform | None = None) -> Any:
    """Iterable dataset of volumes in shards, split by rank and worker; `shuffle` volumes are held to draw from. For `make_loader`."""
    wds = optional_import("webdataset")
    data = wds.WebDataset(
        [str(path) for path in paths], shardshuffle=len(paths) if shuffle else False, seed=seed, nodesplitter=wds.split_by_node,
        empty_check=False,
    )  # fmt: skip
    if shuffle:
        data = data.shuffle(shuffle, seed=seed)
    return data.map(_Decode(transform))


@dataclass(frozen=True)
class _Decode:
    transform: Transform | None

    def __call__(self, sample: Mapping[str, Any]) -> Volume:
        data = sample["volume"]
        volume = volume_from_bytes(data.read() if isinstance(data, io.IOBase) else data)
        return self.transform(volume) if self.transform else volume


def _numbered(coords: Tensor, sample: int) -> Tensor:
    return torch.cat((coords.new_full((len(coords), 1), sample), coords), 1)
