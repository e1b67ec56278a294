"""Small latents, levels and batches that the tests of the VAE share."""

import torch
from analytic import box, box_edge_distance, rotation, sphere, torus, volume_of
from torch import Tensor

from reference_model.dataset import VolumeBatch, collate_volumes
from reference_model.vae import SparseVAE, VAEConfig
from reference_model.vae_grid import Level, find_latent_neighbors

GRID = 4
TINY = dict(channels=(4, 8, 16), hidden_size=32, num_heads=2, num_layers=2, mlp_ratio=2)


def random_latents(count: int, samples: int = 2, seed: int = 0) -> Tensor:
    """[<= count,4] int32, unique, lexicographic, in a grid of 4^3; the middle sample of three is empty."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randint(0, GRID, (count, 4), generator=generator)
    latents[:, 0] = torch.randint(0, samples, (count,), generator=generator) * (2 if samples == 3 else 1)
    return latents.unique(dim=0).int()


def random_level(edge: int, share: float | None, count: int = 24, seed: int = 0) -> Level:
    """A level of random latents; share of the cells that are active, None: all."""
    latents = random_latents(count, seed=seed)
    active = None
    if share is not None:
        active = torch.rand(len(latents), edge**3, generator=torch.Generator().manual_seed(seed)) < share
    return Level.of(latents, find_latent_neighbors(latents, GRID), edge, active)


def shapes() -> list:
    """Volumes at 256 of about 20, 30 and 70 latents, the second with marked edges."""
    frame = rotation(1)
    half = (0.05, 0.04, 0.03)
    block = volume_of(box(half, frame), 256, edges=box_edge_distance(half, frame))
    return [volume_of(sphere(0.05, (0.2, 0.1, 0.0)), 256), block, volume_of(torus(0.12, 0.05), 256)]


def small_batch() -> VolumeBatch:
    return collate_volumes(shapes())


def stirred(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model with all parameters drawn anew, those that start at 0 too, so that every path counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[:2].numel() if parameter.ndim == 3 else parameter.shape[-1] if parameter.ndim == 2 else 16
            gain = 2.0 if parameter.ndim == 3 else 1.0
            parameter.copy_(gain * torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return model


def tiny_model(**changes) -> SparseVAE:
    return stirred(SparseVAE(VAEConfig(**{**TINY, **changes})))
