"""The pieces of `vae_crease` as distances: what a cell says is how far it is to where the two polynomials are zero, to first order.

    value(x) = clamp(d(a) + s relu(s d(b) - s d(a)), -1, 1)      b = a + s l      d(f) = f / |slope of f| * slope of a distance

(Taubin 1991, "Estimation of planar curves, surfaces, and nonplanar space curves", section 4.) Near a curved surface that
is closer than a polynomial of degree 2 that has to be the distance itself. Signs are those of a and b.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from reference_model.vae_crease import (
    BEND,
    GAIN,
    RIDGE,
    SMOOTH,
    TIE,
    Wanted,
    as_latents,
    bases_of,
    crease_values,
    fit_creases,
    fit_pieces,
    in_parts,
    solve_ridge,
)
from reference_model.vae_loss import Targets
from reference_model.volume import TAU

_FLAT = 0.3  # of the slope of a distance: what is flatter is none, as the middle of a wall
_NEAR = 0.1  # |t| of band voxels that count half
_STEPS = 8
_DAMPING, _RISE, _FALL = 1e-3, 8.0, 0.2  # of a step, and what it is multiplied by after one that fails or succeeds


def _field(coefficients: Tensor, basis: Tensor) -> Tensor:
    """[L,k] → [4,L,512]: value and slopes."""
    return coefficients @ basis.mT


def _size(field: Tensor, slope: float) -> Tensor:
    """Of the slopes, in that of a distance."""
    return (field[1:] / slope).square().sum(0).clamp(min=_FLAT**2).sqrt()


def _slope(resolution: int) -> float:
    """Of a distance, in tau from child to child."""
    return 2 / (resolution * TAU)


def distance_values(z: Tensor, resolution: int) -> Tensor:
    """Latents [L,16] → values [L,512] float32 of their pieces, not clamped.

    |s| of a third and more is 1, so noise leaves creases alone; no gradient moves s there, nor l in a cell of one piece.
    """
    bases, slope = bases_of(z.device), _slope(resolution)
    with torch.autocast(z.device.type, enabled=False):
        a, l, s = z.float().split((SMOOTH, BEND, 1), 1)
        s = (3 * s).clamp(-1, 1)
        one = _field(a / GAIN, bases.a)
        other = one + _field(s * l / GAIN, bases.l)
        first, second = (x[0] / _size(x, slope) for x in (one, other))
        return first + s * (s * (second - first)).relu()


@torch.no_grad()
def fit_distances(targets: Targets, resolution: int) -> Tensor:
    """Latents [L,16] float32: those of `fit_creases`, and from there damped Gauss-Newton on distances (Levenberg-Marquardt)."""

    def fit(part: Targets) -> Tensor:
        wanted = Wanted.of(part, _NEAR)
        coefficients, s = fit_pieces(part, wanted)
        better = _refine(coefficients.double(), s.double(), Wanted(*(x.double() for x in wanted)), _slope(resolution))
        return as_latents(better.float(), s)

    return in_parts(fit, targets)


def _refine(coefficients: Tensor, s: Tensor, wanted: Wanted, slope: float) -> Tensor:
    """Coefficients [L,15], better ones for the formula above. In float64: which step is taken must not depend on how sums are rounded."""
    y, jacobian = _linearised(coefficients, s, slope)
    least, damping = wanted.loss(y), torch.full_like(s, _DAMPING)
    for _ in range(_STEPS):
        weighted = (jacobian * wanted.weights(y)[:, :, None]).mT
        matrix = weighted @ jacobian
        right = (weighted @ (wanted.values - y)[:, :, None])[:, :, 0] - RIDGE * coefficients
        new = coefficients + solve_ridge(matrix, right, damping * matrix.diagonal(dim1=1, dim2=2).mean(1, keepdim=True))
        y_new, jacobian_new = _linearised(new, s, slope)
        found = wanted.loss(y_new)
        better = found < least - TIE**2
        least, damping = torch.where(better, found, least), damping * torch.where(better, _FALL, _RISE)[:, None]
        coefficients, y = torch.where(better[:, None], new, coefficients), torch.where(better[:, None], y_new, y)
        jacobian = torch.where(better[:, None, None], jacobian_new, jacobian)
    return coefficients


def _linearised(coefficients: Tensor, s: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """Values [L,512], not clamped, and their derivatives [L,512,15] by the coefficients; float64."""
    bases = bases_of(s.device)
    a, l = coefficients.split((SMOOTH, BEND), 1)
    one = _field(a, bases.wide_a)
    other = one + s * _field(l, bases.wide_l)
    sizes = [_size(x, slope) for x in (one, other)]
    first, second = (x[0] / size for x, size in zip((one, other), sizes, strict=True))
    chosen = s * (second - first) > 0
    y, field, size = torch.where(chosen, second, first), torch.where(chosen, other, one), torch.where(chosen, sizes[1], sizes[0])
    rows = torch.cat((1 / size[None], -y * field[1:] / (size * slope).square() * (size > _FLAT)))
    of_a, of_l = (torch.einsum("dlc,dck->lck", x, basis) for x, basis in ((rows, bases.wide_a), (rows * s * chosen, bases.wide_l)))
    return y, torch.cat((of_a, of_l), 2)


class Patch(NamedTuple):
    """How a cell becomes latents without a network, and back; both are told the resolution."""

    fit: Callable[[Targets, int], Tensor]
    values: Callable[[Tensor, int], Tensor]


PATCHES = {
    "crease": Patch(lambda targets, resolution: fit_creases(targets), lambda z, resolution: crease_values(z)),
    "distance": Patch(fit_distances, distance_values),
}
