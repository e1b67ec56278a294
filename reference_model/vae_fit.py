"""From what a cell should say to its 16 numbers: the pieces of `vae_pieces` nearest to it.

One piece first. Where that is not enough, five more beginnings: voxels in two groups as the larger or the smaller of two pieces or as the
sides of a wall or a slit, and in three groups; each by least squares in turn with the choice of the piece that a voxel belongs to and with
smaller weights for what stays far off (iteratively reweighted). The best two of them then go on as distances (Levenberg-Marquardt).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reference_model.tiles import lattice
from reference_model.vae_crease import (
    RIDGE,
    SMOOTH,
    TIE,
    Wanted,
    bases_of,
    crease_values,
    fit_creases,
    in_parts,
    second_piece,
    slopes,
    solve_ridge,
)
from reference_model.vae_loss import Targets
from reference_model.vae_pieces import (
    FLAT,
    NUMBERS,
    ONE,
    as_latents,
    fields,
    kinds_of,
    piece_at,
    piece_values,
    polynomials,
    sizes,
    slope_of,
)
from reference_model.volume import CELL

_NEAR = 0.35  # voxels from the surface where a voxel counts half
_PRICE = 3e-4  # mean error by which several pieces must be better than one
_ROUNDS = 6  # of least squares
_REFINED = 2  # beginnings that go on
_STEPS = 8
_DAMPING, _RISE, _FALL = 1e-4, 8.0, 0.2  # of a step, and what it is multiplied by after one that fails or succeeds
_GROUPED = 0.2  # of the largest weight: lighter voxels begin no group
_APART = 0.25  # of a distance in tau beside the difference of two unit directions


class Fit(NamedTuple):
    numbers: Tensor  # [L,15] float64
    kind: Tensor  # [L] int64
    least: Tensor  # [L] float64, the loss

    def rows(self, index: Tensor) -> "Fit":
        return Fit(*(x[index] for x in self))

    def where(self, better: Tensor, other: "Fit") -> "Fit":
        """Of the other where it is better [L]."""
        return Fit(*(torch.where(better.view(-1, *(1,) * (x.ndim - 1)), y, x) for x, y in zip(self, other, strict=True)))


@torch.no_grad()
def fit_cells(targets: Targets, resolution: int) -> Tensor:
    """Latents [L,16] float32 near to the band voxels, the more the nearer these are to the surface, that keep the side of other children.

    A cell that one piece fits to within `_PRICE` is not tried with more: several could not be better by that.
    """
    return in_parts(lambda part: _fit(part, resolution), targets)


def _fit(targets: Targets, resolution: int) -> Tensor:
    slope = slope_of(resolution)  # also the size of a voxel
    wanted = Wanted.of(targets, _NEAR * slope).double()
    kind = torch.full_like(targets.band[:, 0], ONE, dtype=torch.int64)
    best = _least_squares(kind, torch.zeros_like(targets.band, dtype=torch.int64), wanted, pieces=1)
    best = _refine(best, wanted, slope, pieces=1)
    hard = (best.least > _PRICE).nonzero().flatten()  # the one wait for the device
    if len(hard):
        several = _several(targets.rows(hard), wanted.rows(hard), slope)
        better = best.rows(hard).where(several.least < best.least[hard] - _PRICE, several)
        best = Fit(*(x.index_copy(0, hard, y) for x, y in zip(best, better, strict=True)))
    return as_latents(best.numbers.float(), best.kind)


def _several(targets: Targets, wanted: Wanted, slope: float) -> Fit:
    """Of more than one piece."""
    count = len(targets.values)
    second = second_piece(targets, wanted.share.float()).long()
    begun = [(torch.full_like(second[:, 0], kind), second) for kind in (ONE - 2, ONE - 1, ONE + 1, ONE + 2)]
    begun.append(_three(targets, wanted, slope))
    kind, piece = (torch.cat(x) for x in zip(*begun, strict=True))
    found = _least_squares(kind, piece, wanted.repeat(len(begun)))
    own = torch.arange(count, device=second.device)
    order = (found.least.view(len(begun), count) / TIE**2).round().argsort(dim=0, stable=True)[:_REFINED]
    refined = _refine(found.rows((order * count + own).flatten()), wanted.repeat(_REFINED), slope)
    first = (refined.least.view(_REFINED, count) / TIE**2).round().argmin(0)
    return refined.rows(first * count + own)


def _least_squares(kind: Tensor, piece: Tensor, wanted: Wanted, pieces: int = 3) -> Fit:
    """The best polynomials of these kinds [L] found in a few rounds that begin with the piece [L,512] of each child."""
    basis, weights = bases_of(kind.device).wide_a[0], wanted.share
    best = Fit(weights.new_zeros(len(kind), NUMBERS), kind, torch.full_like(weights[:, 0], torch.inf))
    for _ in range(_ROUNDS):
        numbers = _solve(weights, piece, wanted.values, kind, pieces)
        d = polynomials(numbers, kind, pieces) @ basis.T
        piece = piece_at(d, kind)
        y = d.gather(0, piece[None])[0]
        found = Fit(numbers, kind, wanted.loss(y))
        best = best.where(found.least < best.least - TIE**2, found)
        weights = wanted.weights(y)
    return best


def _solve(weights: Tensor, piece: Tensor, values: Tensor, kind: Tensor, pieces: int = 3) -> Tensor:
    """Numbers [L,15] of least squares in which each child belongs to the polynomial of its piece; the others [L,512]."""
    bases = bases_of(kind.device)
    own = _of_pieces(weights, piece, pieces)
    return solve_ridge(*_system((own @ bases.aa).unflatten(2, (SMOOTH, SMOOTH)), (own * values[:, None]) @ bases.wide_a[0], kind))


def _of_pieces(weights: Tensor, piece: Tensor, pieces: int) -> Tensor:
    """[L,p,512]: the weights of the children of each piece."""
    return torch.stack([weights * (piece == i) for i in range(pieces)], 1)


def _system(grams: Tensor, right: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    """Normal equations of the polynomials, [L,p,10,10] and [L,p,10] → those of the numbers, [L,15,15] and [L,15]."""
    maps = kinds_of(grams.device, grams.dtype).maps[kind, : grams.shape[1]]
    return (maps.mT @ grams @ maps).sum(1), torch.einsum("lpab,lpa->lb", maps, right)


def _refine(fit: Fit, wanted: Wanted, slope: float, pieces: int = 3) -> Fit:
    """Better numbers for the formula with distances. In float64: which step is taken must not depend on how sums are rounded."""
    y, piece, rows = _linearised(fit, slope, pieces)
    fit = fit._replace(least=wanted.loss(y))
    damping = torch.full_like(fit.least, _DAMPING)
    for _ in range(_STEPS):
        own = _of_pieces(wanted.weights(y), piece, pieces)
        grams = torch.stack([(rows * weights[..., None]).mT @ rows for weights in own.unbind(1)], 1)
        matrix, right = _system(grams, (own * (wanted.values - y)[:, None]) @ rows, fit.kind)
        mean = matrix.diagonal(dim1=1, dim2=2).mean(1)
        new = fit._replace(numbers=fit.numbers + solve_ridge(matrix, right - RIDGE * fit.numbers, (damping * mean)[:, None]))
        y_new, piece_new, rows_new = _linearised(new, slope, pieces)
        new = new._replace(least=wanted.loss(y_new))
        better = new.least < fit.least - TIE**2
        damping = damping * torch.where(better, _FALL, _RISE)
        fit, y, piece = fit.where(better, new), torch.where(better[:, None], y_new, y), torch.where(better[:, None], piece_new, piece)
        rows = torch.where(better[:, None, None], rows_new, rows)
    return fit


def _linearised(fit: Fit, slope: float, pieces: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Values [L,512], whose piece says so [L,512], and derivatives [L,512,10] by the coefficients of that piece's polynomial."""
    f = fields(polynomials(fit.numbers, fit.kind, pieces))
    size = sizes(f, slope)
    d = f[:, 0] / size
    piece = piece_at(d, fit.kind)
    y, size = (x.gather(0, piece[None])[0] for x in (d, size))
    slopes = f[:, 1:].gather(0, piece.expand(1, 3, -1, -1))[0]
    parts = torch.cat((1 / size[None], -y * slopes / (size * slope).square() * (size > FLAT)))
    return y, piece, torch.einsum("dlc,dck->lck", parts, bases_of(y.device).wide_a)


def _three(targets: Targets, wanted: Wanted, slope: float) -> tuple[Tensor, Tensor]:
    """Kind [L] and piece of each child [L,512] to begin with: three groups by direction and place of the surface, then the form
    whose planes through them come nearest."""
    group = _three_groups(targets, wanted, slope)
    count, kind = len(group), torch.full_like(group[:, 0], ONE + 3)
    d = polynomials(_solve(wanted.share, group, wanted.values, kind), kind) @ bases_of(group.device).wide_a[0].T
    firsts = [(0, 1, 2), (1, 0, 2), (2, 0, 1)]  # which of the three is the outer one
    orders = [firsts[0]] * 2 + firsts * 2
    kinds = [ONE + 3, ONE - 3] + [ONE + 4] * 3 + [ONE - 4] * 3
    tried = torch.tensor(kinds, device=kind.device).repeat_interleave(count)
    d = torch.cat([d[list(order)] for order in orders], 1)
    piece = piece_at(d, tried)
    least = wanted.repeat(len(kinds)).loss(d.gather(0, piece[None])[0]).view(len(kinds), count)
    best = (least / TIE**2).round().argmin(0) * count + torch.arange(count, device=kind.device)
    return tried[best], piece[best]


def _three_groups(targets: Targets, wanted: Wanted, slope: float) -> Tensor:
    """[L,512] group 0, 1 or 2 of each child by the plane it sees, (direction in which values rise, distance of the plane): the groups
    begin with the three planes furthest apart."""
    rise, known = slopes(targets.values, targets.band)
    place = slope * (lattice(CELL, rise.device).float() - (CELL - 1) / 2)
    planes = torch.cat((rise, _APART * (targets.values - (rise * place).sum(2))[..., None]), 2)
    weights = (wanted.share * known).float()
    heavy = weights > _GROUPED * weights.amax(1, keepdim=True)

    def at(child: Tensor) -> Tensor:
        return planes.gather(1, child[:, None, None].expand(-1, 1, 4))

    def furthest(*centres: Tensor) -> Tensor:
        apart = torch.stack([(planes - centre).square().sum(2) for centre in centres]).amin(0)
        return at((apart / TIE).round().masked_fill(~heavy, -1).argmax(1))

    first = furthest(furthest(at(weights.argmax(1))))
    second = furthest(first)
    centres = torch.cat((first, second, furthest(first, second)), 1)
    for _ in range(6):
        group = _nearest(planes, centres)
        own = F.one_hot(group, 3).mT * weights[:, None]
        mass = own.sum(2, keepdim=True)
        centres = torch.where(mass > TIE**2, own @ planes / mass.clamp(min=TIE**2), centres)
    return _nearest(planes, centres)


def _nearest(planes: Tensor, centres: Tensor) -> Tensor:
    return ((planes[:, None] - centres[:, :, None]).square().sum(3) / TIE).round().argmin(1)


class Patch(NamedTuple):
    """How a cell becomes latents without a network, and back; both are told the resolution."""

    fit: Callable[[Targets, int], Tensor]
    values: Callable[[Tensor, int], Tensor]
    unit: float  # of what the network adds to latents and values: what is to be corrected is small, and so must be the first steps


PATCHES = {
    "crease": Patch(lambda targets, resolution: fit_creases(targets), lambda z, resolution: crease_values(z), 1.0),
    "pieces": Patch(fit_cells, piece_values, 0.05),
}
