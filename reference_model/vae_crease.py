"""A cell of 8^3 voxels as 16 numbers of two smooth pieces that meet in a crease, without a network: what the VAE's network then corrects.

    value(x) = clamp(a(x) + s relu(l(x)), -1, 1)     a: 10 coefficients, degree up to 2     l: 5, degree up to 1 and |x|^2     s: a sign

With s = 1 that is the larger of the pieces a and a + l: an edge outwards, or a wall with air on both sides; with s = -1 the smaller of a
and a - l: an edge inwards, or a slit. A cell of one piece has l < 0 everywhere and s = 0. `vae_patch` has polynomials without creases.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from reference_model.tiles import lattice
from reference_model.vae_loss import Targets
from reference_model.vae_patch import GAIN, OUTER_VALUE, OUTER_WEIGHT, band_shares, fit_patches, patch_basis, patch_values
from reference_model.volume import CELL

_SMOOTH, _BEND = 10, 5  # coefficients of a and of l, whose first is a constant
_RIDGE = 1e-4  # of squares of coefficients, as in `vae_patch`; less than there, where it rounds edges off
_ROUNDS = 6  # of least squares, between which voxels change from one piece to the other
_PRICE = 1e-4  # mean square by which two pieces must be better than one
_OUTSIDE = 0.1  # in what is compared, of a child outside of the band beside the heaviest one within: its side counts, its value little
_TIE = 1e-4  # what is nearer to a tie counts as one: how a matrix product rounds, say with the size of a batch, then decides nothing
_AWAY = -0.75  # l of a cell of one piece
_ROWS = 1 << 14  # latents fitted at once, in about 1 GB


class _Bases(NamedTuple):
    a: Tensor  # [512,10] float32
    l: Tensor  # [512,5] float32
    wide_a: Tensor  # float64
    wide_l: Tensor
    aa: Tensor  # [512,100] float64, products of their columns
    al: Tensor  # [512,50]
    ll: Tensor  # [512,25]
    ridge: Tensor  # [15,15] float64


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _bases(device: torch.device) -> _Bases:
    a = patch_basis(device)[:, :_SMOOTH]
    square = (lattice(CELL, device).double() - (CELL - 1) / 2).square().sum(1)
    square = square - square.mean()
    l = torch.cat((torch.ones_like(a[:, :1]), a[:, 1:4], (square / square.square().mean().sqrt()).float()[:, None]), 1)
    wide_a, wide_l = a.double(), l.double()
    aa, al, ll = ((x[:, :, None] * y[:, None]).flatten(1) for x, y in ((wide_a, wide_a), (wide_a, wide_l), (wide_l, wide_l)))
    return _Bases(a, l, wide_a, wide_l, aa, al, ll, _RIDGE * torch.eye(_SMOOTH + _BEND, dtype=torch.float64, device=device))


def crease_values(z: Tensor) -> Tensor:
    """Latents [L,16] → values [L,512] float32 of their pieces, not clamped.

    |s| of a third and more is 1, so noise leaves creases alone; no gradient moves s there, nor l in a cell of one piece.
    """
    bases = _bases(z.device)
    with torch.autocast(z.device.type, enabled=False):
        a, l, s = z.float().split((_SMOOTH, _BEND, 1), 1)
        return a @ (bases.a.T / GAIN) + (3 * s).clamp(-1, 1) * (l @ (bases.l.T / GAIN)).relu()


@torch.no_grad()
def fit_creases(targets: Targets) -> Tensor:
    """Latents [L,16] float32 near to the band voxels (squares by weight) that keep the side of the other children, as `fit_patches`.

    Of one piece, of the larger and of the smaller of two, each by least squares in turn with the choice of the piece that a voxel belongs
    to, whichever comes nearest; two pieces begin with the two directions in which the values rise.
    """
    with torch.autocast(targets.values.device.type, enabled=False):
        pieces = range(0, max(len(targets.values), 1), _ROWS)
        return torch.cat([_fit(targets.rows(slice(i, i + _ROWS))) for i in pieces])


def _fit(targets: Targets) -> Tensor:
    bases = _bases(targets.values.device)
    band, values = targets.band, targets.values
    share = band_shares(targets)
    most = share.amax(1, keepdim=True)
    outer = torch.where(band, values, OUTER_VALUE * values)

    def asked(y: Tensor) -> Tensor:
        """Weights of the next round: the band, and what lies outside of it where y is too near to the surface or beyond it."""
        return share + (~band & (y * values < 1)) * most * OUTER_WEIGHT

    def error(y: Tensor) -> Tensor:
        return ((y.clamp(-1, 1) - values).square() * (share + ~band * most * _OUTSIDE)).sum(1)

    def latents(a: Tensor, l: Tensor, s: float) -> Tensor:
        return torch.cat((GAIN * a, GAIN * l, a.new_full((len(a), 1), s)), 1)

    nowhere = torch.zeros_like(values)
    first, _ = _solve(share, nowhere, values, bases)
    a, _ = _solve(asked(first @ bases.a.T), nowhere, outer, bases)
    away = a.new_zeros(len(a), _BEND)
    away[:, 0] = _AWAY
    best, least = latents(a, away, 0.0), error(a @ bases.a.T) - _PRICE
    start = _second_piece(targets).float()
    for s in (1.0, -1.0):
        second, weights = start, share
        for _ in range(_ROUNDS):
            a, l = _solve(weights, second, outer, bases)
            bend = s * (l @ bases.l.T)
            y = a @ bases.a.T + s * bend.relu()
            found = error(y)
            better = found < least - _TIE**2
            best, least = torch.where(better[:, None], latents(a, s * l, s), best), torch.where(better, found, least)
            second, weights = (bend > _TIE).float(), asked(y)
    return best


def _solve(weights: Tensor, second: Tensor, values: Tensor, bases: _Bases) -> tuple[Tensor, Tensor]:
    """a [L,10], l [L,5] of least Σ_i weights_i (values_i - a(x_i) - second_i l(x_i))^2 + ridge |a, l|^2; the others [L,512].

    In float64, since the ridge leaves a condition of 1e5: in float32 the last digits would decide on the choices that follow.
    """
    weights, values, both = weights.double(), values.double(), (weights * second).double()
    aa, al, ll = weights @ bases.aa, both @ bases.al, both @ bases.ll
    aa, al, ll = aa.view(-1, _SMOOTH, _SMOOTH), al.view(-1, _SMOOTH, _BEND), ll.view(-1, _BEND, _BEND)
    matrix = torch.cat((torch.cat((aa, al), 2), torch.cat((al.mT, ll), 2)), 1) + bases.ridge
    right = torch.cat(((weights * values) @ bases.wide_a, (both * values) @ bases.wide_l), 1)
    solution = torch.linalg.solve_ex(matrix, right)[0].float()  # solve would wait for the device to look for singular ones
    return solution[:, :_SMOOTH], solution[:, _SMOOTH:]


def _second_piece(targets: Targets) -> Tensor:
    """[L,512] bool: children whose values rise in the rarer one of two directions, the means of two groups round the two most unlike.

    Children without a slope go with the second group.
    """
    rise, known = _slopes(targets.values, targets.band)
    weight = known * targets.weights

    def at(child: Tensor) -> Tensor:
        return rise.gather(1, child[:, None, None].expand(-1, 1, 3))[:, 0]

    def unlike(direction: Tensor) -> Tensor:
        likeness = (rise * direction[:, None]).sum(2).masked_fill(~known, 2)
        return at((likeness / _TIE).round().argmin(1))

    other = unlike(at(weight.argmax(1)))
    one = unlike(other)
    for _ in range(5):
        first = (rise * (one - other)[:, None]).sum(2) > _TIE
        one, other = (torch.nn.functional.normalize((rise * (weight * chosen)[..., None]).sum(1), dim=1) for chosen in (first, ~first))
    fewer = (weight * first).sum(1) < (weight * ~first).sum(1)
    return first == fewer[:, None]


def _slopes(values: Tensor, band: Tensor) -> tuple[Tensor, Tensor]:
    """Unit directions [L,512,3] in which values rise, from differences within the band of a cell, and where there are some [L,512]."""
    grid, inside = values.view(-1, *(CELL,) * 3), band.view(-1, *(CELL,) * 3)
    slopes, known = [], inside
    for axis in (1, 2, 3):
        both = (inside.narrow(axis, 1, CELL - 1) & inside.narrow(axis, 0, CELL - 1)).float()
        count = _to_both_ends(both, axis)
        slopes.append(_to_both_ends(grid.diff(dim=axis) * both, axis) / count.clamp(min=1))
        known = known & (count > 0)
    return torch.nn.functional.normalize(torch.stack(slopes, 4), dim=4).flatten(1, 3), known.flatten(1)


def _to_both_ends(steps: Tensor, axis: int) -> Tensor:
    """Of each step between two children along an axis, [L,8,8,8] but 7 there: its number, added up at both children."""
    zero = torch.zeros_like(steps.narrow(axis, 0, 1))
    return torch.cat((steps, zero), axis) + torch.cat((zero, steps), axis)


class Patch(NamedTuple):
    """How a cell becomes latents without a network, and back."""

    fit: Callable[[Targets], Tensor]
    values: Callable[[Tensor], Tensor]


PATCHES = {"polynomial": Patch(fit_patches, patch_values), "crease": Patch(fit_creases, crease_values)}
