"""Polynomials over a cell of 8^3 voxels, orthonormal over its children, whose span is the same under the 48 symmetries of the cube.

a: all 10 of degree up to 2; b: the 5 of degree up to 1 and |x|^2, the first of them a constant.
"""

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from reference_model.tiles import lattice
from reference_model.volume import CELL

SMOOTH, BEND = 10, 5  # coefficients of a and of b
HALF = (CELL - 1) / 2  # half an edge of the lattice of children


class Bases(NamedTuple):
    x: Tensor  # [512,3] float64, where children lie in the frame of the cell, [-1, 1]
    a: Tensor  # [4,512,10] float64: values at the children, then how they grow from child to child along each axis
    b: Tensor  # [512,5] float64, values
    aa: Tensor  # [512,100], products of the columns of a[0]
    narrow: Tensor  # a in float32


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def bases_of(device: torch.device) -> Bases:
    powers = torch.tensor(sorted((p for p in product(range(3), repeat=3) if sum(p) < 3), key=sum))
    x = (lattice(CELL).double() - HALF) / HALF
    steps = torch.eye(3).double() / HALF

    def monomials(x: Tensor) -> Tensor:
        return x[:, None].pow(powers).prod(2)

    a = torch.linalg.inv(torch.linalg.qr(monomials(x)).R) * CELL**1.5  # [10,10] coefficients of the monomials
    square = (powers.amax(1) == 2).double()
    square[0] = -(monomials(x) @ square).mean()
    square = square / (monomials(x) @ square).square().mean().sqrt()
    b = torch.cat((torch.eye(SMOOTH, 1).double(), a[:, 1:4], square[:, None]), 1)
    fields = torch.stack([monomials(x), *((monomials(x + step) - monomials(x - step)) / 2 for step in steps)])
    a, b = (fields @ a).to(device), (fields[0] @ b).to(device)
    return Bases(x.to(device), a, b, (a[0, :, :, None] * a[0, :, None]).flatten(1), a.float())
