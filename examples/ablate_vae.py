"""What limits the VAE: the compact model trained for as many minutes in each variant, scored on the held-out meshes at 256.

`python -m examples.ablate_vae --meshes DIR --prepared DIR --out DIR [--minutes 1] [--jobs 1]` → OUT/ablation.md; PREPARED holds volumes at
256 and 512, as `examples.train_full` leaves them. A scored variant is not trained again, and the volumes of the held-out meshes in
OUT/volumes are not made again: other MESHES or minutes need another OUT.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from reference_model.cli import parse
from reference_model.dataset import find_prepared
from reference_model.distributed import Ranks
from reference_model.vae_fits import fits_folder, keep_fits

# name → settings of train_vae, settings of evaluate_vae
VARIANTS: dict[str, tuple[list[str], list[str]]] = {
    "pieces, learned pooling, subpixel decoder": ([], []),
    "pieces alone, no training": (["trainer.steps=1", "trainer.lr=0"], []),
    "up to three pieces, no planes": (["vae.planes=false"], []),
    "no pieces, clamped": (["vae.head=clamp"], []),
    "no pieces, tanh (paper)": (["vae.head=tanh"], []),
    "pooling by the mean (paper)": (["vae.pooling=mean"], []),
    "symmetric decoder (paper)": (["vae.decoder=symmetric"], []),
    "released decoder": (["vae.decoder=released"], []),
    "no pieces, outside of the band taught +1 (released)": (["vae.head=tanh", "vae.ext_target=released"], []),
    "no sharp loss": (["vae.lambda_sharp=0"], []),
    "occupancy head, pruned at 1/2": (["vae.occupancy=true"], ["prune=0.5"]),
    "trained at 256 and 512": (["resolutions=[256,512]"], []),
    "a hundredth of the KL": (["vae.lambda_kl=1e-5"], []),
    "all voxels alike": (["vae.focus=null"], []),
    "squares, all alike (paper)": (["vae.error=squared", "vae.focus=null"], []),
    "AdamW (paper)": (["trainer.optimizer=adamw", "trainer.lr=1e-3"], []),
}
BASE = [
    "train=gpu-multi", "vae=compact", "data=prepared", "resolutions=[256]", "tokens=4000", "trainer.optimizer=muon",
    "trainer.lr=7e-4", "trainer.warmup=50", "picture=false", "compile=false",
]  # fmt: skip


def one_thread() -> dict[str, str]:
    """The environment of processes that are as many as there are cores."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def command(module: str, *arguments: str) -> None:
    """Run a module of the reference model; RuntimeError with the end of what it said."""
    call = [sys.executable, "-m", f"reference_model.{module}", *arguments]
    done = subprocess.run(call, env=one_thread(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)}: {done.stderr[-2000:]}")


def run_variant(options: argparse.Namespace, names: str, variant: tuple[str, tuple[list[str], list[str]]]) -> dict[str, Any]:
    """Train and score one variant: its last validation and its gaps to the ceiling."""
    name, (training, scoring) = variant
    out = options.out / name.split(" (")[0].replace(" ", "_").replace("/", "_").replace(",", "")
    schedule = [f"trainer.schedule_minutes={options.minutes}", "trainer.validate_every=100000"]
    if not (out / "scores" / "scores.json").exists():
        begun = [] if any(setting.startswith("vae.head=") for setting in training) else [f"fits={options.out / 'fits'}"]
        data = [f"prepared={options.prepared}", *begun, f"workers={options.workers}"]
        command("train_vae", *BASE, *schedule, *training, *data, f"out={out}")
        paths = [f"meshes={options.meshes}", f"weights={out / 'weights.safetensors'}", f"out={out / 'scores'}"]
        paths += [f"volumes={options.out / 'volumes'}", f"names=[{names}]"]
        more = ["resolution=[256]", f"workers={options.workers}", "pictures=false"]
        command("evaluate_vae", *paths, *more, *scoring)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    gaps = json.loads((out / "scores" / "scores.json").read_text())["gaps"][0]
    return {"name": name, "loss": [row for row in rows if row["kind"] == "validation"][-1], "gaps": gaps}


def table(rows: Sequence[dict[str, Any]], minutes: float) -> str:
    text = [f"# What limits the VAE: {minutes:g} minutes of the compact model at 256", ""]
    text += [f"`python -m examples.ablate_vae {shlex.join(sys.argv[1:])}`", ""]
    text += ["Losses on the held-out meshes, each as it was minimised (smooth L1 beside squares says nothing),"]
    text += ["then the gap to the ceiling, mean over the closed ones.", ""]
    text += ["| variant | steps | in | ext | sharp | F1@.005 | F1@.001 | F1@2e-4 | normals | area off % | pieces equal |"]
    text += ["|---|" + "---:|" * 10]
    for row in rows:
        loss, gaps = row["loss"], row["gaps"]
        cells = [row["name"], str(loss["step"]), *(f"{loss[name]:.4f}" for name in ("in", "ext", "sharp"))]
        cells += [f"{gaps[name]:.2f}" for name in ("f1@0.005", "f1@0.001", "f1@0.0002", "normal_consistency", "area")]
        text.append("| " + " | ".join([*cells, f"{gaps['components']} of {gaps['meshes']}"]) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--meshes", type=Path, required=True)
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--jobs", type=int, default=1, help="variants trained at once, on one device")
    parser.add_argument("--workers", type=int, default=4, help="processes of each that make batches")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    held_out = ",".join(parse("train_vae", ("out",), [])[0].held_out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_fits(find_prepared(options.prepared), fits_folder(options.out / "fits", True), device, Ranks())  # once, not by each job
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(partial(run_variant, options, held_out), [(name, VARIANTS[name]) for name in options.only]):
            rows.append(row)
            (options.out / "ablation.md").write_text(table(rows, options.minutes), encoding="utf-8")  # what is there, should it be stopped
            print(table(rows, options.minutes).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
