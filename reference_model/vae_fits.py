"""Fits of prepared volumes, made once and kept: a cell is fitted on its own, so that patches and turned volumes need no other.

A fit takes more time than all else of a training step; turning it is a product with a matrix (`vae_pieces.turn_latents`).
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from reference_model.dataset import PreparedVolume
from reference_model.distributed import Ranks
from reference_model.packed import PackedBatch, read_packed
from reference_model.vae_fit import VERSION, fit_cells
from reference_model.vae_loss import make_targets
from reference_model.vae_pieces import COEFFICIENTS


def fits_folder(fits: str | Path, planes: bool) -> Path:
    """Where a training keeps fits with planes, or those without."""
    return Path(fits) / ("planes" if planes else "pieces")


def keep_fits(volumes: Sequence[PreparedVolume], folder: Path, device: torch.device, ranks: Ranks, planes: bool = True) -> None:
    """Write what is missing in folder; each rank a share. Returns when all ranks are done. planes: as `fit_cells`.

    Volumes with a margin get none: of them comes what is resampled or cut. What another version of `vae_fit` left there is made anew.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    missing = [v for v in volumes if _version(_path(folder, v)) != VERSION][ranks.rank :: ranks.size]
    with ranks.bar(len(missing), unit="fit") as bar:
        for volume in missing:
            packed = read_packed(volume.path)
            if not packed.margin:
                fit = fit_cells(make_targets(PackedBatch.of([packed]).unpack(device)), volume.resolution, planes)
                part = folder / f".{_path(folder, volume).name}.{os.getpid()}.part"
                save_file({"fit": fit.cpu()}, part, {"version": VERSION})
                os.replace(part, _path(folder, volume))
            bar.update()
    ranks.sum([0.0])


def read_fit(folder: Path, volume: PreparedVolume) -> Tensor:
    """[L,16] float32 of the volume's latents; ValueError unless `keep_fits` of this version left it there for this volume."""
    from safetensors import safe_open

    path = _path(folder, volume)
    try:
        with safe_open(path, "pt") as file:
            version, fit = (file.metadata() or {}).get("version"), file.get_tensor("fit")
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: fits must be kept before volumes are drawn") from error
    if version != VERSION:
        raise ValueError(f"{path} must be of version {VERSION} of the fit, got {version}: keep_fits makes it anew")
    if fit.shape != (volume.tokens, COEFFICIENTS):
        raise ValueError(f"{path} must hold [{volume.tokens},{COEFFICIENTS}] numbers, got {[*fit.shape]}")
    return fit


def _version(path: Path) -> str | None:
    """Of the fit that is kept there, None where there is none."""
    from safetensors import safe_open

    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("version")


def _path(folder: Path, volume: PreparedVolume) -> Path:
    return folder / f"{volume.path.stem}_{volume.resolution}.safetensors"
