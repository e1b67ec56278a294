"""Volumes as their files hold them: a tenth of the bytes of `Volume`, to be unpacked on the device that trains."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from reference_model.dataset import VolumeBatch
from reference_model.tiles import CELL, lattice
from reference_model.volume import TENSORS, Volume, check_schema


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
    fit: Tensor | None = None  # [L,16] float32, of `VolumeBatch`

    @property
    def latents(self) -> Tensor:
        return self.tensors["latents"]

    def unpack(self, device: torch.device | str = "cpu") -> Volume:
        """The volume on a device, bit for bit that of `load_volume(…, margin=True)`."""
        x = PackedBatch.of([self]).unpack(device)
        return Volume(
            self.resolution, x.coords[:, 1:].contiguous(), x.values, x.sharp, x.latents[:, 1:].contiguous(), x.latent_index, x.inside,
            self.scale, self.offset, self.y_up, self.meta, self.margin,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Volumes of one resolution, their tensors joined: few copies and few launches, however many there are."""

    tensors: Mapping[str, Tensor]  # of the files, row after row; sharp and inside bit after bit, with no padding between volumes
    cu_seqlens: Tensor  # [B+1] int32 on the host, bounds of the samples among values
    cu_latents: Tensor  # [B+1] int32 on the host
    levels: Tensor  # [B] float32
    resolution: int
    meta: tuple[Mapping[str, str], ...]
    dropped: int = 0
    fit: Tensor | None = None

    @staticmethod
    def of(volumes: Sequence[PackedVolume], dropped: int = 0) -> "PackedBatch":
        """The volumes in their order, on the host, with a fit if each has one; ValueError unless they are of one resolution."""
        resolutions = {v.resolution for v in volumes}
        if len(resolutions) != 1:
            raise ValueError(f"a batch needs volumes of one resolution, got {sorted(resolutions)}")
        parts = {name: [v.tensors[name] for v in volumes] for name in TENSORS}
        latents, voxels = [len(x) for x in parts["latents"]], [len(x) for x in parts["values"]]
        bits = {"sharp": voxels, "inside": [CELL**3 * a - b for a, b in zip(latents, voxels, strict=True)]}
        tensors = {name: _join_bits(x, bits[name]) if name in bits else torch.cat(x) for name, x in parts.items()}
        cu_seqlens, cu_latents = (torch.tensor([0, *counts]).cumsum(0).int() for counts in (voxels, latents))
        levels, meta = torch.tensor([v.levels for v in volumes]), tuple(v.meta for v in volumes)
        fits = [v.fit for v in volumes if v.fit is not None]
        fit = torch.cat(fits) if len(fits) == len(volumes) else None
        return PackedBatch(tensors, cu_seqlens, cu_latents, levels, volumes[0].resolution, meta, dropped, fit)

    @property
    def counts(self) -> dict[str, int]:
        """As `VolumeBatch.counts`."""
        tokens, voxels = (len(self.tensors[name]) for name in ("latents", "values"))
        return {"tokens": tokens, "voxels": voxels, "samples": len(self.meta), "dropped": self.dropped}

    def pin_memory(self) -> "PackedBatch":
        fit = None if self.fit is None else self.fit.pin_memory()
        return replace(self, tensors={name: x.pin_memory() for name, x in self.tensors.items()}, levels=self.levels.pin_memory(), fit=fit)

    def unpack(self, device: torch.device | str, non_blocking: bool = False) -> VolumeBatch:
        """The batch with its rows on the device; the bounds of the samples stay on the host."""
        x = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors.items()}
        levels = self.levels.to(device, non_blocking=non_blocking)
        sizes = self.cu_latents.diff().to(device)
        sample = torch.arange(len(levels), dtype=torch.int32, device=device).repeat_interleave(sizes, output_size=len(x["latents"]))
        latents = torch.cat([sample[:, None], x["latents"].int()], 1)
        band = _bits(x["band"]).view(-1, CELL**3)
        latent_index, child = band.nonzero().unbind(1)
        at = latents[latent_index]
        values = x["values"].float() / levels[at[:, 0]]  # by a tensor: by a number, a GPU would multiply, another rounding
        inside = torch.zeros_like(band).masked_scatter_(band, values < 0).masked_scatter_(~band, _bits(x["inside"]))
        coords = torch.cat([at[:, :1], at[:, 1:] * CELL + lattice(CELL, latents.device).int()[child]], 1)
        return VolumeBatch(
            self.resolution, coords, values, _bits(x["sharp"])[: len(values)], latents, latent_index.int(), inside,
            self.cu_seqlens, self.cu_latents, self.meta, self.dropped,
            None if self.fit is None else self.fit.to(device, non_blocking=non_blocking),
        )  # fmt: skip


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


def _join_bits(parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Packed bits uint8 of several tensors, so many of each → [ceil(all / 8)] uint8, one after another."""
    if len(parts) == 1:
        return parts[0]
    return torch.from_numpy(np.packbits(np.concatenate([np.unpackbits(x.numpy(), count=n) for x, n in zip(parts, counts, strict=True)])))
