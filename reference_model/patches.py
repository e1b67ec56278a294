"""Patches of volumes, so that a step of one batch sees a little of many shapes instead of all of one.

A patch holds the latents of a volume in a cube of `edge` latents. Its corner lies on multiples of 8, so that unshifted windows of the
attention stay whole; coordinates and resolution stay those of the volume. Beyond the cube nothing is there, as beyond an open edge.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reference_model.packed import PackedVolume
from reference_model.volume import CELL, Volume, children_marked

STEP = 8  # latents between corners: a window


def draw_patch(volume: Volume | PackedVolume, edge: int, rng: np.random.Generator) -> Volume | PackedVolume:
    """A cube around one of the volume's latents, each as likely, in one of its (edge / 8)^3 places; packed if the volume is."""
    latents = volume.latents
    if not len(latents):
        return volume
    around = latents[int(rng.integers(len(latents)))].long()
    low = (around // STEP - torch.from_numpy(rng.integers(edge // STEP, size=3))) * STEP
    keep = ((latents >= low) & (latents < low + edge)).all(1)
    return select_packed(volume, keep) if isinstance(volume, PackedVolume) else select_latents(volume, keep)


def select_latents(volume: Volume, keep: Tensor) -> Volume:
    """The volume of the latents that keep [L] bool says."""
    voxels = keep[volume.latent_index.long()]
    rows = keep.cumsum(0, dtype=torch.int32) - 1
    return replace(
        volume, coords=volume.coords[voxels], values=volume.values[voxels], sharp=volume.sharp[voxels], latents=volume.latents[keep],
        latent_index=rows[volume.latent_index[voxels].long()], inside=volume.inside[keep],
    )  # fmt: skip


def select_packed(volume: PackedVolume, keep: Tensor) -> PackedVolume:
    """`select_latents` of a packed volume; what is left out is neither unpacked nor, but for its bands, read."""
    x, rows = {name: tensor.numpy() for name, tensor in volume.tensors.items()}, keep.numpy().nonzero()[0]
    counts = children_marked(x["band"])
    voxels, others = _members(counts, rows), _members(CELL**3 - counts, rows)
    selected = {
        "latents": x["latents"][rows],
        "band": x["band"][rows],
        "values": x["values"][voxels],
        "sharp": np.packbits(_bits_at(x["sharp"], voxels)),
        "inside": np.packbits(_bits_at(x["inside"], others)),
    }
    fit = None if volume.fit is None else volume.fit[keep]
    return replace(volume, tensors={name: torch.from_numpy(a) for name, a in selected.items()}, fit=fit)


def _members(counts: NDArray, rows: NDArray) -> NDArray:
    """[n] int64 places of the members of chosen rows [K], where row i has counts[i] of them side by side."""
    ends, sizes = counts.cumsum(dtype=np.int64), counts[rows]
    first = np.repeat(ends[rows] - sizes.cumsum(dtype=np.int64), sizes)  # of a row's members, less the number of those before
    return first + np.arange(len(first))


def _bits_at(packed: NDArray, places: NDArray) -> NDArray:
    """[n] uint8, 0 or 1: bits of bytes at places [n], most significant first."""
    return packed[places >> 3] >> (7 - (places & 7)).astype(np.uint8) & 1
