"""A VAE in one go, from meshes to scores: `python -m examples.train_full --meshes DIR --out DIR [key=value …]`.

Volumes come from a list that mixes the meshes, shapes made by code and turned, stretched, thin and rough copies of both; meshes that
configs/train_vae.yaml holds out are scored at each resolution and not trained on. What else is given goes to `train_vae`, as vae=compact.
With several GPUs torchrun trains on all of them. Writes OUT/run, OUT/scores_RESOLUTION and OUT/scores_mean_RESOLUTION (by the mean of
the posterior alone); a stage that is complete is not done again.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from examples.ablate_vae import command, one_thread
from reference_model.cli import parse
from reference_model.shapes import FAMILIES
from reference_model.sources import find_sources

LONGEST = 120  # seconds that a volume may take: one mesh must not hold up a run of minutes
SINGLE = ("lattice", "minimal")  # heavy: one shape of each, no copies
NO_COPIES = (*SINGLE, "nested")  # of many pieces
BLADES = 8  # times as many of the thinnest family
RECIPE = [
    "train=gpu-multi", "vae=full", "data=prepared", "tokens=7000", "patch_latents=24", "patch_tokens=800",
    "max_tokens=150000", "checkpointing=false", "trainer.optimizer=muon", "trainer.lr=1e-3", "trainer.warmup=100", "trainer.ema=0.998",
    "trainer.validate_every=1500", "trainer.save_every=3000", "picture=false",
]  # fmt: skip


def make_meshes(meshes: Path, out: Path, count: int, pool: ThreadPoolExecutor) -> None:
    """OUT/shapes and OUT/copies."""
    folders = []
    jobs: list[tuple[str, ...]] = []
    for family in FAMILIES:
        for part in range(BLADES if family == "blade" else 1):
            folder = out / "shapes" / f"{family}_{part}"
            number = 1 if family in SINGLE else count
            jobs.append(("shapes", f"out={folder}", f"families={family}", f"count={number}", f"seed={part * count}"))
            folders += [folder] * (family not in NO_COPIES)
    for seed, least in [(0, 0.4), (1, 0.4), (2, 0.4), (3, 0.4), (100, 0.03), (101, 0.03), (102, 0.03)]:
        jobs.append(("variants", f"meshes={meshes}", f"out={out / 'copies' / str(seed)}", "count=1", f"seed={seed}", f"least={least}"))
    run_all(pool, jobs)
    kinds = {"turned": ("least=0.5",), "thin": ("seed=100", "least=0.03"), "rough": ("seed=200", "least=0.5", "rough=0.001")}
    places = [(f, out / "copies" / f.name / kind, how) for f in folders for kind, how in kinds.items()]
    run_all(pool, [("variants", f"meshes={folder}", f"out={copies}", "count=1", *how) for folder, copies, how in places])


def run_all(pool: ThreadPoolExecutor, jobs: Sequence[tuple[str, ...]]) -> None:
    list(pool.map(lambda job: command(*job), jobs))


def write_list(meshes: Path, out: Path, held: Sequence[str], volumes: int, seed: int, path: Path) -> None:
    """A manifest of so many: the held-out meshes, then a random choice of all else."""
    own = [s.path for s in find_sources(str(meshes))]
    first = [p for p in own if p.stem in held]
    rest = [p for p in own if p.stem not in held] + [s.path for kind in ("shapes", "copies") for s in find_sources(str(out / kind))]
    random.Random(seed).shuffle(rest)
    path.write_text("\n".join(["path", *(str(p.resolve()) for p in [*first, *rest][:volumes])]) + "\n", encoding="utf-8")


def once(mark: Path, stage: Callable[[], None]) -> None:
    """Do a stage unless it was completed before."""
    if not mark.exists():
        print(mark.stem, flush=True)
        stage()
        mark.touch()


def launch(*arguments: str) -> list[str]:
    """What trains on all GPUs."""
    gpus = torch.cuda.device_count()
    several = ["torch.distributed.run", "--nproc-per-node", str(gpus), "-m"] if gpus > 1 else []
    return [sys.executable, "-m", *several, "reference_model.train_vae", *arguments]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--meshes", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.5, help="of training")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--chances", type=int, nargs="+", default=[4, 1], help="of each resolution to be drawn for a step")
    parser.add_argument("--volumes", type=int, nargs="+", default=[220, 18], help="at each resolution, the held-out ones among them")
    parser.add_argument("--shapes", type=int, default=9, help="of each family")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    options, settings = parser.parse_known_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    parse("train_vae", ("init",), [*RECIPE, *settings])  # a mistake is told before the volumes are made
    held = list(parse("train_vae", (), [])[0].held_out)
    plan = list(zip(options.resolutions, options.volumes, range(len(options.volumes)), strict=True))
    works = [volumes * r**2 for r, volumes, _ in plan]
    shares = [max(1, round(options.workers * work / sum(works))) for work in works]  # so that all resolutions are ready at once
    drawn = [r for r, chance in zip(options.resolutions, options.chances, strict=True) for _ in range(chance)]

    def prepare() -> None:
        jobs = []
        for (resolution, volumes, seed), share in zip(plan, shares, strict=True):
            path, made = out / f"list_{resolution}.csv", out / "prepared" / str(resolution)
            write_list(options.meshes, out, held, volumes, seed, path)
            how = ("val=0", "test=0", "contact_sheet=0", f"timeout={LONGEST}", f"workers={share}")
            jobs.append(("prepare", f"meshes={path}", f"out={made}", f"resolution={resolution}", *how))
        run_all(pool, jobs)

    def train() -> None:
        minutes = f"trainer.schedule_minutes={options.minutes}"
        paths = [f"prepared={out / 'prepared'}", f"fits={out / 'fits'}", f"out={out / 'run'}"]
        loaders = max(1, options.workers // 2 // max(1, torch.cuda.device_count()))
        drawing = [f"resolutions={drawn}".replace(" ", ""), f"workers={loaders}"]
        subprocess.run(launch(*RECIPE, minutes, *paths, *drawing, *settings), env=one_thread(), check=True)

    def score() -> None:
        share = max(1, options.workers // len(options.resolutions))
        fixed = [f"meshes={options.meshes}", f"names=[{','.join(held)}]", f"workers={share}", f"weights={out}/run/weights.safetensors"]
        fixed += [setting for setting in settings if setting.startswith("commit=")]
        for where, *how in (("scores", "latents=chosen"), ("scores_mean", "latents=mean", "pictures=false")):
            jobs = [(f"out={out / f'{where}_{r}'}", f"resolution={r}", f"volumes={out / 'scored'}", *how) for r in options.resolutions]
            run_all(pool, [("evaluate_vae", *fixed, *job) for job in jobs])

    with ThreadPoolExecutor(options.workers) as pool:
        once(out / "meshes.done", lambda: make_meshes(options.meshes, out, options.shapes, pool))
        once(out / "volumes.done", prepare)
        once(out / "training.done", train)
        once(out / "scores.done", score)
    for where in ("scores", "scores_mean"):
        for resolution in options.resolutions:
            print((out / f"{where}_{resolution}" / "scores.md").read_text().split("\n\n")[4])


if __name__ == "__main__":
    main()
