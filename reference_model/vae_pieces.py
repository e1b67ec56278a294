"""A cell of 8^3 voxels as 16 numbers of a few pieces of surface, without a network: what the VAE's network then corrects.

    value(x) = outer(d(f0), inner(d(f1), d(f2)))    d(f) = f / |slope of f| * slope of a distance    outer, inner: the larger or the smaller

d is how far it is to where f is zero, to first order (Taubin 1991, "Estimation of planar curves, surfaces, and nonplanar space curves",
section 4); its clamping to [-1, 1] is no part of what numbers have to tell. Of the 16 numbers 15 make the three polynomials, as the last
one says, the kind: a form, and the larger or the smaller. a has all 10 coefficients of degree up to 2, each b has 5, degree up to 1
and |x|^2.

    one      f0 = f1 = f2 = a                 a smooth piece of surface
    two      f0 = a, f1 = f2 = a + b          an edge
    wall     f0 = a, f1 = f2 = b - a          both sides of a wall, or of a slit, which bend alike
    three    f0 = b0, f1 = b1, f2 = b2        a corner
    mixed    the same, outer unlike inner     a corner, or an edge beside another surface
    planes   the larger or the smaller of 5   a wall with ridges, a tip, a corner of more faces
    corners  outer of inner of 2 and of 3     two edges or corners side by side, a wall of several sides

A plane of the last two is a vector m, n.x + REACH log |m| with n = m / |m| in the frame of the cell, where children lie in [-1, 1]: every
vector is one plane and every plane one vector, and what turns a cell turns its vectors.
Between two kinds the last number says that the cell is open: no pieces came near enough, and the network corrects what was found. It leaves
all others as they are, where it could only add noise.
The bases are orthonormal over the children and span the same under the 48 symmetries of the cube. `vae_fit` finds the numbers.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from reference_model.vae_bases import BEND, HALF, SMOOTH, bases_of
from reference_model.volume import CELL, TAU

COEFFICIENTS = 16
NUMBERS = COEFFICIENTS - 1
GAIN = 2.0  # of a number in a latent, so that latents have a variance near 1
UNIT = 0.05  # of what the network adds to latents and values: what is to be corrected is small, and so must be the first steps
TIE = 1e-4  # what is nearer to a tie counts as one: how a matrix product rounds, say with the size of a batch, then decides nothing
STEP = 0.5  # from kind to kind in a latent: noise must not make one of another
OPEN = STEP / 2  # added to that of an open cell
FLAT = 0.3  # of the slope of a distance: what is flatter is none, as the middle of a wall
# kind ONE ± i is form i: + the larger of the outer two, - the smaller
FORMS = ("one", "two", "wall", "three", "mixed", "planes", "corners")
ONE = len(FORMS) - 1
PLANES = 5  # of the last two forms, the first two of them in a group of their own
REACH = 2.0  # how far a plane is whose vector is e long, in the frame of the cell


class Kinds(NamedTuple):
    """What kinds 0…12 make of numbers."""

    maps: Tensor  # [13,3,10,15]: numbers to the coefficients of f0, f1, f2; zero for planes
    outer: Tensor  # [13]: 1 the larger, -1 the smaller
    inner: Tensor  # [13]


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def kinds_of(device: torch.device, dtype: torch.dtype) -> Kinds:
    """The table of kinds, made once for each device and dtype."""
    bases = bases_of(torch.device("cpu"))
    a = torch.eye(SMOOTH, NUMBERS).double()
    b_in_a = bases.a[0].T @ bases.b / CELL**3  # [10,5]

    def b(first: int) -> Tensor:
        return torch.cat((torch.zeros(SMOOTH, first), b_in_a, torch.zeros(SMOOTH, NUMBERS - BEND - first)), 1)

    three = (b(0), b(BEND), b(2 * BEND))
    forms = {
        "one": (a, a, a), "two": (a, *2 * (a + b(SMOOTH),)), "wall": (a, *2 * (b(SMOOTH) - a,)), "three": three, "mixed": three,
        **dict.fromkeys(("planes", "corners"), 3 * (torch.zeros_like(a),)),
    }  # fmt: skip
    kinds = [(1 if k > 0 else -1, FORMS[abs(k)]) for k in range(-ONE, ONE + 1)]
    maps = torch.stack([torch.stack(forms[form]) for _, form in kinds])
    outer = torch.tensor([float(sign) for sign, _ in kinds])
    inner = torch.tensor([float(-sign if form in ("mixed", "corners") else sign) for sign, form in kinds])
    return Kinds(maps.to(device, dtype), outer.to(device, dtype), inner.to(device, dtype))


def slope_of(resolution: int) -> float:
    """Of a distance, in tau from child to child."""
    return 2 / (resolution * TAU)


def polynomials(numbers: Tensor, kind: Tensor, pieces: int = 3) -> Tensor:
    """Numbers [L,15] of kinds [L] int64 in 0…12 → coefficients [3,L,10] of f0, f1, f2; or [1,L,10] of f0, where all are of one piece."""
    return torch.einsum("lpab,lb->pla", kinds_of(numbers.device, numbers.dtype).maps[kind, :pieces], numbers)


def fields(coefficients: Tensor) -> Tensor:
    """[p,L,10] → [p,4,L,512]: values and slopes at the children."""
    bases = bases_of(coefficients.device)
    basis = bases.a if coefficients.dtype == torch.float64 else bases.narrow
    return coefficients[:, None] @ basis.mT


def sizes(fields: Tensor, slope: float) -> Tensor:
    """[p,L,512] of the slopes, in that of a distance."""
    return (fields[:, 1:] / slope).square().sum(1).clamp(min=FLAT**2).sqrt()


def piece_at(d: Tensor, kind: Tensor) -> Tensor:
    """Which of d [p,L,512] speaks at each child [L,512]: 0, 1 or 2; the first where they say the same."""
    if len(d) == 1:
        return torch.zeros_like(d[0], dtype=torch.int64)
    kinds = kinds_of(d.device, d.dtype)
    outer, inner = kinds.outer[kind, None], kinds.inner[kind, None]
    last = inner * (d[2] - d[1]) > TIE
    return torch.where(outer * (torch.where(last, d[2], d[1]) - d[0]) > TIE, 1 + last.long(), 0)


def as_latents(numbers: Tensor, kind: Tensor) -> Tensor:
    """Numbers [L,15] and kinds [L] → [L,16], none of them open."""
    return torch.cat((GAIN * numbers, STEP * (kind - ONE)[:, None].to(numbers)), 1)


def turning(came_from: Tensor) -> Tensor:
    """[S,3,15,15] float64, what motions of a cell do to the numbers of its latent: of simpler forms, of "three" and "mixed", of planes;
    came_from [S,512]: which child lies at each child's place afterwards."""
    bases = bases_of(came_from.device)
    a, b = (basis.T @ basis[came_from] / CELL**3 for basis in (bases.a[0], bases.b))
    vectors = b[:, 1:4, 1:4].flip(1, 2)  # as what is linear, whose terms are in z, y and x
    families = ((a, b), 3 * (b,), PLANES * (vectors,))
    return torch.stack([torch.stack([torch.block_diag(*x) for x in zip(*blocks, strict=True)]) for blocks in families], 1)


def turn_latents(z: Tensor, turns: Tensor, motion: Tensor) -> Tensor:
    """Latents [L,16] of cells moved by motions [L] of turns [S,3,15,15]: what a fit of the moved cells would say, but for ties."""
    form = (kind_of(z) - ONE).abs()
    family = (form >= FORMS.index("three")).long() + (form >= FORMS.index("planes"))
    return torch.cat((torch.einsum("lab,lb->la", turns[motion, family].to(z), z[:, :NUMBERS]), z[:, NUMBERS:]), 1)


def _last(z: Tensor) -> Tensor:
    """The last number of latents [L,16], in half steps from the first kind: [L] int64. No gradient reaches it."""
    return ((z[:, NUMBERS].detach().float() / OPEN).round().long() + 2 * ONE).clamp(0, 4 * ONE + 1)


def kind_of(z: Tensor) -> Tensor:
    """Latents [L,16] → kinds [L] int64 in 0…12."""
    return _last(z) // 2


def is_open(z: Tensor) -> Tensor:
    """Latents [L,16] → [L] bool, cells that the network corrects."""
    return _last(z) % 2 == 1


def opened(z: Tensor, cells: Tensor) -> Tensor:
    """Latents [L,16] of which those of cells [L] bool are open, and no others."""
    last = z[:, NUMBERS] + OPEN * (cells.to(z) - is_open(z).to(z))
    return torch.cat((z[:, :NUMBERS], last[:, None]), 1)


def closed(z: Tensor) -> Tensor:
    """Latents [L,16] of which none is open: as the network sees them."""
    return opened(z, torch.zeros_like(z[:, 0], dtype=torch.bool))


def correction(z: Tensor, added: Tensor) -> Tensor:
    """What the network adds [L,n] to latents [L,16] or to what their pieces say: nothing where cells are not open."""
    return UNIT * is_open(z)[:, None] * added


def plane_distances(vectors: Tensor, slope: float) -> Tensor:
    """Vectors [L,5,3] → [L,5,512], how far their planes are from the children, in tau; finite for a vector of no length too."""
    size = vectors.norm(dim=2, keepdim=True).clamp(min=TIE)
    return slope * HALF * (vectors / size @ bases_of(vectors.device).x.to(vectors).T + REACH * size.log())


def meet(d: Tensor, kind: Tensor) -> Tensor:
    """What planes of kinds [L] with distances d [L,5,512] say at the children [L,512]."""
    kinds = kinds_of(d.device, d.dtype)
    outer, inner = kinds.outer[kind, None], kinds.inner[kind, None]
    d = inner[..., None] * d
    unlike = outer * inner
    return outer * torch.maximum(unlike * d[:, :2].amax(1), unlike * d[:, 2:].amax(1))


def piece_values(z: Tensor, resolution: int) -> Tensor:
    """Latents [L,16] → values [L,512] float32 of their pieces, not clamped. No gradient reaches the kind."""
    with torch.autocast(z.device.type, enabled=False):
        numbers, kind, slope = z[:, :NUMBERS].float() / GAIN, kind_of(z), slope_of(resolution)
        f = fields(polynomials(numbers, kind))
        d = f[:, 0] / sizes(f, slope)
        values = d.gather(0, piece_at(d.detach(), kind)[None])[0]
        planes = (kind - ONE).abs()[:, None] >= FORMS.index("planes")
        distances = plane_distances(torch.where(planes, numbers, 1.0).unflatten(1, (PLANES, 3)), slope)
        return torch.where(planes, meet(distances, kind), values)
