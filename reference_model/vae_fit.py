"""From what a cell should say to its 16 numbers: the pieces of `vae_pieces` nearest to it.

One piece first. Where that is not enough, eight more beginnings: voxels in two groups as the larger or the smaller of two pieces or as the
sides of a wall or a slit, and twice in three groups, near the surface or all alike, in the two best forms; each by least squares in turn
with the choice of the piece that a voxel belongs to and with smaller weights for what stays far off (iteratively reweighted). They go on
as distances (Levenberg-Marquardt), fewer and fewer of them. Where that is not enough either, five planes, begun as what voxels in five
groups see, go on likewise, together or in pairs of corners.
"""

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reference_model.vae_bases import HALF, SMOOTH, bases_of
from reference_model.vae_descent import RIDGE, State, Wanted, descend, solve_ridge, where
from reference_model.vae_groups import plane_groups, planes_seen, second_piece
from reference_model.vae_loss import Targets
from reference_model.vae_pieces import (
    FLAT,
    FORMS,
    NUMBERS,
    ONE,
    PLANES,
    REACH,
    TIE,
    as_latents,
    fields,
    kinds_of,
    meet,
    opened,
    piece_at,
    plane_distances,
    polynomials,
    sizes,
    slope_of,
)

VERSION = "2"  # of fits that are kept: to be raised where another one comes out
_ROWS = {"cpu": 1 << 8, "cuda": 1 << 13}  # latents at once: what fits a processor's cache, what fills a GPU
_HARD = {"cpu": 1 << 6, "cuda": 1 << 12}  # the same where several pieces are fitted
_NEAR = 0.35  # voxels from the surface where a voxel counts half
_PRICE = 3e-4  # mean error by which several pieces must be better than one
_OPEN = 1e-3  # mean error from which on a cell is open
_ROUNDS = 6  # of least squares
_STEPS = 8  # of one piece
_FORMS = 2  # of three groups that are tried further
_REFINED = ((4, 3), (2, 4), (1, 10))  # of several: how many beginnings go on, for how many steps
_CORNERS = 3  # ways to pair planes that are tried further
_PLANES_REFINED = ((3, 3), (1, 4), (1, 8))  # of planes: how many then go on, after how many steps
_FURTHEST = 2.0  # of the logarithm of a vector's length


class Fit(NamedTuple):
    numbers: Tensor  # [L,15] float64
    kind: Tensor  # [L] int64
    least: Tensor  # [L] float64, the loss

    def rows(self, index: Tensor) -> "Fit":
        return Fit(*(x[index] for x in self))

    def where(self, better: Tensor, other: "Fit") -> "Fit":
        """Of the other where it is better [L]."""
        return Fit(*(where(better, y, x) for x, y in zip(self, other, strict=True)))


@torch.no_grad()
def fit_cells(targets: Targets, resolution: int, planes: bool = True, weights: Tensor | None = None) -> Tensor:
    """Latents [L,16] float32 near to the band voxels, the more the nearer these are to the surface, that keep the side of other children.

    planes: also of the forms "planes" and "corners". weights [L,512]: how much more than else a child counts.
    A cell that fewer pieces fit to within `_PRICE` is not tried with more: these could not be better by that.
    """
    device = targets.values.device.type
    with torch.autocast(device, enabled=False):
        parts = range(0, max(len(targets.values), 1), _ROWS[device])
        rows = [slice(i, i + _ROWS[device]) for i in parts]
        return torch.cat([_fit(targets.rows(r), resolution, planes, None if weights is None else weights[r]) for r in rows])


def closeness(values: Tensor, targets: Targets, resolution: int) -> Tensor:
    """[L] float64, what `fit_cells` makes small: how far values [L,512] are from what they should be."""
    return Wanted.of(targets, _NEAR * slope_of(resolution)).double().loss(values.double())


def _fit(targets: Targets, resolution: int, planes: bool, weights: Tensor | None) -> Tensor:
    slope = slope_of(resolution)  # also the size of a voxel
    wanted = Wanted.of(targets, _NEAR * slope, weights).double()
    kind = torch.full_like(targets.band[:, 0], ONE, dtype=torch.int64)
    best = _least_squares(kind, torch.zeros_like(targets.band, dtype=torch.int64), wanted, pieces=1)
    best = _refine(best, wanted, slope, _STEPS, pieces=1)
    for find in (_several, _planes)[: 1 + planes]:
        left = (best.least > _PRICE).nonzero().flatten()  # a wait for the device
        for part in left.split(_HARD[left.device.type]) if len(left) else ():
            found = find(targets.rows(part), wanted.rows(part), slope)
            better = best.rows(part).where(found.least < best.least[part] - _PRICE, found)
            best = Fit(*(x.index_copy(0, part, y) for x, y in zip(best, better, strict=True)))
    return opened(as_latents(best.numbers.float(), best.kind), best.least > _OPEN)


def _several(targets: Targets, wanted: Wanted, slope: float) -> Fit:
    """Of up to three pieces."""
    count = len(targets.values)
    second = second_piece(targets, wanted.share.float()).long()
    begun = [(torch.full_like(second[:, 0], kind), second) for kind in (ONE - 2, ONE - 1, ONE + 1, ONE + 2)]
    begun += [_three(wanted, group) for group, _ in _groups(targets, wanted, slope, 3)]
    kind, piece = (torch.cat(x) for x in zip(*begun, strict=True))
    found = _least_squares(kind, piece, wanted.repeat(len(kind) // count))
    for left, steps in _REFINED:
        found = _refine(found.rows(_places_of_best(found.least, count, left)), wanted.repeat(left), slope, steps)
    return found


def _planes(targets: Targets, wanted: Wanted, slope: float) -> Fit:
    """Of five planes."""
    count = len(targets.values)
    seen = [_vectors(planes, slope) for _, planes in _groups(targets, wanted, slope, PLANES)]
    together = torch.full((count,), FORMS.index("planes"), device=targets.values.device)
    begun = [(vectors, ONE + form) for vectors in seen for form in (together, -together)] + [_corners(v, wanted, slope) for v in seen]
    vectors, kind = (torch.cat(x) for x in zip(*begun, strict=True))
    for left, steps in _PLANES_REFINED:
        found = _refine_planes(vectors, kind, wanted.repeat(len(kind) // count), slope, steps)
        found = found.rows(_places_of_best(found.least, count, left))
        vectors, kind = found.numbers.unflatten(1, (PLANES, 3)), found.kind
    return found


def _corners(vectors: Tensor, wanted: Wanted, slope: float) -> tuple[Tensor, Tensor]:
    """Vectors [cL,5,3] and kinds [cL] to begin with: of all ways to make two corners of five planes [L,5,3] the c that come nearest."""
    count, form = len(vectors), FORMS.index("corners")
    pairs = combinations(range(PLANES), 2)
    ways = [((*pair, *(i for i in range(PLANES) if i not in pair)), ONE + sign * form) for pair in pairs for sign in (1, -1)]
    order, kind = (torch.tensor(x, device=vectors.device) for x in zip(*ways, strict=True))  # [20,5], [20]
    d = plane_distances(vectors, slope)
    least = torch.cat([wanted.loss(meet(d[:, o], k.expand(count))) for o, k in zip(order, kind, strict=True)])
    best = _places_of_best(least, count, _CORNERS)
    way = best.div(count, rounding_mode="floor")
    return vectors[best[:, None] % count, order[way]], kind[way]


def _groups(targets: Targets, wanted: Wanted, slope: float, count: int) -> list[tuple[Tensor, Tensor]]:
    """`plane_groups` by two weights: the nearer to the surface the more, and all alike."""
    seen, known = planes_seen(targets, slope)
    alike = targets.band / targets.band.sum(1, keepdim=True).clamp(min=1)
    return [plane_groups(seen, share * known, count) for share in (wanted.share, alike)]


def _places_of_best(least: Tensor, count: int, left: int) -> Tensor:
    """[left * count] places in least, which holds the losses of count cells several times: those of the best of all cells come first."""
    order = (least.view(-1, count) / TIE**2).round().argsort(dim=0, stable=True)[:left]
    return (order * count + torch.arange(count, device=order.device)).flatten()


def _least_squares(kind: Tensor, piece: Tensor, wanted: Wanted, pieces: int = 3) -> Fit:
    """The best polynomials of these kinds [L] found in a few rounds that begin with the piece [L,512] of each child."""
    basis, weights = bases_of(kind.device).a[0], wanted.share
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
    return solve_ridge(*_system((own @ bases.aa).unflatten(2, (SMOOTH, SMOOTH)), (own * values[:, None]) @ bases.a[0], kind))


def _of_pieces(weights: Tensor, piece: Tensor, pieces: int) -> Tensor:
    """[L,p,512]: the weights of the children of each piece."""
    return torch.stack([weights * (piece == i) for i in range(pieces)], 1)


def _system(grams: Tensor, right: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    """Normal equations of the polynomials, [L,p,10,10] and [L,p,10] → those of the numbers, [L,15,15] and [L,15]."""
    maps = kinds_of(grams.device, grams.dtype).maps[kind, : grams.shape[1]]
    return (maps.mT @ grams @ maps).sum(1), torch.einsum("lpab,lpa->lb", maps, right)


def _refine(fit: Fit, wanted: Wanted, slope: float, steps: int, pieces: int = 3) -> Fit:
    """Better numbers for the formula with distances."""

    def solve(numbers: Tensor, state: State, damping: Tensor) -> Tensor:
        y, piece, parts = state
        own, rows = _of_pieces(wanted.weights(y), piece, pieces), _by_coefficients(parts)
        grams = torch.stack([(rows * weights[:, None]) @ rows.mT for weights in own.unbind(1)], 1)
        matrix, right = _system(grams, (own * (wanted.values - y)[:, None]) @ rows.mT, fit.kind)
        mean = matrix.diagonal(dim1=1, dim2=2).mean(1)
        return numbers + solve_ridge(matrix, right - RIDGE * numbers, (damping * mean)[:, None])

    numbers, least = descend(fit.numbers, lambda numbers: _linearised(numbers, fit.kind, slope, pieces), solve, wanted, steps)
    return Fit(numbers, fit.kind, least)


def _linearised(numbers: Tensor, kind: Tensor, slope: float, pieces: int = 3) -> State:
    """Values [L,512], whose piece says so [L,512], and derivatives [L,4,512] by the value and the slopes of that piece's polynomial."""
    f = fields(polynomials(numbers, kind, pieces))
    size = sizes(f, slope)
    d = f[:, 0] / size
    piece = piece_at(d, kind)
    y, size = (x.gather(0, piece[None])[0] for x in (d, size))
    slopes = f[:, 1:].gather(0, piece.expand(1, 3, -1, -1))[0]
    return y, piece, torch.stack((1 / size, *(-y * slopes / (size * slope).square() * (size > FLAT))), 1)


def _by_coefficients(parts: Tensor) -> Tensor:
    """Derivatives [L,4,512] by a polynomial's value and slopes → [L,10,512] by its coefficients."""
    basis = bases_of(parts.device).a.mT.contiguous()
    rows = parts[:, :1] * basis[0]
    for i in (1, 2, 3):
        rows.addcmul_(parts[:, i, None], basis[i])
    return rows


def _three(wanted: Wanted, group: Tensor) -> tuple[Tensor, Tensor]:
    """Kinds [fL] and pieces of each child [fL,512] to begin with: of three groups [L,512] the f forms whose planes come nearest."""
    count, kind = len(group), torch.full_like(group[:, 0], ONE + 3)
    d = polynomials(_solve(wanted.share, group, wanted.values, kind), kind) @ bases_of(group.device).a[0].T
    firsts = [(0, 1, 2), (1, 0, 2), (2, 0, 1)]  # which of the three is the outer one: for "three" it does not matter
    orders = [firsts[0]] * 2 + firsts * 2
    kinds = [ONE + 3, ONE - 3] + [ONE + 4] * 3 + [ONE - 4] * 3
    tried = torch.tensor(kinds, device=kind.device).repeat_interleave(count)
    d = torch.cat([d[list(order)] for order in orders], 1)
    piece = piece_at(d, tried)
    least = wanted.repeat(len(kinds)).loss(d.gather(0, piece[None])[0])
    best = _places_of_best(least, count, _FORMS)
    return tried[best], piece[best]


def _vectors(planes: Tensor, slope: float) -> Tensor:
    """What groups see [L,5,4] → vectors [L,5,3] float64."""
    planes = planes.double()
    size = planes[..., :3].norm(dim=2, keepdim=True)
    direction = torch.where(size > TIE, planes[..., :3] / size, planes.new_tensor((1.0, 0.0, 0.0)))  # none: any
    return direction * (planes[..., 3:] / (slope * HALF * REACH)).clamp(-_FURTHEST, _FURTHEST).exp()


def _refine_planes(vectors: Tensor, kind: Tensor, wanted: Wanted, slope: float, steps: int) -> Fit:
    """`_refine` of planes: a child moves one vector, so that each has equations of its own."""

    def solve(vectors: Tensor, state: State, damping: Tensor) -> Tensor:
        y, own, rows = state
        weights = own * wanted.weights(y)[:, None]
        grams = (weights @ (rows[..., None] * rows[..., None, :]).flatten(2)).unflatten(2, (3, 3))
        mean = grams.diagonal(dim1=2, dim2=3).mean((1, 2))
        new = vectors + solve_ridge(grams, (weights * (wanted.values - y)[:, None]) @ rows, (damping * mean)[:, None, None])
        size = new.norm(dim=2, keepdim=True)
        return new * (size.log().clamp(-_FURTHEST, _FURTHEST).exp() / size)

    vectors, least = descend(vectors, lambda vectors: _linearised_planes(vectors, kind, slope), solve, wanted, steps)
    return Fit(vectors.flatten(1), kind, least)


def _linearised_planes(vectors: Tensor, kind: Tensor, slope: float) -> State:
    """Values [L,512], whose plane says so [L,5,512] bool, and derivatives [L,512,3] by its vector."""
    d = plane_distances(vectors, slope)
    y = meet(d, kind)
    near = (d - y[:, None]).abs() < TIE
    own = near & (near.cumsum(1) == 1)  # the first
    of_planes = torch.cat((F.normalize(vectors, dim=2), vectors.norm(dim=2, keepdim=True)), 2)
    n, size = (own.to(vectors).mT @ of_planes).split((3, 1), 2)  # of each child
    x = bases_of(n.device).x
    return y, own, slope * HALF / size * (x + (REACH - (n * x).sum(2, keepdim=True)) * n)
