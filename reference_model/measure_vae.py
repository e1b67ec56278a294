"""What the VAE costs: `python -m reference_model.measure_vae out=DIRECTORY [weights=PATH] [conv_backend=triton] [memory_gb=80]`.

Volumes are concentric spheres: how many decides the number of latents. For each resolution: a training step (forward and backward in bf16,
the decoder asked in one crop where `crop_from` says so; `checkpointing` and `compile` as in training), also with fits that are kept,
encoding without and with a look at what it decodes to (`encode_volume`), and decoding in chunks for each precision. Spheres are fitted
faster than what has edges: one piece a cell is enough. Times are medians after warm-up, synchronised; peaks are what torch allocated
beyond the weights. Writes `measure.json` and `measure.md`.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference_model.cli import parse
from reference_model.dataset import VolumeBatch, collate_volumes
from reference_model.tiles import lattice
from reference_model.vae import SparseVAE, VAEConfig
from reference_model.vae_blocks import compile_fused
from reference_model.vae_decode import decode_volume, load_vae
from reference_model.vae_encode import encode_volume
from reference_model.vae_fit import fit_cells
from reference_model.vae_loss import make_targets
from reference_model.vae_pieces import opened
from reference_model.volume import CELL, TAU, Volume, voxel_centers

_PRECISION = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def spheres(radii: Sequence[float], resolution: int, device: torch.device | str = "cpu") -> Volume:
    """Volume of concentric spheres; inside and outside alternate from shell to shell."""
    ordered = torch.tensor(sorted(radii), device=device)
    grid = resolution // CELL

    def distance(points: Tensor) -> Tensor:
        r = points.norm(dim=-1)
        sign = 1 - 2.0 * ((r[..., None] < ordered).sum(-1) % 2)
        return sign * (r[..., None] - ordered).abs().amin(-1)

    cells = lattice(grid, device)
    cells = cells[distance(voxel_centers(cells, grid)).abs() <= TAU + 3**0.5 / grid].int()
    children = lattice(CELL, device).int()
    t = torch.cat([distance(voxel_centers(c[:, None] * CELL + children, resolution)) / TAU for c in cells.split(1 << 12)])
    t = torch.where(t.abs() <= 1, t, t.sign() * 2)
    used = (t.abs() <= 1).any(1)
    cells, t = cells[used], t[used]
    latent, child = (t.abs() <= 1).nonzero().unbind(1)
    values = t[latent, child]
    return Volume(
        resolution, cells[latent] * CELL + children[child], values, torch.zeros_like(values, dtype=torch.bool), cells, latent.int(), t < 0
    )


def measure(function: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, float]:
    """{"ms": median, "gb": peak of allocated memory beyond what was there before}; gb is 0 without a GPU."""
    cuda = device.type == "cuda"
    function()
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9 if cuda else 0.0
    return {"ms": statistics.median(times), "gb": peak}


def train_step(model: SparseVAE, batch: VolumeBatch, crop: int | None) -> None:
    """Forward and backward as a trainer does them."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(batch.coords.device.type, torch.bfloat16):
        loss = model.loss(batch, crop_latents=crop)["total"]
    loss.backward()


def measure_one(model: SparseVAE, volume: Volume, config: Any, device: torch.device) -> list[dict[str, Any]]:
    """Rows of one volume: train, encode and decode at each precision."""
    batch = collate_volumes([volume]).to(device)
    facts = {"resolution": volume.resolution, "latents": len(volume.latents), "voxels": len(volume.coords)}
    rows = []
    crop = config.crop_latents if volume.resolution >= config.crop_from else None
    if facts["latents"] <= config.train_latents:
        steps = {"training step": batch}
        if model.config.head == "pieces":
            steps["training step, fits kept"] = replace(batch, fit=fit_cells(make_targets(batch), volume.resolution, model.config.planes))
        passes = 4 if config.checkpointing else 3  # forward, perhaps again, and a backward of two
        operations = passes * 1e-9 * model.flops(batch, crop)
        for what, given in steps.items():
            cost = measure(partial(train_step, model.train(), given, crop), device, config.repeats)
            rows.append(facts | {"what": what, "precision": "bf16", "crop": crop} | cost | {"tflops": operations / cost["ms"]})
        model.zero_grad(set_to_none=True)
    latents = batch.latents[:, 1:]
    model.eval()
    with torch.no_grad():
        z = model.encode(batch).mean
        if model.config.head == "pieces":  # of smooth spheres the network would correct nothing, in any precision
            z = opened(z, torch.ones_like(z[:, 0], dtype=torch.bool))
        exact = decode_volume(model, z, latents, volume.resolution, config.chunk)[1]
        for name in config.precisions:
            with torch.autocast(device.type, _PRECISION[name], enabled=name != "fp32"):
                rows.append(facts | {"what": "encode", "precision": name} | measure(lambda: model.encode(batch), device, config.repeats))
                cost = measure(lambda: encode_volume(model, batch), device, config.repeats)
                rows.append(facts | {"what": "encode and look", "precision": name} | cost)

                def decode() -> Tensor:
                    return decode_volume(model, z, latents, volume.resolution, config.chunk)[1]

                cost = measure(decode, device, config.repeats)
                error = (decode() - exact).abs().max().item()
            rows.append(facts | {"what": "decode", "precision": name, "largest_difference": error} | cost)
    return rows


def table(rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> str:
    text = ["# What the VAE costs", "", f"`{settings['command']}`", "", settings["versions"], ""]
    text += ["| what | R | latents | voxels | precision | ms | M voxels/s | peak GB | TFLOP/s | largest difference to fp32 |"]
    text += ["|---|" + "---:|" * 3 + "---|" + "---:|" * 5]
    for r in rows:
        what = r["what"] + (f", crop {r['crop']}" if r.get("crop") else "")
        rest = [f"{r[name]:.2g}" if name in r else "" for name in ("tflops", "largest_difference")]
        cells = [what, str(r["resolution"]), f"{r['latents']:,}", f"{r['voxels']:,}", r["precision"], f"{r['ms']:.1f}"]
        text.append("| " + " | ".join([*cells, f"{r['voxels'] / r['ms'] / 1e3:.1f}", f"{r['gb']:.2f}", *rest]) + " |")
    return "\n".join(text) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    config, paths = parse("measure_vae", ("out", "weights"), argv, required=("out",))
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    out = Path(paths["out"])
    out.mkdir(parents=True, exist_ok=True)
    if config.memory_gb and device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, config.memory_gb * 1e9 / torch.cuda.get_device_properties(device).total_memory))
    torch.manual_seed(0)
    if "weights" in paths:
        model = load_vae(paths["weights"], device, config.conv_backend).requires_grad_(True)
    else:
        model = SparseVAE(VAEConfig(conv_backend=config.conv_backend, **config.vae)).to(device)
        torch.nn.init.normal_(model.decoder.head.weight, std=config.vae.channels[0] ** -0.5)  # a fresh one adds nothing
    model.activation_checkpointing = config.checkpointing
    if config.compile:
        compile_fused(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    settings = {"command": " ".join(["python -m reference_model.measure_vae", *(sys.argv[1:] if argv is None else argv)])}
    settings["versions"] = f"{name}, torch {torch.__version__}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
    rows: list[dict[str, Any]] = []
    for case in config.cases:
        volume = spheres(case.radii, case.resolution, device)
        rows += measure_one(model, volume, config, device)
        (out / "measure.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1), encoding="utf-8")
        (out / "measure.md").write_text(table(rows, settings), encoding="utf-8")
        print("\n".join(table(rows, settings).splitlines()[-7:]), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
