"""A cell of 8^3 voxels as 16 coefficients of a polynomial, without a network: what the VAE's network then corrects.

    value(x) = clamp(Σ_k c_k P_k(x), -1, 1)        x: place in the cell, [-1,1]^3

Near one smooth piece of surface a distance is close to a polynomial, and its clamping is no part of what 16 numbers have to tell.
P_k: monomials of degree up to 2 and the x_i^2 x_j, which the 48 symmetries of the cube map to themselves, orthonormal over the children.
"""

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from reference_model.tiles import lattice
from reference_model.vae_loss import Targets
from reference_model.volume import CELL

COEFFICIENTS = 16
GAIN = 2.0  # of a coefficient in a latent, so that latents have a variance near 1
# squares of c_k beyond which the fit gives up accuracy: cells with few voxels leave most of them open
_RIDGE = 1e-3
# of children outside the band where the polynomial of the band says less than ±1, and what it should say there
OUTER_WEIGHT, OUTER_VALUE = 0.02, 1.5


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def patch_basis(device: torch.device) -> Tensor:
    """P_k [512,16] float32 at the children (dx*8+dy)*8+dz, mean square 1."""
    x = (lattice(CELL).double() - (CELL - 1) / 2) / ((CELL - 1) / 2)
    powers = [p for p in product(range(3), repeat=3) if sum(p) < 3 or sorted(p) == [0, 1, 2]]
    monomials = torch.stack([x.pow(torch.tensor(p)).prod(1) for p in sorted(powers, key=sum)], 1)
    return (torch.linalg.qr(monomials).Q * CELL**1.5).float().to(device)


def patch_values(z: Tensor) -> Tensor:
    """Latents [L,16] → values [L,512] float32 of their polynomials, not clamped."""
    with torch.autocast(z.device.type, enabled=False):
        return z.float() @ (patch_basis(z.device).T / GAIN)


def band_shares(targets: Targets) -> Tensor:
    """[L,512] weights of the band voxels of a cell, their sum 1; 0 for the other children."""
    band = targets.band * targets.weights
    return band / band.sum(1, keepdim=True).clamp(min=1e-9)


@torch.no_grad()
def fit_patches(targets: Targets) -> Tensor:
    """Latents [L,16] float32 of the polynomials nearest to the band voxels (squares by weight) that keep the side of the other children.

    Two rounds: over the band; then also over those other children that the first polynomial puts too near to the surface or beyond it.
    """
    basis = patch_basis(targets.values.device)
    squares = (basis[:, :, None] * basis[:, None]).flatten(1)
    with torch.autocast(basis.device.type, enabled=False):
        share = band_shares(targets)
        first = _solve(share, targets.values, basis, squares)
        near = ~targets.band & (first @ basis.T * targets.values < 1)
        wanted = torch.where(targets.band, targets.values, OUTER_VALUE * targets.values)
        return GAIN * _solve(share + near * share.amax(1, keepdim=True) * OUTER_WEIGHT, wanted, basis, squares)


def _solve(weights: Tensor, values: Tensor, basis: Tensor, squares: Tensor) -> Tensor:
    """[L,16] least Σ_i weights_i (values_i - c·P(x_i))^2 + ridge |c|^2; weights, values [L,512]."""
    matrix = (weights @ squares).view(-1, COEFFICIENTS, COEFFICIENTS) + _RIDGE * torch.eye(COEFFICIENTS, device=basis.device)
    return torch.linalg.solve_ex(matrix, (weights * values) @ basis)[0]  # solve would wait for the device to look for singular ones
