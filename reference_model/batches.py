"""Endless training batches of volumes, drawn from prepared directories and from shapes made on the spot.

Batch `number` of a rank follows from (seed, number, rank) alone: any worker can make it, ranks share its resolution, and a run goes on at
any number. Letters: R resolution; tokens are latents.
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from reference_model.dataset import PreparedVolume, VolumeBatch, collate_volumes
from reference_model.packed import PackedBatch, PackedVolume, read_packed
from reference_model.patches import STEP, draw_patch
from reference_model.resample import resample
from reference_model.symmetry import turn_batch
from reference_model.vae_fits import read_fit
from reference_model.volume import Volume, load_volume, save_volume, without_margin

_PATIENCE = 200  # draws in a row that may be of no use
_MOST_PIECES = 32  # patches of one volume in a batch


class DrawError(ValueError):
    """What was drawn makes no volume; the next draw may."""


class Source(Protocol):
    """Where volumes come from."""

    @property
    def identity(self) -> str:
        """Text that changes with what can be drawn."""

    def draw(self, rng: np.random.Generator, resolution: int) -> Volume | PackedVolume:
        """One volume of this resolution, without a margin, chosen by rng alone; DrawError where the choice makes none."""


@dataclass(frozen=True)
class PreparedSource:
    """Volumes on disk, each as likely: those of the resolution asked for, else the finest ones resampled.

    fits: where `keep_fits` left what the model would else fit to the cells of each batch anew; nothing of what is resampled.
    """

    volumes: tuple[PreparedVolume, ...]
    fits: Path | None = None

    def __post_init__(self) -> None:
        if not self.volumes:
            raise ValueError("a source needs volumes, got none")

    @property
    def identity(self) -> str:
        kept = ["fits"] * (self.fits is not None)  # turned ones are not bit for bit fits of what is turned
        return "\n".join([*sorted(f"{v.path.name} {v.geometry} {v.resolution} {v.voxels}" for v in self.volumes), *kept])

    @cached_property
    def _by_resolution(self) -> dict[int, list[PreparedVolume]]:
        groups: dict[int, list[PreparedVolume]] = {}
        for volume in self.volumes:
            groups.setdefault(volume.resolution, []).append(volume)
        return groups

    def draw(self, rng: np.random.Generator, resolution: int) -> Volume | PackedVolume:
        group = self._by_resolution.get(resolution) or self._by_resolution[max(self._by_resolution)]
        return self.read(group[int(rng.integers(len(group)))], resolution)

    def read(self, volume: PreparedVolume, resolution: int) -> Volume | PackedVolume:
        """The volume at this resolution, with its fit where that is kept."""
        if volume.resolution == resolution and not (packed := read_packed(volume.path)).margin:
            return packed if self.fits is None else replace(packed, fit=read_fit(self.fits, volume))
        return load_at(volume.path, resolution)


@dataclass(frozen=True)
class ShapeSource:
    """Shapes made by code: `count` seeds from `first` on of each family; `cache` keeps volumes once made."""

    families: tuple[str, ...]
    count: int
    first: int = 0
    cache: Path | None = None

    @property
    def identity(self) -> str:
        return f"shapes {' '.join(self.families)} {self.first} {self.count}"

    def draw(self, rng: np.random.Generator, resolution: int) -> Volume:
        family = self.families[int(rng.integers(len(self.families)))]
        return self.make(family, self.first + int(rng.integers(self.count)), resolution)

    def make(self, family: str, seed: int, resolution: int) -> Volume:
        """Volume of (family, seed), from the cache where it lies there; DrawError where there is none."""
        from reference_model.sdf import mesh_to_volume
        from reference_model.shapes import make_shape

        path = self.cache / f"{family}_{seed:06d}_{resolution}.safetensors" if self.cache else None
        if path and path.exists():
            return load_volume(path)
        try:
            shape = make_shape(family, seed)
            volume = mesh_to_volume(shape.vertices, shape.faces, resolution, meta={"source": f"{family}_{seed:06d}"})
        except ValueError as error:
            raise DrawError(f"{family} {seed} at {resolution}: {error}") from error
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{os.getpid()}.{path.name}")  # workers may make the same shape at once
            save_volume(volume, part)
            os.replace(part, path)
            return load_volume(path)  # values are rounded on disk: the first draw is like all later ones
        return volume


def load_at(path: Path, resolution: int) -> Volume:
    """The volume of a file at a resolution; ValueError where it holds neither that nor the margin to resample it."""
    volume = load_volume(path, margin=True)
    return without_margin(volume) if volume.resolution == resolution else resample(volume, resolution)


@dataclass(frozen=True)
class DrawnBatch:
    """A batch as workers make it; `to` unpacks and turns volumes where they are wanted, all at once."""

    volumes: VolumeBatch | PackedBatch
    symmetries: tuple[int, ...]  # of each volume; none: they stay as they are

    @property
    def counts(self) -> dict[str, int]:
        return self.volumes.counts

    def pin_memory(self) -> "DrawnBatch":
        return replace(self, volumes=self.volumes.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> VolumeBatch:
        volumes = self.volumes.unpack(device, non_blocking) if isinstance(self.volumes, PackedBatch) else self.volumes
        return turn_batch(volumes, self.symmetries, device, non_blocking)


@dataclass(frozen=True)
class BatchStream(Dataset[DrawnBatch]):
    """Item `number` is a batch of one of the `resolutions`, each as likely; its volumes come from `sources` with their weights.

    Volumes are added until the batch holds at least `tokens`: which ones are drawn does not depend on their size, as it would if the
    last had to fit. Volumes of more than `max_tokens` are dropped and counted, so a batch has less than tokens + max_tokens;
    so are draws that make no volume. ValueError when nothing else comes.
    patch_latents: of each volume come cubes of so many latents an edge (`reference_model.patches`), each turned on its own, until they
    hold `patch_tokens`, 32 cubes at most: a thin blade gives many where a large shape gives one, and so both count alike. `max_tokens`
    is then asked of each cube, a draw with a larger one is dropped, and a batch has less than tokens + patch_tokens + max_tokens.
    """

    sources: Sequence[tuple[Source, float]]
    resolutions: Sequence[int]
    tokens: int
    max_tokens: int
    seed: int = 0
    symmetries: bool = True
    rank: int = 0
    patch_latents: int | None = None
    patch_tokens: int = 1

    def __post_init__(self) -> None:
        weights = [weight for _, weight in self.sources]
        if min(weights, default=0) < 0 or sum(weights) <= 0:
            raise ValueError(f"sources need weights >= 0, one of them positive, got {weights}")
        if min(self.tokens, self.max_tokens, self.patch_tokens) < 1:
            raise ValueError(
                f"tokens, max_tokens and patch_tokens must be positive, got {self.tokens=}, {self.max_tokens=}, {self.patch_tokens=}"
            )
        if self.patch_tokens > 1 and self.patch_latents is None:
            raise ValueError(f"patch_tokens is of patches: patch_latents must be given, got {self.patch_tokens=}, {self.patch_latents=}")
        if self.patch_latents is not None and (self.patch_latents < STEP or self.patch_latents % STEP):
            raise ValueError(f"patch_latents must be a positive multiple of {STEP}, or None, got {self.patch_latents=}")

    def data_hash(self) -> str:
        """sha256 of what can be drawn and how often."""
        text = [f"{weight} {source.identity}" for source, weight in self.sources]
        return hashlib.sha256("\n".join([*text, str(sorted(self.resolutions))]).encode()).hexdigest()

    def __getitem__(self, number: int) -> DrawnBatch:
        resolution = int(np.random.default_rng([self.seed, number]).choice(self.resolutions))
        rng = np.random.default_rng([self.seed, number, 1 + self.rank])
        weights = np.array([weight for _, weight in self.sources])
        volumes: list[Volume | PackedVolume] = []
        symmetries: list[int] = []
        held = dropped = in_a_row = 0
        while held < self.tokens:
            source, _ = self.sources[int(rng.choice(len(weights), p=weights / weights.sum()))]
            pieces: list[Volume | PackedVolume] = []
            try:
                pieces = self._pieces(source.draw(rng, resolution), rng)
                most = max(len(piece.latents) for piece in pieces)
                reason = f"{most} tokens of {self.max_tokens=}"
            except DrawError as error:
                most, reason = 0, str(error)
            if not 0 < most <= self.max_tokens:
                dropped, in_a_row = dropped + 1, in_a_row + 1
                if in_a_row == _PATIENCE:
                    raise ValueError(f"{_PATIENCE} draws in a row at {resolution=} cannot be used, the last one for {reason}")
                continue
            volumes += pieces
            if self.symmetries:
                symmetries += [int(rng.integers(48)) for _ in pieces]
            held, in_a_row = held + sum(len(piece.latents) for piece in pieces), 0
        packed = [v for v in volumes if isinstance(v, PackedVolume)]
        if len(packed) == len(volumes):
            return DrawnBatch(PackedBatch.of(packed, dropped), tuple(symmetries))
        known = [v.unpack() if isinstance(v, PackedVolume) else v for v in volumes]
        return DrawnBatch(replace(collate_volumes(known), dropped=dropped), tuple(symmetries))

    def _pieces(self, volume: Volume | PackedVolume, rng: np.random.Generator) -> list[Volume | PackedVolume]:
        """What a batch takes of a volume: all of it, or patches."""
        if not self.patch_latents:
            return [volume]
        pieces: list[Volume | PackedVolume] = []
        held = 0
        while not pieces or (0 < held < self.patch_tokens and len(pieces) < _MOST_PIECES):
            pieces.append(draw_patch(volume, self.patch_latents, rng))
            held += len(pieces[-1].latents)
        return pieces

    def loader(self, start: int, workers: int, ahead: int = 2) -> Iterator[DrawnBatch]:
        """Batches start, start + 1, …: made by `workers` processes, each `ahead` of its turn, in pinned memory where a GPU is."""
        return iter(DataLoader(
            self, batch_size=None, sampler=range(start, sys.maxsize), num_workers=workers, pin_memory=torch.cuda.is_available(),
            prefetch_factor=ahead if workers else None, multiprocessing_context="spawn" if workers else None,
        ))  # fmt: skip

