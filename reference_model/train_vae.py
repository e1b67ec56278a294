"""Train the VAE: `python -m reference_model.train_vae train=gpu-512 vae=compact data=mixed prepared=DIRECTORY out=DIRECTORY`.

Under torchrun (`torchrun --nproc-per-node 2 -m reference_model.train_vae …`) ranks average their gradients. `--help` lists every setting.
Writes out/checkpoints, out/log.jsonl, out/tensorboard, out/pictures and, at the end, out/weights.safetensors: the EMA in bf16.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reference_model.batches import BatchStream, DrawnBatch, PreparedSource, ShapeSource, Source
from reference_model.checkpoint import git_commit
from reference_model.cli import optional_import, parse
from reference_model.dataset import PreparedVolume, VolumeBatch, collate_volumes, find_prepared
from reference_model.distributed import Ranks
from reference_model.extract import extract_mesh
from reference_model.packed import PackedBatch, PackedVolume, read_packed
from reference_model.train_settings import TrainSettings
from reference_model.trainer import Trainer
from reference_model.vae import SparseVAE, VAEConfig
from reference_model.vae_blocks import compile_fused
from reference_model.vae_decode import decode_volume, load_vae, save_vae
from reference_model.vae_fits import fits_folder, keep_fits
from reference_model.volume import RESAMPLING_MARGIN, Volume, load_volume

# what may change between the calls of one run; all else shapes the curve
_FREE = ("workers", "device", "commit", "picture", "validation")
_FREE_TRAINER = ("minutes", "log_every", "validate_every", "save_every", "keep", "max_skipped", "peak_tflops")
_VALIDATION_SEED = 1_000_000  # first seed of the shapes that validate


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run trains on and what it is scored on."""

    stream: BatchStream
    validation: list[VolumeBatch]  # one volume each, the same on every rank
    overfit: VolumeBatch | None
    facts: dict[str, Any]

    def batches(self, workers: int, start: int) -> Iterator[VolumeBatch | DrawnBatch]:
        return repeat(self.overfit) if self.overfit else self.stream.loader(start, workers)


def split_prepared(volumes: Sequence[PreparedVolume], held_out: Sequence[str]) -> tuple[list[PreparedVolume], list[PreparedVolume]]:
    """(to train on, to validate on): meshes named in held_out and copies of them validate, or the split "val" where there are none."""
    hashes = {v.geometry for v in volumes if v.name in held_out}
    held = [v for v in volumes if v.geometry in hashes]
    train = [v for v in volumes if v.geometry not in hashes and v.split == "train"]
    return train, held or [v for v in volumes if v.split == "val"]


def load_data(config: Mapping[str, Any], paths: Mapping[str, str], rank: int = 0) -> Data:
    """Sources, validation volumes and facts about them. ValueError where nothing is left to draw."""
    if config["overfit"] and config["patch_latents"]:
        raise ValueError(f"overfit trains on whole volumes: patch_latents must be null, got {config['patch_latents']}")
    resolutions = list(config["resolutions"])
    sources: list[tuple[Source, float]] = []
    validation: list[VolumeBatch] = []
    facts: dict[str, Any] = {}
    if config["weights"]["prepared"]:
        if "prepared" not in paths:
            raise ValueError("prepared= must be given: weights.prepared is not 0")
        train, held = split_prepared(find_prepared(paths["prepared"]), list(config["held_out"]))
        fitting = [v for v in train if config["patch_latents"] or v.tokens <= config["max_tokens"] or v.resolution not in resolutions]
        facts |= {"train": len(fitting), "dropped": len(train) - len(fitting), "held_out": sorted({v.name for v in held})}
        _check_resolutions(fitting, resolutions)
        source = PreparedSource(tuple(fitting), fits_folder(paths["fits"], config["vae"]["planes"]) if "fits" in paths else None)
        sources.append((source, config["weights"]["prepared"]))
        for resolution in sorted({v.resolution for v in held}):
            group = [v for v in held if v.resolution == resolution and v.tokens <= config["max_tokens"]]
            validation += [_whole(source.read(v, resolution)) for v in group[: config["validation"]]]
    if config["weights"]["shapes"]:
        shapes = _shapes(config, paths)
        facts["shapes"] = len(shapes.families) * shapes.count
        sources.append((shapes, config["weights"]["shapes"]))
        if not validation:
            made = [shapes.make(name, _VALIDATION_SEED, resolutions[0]) for name in shapes.families[: config["validation"]]]
            validation = [_whole(volume) for volume in made]
    stream = BatchStream(
        sources, resolutions, config["tokens"], config["max_tokens"], config["trainer"]["seed"], config["symmetries"], rank=rank,
        patch_latents=config["patch_latents"], patch_tokens=config["patch_tokens"],
    )  # fmt: skip
    overfit = None
    if config["overfit"]:
        alone = dataclasses.replace(stream, symmetries=False, tokens=1)
        overfit = collate_volumes(_first(alone, config["overfit"], resolutions[0]))
        return Data(stream, [overfit], overfit, facts | {"overfit": [m.get("source", "") for m in overfit.meta]})
    return Data(stream, validation, None, facts)


def _check_resolutions(volumes: Sequence[PreparedVolume], resolutions: Sequence[int]) -> None:
    """ValueError unless volumes are of these resolutions, or the finest can be resampled."""
    absent = sorted(set(resolutions) - {v.resolution for v in volumes})
    finest = max(volumes, key=lambda v: v.resolution, default=None)
    if absent and finest and not read_packed(finest.path).margin:
        raise ValueError(
            f"resolutions={absent} were not prepared, and {finest.path.name} has no margin to be resampled: "
            f"prepare with margin={RESAMPLING_MARGIN:.4f}, or draw resolutions={sorted({v.resolution for v in volumes})}"
        )


def _whole(volume: Volume | PackedVolume) -> VolumeBatch:
    return PackedBatch.of([volume]).unpack("cpu") if isinstance(volume, PackedVolume) else collate_volumes([volume])


def _keep_fits(config: Mapping[str, Any], paths: Mapping[str, str], device: torch.device, ranks: Ranks) -> None:
    """What fits= asks for; ValueError where no batch would use it."""
    head, share = config["vae"]["head"], config["weights"]["prepared"]
    if head != "pieces" or not share or "prepared" not in paths:
        raise ValueError(f"fits= is of prepared volumes and of head pieces, got head {head}, weights.prepared {share} and {sorted(paths)}")
    planes = config["vae"]["planes"]
    keep_fits(find_prepared(paths["prepared"]), fits_folder(paths["fits"], planes), device, ranks, planes)


def _shapes(config: Mapping[str, Any], paths: Mapping[str, str]) -> ShapeSource:
    from reference_model.shapes import FAMILIES

    wanted = config["shapes"]
    names = list(FAMILIES) if wanted["families"] == "all" else wanted["families"].split("+")
    if unknown := sorted(set(names) - set(FAMILIES)):
        raise ValueError(f"unknown families {unknown}, only {' '.join(FAMILIES)}")
    return ShapeSource(tuple(names), wanted["count"], wanted["first"], Path(paths["cache"]) if "cache" in paths else None)


def _first(stream: BatchStream, count: int, resolution: int) -> list[Volume]:
    """The first volumes of the first source, in its own order."""
    source = stream.sources[0][0]
    if isinstance(source, ShapeSource):
        places = [(source.families[i % len(source.families)], source.first + i // len(source.families)) for i in range(count)]
        return [source.make(family, seed, resolution) for family, seed in places]
    assert isinstance(source, PreparedSource)
    return [load_volume(v.path) for v in source.volumes if v.resolution == resolution][:count]


def vae_loss(crop_latents: int | None, model: Any, batch: VolumeBatch, generator: torch.Generator) -> dict[str, Tensor]:
    """The loss of a crop of each sample, or of all of it."""
    return model.loss(batch, generator, crop_latents=crop_latents)


def draw_reconstruction(batch: VolumeBatch, precision: str, model: Any, path: Path) -> None:
    """Write the surface of a batch's only volume beside its reconstruction (posterior mean); nothing where no surface is decoded."""
    from reference_model.evaluate_meshes import save_side_by_side
    from reference_model.metrics import Surface

    device = next(model.parameters()).device
    moved = batch.to(device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        z = model.encode(moved).mean
        decoded = decode_volume(model, z, moved.latents[:, 1:], batch.resolution)
    surfaces = {}
    for name, (coords, values, inside) in {"truth": (batch.coords[:, 1:], batch.values, batch.inside), "result": decoded}.items():
        vertices, faces, _ = extract_mesh(coords, values, batch.resolution, inside)
        if len(faces) == 0:
            return
        surfaces[name] = Surface(vertices.cpu().numpy(), faces.cpu().numpy())
    save_side_by_side(surfaces, path, f"{batch.meta[0].get('source', '')} at {batch.resolution}", size=320)


def build_model(config: Mapping[str, Any], paths: Mapping[str, str], device: torch.device) -> SparseVAE:
    """The model of config["vae"], or the weights of init= if they are of that form."""
    torch.manual_seed(config["trainer"]["seed"])
    model = SparseVAE(VAEConfig(conv_backend=config["conv_backend"], **config["vae"]))
    if "init" in paths:
        model.load_state_dict(load_vae(paths["init"]).state_dict())
    model.activation_checkpointing = config["checkpointing"]
    if config["compile"]:
        compile_fused(model)
    return model.to(device)


def run(config: dict[str, Any], paths: Mapping[str, str], ranks: Ranks) -> Trainer:
    """One call of a training run."""
    device = ranks.device(config["device"])
    if "fits" in paths:
        _keep_fits(config, paths, device, ranks)
    data = load_data(config, paths, ranks.rank)
    settings = TrainSettings(**config["trainer"] | {"betas": tuple(config["trainer"]["betas"])})
    model = build_model(config, paths, device)
    shaping = {name: value for name, value in config.items() if name not in _FREE}
    shaping["trainer"] = {name: value for name, value in config["trainer"].items() if name not in _FREE_TRAINER}
    card = {
        "config": json.loads(json.dumps(shaping)), "commit": config["commit"] or git_commit(), "data_hash": data.stream.data_hash(),
        "ranks": ranks.size, "parameters": sum(p.numel() for p in model.parameters()), **data.facts,
    }  # fmt: skip
    if ranks.rank == 0:
        print(json.dumps({name: value for name, value in card.items() if name != "config"}), file=sys.stderr)
    picture: Callable[[nn.Module, Path], None] | None = None
    if config["picture"] and data.validation:
        picture = partial(draw_reconstruction, data.validation[0], settings.precision)
    crop = config["crop_latents"]
    trainer = Trainer(
        model, partial(data.batches, config["workers"]), settings, Path(paths["out"]), loss=partial(vae_loss, crop),
        flops=partial(model.flops, crop_latents=crop), validation=data.validation, picture=picture, card=card, ranks=ranks,
    )  # fmt: skip
    trainer.run()
    if ranks.rank == 0:
        facts = {name: json.dumps(value) if isinstance(value, (dict, list)) else value for name, value in card.items() if name != "config"}
        facts |= {"training": json.dumps(card["config"]), "step": trainer.state.step, "hours": round(trainer.state.seconds / 3600, 4)}
        save_vae(trainer.ema, Path(paths["out"]) / "weights.safetensors", torch.bfloat16, **facts)  # type: ignore[arg-type]
    return trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for a mistake on the command line."""
    config, paths = parse("train_vae", ("out", "prepared", "fits", "cache", "init"), argv, required=("out",))
    settings: dict[str, Any] = optional_import("omegaconf").OmegaConf.to_container(config, resolve=True)
    ranks = Ranks.launched()
    try:
        run(settings, paths, ranks)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        ranks.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
