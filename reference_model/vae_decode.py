"""Latents → voxels for marching cubes, chunk by chunk, and weights on disk.

Attention runs over all latents at once, the upsampling in cubes of latents with a halo: memory follows the chunk, the result does not.
A weight file is safetensors; its header says `format` = "ssa-vae", `config` (JSON of `VAEConfig`) and whatever the card says.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference_model.cli import optional_import
from reference_model.tiles import lattice
from reference_model.vae import SparseVAE, VAEConfig
from reference_model.vae_decoder import HALO
from reference_model.volume import CELL

DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "vae_compact.safetensors"
_FORMAT = "ssa-vae"


@torch.no_grad()
def decode_volume(
    model: SparseVAE, z: Tensor, latents: Tensor, resolution: int, chunk: int = 32, prune: float | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One sample's latents → (coords [N,3] int32, values [N] float32, inside [L,512] bool), as `extract.extract_mesh` takes them.

    z [L,16]; latents [L,3] integer, unique, lexicographic. chunk: edge in latents of the cubes upsampled at once. Every child of a latent
    is there (N = 512 L) and `inside` holds their signs; with prune, children of cells less probable than that are left out and inside is
    None: a missing voxel takes the sign of its neighbours. ValueError as `SparseVAE.decode`.
    """
    if latents.ndim != 2 or latents.shape[1] != 3:
        raise ValueError(f"latents must be [L,3], got {latents.shape=}")
    latents = torch.cat((latents.new_zeros(len(latents), 1), latents), 1)
    hidden = model.attend(z, latents, resolution)
    values = torch.empty(len(latents), CELL**3, device=z.device)
    for rows, core in chunks(latents, chunk):
        upsampled, _ = model.decoder.upsample(hidden[rows], z[rows], latents[rows], resolution // CELL, prune)
        values[rows[core]] = upsampled[core].clamp(-1, 1)
    coords = (latents[:, None, 1:] * CELL + lattice(CELL, z.device)).flatten(0, 1).int()
    if prune is None:
        return coords, values.flatten(), values < 0
    known = values.flatten().isfinite()
    return coords[known], values.flatten()[known], None


def chunks(latents: Tensor, edge: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cubes of `edge` latents that hold any: rows [n] of latents [L,4] in cube and halo, and which [m] of those rows the cube holds."""
    if edge < 1:
        raise ValueError(f"chunk must be at least 1, got {edge}")
    cell = torch.div(latents[:, 1:], edge, rounding_mode="floor")
    for low in torch.unique(cell, dim=0) * edge:
        step = latents[:, 1:] - low
        rows = ((step >= -HALO) & (step < edge + HALO)).all(1).nonzero().flatten()
        yield rows, ((step[rows] >= 0) & (step[rows] < edge)).all(1).nonzero().flatten()


def save_vae(model: SparseVAE, path: str | os.PathLike[str], dtype: torch.dtype | None = None, **card: Any) -> None:
    """Write weights (in `dtype`, None: as they are) and configuration, complete or not at all; `card` is kept in the header as text."""
    save_file = optional_import("safetensors.torch").save_file
    config = asdict(model.config) | {"conv_backend": None}  # a choice of the machine, not of the weights
    header = {"format": _FORMAT, "config": json.dumps(config), **{name: str(value) for name, value in card.items()}}
    tensors = {name: x.detach().to(dtype or x.dtype).cpu().contiguous() for name, x in model.state_dict().items()}
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    save_file(tensors, part, header)
    os.replace(part, path)


def load_vae(path: str | os.PathLike[str], device: torch.device | str = "cpu", conv_backend: str | None = None) -> SparseVAE:
    """Model in float32 and evaluation mode; ValueError for a file of another kind."""
    config = {"head": "tanh", "planes": False} | json.loads(read_card(path)["config"])  # older files do not name them
    model = SparseVAE(VAEConfig(**config | {"conv_backend": conv_backend}))
    model.load_state_dict(optional_import("safetensors.torch").load_file(path, device="cpu"))
    return model.to(device).eval().requires_grad_(False)


def read_card(path: str | os.PathLike[str]) -> dict[str, str]:
    """Header of a weight file."""
    safetensors = optional_import("safetensors")
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a weight file: {error}") from error
    if header.get("format") != _FORMAT:
        raise ValueError(f"{path}: not weights of the VAE: {header.get('format')=}")
    return dict(header)
