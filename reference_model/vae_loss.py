"""Targets and losses of the VAE (paper: arXiv 2505.17412, section 3.2, Eq. 3).

    L = sum over c in {in, ext, sharp} of lambda_c mean_c f(t - t~) + lambda_kl KL,    f(e) = e^2

in: band voxels; ext: the other children of active latents, t = ±1 by the true sign; sharp: band voxels near a marked edge. Each mean runs
over its own set in the whole batch and is 0 for an empty set; where t = ±1, a value beyond it is no error. The paper names no reduction
of KL: here the mean over latent elements. Squares are mostly those of the few cells that 16 numbers cannot hold; f "smooth_l1" grows with
|e| beyond BETA (Girshick, arXiv 1504.08083, Eq. 3), so that the many others count. Marching cubes reads the voxels next to the surface
alone: with a focus, a voxel counts 1 / (1 + (t / focus)^2) in the mean of its set.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from reference_model.dataset import VolumeBatch
from reference_model.volume import CELL, child_index

BETA = 0.02  # of tau = 1/128: 1.6e-4 of the cube's half edge
STEEPNESS = {"squared": 1.0, "smooth_l1": 0.5 / BETA}  # f(e) / e^2 of small errors


@dataclass(frozen=True, eq=False)
class Targets:
    """What the decoder should say at every child of L latents, child (dx*8+dy)*8+dz."""

    values: Tensor  # [L,512] float32, t of band voxels, ±1 elsewhere
    band: Tensor  # [L,512] bool
    sharp: Tensor  # [L,512] bool, within the band
    weights: Tensor  # [L,512] float32, of a child in the mean of its set

    def rows(self, index: Tensor | slice) -> "Targets":
        return Targets(self.values[index], self.band[index], self.sharp[index], self.weights[index])


def make_targets(batch: VolumeBatch, ext_target: str = "sign", focus: float | None = None) -> Targets:
    """Targets at all latents of a batch; values are clamped to [-1, 1]. ext_target "released": +1 outside the band, inside or not.

    focus: the |t| of children that count half as much as those at the surface; None: all count alike.
    """
    place = batch.latent_index.long() * CELL**3 + child_index(batch.coords[:, 1:])
    values = torch.where(batch.inside & (ext_target == "sign"), -1.0, 1.0)
    band, sharp = torch.zeros_like(batch.inside), torch.zeros_like(batch.inside)
    values.view(-1)[place] = batch.values.clamp(-1, 1)
    band.view(-1)[place] = True
    sharp.view(-1)[place] = batch.sharp
    return Targets(values, band, sharp, values.new_ones(()).expand_as(values) if focus is None else 1 / (1 + (values / focus).square()))


def reconstruction_terms(predicted: Tensor, targets: Targets, error: str = "squared") -> dict[str, Tensor]:
    """Means "in", "ext", "sharp" of the errors of predicted [L,512], "squared" or "smooth_l1"; float32 scalars.

    Beyond a target of ±1 there is no error.
    """
    predicted = predicted.float()
    beyond = (targets.values.abs() >= 1) & (predicted * targets.values > 1)
    if error == "squared":
        errors = (predicted - targets.values).square()
    else:
        errors = F.smooth_l1_loss(predicted, targets.values, reduction="none", beta=BETA)
    errors = errors.masked_fill(beyond, 0) * targets.weights
    sets = {"in": targets.band, "ext": ~targets.band, "sharp": targets.sharp}
    sums = {name: [torch.where(chosen, x, 0).sum() for x in (errors, targets.weights)] for name, chosen in sets.items()}
    return {name: error / weight.clamp(min=1e-9) for name, (error, weight) in sums.items()}


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Mean over all elements of (mean^2 + var - 1 - log var) / 2, 0 for none; float32."""
    mean, logvar = mean.float(), logvar.float()
    return (mean.square() + logvar.exp() - 1 - logvar).sum() / (2 * max(mean.numel(), 1))


def occupancy_loss(logits: dict[int, Tensor], band: Tensor) -> Tensor:
    """Cross entropy of "a band voxel lies in this cell", mean over the levels; logits {edge: [L,edge^3]}, band [L,512], both by slot."""
    terms = []
    for edge, logit in logits.items():
        target = band.view(len(band), edge**3, -1).any(2).float()
        terms.append(torch.nn.functional.binary_cross_entropy_with_logits(logit.float(), target, reduction="sum") / max(logit.numel(), 1))
    return torch.stack(terms).mean()
