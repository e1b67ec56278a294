"""Volumes as their files hold them: a tenth of the bytes of `Volume`, to be unpacked on the device that trains."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reference_model.dataset import VolumeBatch, collate_volumes
from reference_model.tiles import CELL, lattice
from reference_model.volume import Volume, check_schema


@dataclass(frozen=True, eq=False)
class PackedVolume:
    """The tensors of one file (`reference_model.volume` has their meaning) and what its header says."""

    tensors: Mapping[str, Tensor]  # latents, band, values, sharp, inside
    resolution: int
    levels: float  # the value that stands for tau
    scale: float
    offset: tuple[float, float, float]
    y_up: bool
    margin: float
    meta: Mapping[str, str]

    @property
    def latents(self) -> Tensor:
        return self.tensors["latents"]

    def map(self, function: Callable[[Tensor], Tensor]) -> "PackedVolume":
        """The same with each tensor replaced by the function of it."""
        return replace(self, tensors={name: function(x) for name, x in self.tensors.items()})

    def unpack(self, device: torch.device | str = "cpu", non_blocking: bool = False) -> Volume:
        """The volume on a device, bit for bit that of `load_volume(…, margin=True)`."""
        x = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors.items()}
        latents = x["latents"].int()
        band = _bits(x["band"]).view(-1, CELL**3)
        latent_index, child = band.nonzero().unbind(1)
        values = x["values"].float() / torch.full((), self.levels, device=device)  # by a number, a GPU would multiply: another rounding
        inside = torch.zeros_like(band).masked_scatter_(band, values < 0).masked_scatter_(~band, _bits(x["inside"]))
        coords = latents[latent_index] * CELL + lattice(CELL, latents.device).int()[child]
        return Volume(
            self.resolution, coords, values, _bits(x["sharp"])[: len(values)], latents, latent_index.int(), inside,
            self.scale, self.offset, self.y_up, self.meta, self.margin,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Volumes of one resolution, packed."""

    volumes: tuple[PackedVolume, ...]
    dropped: int = 0

    @property
    def resolution(self) -> int:
        return self.volumes[0].resolution

    @property
    def counts(self) -> dict[str, int]:
        """As `VolumeBatch.counts`."""
        tokens, voxels = (sum(len(v.tensors[name]) for v in self.volumes) for name in ("latents", "values"))
        return {"tokens": tokens, "voxels": voxels, "samples": len(self.volumes), "dropped": self.dropped}

    def pin_memory(self) -> "PackedBatch":
        return replace(self, volumes=tuple(v.map(Tensor.pin_memory) for v in self.volumes))

    def unpack(self, device: torch.device | str, non_blocking: bool = False) -> VolumeBatch:
        """The batch with its rows on the device; the bounds of the samples stay on the host."""
        return replace(collate_volumes([v.unpack(device, non_blocking) for v in self.volumes]), dropped=self.dropped)


def read_packed(path: str | os.PathLike[str]) -> PackedVolume:
    """Read a file that `save_volume` wrote; ValueError for another one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        check_schema(tensors, header)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: {'not a volume: ' if isinstance(error, SafetensorError) else ''}{error}") from error
    return PackedVolume(
        tensors, int(header["resolution"]), float(header["levels"]), float(header["scale"]), tuple(json.loads(header["offset"])),
        bool(json.loads(header["y_up"])), float(header["margin"]), json.loads(header["meta"]),
    )  # fmt: skip


def _bits(x: Tensor) -> Tensor:
    """The bits of bytes, most significant first: uint8 [...] → bool [8n]."""
    return ((x.reshape(-1, 1) >> torch.arange(7, -1, -1, device=x.device).byte()) & 1).bool().flatten()
