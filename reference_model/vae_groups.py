"""In which groups the voxels of a cell begin, where several pieces of surface are fitted to it: by the plane that each one sees."""

import torch
from torch import Tensor
from torch.nn import functional as F

from reference_model.tiles import lattice
from reference_model.vae_bases import HALF
from reference_model.vae_loss import Targets
from reference_model.vae_pieces import TIE
from reference_model.volume import CELL

_GROUPED = 0.2  # of the largest weight: lighter voxels begin no group
_APART = 0.25  # of a distance in tau beside the difference of two unit directions


def second_piece(targets: Targets, weights: Tensor) -> Tensor:
    """[L,512] bool: children whose values rise in the rarer one of two directions, the means of two groups round the two most unlike.

    Children without a slope go with the second group.
    """
    rise, known = slopes(targets.values, targets.band)
    weight = known * weights

    def at(child: Tensor) -> Tensor:
        return rise.gather(1, child[:, None, None].expand(-1, 1, 3))[:, 0]

    def unlike(direction: Tensor) -> Tensor:
        likeness = (rise * direction[:, None]).sum(2).masked_fill(~known, 2)
        return at((likeness / TIE).round().argmin(1))

    other = unlike(at(weight.argmax(1)))
    one = unlike(other)
    for _ in range(5):
        first = (rise * (one - other)[:, None]).sum(2) > TIE
        one, other = (F.normalize((rise * (weight * chosen)[..., None]).sum(1), dim=1) for chosen in (first, ~first))
    fewer = (weight * first).sum(1) < (weight * ~first).sum(1)
    return first == fewer[:, None]


def planes_seen(targets: Targets, slope: float) -> tuple[Tensor, Tensor]:
    """The plane that each child sees [L,512,4], the direction in which values rise and how far the plane is from the cell's middle, in tau;
    and which children see one [L,512] bool. slope: of a distance, in tau from child to child."""
    rise, known = slopes(targets.values, targets.band)
    place = slope * (lattice(CELL, rise.device).float() - HALF)
    return torch.cat((rise, (targets.values - (rise * place).sum(2))[..., None]), 2), known


def plane_groups(seen: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Groups of children with weights [L,512] by the planes [L,512,4] that they see, begun with those furthest apart: the group [L,512] of
    each child, and the planes of the groups, [L,count,4]."""
    planes, weights = torch.cat((seen[..., :3], _APART * seen[..., 3:]), 2), weights.float()
    heavy = weights > _GROUPED * weights.amax(1, keepdim=True)

    def at(child: Tensor) -> Tensor:
        return planes.gather(1, child[:, None, None].expand(-1, 1, 4))

    def furthest(centres: Tensor) -> Tensor:
        apart = _apart(planes, centres).amin(1)
        return at((apart / TIE).round().masked_fill(~heavy, -1).argmax(1))

    centres = furthest(furthest(at(weights.argmax(1))))
    while centres.shape[1] < count:
        centres = torch.cat((centres, furthest(centres)), 1)
    for _ in range(6):
        own = F.one_hot(_nearest(planes, centres), count).mT * weights[:, None]
        mass = own.sum(2, keepdim=True)
        centres = torch.where(mass > TIE**2, own @ planes / mass.clamp(min=TIE**2), centres)
    return _nearest(planes, centres), torch.cat((centres[..., :3], centres[..., 3:] / _APART), 2)


def _apart(planes: Tensor, centres: Tensor) -> Tensor:
    """Squares of how far each of [L,512,4] is from each of [L,count,4]: [L,count,512]."""
    return (planes[:, None] - centres[:, :, None]).square().sum(3)


def _nearest(planes: Tensor, centres: Tensor) -> Tensor:
    """The first of the nearest; over so few, argmin is slow on a CPU."""
    least, *others = (_apart(planes, centres) / TIE).round().unbind(1)
    nearest = torch.zeros_like(least, dtype=torch.int64)
    for i, apart in enumerate(others, 1):
        nearest, least = torch.where(apart < least, i, nearest), torch.minimum(apart, least)
    return nearest


def slopes(values: Tensor, band: Tensor) -> tuple[Tensor, Tensor]:
    """Unit directions [L,512,3] in which values rise, from differences within the band of a cell, and where there are some [L,512]."""
    grid, inside = values.view(-1, *(CELL,) * 3), band.view(-1, *(CELL,) * 3)
    slopes, known = [], inside
    for axis in (1, 2, 3):
        both = (inside.narrow(axis, 1, CELL - 1) & inside.narrow(axis, 0, CELL - 1)).float()
        count = _to_both_ends(both, axis)
        slopes.append(_to_both_ends(grid.diff(dim=axis) * both, axis) / count.clamp(min=1))
        known = known & (count > 0)
    return F.normalize(torch.stack(slopes, 4), dim=4).flatten(1, 3), known.flatten(1)


def _to_both_ends(steps: Tensor, axis: int) -> Tensor:
    """Of each step between two children along an axis, [L,8,8,8] but 7 there: its number, added up at both children."""
    zero = torch.zeros_like(steps.narrow(axis, 0, 1))
    return torch.cat((steps, zero), axis) + torch.cat((zero, steps), axis)
