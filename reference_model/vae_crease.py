"""A cell of 8^3 voxels as 16 numbers of two smooth pieces that meet in a crease, without a network: what the VAE's network then corrects.

    value(x) = clamp(a(x) + s relu(l(x)), -1, 1)     a: 10 coefficients, degree up to 2     l: 5, degree up to 1 and |x|^2     s: a sign

Near one smooth piece of surface a distance is close to a polynomial, and its clamping is no part of what 16 numbers have to tell. With
s = 1 the value is that of the larger of the pieces a and a + l: an edge outwards, or a wall with air on both sides; with s = -1 of the
smaller of a and a - l: an edge inwards, or a slit. A cell of one piece has l < 0 everywhere and s = 0. The bases are orthonormal over the
children and map to themselves under the 48 symmetries of the cube. Weights older than `vae_pieces` begin so.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reference_model.tiles import lattice
from reference_model.vae_loss import BETA, Targets
from reference_model.volume import CELL

COEFFICIENTS = 16
GAIN = 2.0  # of a coefficient in a latent, so that latents have a variance near 1
SMOOTH, BEND = 10, 5  # coefficients of a and of l, whose first is a constant
RIDGE = 1e-5  # of squares of coefficients: cells with few voxels leave most of them open, and more would round edges off
_ROUNDS = 10  # of least squares, between which voxels change from one piece to the other
_NEAR = 0.5  # |t| of band voxels that count half: what marching cubes reads lies next to the surface
_PRICE = 1e-4  # mean error by which two pieces must be better than one
# of a child outside of the band beside the heaviest one within: in what is compared; and in a round, where it is too near to the surface
_OUTSIDE, _OUTER = 0.03, 5e-3
TIE = 1e-4  # what is nearer to a tie counts as one: how a matrix product rounds, say with the size of a batch, then decides nothing
_AWAY = -0.75  # l of a cell of one piece
_ROWS = 1 << 13  # latents fitted at once


class Bases(NamedTuple):
    a: Tensor  # [4,512,10] float32: values at the children, then how they grow from child to child along each axis
    l: Tensor  # [4,512,5]
    wide_a: Tensor  # float64
    wide_l: Tensor
    aa: Tensor  # [512,100], products of the columns of a[0]; and so on
    al: Tensor
    ll: Tensor


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def bases_of(device: torch.device) -> Bases:
    powers = torch.tensor(sorted((p for p in product(range(3), repeat=3) if sum(p) < 3), key=sum))
    x = (lattice(CELL).double() - (CELL - 1) / 2) / ((CELL - 1) / 2)
    steps = 2 / (CELL - 1) * torch.eye(3).double()

    def monomials(x: Tensor) -> Tensor:
        return x[:, None].pow(powers).prod(2)

    a = torch.linalg.inv(torch.linalg.qr(monomials(x)).R) * CELL**1.5  # [10,10] coefficients of the monomials
    square = (powers.amax(1) == 2).double()
    square[0] = -(monomials(x) @ square).mean()
    square = square / (monomials(x) @ square).square().mean().sqrt()
    l = torch.cat((torch.eye(SMOOTH, 1).double(), a[:, 1:4], square[:, None]), 1)
    fields = torch.stack([monomials(x), *((monomials(x + step) - monomials(x - step)) / 2 for step in steps)])
    a, l = (fields @ a).to(device), (fields @ l).to(device)
    aa, al, ll = ((y[0, :, :, None] * z[0, :, None]).flatten(1) for y, z in ((a, a), (a, l), (l, l)))
    return Bases(a.float(), l.float(), a, l, aa, al, ll)


class Wanted(NamedTuple):
    """What cells should say, all [L,512]."""

    values: Tensor
    share: Tensor  # weights of band voxels, their sum 1
    outside: Tensor  # of the other children: the largest share

    @staticmethod
    def of(targets: Targets, near: float) -> "Wanted":
        """near: the |t| of band voxels that count half as much as those at the surface."""
        share = targets.band / (1 + (targets.values / near).square())
        share = share / share.sum(1, keepdim=True).clamp(min=1e-9)
        return Wanted(targets.values, share, ~targets.band * share.amax(1, keepdim=True))

    def rows(self, index: Tensor) -> "Wanted":
        return Wanted(*(x[index] for x in self))

    def repeat(self, times: int) -> "Wanted":
        return Wanted(*(x.repeat(times, 1) for x in self))

    def double(self) -> "Wanted":
        return Wanted(*(x.double() for x in self))

    def loss(self, y: Tensor) -> Tensor:
        """[L], what is to be least."""
        y = torch.where(self.share > 0, y, y.clamp(-1, 1))
        errors = F.smooth_l1_loss(y, self.values, reduction="none", beta=BETA)
        return ((self.share + _OUTSIDE * self.outside) * errors).sum(1)

    def weights(self, y: Tensor) -> Tensor:
        """[L,512] of squares that stand for the loss near y: less for what is far off; others where they are too near to the surface."""
        return self.share * BETA / (y - self.values).abs().clamp(min=BETA) + _OUTER * self.outside * (y * self.values < 1)


def crease_values(z: Tensor) -> Tensor:
    """Latents [L,16] → values [L,512] float32 of their pieces, not clamped.

    |s| of a third and more is 1, so noise leaves creases alone; no gradient moves s there, nor l in a cell of one piece.
    """
    bases = bases_of(z.device)
    with torch.autocast(z.device.type, enabled=False):
        a, l, s = z.float().split((SMOOTH, BEND, 1), 1)
        return a @ (bases.a[0].T / GAIN) + (3 * s).clamp(-1, 1) * (l @ (bases.l[0].T / GAIN)).relu()


@torch.no_grad()
def fit_creases(targets: Targets) -> Tensor:
    """Latents [L,16] float32 near to the band voxels, the more the nearer these are to the surface, that keep the side of other children.

    Of one piece, of the larger and of the smaller of two, each by least squares in turn with the choice of the piece that a voxel belongs
    to and with smaller weights for what stays far off (iteratively reweighted), whichever comes nearest in any round; two pieces begin with
    the two directions in which the values rise.
    """
    return in_parts(lambda part: as_latents(*fit_pieces(part, Wanted.of(part, _NEAR))), targets)


def in_parts(fit: Callable[[Targets], Tensor], targets: Targets) -> Tensor:
    """What `fit` says of the latents, of so many at once that they need some 4 GB; without autocast."""
    with torch.autocast(targets.values.device.type, enabled=False):
        parts = range(0, max(len(targets.values), 1), _ROWS)
        return torch.cat([fit(targets.rows(slice(i, i + _ROWS))) for i in parts])


def as_latents(coefficients: Tensor, s: Tensor) -> Tensor:
    """Coefficients [L,15] of a and l, s [L,1] → [L,16]."""
    a, l = coefficients.split((SMOOTH, BEND), 1)
    away = _AWAY * torch.eye(1, BEND, device=s.device)
    return torch.cat((GAIN * a, GAIN * torch.where(s == 0, away, l), s), 1)


def fit_pieces(targets: Targets, wanted: Wanted) -> tuple[Tensor, Tensor]:
    """Coefficients [L,15] and s [L,1] of a + s relu(l)."""
    bases, count = bases_of(targets.values.device), len(targets.values)
    s = torch.tensor([0.0, 1.0, -1.0], device=targets.values.device).repeat_interleave(count)[:, None]  # all three kinds at once
    three = wanted.repeat(3)
    second, weights = second_piece(targets, targets.weights).repeat(3, 1) & (s != 0), three.share
    best, least = s.new_zeros(3 * count, SMOOTH + BEND), torch.full_like(s[:, 0], torch.inf)
    for _ in range(_ROUNDS):
        a, l = _solve(weights, second.float(), three.values, bases)
        bend = l @ bases.l[0].T
        second = s * bend > TIE
        y = a @ bases.a[0].T + second * bend
        found = three.loss(y)
        better = found < least - TIE**2
        best, least = torch.where(better[:, None], torch.cat((a, s * l), 1), best), torch.where(better, found, least)
        weights = three.weights(y)
    least = least.view(3, count) - _PRICE * (s == 0).view(3, count)
    chosen = (least / TIE**2).round().argmin(0) * count + torch.arange(count, device=s.device)
    return best[chosen], s[chosen]


def _solve(weights: Tensor, second: Tensor, values: Tensor, bases: Bases) -> tuple[Tensor, Tensor]:
    """a [L,10], l [L,5] of least Σ_i weights_i (values_i - a(x_i) - second_i l(x_i))^2 + ridge |a, l|^2; the others [L,512].

    In float64, since the ridge leaves a condition of 1e6: in float32 the last digits would decide on the choices that follow.
    """
    weights, values, both = weights.double(), values.double(), (weights * second).double()
    aa, al, ll = weights @ bases.aa, both @ bases.al, both @ bases.ll
    aa, al, ll = aa.view(-1, SMOOTH, SMOOTH), al.view(-1, SMOOTH, BEND), ll.view(-1, BEND, BEND)
    matrix = torch.cat((torch.cat((aa, al), 2), torch.cat((al.mT, ll), 2)), 1)
    right = torch.cat(((weights * values) @ bases.wide_a[0], (both * values) @ bases.wide_l[0]), 1)
    solution = solve_ridge(matrix, right).float()
    return solution[:, :SMOOTH], solution[:, SMOOTH:]


def solve_ridge(matrix: Tensor, right: Tensor, damping: float | Tensor = 0.0) -> Tensor:
    """x [L,n] of (matrix + ridge + damping) x = right; damping [L,1]. Of orthonormal bases: neither depends on how a cell is turned."""
    ridge = torch.full_like(right, RIDGE) + damping
    return torch.linalg.solve_ex(matrix + ridge.diag_embed(), right)[0]  # solve would wait for the device to look for singular ones


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
