"""A volume at another resolution by trilinear interpolation, for multi-resolution training (paper: arXiv 2505.17412, section 3.3)."""

from dataclasses import replace

import torch
from torch import Tensor

from reference_model.tiles import CELL, OCTANTS, Tiles, lattice
from reference_model.volume import BAND, RESAMPLING_MARGIN, TAU, Volume, child_index, group_voxels, without_margin

_STEP = 1 << 20  # voxels handled at once


def resample(volume: Volume, resolution: int) -> Volume:
    """Volume of the same shape at `resolution` (a multiple of 8, at least 256): the voxels with |s| <= tau after resampling, no margin.

    The source must hold |s| < tau + sqrt(3) h, h its voxel edge (`margin` of `mesh_to_volume`): then all eight corners round a voxel of
    the new band are known and nothing is guessed. Signs of other children spread from there: no sign changes beyond the band.
    A voxel is sharp within one new voxel edge of where a marked edge must run: the mean of the sharp source voxels in 5^3 round each.
    At its own resolution a source only loses its margin. ValueError for a source without one and for other resolutions.
    """
    if resolution % CELL or 2 / resolution > TAU:
        raise ValueError(f"resolution must be a multiple of {CELL}, at least {round(2 / TAU)}, got {resolution=}")
    if resolution == volume.resolution:
        return without_margin(volume)
    if volume.margin < RESAMPLING_MARGIN * 0.999:
        raise ValueError(f"the source must hold |s| < tau + sqrt(3) h, got {volume.margin=} voxel edges")
    known_coords, known = _interpolate(volume, resolution)
    band = known.abs() <= BAND
    order, latents, latent_index = group_voxels(known_coords[band], resolution)
    coords, values = known_coords[band][order], known[band][order].clamp(-1, 1)
    sign = Tiles.build(coords, values, resolution)
    row = sign.rows(known_coords >> 3)
    sign.values[row, child_index(known_coords)] = known
    return replace(
        volume,
        resolution=resolution,
        coords=coords,
        values=values,
        sharp=_near_edges(volume.coords[volume.sharp], volume.resolution, coords, resolution),
        latents=latents,
        latent_index=latent_index,
        inside=_spread_signs(sign.values[:-1]),
        margin=0.0,
    )


def _interpolate(volume: Volume, resolution: int) -> tuple[Tensor, Tensor]:
    """Voxels of the new grid whose neighbours in the source are known: coords [M,3] int32, values [M], in no order."""
    tiles = Tiles.build(volume.coords, volume.values, volume.resolution)
    device = volume.coords.device
    numerator = (2 * torch.arange(resolution, device=device) + 1) * volume.resolution - resolution  # of the place in the source grid
    base, part = numerator // (2 * resolution), (numerator % (2 * resolution)) / (2 * resolution)
    index = torch.arange(volume.resolution, device=device)
    first = torch.searchsorted(base, index)
    count = torch.searchsorted(base, index, right=True) - first  # new voxels whose lower neighbour in the source is `index`, on an axis
    corners = torch.tensor(OCTANTS, device=device)
    kept_coords, kept_values = [torch.empty(0, 3, dtype=torch.int32, device=device)], [torch.empty(0, device=device)]
    for c in volume.coords.long().split(_STEP):
        number = count[c]
        c, number = c[number.all(1)], number[number.all(1)]
        total = number.prod(1)
        source = torch.arange(len(c), device=device).repeat_interleave(total)
        place = torch.arange(len(source), device=device) - (total.cumsum(0) - total)[source]
        n = number[source]
        new = first[c[source]] + torch.stack((place // (n[:, 1] * n[:, 2]), place // n[:, 2] % n[:, 1], place % n[:, 2]), 1)
        upper = part[new][:, None]
        weight = torch.where(corners.bool(), upper, 1 - upper).prod(2)  # [n,8]
        corner = tiles.at(c[source][:, None] + corners)
        t = torch.where(weight > 0, weight * corner, 0).sum(1)
        kept = t.isfinite()
        kept_coords.append(new[kept].int())
        kept_values.append(t[kept])
    return torch.cat(kept_coords), torch.cat(kept_values)


def _near_edges(source: Tensor, source_resolution: int, coords: Tensor, resolution: int) -> Tensor:
    """[M] bool: voxels coords [M,3] of the new grid within one of its edges of the middle of the sharp source voxels [S,3]."""
    c = coords.long()
    key, order = torch.sort((c[:, 0] * resolution + c[:, 1]) * resolution + c[:, 2])
    near = torch.zeros(len(coords), dtype=torch.bool, device=coords.device)
    if len(coords) == 0:
        return near
    tiles = Tiles.build(source, torch.ones(len(source), device=source.device), source_resolution)
    around = lattice(5, source.device) - 2
    for c in source.long().split(_STEP // len(around)):
        present = tiles.at(c[:, None] + around) == 1
        middle = c + (present[..., None] * around).sum(1) / present.sum(1, keepdim=True)
        place = (middle + 0.5) * (resolution / source_resolution) - 0.5
        new = place.round().long()[:, None] + around
        new = new[((new - place[:, None]).norm(dim=2) <= 1) & ((new >= 0) & (new < resolution)).all(2)]
        wanted = (new[:, 0] * resolution + new[:, 1]) * resolution + new[:, 2]
        found = torch.searchsorted(key, wanted).clamp(max=len(key) - 1)
        near[order[found[key[found] == wanted]]] = True
    return near


def _spread_signs(values: Tensor) -> Tensor:
    """inside [L,512] from values [L,512]: a child without a value (NaN) takes the sign of its neighbours, in sweeps through the cell."""
    sign = torch.where(values < 0, -1, (values >= 0).int()).to(torch.int8).view(-1, CELL, CELL, CELL)
    todo = (sign == 0).flatten(1).any(1).nonzero().flatten()
    while len(todo):
        tile = sign[todo]
        for axis in (1, 2, 3):
            lower, upper = tile.narrow(axis, 0, CELL - 1), tile.narrow(axis, 1, CELL - 1)
            upper.copy_(torch.where(upper == 0, lower, upper))
            lower.copy_(torch.where(lower == 0, upper, lower))
        sign[todo] = tile
        todo = todo[(tile == 0).flatten(1).any(1)]
    return (sign < 0).flatten(1)
