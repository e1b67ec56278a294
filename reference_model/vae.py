"""SS-VAE: a signed-distance volume ⇄ 16 numbers for every active cell of 8^3 voxels (paper: arXiv 2505.17412, section 3.2).

    volume [N voxels] → Encoder → Posterior [L,16] → sample → Decoder → a value at each of the 512 children of the L latents
                      ↘ fit of each cell ↗                   ↘ the values of the fit ↗

Latents begin as what is fitted to a cell (`vae_pieces`, `vae_fit`), which the network corrects on both sides where no fit comes near: a
smooth piece of surface, an edge, a corner or a thin wall needs no learning. `head="tanh"` is the paper's output, without them.

`loss` is what a trainer minimises; `encode` and `decode` are the two halves, and `vae_encode.encode_volume` chooses latents to keep.
Letters: N band voxels, L latents, B samples, R resolution.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ssa
from reference_model.dataset import VolumeBatch
from reference_model.vae_decoder import HALO, Decoder
from reference_model.vae_encoder import Encoder, EncoderPlan
from reference_model.vae_fit import fit_cells
from reference_model.vae_flops import forward_flops
from reference_model.vae_grid import Level, check_latents, children_of_slots, find_latent_neighbors
from reference_model.vae_loss import STEEPNESS, Targets, kl_divergence, make_targets, occupancy_loss, reconstruction_terms
from reference_model.vae_pieces import COEFFICIENTS
from reference_model.volume import CELL

CHOICES = {
    "decoder": ("symmetric", "subpixel", "released"),
    "head": ("pieces", "clamp", "tanh"),
    "pooling": ("mean", "subpixel", "released"),
    "ext_target": ("sign", "released"),
    "error": tuple(STEEPNESS),
}


@dataclass(frozen=True)
class VAEConfig:
    """Sizes and choices; the sizes are the paper's by default."""

    channels: tuple[int, int, int] = (32, 64, 128)  # at R, R/2, R/4
    hidden_size: int = 512  # at the latents
    num_layers: int = 4  # transformer blocks, in the encoder and in the decoder
    num_heads: int = 8
    mlp_ratio: int = 4
    window_size: int = 8  # latents; odd layers shift by half of it
    latent_channels: int = 16
    decoder: str = "subpixel"  # or "symmetric", "released": the blocks of `vae_blocks`
    head: str = "pieces"  # what the network corrects in each cell; or nothing: "clamp", "tanh" (released)
    planes: bool = True  # pieces may be five planes, together or as two corners, not up to three bent ones alone
    pooling: str = "subpixel"  # learned; or "mean", "released": sum / (n + 1)
    ext_target: str = "sign"  # of children outside the band; "released": +1 everywhere, which gives the surface a second side
    error: str = "squared"  # of a value; or "smooth_l1", which counts what is almost right for more: `vae_loss`
    focus: float | None = None  # |t| of voxels that count half, in losses; None: all count alike
    occupancy: bool = False  # a head that tells which cells hold band voxels, for pruning
    conv_backend: str | None = None  # "torch", "triton", "spconv"; None: triton on CUDA, torch elsewhere
    lambda_in: float = 1.0
    lambda_ext: float = 0.1
    lambda_sharp: float = 1.0
    lambda_kl: float = 1e-3
    lambda_occupancy: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        if len(self.channels) != 3:
            raise ValueError(f"channels must be three numbers, got {self.channels}")
        head_dim = self.hidden_size // self.num_heads
        if self.hidden_size % self.num_heads or head_dim % 8 or not 16 <= head_dim <= 128:
            raise ValueError(f"hidden_size / num_heads must be a multiple of 8 from 16 to 128, got {self.hidden_size} / {self.num_heads}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if self.focus is not None and not self.focus > 0:
            raise ValueError(f"focus must be positive, or None, got {self.focus}")
        if self.head == "pieces" and self.latent_channels != COEFFICIENTS:
            raise ValueError(f"head {self.head} needs {COEFFICIENTS} latent channels, got {self.latent_channels=}")
        if self.head == "pieces" and self.ext_target == "released":
            raise ValueError(f'ext_target "released" needs head "clamp" or "tanh": pieces keep the true side, got head {self.head!r}')


@dataclass(frozen=True, eq=False)
class Posterior:
    """Diagonal normal distribution of each latent."""

    mean: Tensor  # [L,16] float32
    logvar: Tensor  # [L,16] float32

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """[L,16]; the generator must live on the device of the latents."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device)
        return self.mean + noise * (0.5 * self.logvar).exp()


class SparseVAE(nn.Module):
    """The two halves and the loss. `activation_checkpointing = True` recomputes every block in the backward."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    @property
    def activation_checkpointing(self) -> bool:
        return self.encoder.checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: bool) -> None:
        self.encoder.checkpointing = self.decoder.checkpointing = value

    def partitions(self, latents: Tensor) -> tuple[ssa.VoxelPartition, ssa.VoxelPartition]:
        """Order of latents [L,4] with windows without and with shift, shared by all layers of a batch."""
        size = self.config.window_size
        plain = ssa.partition_voxels(latents, compression_block_size=size, selection_block_size=size, window_size=size)
        return plain, plain.with_window(size, size // 2)

    def encode(self, batch: VolumeBatch) -> Posterior:
        """Posterior of each latent, rows as batch.latents."""
        return self._encode(batch, self.partitions(batch.latents), make_targets(batch, focus=self.config.focus))

    def decode(self, z: Tensor, latents: Tensor, resolution: int) -> Tensor:
        """Values [L,512] float32 in [-1, 1] of the children (dx*8+dy)*8+dz of each latent.

        z [L,16]; latents [L,4] integer (sample, x, y, z), unique, lexicographic, in [0, R/8). ValueError otherwise.
        """
        return self.values(z, latents, resolution).clamp(-1, 1)

    def values(self, z: Tensor, latents: Tensor, resolution: int) -> Tensor:
        """`decode` before values are clamped: what the loss sees."""
        return self.decoder.upsample(self.attend(z, latents, resolution), z, latents, resolution // CELL)[0]

    def attend(self, z: Tensor, latents: Tensor, resolution: int) -> Tensor:
        """First half of `decode`, over all latents: → [L,hidden] for `decoder.upsample`."""
        _check_decode(z, latents, resolution, self.config.latent_channels)
        return self.decoder.attend(z, latents, self.partitions(latents), _factor(resolution))

    def loss(self, batch: VolumeBatch, generator: torch.Generator | None = None, crop_latents: int | None = None) -> dict[str, Tensor]:
        """Terms of the loss, float32 scalars: "in", "ext", "sharp", "kl" (and "occupancy"), and the weighted sum "total".

        crop_latents: edge of a random cube a sample, inside which the decoder is asked (32 at 1024); the upsampling then runs there and on
        a halo of 3 latents, so that the crop's values are those of the whole. None: everywhere. The generator lives on the batch's device.
        """
        c, grid = self.config, batch.resolution // CELL
        partitions = self.partitions(batch.latents)
        targets, latents = make_targets(batch, c.ext_target, c.focus), batch.latents
        posterior = self._encode(batch, partitions, targets)
        z = posterior.sample(generator)
        h = self.decoder.attend(z, batch.latents, partitions, _factor(batch.resolution))
        if crop_latents is None:
            predicted, logits = self.decoder.upsample(h, z, latents, grid)
        else:
            rows, core = _crop(batch, crop_latents, generator)
            predicted, logits = self.decoder.upsample(h[rows], z[rows], latents[rows], grid)
            predicted, logits = predicted[core], {edge: logit[core] for edge, logit in logits.items()}
            targets = targets.rows(rows[core])
        terms = reconstruction_terms(predicted, targets, c.error)
        terms["kl"] = kl_divergence(posterior.mean, posterior.logvar)
        weights = {"in": c.lambda_in, "ext": c.lambda_ext, "sharp": c.lambda_sharp, "kl": c.lambda_kl}
        if c.occupancy:
            terms["occupancy"] = occupancy_loss(logits, targets.band[:, children_of_slots(latents.device)])
            weights["occupancy"] = c.lambda_occupancy
        terms["total"] = torch.stack([weight * terms[name] for name, weight in weights.items()]).sum()
        return terms

    def flops(self, batch: VolumeBatch, crop_latents: int | None = None) -> float:
        """Operations of the matrix products of one forward, two a multiply-add; absent neighbours cost none. What is fitted to cells (in
        float64) is left out. crop_latents: as `loss`; of one drawing, which is always the same.

        It builds the structure of the batch once more: ask now and then, not every step.
        """
        plan = EncoderPlan.build(batch)
        upsampled = plan.levels[-1]
        if crop_latents is not None:
            latents = batch.latents[_crop(batch, crop_latents, torch.Generator(batch.latents.device).manual_seed(0))[0]]
            upsampled = Level(1, latents, find_latent_neighbors(latents, batch.resolution // CELL))
        return forward_flops(self, plan, self.partitions(batch.latents), upsampled)

    def _encode(self, batch: VolumeBatch, partitions: tuple[ssa.VoxelPartition, ssa.VoxelPartition], targets: Targets) -> Posterior:
        fit = None
        if self.config.head == "pieces":
            fit = fit_cells(targets, batch.resolution, self.config.planes) if batch.fit is None else batch.fit
        return Posterior(*self.encoder(EncoderPlan.build(batch), partitions, _factor(batch.resolution), fit))


def _factor(resolution: int) -> float:
    """Of the position code: a place in the cube has one code at every resolution, that of the 64^3 grid."""
    return 64 * CELL / resolution


def _crop(batch: VolumeBatch, edge: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A random cube of `edge` latents a sample: rows of the latents in it and its halo, and which of these rows it holds."""
    low = _crop_corner(batch, edge, generator)[batch.latents[:, 0].long()]
    rows = _inside(batch.latents, low - HALO, edge + 2 * HALO).nonzero().flatten()
    return rows, _inside(batch.latents[rows], low[rows], edge).nonzero().flatten()


def _crop_corner(batch: VolumeBatch, edge: int, generator: torch.Generator | None) -> Tensor:
    """[B,3] lowest corner of a cube of `edge` latents round a random latent of each sample, moved into the grid."""
    if edge < 1:
        raise ValueError(f"crop_latents must be at least 1, got {edge}")
    counts = batch.cu_latents.diff().long()
    drawn = torch.rand(len(counts), generator=generator, device=counts.device)
    row = batch.cu_latents[:-1].long() + (drawn * counts).long().clamp(max=(counts - 1).clamp(min=0))
    low = batch.latents[row.clamp(max=len(batch.latents) - 1), 1:].long() - edge // 2
    return low.clamp(min=0, max=max(batch.resolution // CELL - edge, 0))


def _inside(latents: Tensor, low: Tensor, edge: int) -> Tensor:
    """[L] bool: latents [L,4] in the cube of `edge` from low [L,3]."""
    step = latents[:, 1:] - low
    return ((step >= 0) & (step < edge)).all(1)


def _check_decode(z: Tensor, latents: Tensor, resolution: int, channels: int) -> None:
    if resolution < CELL or resolution % CELL:
        raise ValueError(f"resolution must be a positive multiple of {CELL}, got {resolution=}")
    check_latents(latents, resolution // CELL)
    if z.shape != (len(latents), channels):
        raise ValueError(f"z must be [L,{channels}] for {len(latents)} latents, got {z.shape=}")
