"""Sparse truncated signed-distance volumes and their file format (paper: arXiv 2505.17412, section 3.1).

Letters: R resolution, N band voxels, L latents (active cells of 8^3 voxels), h = 2 / R the voxel edge.
Voxel i of R has its centre at -1 + (2i + 1) / R, so the cells of every resolution nest and flips and quarter turns are exact.

A file is safetensors; its header says `format` = "ssa-volume", `version`, `resolution`, `scale`, `offset`, `y_up` and `meta` (JSON),
`margin` (voxel edges) and `levels` = floor(32767 tau / (tau + margin h)), so that a value is of the band where it is at most `levels` in
magnitude, and its tensors are

| name    | dtype, shape               | content                                                                          |
|---------|----------------------------|----------------------------------------------------------------------------------|
| latents | int16 [L,3]                | active cells, lexicographic, unique, 0 <= xyz < R / 8                            |
| band    | uint8 [L,64]               | bit per child: it has a value; child (dx*8+dy)*8+dz, most significant bit first  |
| values  | int16 [N]                  | round(t * levels), at most -1 where inside, at least 0 where outside             |
| sharp   | uint8 [ceil(N/8)]          | bit per value: near a marked edge                                                |
| inside  | uint8 [ceil((512L-N)/8)]   | bit per child without a value: inside (a value carries it as its sign)           |

which is 2 + 134 / (N / L) bytes a voxel: below 4 for every surface at R >= 256. N and L count the voxels of the margin where there is one.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

TAU = 1 / 128
BAND = 1 + 1e-6  # of tau: |s| <= tau, whatever rounding does; a plane of voxel centres at R = 256 has its neighbours exactly tau away
RESAMPLING_MARGIN = 3**0.5  # voxel edges beyond the band that `resample` needs
CELL = 8
_CELLS = 256  # latents decoded at once: they stay in the cache
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.int32)  # bits of a byte
_FORMAT, _VERSION, _MOST_LEVELS = "ssa-volume", "2", 32767
TENSORS, _HEADER = ("latents", "band", "values", "sharp", "inside"), ("resolution", "levels", "scale", "offset", "y_up", "margin", "meta")


@dataclass(frozen=True, eq=False)
class Volume:
    """Band voxels |s| <= tau = 1/128 of one shape in the cube [-1,1]^3, grouped by latent cell; with a margin |s| < tau + margin h too.

    Rows are lexicographic by (latent x, y, z), then by (x, y, z) inside the latent: the order of
    `ssa.partition_voxels(coords, compression_block_size=8, selection_block_size=8)`.
    """

    resolution: int  # R, a multiple of 8
    coords: Tensor  # [N,3] int32
    values: Tensor  # [N] float32, t = s / tau, negative inside; |t| <= 1 without a margin
    sharp: Tensor  # [N] bool, within one voxel of a marked edge
    latents: Tensor  # [L,3] int32, coords // 8, lexicographic
    latent_index: Tensor  # [N] int32, row of `latents` of each voxel, non-decreasing
    inside: Tensor  # [L,512] bool, sign of every child voxel, child index = (dx*8+dy)*8+dz
    scale: float = 1.0
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)  # unit = mesh * scale + offset, mesh in its z-up frame
    y_up: bool = False  # the source was y-up (GLB): turned on reading, to be turned back on writing
    meta: Mapping[str, str] = field(default_factory=dict)
    margin: float = 0.0  # voxel edges beyond the band that are held; training reads volumes without (`without_margin`)

    def __post_init__(self) -> None:
        _check_resolution(self.resolution)
        n, cells = len(self.coords), len(self.latents)
        for name, dtype, shape in (
            ("coords", torch.int32, (n, 3)), ("values", torch.float32, (n,)), ("sharp", torch.bool, (n,)),
            ("latents", torch.int32, (cells, 3)), ("latent_index", torch.int32, (n,)), ("inside", torch.bool, (cells, CELL**3)),
        ):  # fmt: skip
            x = getattr(self, name)
            if x.dtype != dtype or tuple(x.shape) != shape:
                raise ValueError(f"{name} must be {dtype} {list(shape)}, got {x.dtype} {list(x.shape)}")

    @property
    def child_index(self) -> Tensor:
        """[N] int64: place of each band voxel among its latent's 512 children."""
        return child_index(self.coords)


def voxel_centers(coords: Tensor, resolution: int) -> Tensor:
    """Centres -1 + (2i + 1) / R of voxels coords [...,3] (integer) in the cube [-1,1]^3, float32 [...,3]."""
    return (2.0 * coords + 1.0) / resolution - 1.0


def child_index(coords: Tensor) -> Tensor:
    """[N] int64 place (dx*8+dy)*8+dz of voxels coords [N,3] in their cell of 8^3."""
    d = coords.long() & (CELL - 1)
    return (d[:, 0] * CELL + d[:, 1]) * CELL + d[:, 2]


def group_voxels(coords: Tensor, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order of a volume: coords [N,3] integer, unique → (order [N] int64, latents [L,3] int32, latent_index [N] int32).

    `coords[order]` is in the order of `Volume`; latent_index belongs to the ordered rows.
    """
    grid = resolution // CELL
    c = coords.long()
    cell = c >> 3
    key = ((cell[:, 0] * grid + cell[:, 1]) * grid + cell[:, 2]) * CELL**3 + child_index(c)
    key, order = torch.sort(key)
    cells, index = torch.unique_consecutive(key >> 9, return_inverse=True)
    latents = torch.stack((cells // (grid * grid), cells // grid % grid, cells % grid), 1).int()
    return order, latents, index.int()


def without_margin(volume: Volume) -> Volume:
    """The band alone: voxels of the margin go, and latents that hold nothing else."""
    if volume.margin == 0:
        return volume
    keep = volume.values.abs() <= BAND
    rows, index = torch.unique_consecutive(volume.latent_index[keep], return_inverse=True)
    return replace(
        volume, coords=volume.coords[keep], values=volume.values[keep].clamp(-1, 1), sharp=volume.sharp[keep], margin=0.0,
        latents=volume.latents[rows.long()], latent_index=index.int(), inside=volume.inside[rows.long()],
    )  # fmt: skip


def save_volume(volume: Volume, path: str | os.PathLike[str]) -> None:
    """Write a volume; the file appears complete or not at all. Schema: the module's docstring."""
    from safetensors.torch import save_file

    rows, cells = volume.latent_index.cpu().numpy(), len(volume.latents)
    band = np.zeros((cells, CELL**3), np.bool_)
    band[rows, volume.child_index.cpu().numpy()] = True
    inside = volume.inside.cpu().numpy()
    count = int(_MOST_LEVELS / (1 + volume.margin * 2 / volume.resolution / TAU))
    values = volume.values.cpu().numpy()
    levels = np.rint(values * count)
    if len(levels) and np.any((levels < 0) > inside[band]):
        raise ValueError("values and inside must agree in sign at every voxel")
    beyond = np.abs(values) > BAND
    levels[beyond] = np.copysign(np.maximum(np.abs(levels[beyond]), count + 1), values[beyond])
    if np.abs(levels).max(initial=0) > (_MOST_LEVELS if volume.margin else count):
        raise ValueError(f"values must lie below tau + {volume.margin} h, got {np.abs(values).max()} tau")
    levels = np.where(inside[band], np.minimum(levels, -1), levels).astype(np.int16)
    tensors = {
        "latents": volume.latents.cpu().to(torch.int16).contiguous(),
        "band": torch.from_numpy(np.packbits(band, axis=1)),
        "values": torch.from_numpy(levels),
        "sharp": torch.from_numpy(np.packbits(volume.sharp.cpu().numpy())),
        "inside": torch.from_numpy(np.packbits(inside[~band])),
    }
    header = {
        "format": _FORMAT, "version": _VERSION, "resolution": str(volume.resolution), "scale": repr(float(volume.scale)),
        "margin": repr(float(volume.margin)), "levels": str(count),
        "offset": json.dumps([float(x) for x in volume.offset]), "y_up": json.dumps(volume.y_up), "meta": json.dumps(dict(volume.meta)),
    }  # fmt: skip
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    save_file(tensors, part, header)
    os.replace(part, path)


def load_volume(path: str | os.PathLike[str], margin: bool = False) -> Volume:
    """Read a volume (CPU tensors), its margin only if asked for; ValueError names what breaks the schema of the module's docstring."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return _checked({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}, margin)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: {'not a volume: ' if isinstance(error, SafetensorError) else ''}{error}") from error


def volume_from_bytes(data: bytes, margin: bool = False) -> Volume:
    """The volume in the bytes of a file, as `load_volume`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"not a volume: {error}") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    return _checked(tensors, header, margin)


def _checked(tensors: Mapping[str, Tensor], header: Mapping[str, str], margin: bool) -> Volume:
    counts = check_schema(tensors, header)
    volume = _decode({name: x.numpy() for name, x in tensors.items()}, header, counts)
    return volume if margin else without_margin(volume)


def check_schema(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> np.ndarray:
    """Children marked in each latent; ValueError names what breaks the schema of the module's docstring."""
    if header.get("format") != _FORMAT or header.get("version") != _VERSION:
        raise ValueError(f"not a volume of version {_VERSION}: {header.get('format')=}, {header.get('version')=}")
    for names, held in ((TENSORS, tensors), (_HEADER, header)):
        for name in names:
            if name not in held:
                raise ValueError(f"{name!r} is missing")
    return _check_tensors({name: x.numpy() for name, x in tensors.items()}, int(header["resolution"]))


def children_marked(band: np.ndarray) -> np.ndarray:
    """Values of each latent, from the bits of band uint8 [L,64]."""
    return _ONES[band].sum(1)


def _check_tensors(tensors: Mapping[str, np.ndarray], resolution: int) -> np.ndarray:
    _check_resolution(resolution)
    cells, n = len(tensors["latents"]), len(tensors["values"])
    for name, dtype, shape in (
        ("latents", np.int16, (cells, 3)), ("band", np.uint8, (cells, 64)), ("values", np.int16, (n,)),
        ("sharp", np.uint8, (-(-n // 8),)), ("inside", np.uint8, (-(-(cells * CELL**3 - n) // 8),)),
    ):  # fmt: skip
        x = tensors[name]
        if x.dtype != dtype or x.shape != shape:
            raise ValueError(f"{name} must be {np.dtype(dtype).name} {list(shape)}, got {x.dtype} {list(x.shape)}")
    counts = children_marked(tensors["band"])
    if counts.sum() != n or not counts.all():
        raise ValueError(f"band must mark one child a value and one at least in each latent, got {counts.sum()} children for {n} values")
    latents = tensors["latents"]
    keys = latents.astype(np.int64) @ [1 << 32, 1 << 16, 1]
    if cells and (latents.min() < 0 or latents.max() >= resolution // CELL or not (keys[1:] > keys[:-1]).all()):
        raise ValueError("latents must be unique, lexicographic and in the grid")
    return counts


def _decode(tensors: Mapping[str, np.ndarray], header: Mapping[str, str], counts: np.ndarray) -> Volume:
    resolution = int(header["resolution"])
    cells, n = len(tensors["latents"]), len(tensors["values"])
    latents = tensors["latents"].astype(np.int32)
    values = np.divide(tensors["values"], np.float32(header["levels"]), dtype=np.float32)
    negative = tensors["values"] < 0
    coords, inside = np.empty((n, 3), np.int32), np.empty((cells, CELL**3), np.bool_)
    rest = np.unpackbits(tensors["inside"], count=cells * CELL**3 - n).view(np.bool_)
    children = np.stack(np.unravel_index(np.arange(CELL**3), (CELL,) * 3), 1).astype(np.int32)
    starts = np.concatenate(([0], np.cumsum(counts)))
    for first in range(0, cells, _CELLS):
        last = min(first + _CELLS, cells)
        band = np.unpackbits(tensors["band"][first:last], axis=1).view(np.bool_)
        mine = slice(starts[first], starts[last])
        np.take(children, np.flatnonzero(band) & 511, 0, out=coords[mine], mode="clip")
        coords[mine] += np.repeat(latents[first:last] * CELL, counts[first:last], 0)
        inside[first:last][band] = negative[mine]
        inside[first:last][~band] = rest[first * CELL**3 - starts[first] : last * CELL**3 - starts[last]]
    return Volume(
        resolution=resolution, coords=torch.from_numpy(coords), values=torch.from_numpy(values), latents=torch.from_numpy(latents),
        latent_index=torch.from_numpy(np.repeat(np.arange(cells, dtype=np.int32), counts)),
        sharp=torch.from_numpy(np.unpackbits(tensors["sharp"], count=n).view(np.bool_)),
        inside=torch.from_numpy(inside), scale=float(header["scale"]), offset=tuple(json.loads(header["offset"])),
        y_up=bool(json.loads(header["y_up"])), meta=json.loads(header["meta"]), margin=float(header["margin"]),
    )  # fmt: skip


def _check_resolution(resolution: int) -> None:
    if resolution < CELL or resolution % CELL or resolution > CELL << 15:
        raise ValueError(f"resolution must be a positive multiple of {CELL}, got {resolution=}")
