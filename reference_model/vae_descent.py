"""What fits of cells make small, and how: Levenberg-Marquardt, whatever the numbers are of."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reference_model.vae_loss import BETA, Targets
from reference_model.vae_pieces import TIE

_DAMPING, _RISE, _FALL = 1e-4, 8.0, 0.2  # of a step, and what it is multiplied by after one that fails or succeeds
RIDGE = 1e-5  # of squares of numbers: cells with few voxels leave most of them open, and more would round edges off
# of a child outside of the band beside the heaviest one within: in what is compared; and in a round, where it is too near to the surface
_OUTSIDE, _OUTER = 0.03, 5e-3
_WRONG = 0.03  # added to the error of a child on the wrong side: a thin wall has few children, and a hole needs but one

State = tuple[Tensor, ...]  # values [L,512] and what else a step needs, row by row


class Wanted(NamedTuple):
    """What cells should say, all [L,512]."""

    values: Tensor
    share: Tensor  # weights of band voxels, their sum 1
    outside: Tensor  # of the other children: the largest share

    @staticmethod
    def of(targets: Targets, near: float, weights: Tensor | None = None) -> "Wanted":
        """near: the |t| of band voxels that count half as much as those at the surface; weights [L,512]: how much more they count."""
        share = targets.band / (1 + (targets.values / near).square())
        if weights is not None:
            share = share * weights
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
        errors = F.smooth_l1_loss(y, self.values, reduction="none", beta=BETA) + _WRONG * ((y < 0) != (self.values < 0))
        return ((self.share + _OUTSIDE * self.outside) * errors).sum(1)

    def weights(self, y: Tensor) -> Tensor:
        """[L,512] of squares that stand for the loss near y: less for what is far off; others where they are too near to the surface."""
        return self.share * BETA / (y - self.values).abs().clamp(min=BETA) + _OUTER * self.outside * (y * self.values < 1)


def where(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Of new [L,…] where it is better [L]."""
    return torch.where(better.view(-1, *(1,) * (old.ndim - 1)), new, old)


def descend(
    begun: Tensor, linearise: Callable[[Tensor], State], solve: Callable[[Tensor, State, Tensor], Tensor], wanted: Wanted, steps: int
) -> tuple[Tensor, Tensor]:
    """Levenberg-Marquardt: numbers [L,…] better than those to begin with, and their losses [L].

    linearise: numbers → values [L,512] and what solve needs; solve: numbers, that and damping [L] → new numbers. In float64: which step
    is taken must not depend on how sums are rounded.
    """
    numbers, state = begun, linearise(begun)
    least = wanted.loss(state[0])
    damping = torch.full_like(least, _DAMPING)
    for _ in range(steps):
        new = solve(numbers, state, damping)
        state_new = linearise(new)
        least_new = wanted.loss(state_new[0])
        better = least_new < least - TIE**2
        damping = damping * torch.where(better, _FALL, _RISE)
        numbers, least = where(better, new, numbers), torch.where(better, least_new, least)
        state = tuple(where(better, *x) for x in zip(state_new, state, strict=True))
    return numbers, least


def solve_ridge(matrix: Tensor, right: Tensor, damping: float | Tensor = 0.0) -> Tensor:
    """x [L,n] of (matrix + ridge + damping) x = right; damping [L,1]. Of orthonormal bases: neither depends on how a cell is turned."""
    ridge = torch.full_like(right, RIDGE) + damping
    return torch.linalg.solve_ex(matrix + ridge.diag_embed(), right)[0]  # solve would wait for the device to look for singular ones
