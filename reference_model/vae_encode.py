"""A volume → the latents that say it best, by looking at what they decode to: for whoever keeps latents, not for training."""

from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from reference_model.dataset import VolumeBatch
from reference_model.topology import euler, parities, places_round
from reference_model.vae import SparseVAE
from reference_model.vae_decode import decode_volume
from reference_model.vae_fit import closeness, fit_cells
from reference_model.vae_loss import Targets, make_targets
from reference_model.vae_pieces import closed, piece_values, slope_of
from reference_model.volume import CELL

# of further fits: weights of voxels on the wrong side, and the |t|, in voxels, of voxels that count half; mild ones first
_TRIES = sorted(product((0.0, 3.0, 10.0, 30.0, 100.0, 300.0), (1.0, 0.3, 0.1, 0.03)), key=lambda x: x[0] / x[1])
_ROUNDS = 3  # of a look: other pieces in a cell change a little what the network says of cells beside it


@torch.no_grad()
def encode_volume(model: SparseVAE, batch: VolumeBatch) -> Tensor:
    """One sample → its latents [L,16], rows as batch.latents.

    The mean of the posterior; but pieces alone in open cells that the network does not bring nearer, and other pieces in cells that would
    give the surface another Euler characteristic. Takes two to four decodings more than `SparseVAE.encode`. ValueError for several samples.
    """
    if len(batch.meta) != 1:
        raise ValueError(f"encode_volume takes one sample, got {len(batch.meta)}")
    if model.config.head != "pieces":
        return model.encode(batch).mean
    targets, latents, resolution = make_targets(batch), batch.latents[:, 1:], batch.resolution
    fit = fit_cells(targets, resolution, model.config.planes) if batch.fit is None else batch.fit
    z, pieces = model.encode(replace(batch, fit=fit)).mean, closed(fit)
    values, alone = decode_volume(model, z, latents, resolution)[1].view(-1, CELL**3), piece_values(pieces, resolution).clamp(-1, 1)
    nearer = closeness(values, targets, resolution) < closeness(alone, targets, resolution)
    z = torch.where(nearer[:, None], z, pieces)
    for _ in range(_ROUNDS):
        before, values = z, decode_volume(model, z, latents, resolution)[1].view(-1, CELL**3)
        z = keep_topology(z, values, targets, latents, resolution, model.config.planes)
        if torch.equal(z, before):
            break
    return z


def keep_topology(z: Tensor, values: Tensor, targets: Targets, latents: Tensor, resolution: int, planes: bool) -> Tensor:
    """Latents z [L,16], which decode to values [L,512], with other pieces in those of the cells latents [L,3] that would change the Euler
    characteristic of the true surface; where none of `_TRIES` keeps it, they stay."""
    z, both, places = z.clone(), targets.values.repeat(2, 1), places_round(latents, resolution)
    state, parity = both[: len(z)], parities(latents)
    for i in range(8):
        rows = (parity == i).nonzero().flatten()
        before = euler(both.view(-1)[places[rows]])
        state[rows] = values[rows]
        left = euler(both.view(-1)[places[rows]]) != before
        rows, before = rows[left], before[left]
        for heed, near in _TRIES:
            if not len(rows):
                break
            found = targets.rows(rows)
            weights = 1 + heed * ((values[rows] < 0) != (found.values < 0))
            weights = weights / (1 + (found.values / (near * slope_of(resolution))).square())
            pieces = closed(fit_cells(found, resolution, planes, weights))
            state[rows] = piece_values(pieces, resolution)
            kept = euler(both.view(-1)[places[rows]]) == before
            z[rows[kept]] = pieces[kept]
            rows, before = rows[~kept], before[~kept]
        state[rows] = values[rows]
    return z
