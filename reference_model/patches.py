"""Patches of volumes, so that a step of one batch sees a little of many shapes instead of all of one.

A patch holds the latents of a volume in a cube of `edge` latents. Its corner lies on multiples of 8, so that unshifted windows of the
attention stay whole; coordinates and resolution stay those of the volume. Beyond the cube nothing is there, as beyond an open edge.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from reference_model.packed import PackedVolume
from reference_model.volume import CELL, Volume, children_marked

STEP = 8  # latents between corners: a window


def draw_patch(volume: Volume | PackedVolume, edge: int, rng: np.random.Generator) -> Volume:
    """A cube around one of the volume's latents, each as likely, in one of its (edge / 8)^3 places."""
    latents = volume.latents
    if not len(latents):
        return volume.unpack() if isinstance(volume, PackedVolume) else volume
    around = latents[int(rng.integers(len(latents)))].long()
    low = (around // STEP - torch.from_numpy(rng.integers(edge // STEP, size=3))) * STEP
    keep = ((latents >= low) & (latents < low + edge)).all(1)
    return select_packed(volume, keep).unpack() if isinstance(volume, PackedVolume) else select_latents(volume, keep)


def select_latents(volume: Volume, keep: Tensor) -> Volume:
    """The volume of the latents that keep [L] bool says."""
    voxels = keep[volume.latent_index.long()]
    rows = keep.cumsum(0, dtype=torch.int32) - 1
    return replace(
        volume, coords=volume.coords[voxels], values=volume.values[voxels], sharp=volume.sharp[voxels], latents=volume.latents[keep],
        latent_index=rows[volume.latent_index[voxels].long()], inside=volume.inside[keep],
    )  # fmt: skip


def select_packed(volume: PackedVolume, keep: Tensor) -> PackedVolume:
    """`select_latents` of a packed volume, without unpacking what is left out."""
    x, kept = {name: tensor.numpy() for name, tensor in volume.tensors.items()}, keep.numpy()
    counts = children_marked(x["band"])
    voxels, others = np.repeat(kept, counts), np.repeat(kept, CELL**3 - counts)
    selected = {
        "latents": x["latents"][kept],
        "band": x["band"][kept],
        "values": x["values"][voxels],
        "sharp": np.packbits(np.unpackbits(x["sharp"], count=len(voxels))[voxels]),
        "inside": np.packbits(np.unpackbits(x["inside"], count=len(others))[others]),
    }
    return replace(volume, tensors={name: torch.from_numpy(a) for name, a in selected.items()})
