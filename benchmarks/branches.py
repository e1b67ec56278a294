"""Growth of each branch with T, from 4k to 1M voxels: `python -m benchmarks.branches`, or as the last part of `benchmarks.run`.

One shape refined: a gyroid on a grid of edge sqrt(T / 8), so that blocks stay as full and C and S grow with T. The rows have the
columns of `benchmarks.run`, with the branch as impl; limit_share is the time that the model of `cases.py` predicts over the time taken.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

import ssa

from . import report
from .cases import CHIPS, Case, Inputs, Pairs, count_pairs, limit_seconds, make_inputs, ssa_work, useful_flops
from .gate import GateError, check_forward
from .rows import ResultFile
from .timing import Calls, environment, measure, reason_of, synchronize, three_calls
from .voxels import gyroid

TOKENS = (4_096, 16_384, 65_536, 262_144, 1_048_576)
HEAD_DIM, BLOCKS = 32, (4, 8, 8)
PASSES = {"all": ("fwd", "bwd"), "cmp": ("fwd", "bwd"), "score": ("fwd",), "slc": ("fwd", "bwd"), "win": ("fwd", "bwd")}


def path_beside(path: Path) -> Path:
    """h200.csv → h200-branches.csv."""
    return path.with_name(path.stem + "-branches.csv")


def run(path: Path, env: dict[str, str], device: torch.device, options: argparse.Namespace, deadline: float = float("inf")) -> None:
    """Time every branch at each T up to the largest asked for, none that would end after `deadline` (time.monotonic).

    Rows go to `path_beside(path)`; a T that fails is recorded and the others go on.
    """
    tokens = [T for T in TOKENS if T <= max(options.T)]
    if not tokens:
        return
    results = ResultFile(path_beside(path), env, {}, resume=options.resume)
    for T in tokens:
        if time.monotonic() + 20 + T / 20_000 > deadline:
            print(f"No time for the branches at T = {T:,} (call again with --resume)")
            continue
        whole = Case("all", T, HEAD_DIM, BLOCKS, "gyroid", 0)
        results.forget(whole, "all")
        try:
            run_size(T, results, device, options.dtype, options.budget)
        except Exception as error:
            results.fail(whole, "all", reason_of(error))
            print(f"{whole} FAILED: {reason_of(error)}", flush=True)
            synchronize(device)


def check_branches(inputs: Inputs, topk_indices: Tensor) -> None:
    """The public branches, gated and summed, give the operator within the roundings of three summands."""
    with torch.no_grad():
        o = inputs.attend(topk_indices)
        parts = [cast(Tensor, branch_calls(name, inputs, topk_indices)["fwd"]()) for name in ("cmp", "slc", "win")]
        total = torch.zeros(o.shape, device=o.device)
        for i, part in enumerate(parts):
            total += inputs.gates[:, i, None, None] * part.float()
        error, bound = float((total - o).abs().max()), 4 * torch.finfo(o.dtype).eps * max(float(part.abs().max()) for part in parts)
    if not error <= bound:
        raise GateError(f"the branches must sum to the operator within {bound:.3g}, got {error:.3g}")


def run_size(num_tokens: int, results: ResultFile, device: torch.device, dtype: torch.dtype, budget: float) -> None:
    """The rows of one T that `results` lacks; a branch that fails is recorded and the others go on."""
    resolution = max(16, round((num_tokens / 8) ** 0.5))
    cases = {name: Case(name, num_tokens, HEAD_DIM, BLOCKS, "gyroid", resolution) for name in PASSES}
    missing = [(name, pass_) for name, case in cases.items() for pass_ in PASSES[name] if (case, pass_) not in results]
    if not missing:
        return
    inputs = make_inputs(gyroid(num_tokens, resolution), HEAD_DIM, BLOCKS, device=device, dtype=dtype)
    topk_indices = inputs.choose()
    check_forward(inputs, topk_indices)
    check_branches(inputs, topk_indices)
    pairs = count_pairs(inputs.partition, topk_indices, cases["all"].num_heads)
    counts = {"C": len(inputs.partition.compression), "S": len(inputs.partition.selection)}
    for name, pass_ in missing:
        try:
            timing = measure(branch_calls(name, inputs, topk_indices)[pass_], device, budget)
        except RuntimeError as error:
            results.fail(cases[name], pass_, reason_of(error))
            print(f"{cases[name]} FAILED {pass_}: {reason_of(error)}", flush=True)
            synchronize(device)
            continue
        kept = {f"pairs_{branch}": getattr(pairs, branch) for branch in ("cmp", "slc", "win") if name in ("all", branch)}
        model = model_seconds(name, pass_, cases[name], pairs, results.environment["gpu"])
        measured = {
            "ms": timing.ms,
            "ms_p20": timing.ms_p20,
            "ms_p80": timing.ms_p80,
            "tflops": useful_flops(pass_, HEAD_DIM, sum(kept.values())) / timing.ms / 1e9 if kept else None,
            "limit_share": None if model is None else model * 1e3 / timing.ms,
            "peak_gb": None if timing.peak is None else timing.peak / 1e9,
        }
        print(report.line(results.add(cases[name], pass_, counts | kept | measured), []), flush=True)


def branch_calls(name: str, inputs: Inputs, topk_indices: Tensor) -> Calls:
    """Forward and backward of one public branch, or of the whole operator ("all"); the score has no backward."""
    q, k, v, k_cmp, v_cmp, _ = inputs.leaves
    if name == "score":
        lse = ssa.compression_attention(q, k_cmp, v_cmp, inputs.partition)[1].detach()
        return {"fwd": lambda: ssa.block_topk(q, k_cmp, lse, inputs.partition, inputs.topk)}
    branches: dict[str, tuple[Callable[[], Tensor], tuple[Tensor, ...]]] = {
        "all": (inputs.attend, inputs.leaves),
        "cmp": (lambda: ssa.compression_attention(q, k_cmp, v_cmp, inputs.partition)[0], (q, k_cmp, v_cmp)),
        "slc": (lambda: ssa.selected_attention(q, k, v, topk_indices, inputs.partition)[0], (q, k, v)),
        "win": (lambda: ssa.window_attention(q, k, v, inputs.partition)[0], (q, k, v)),
    }
    forward, leaves = branches[name]
    return three_calls(forward, leaves, inputs.do)


def model_seconds(name: str, pass_: str, case: Case, pairs: Pairs, gpu: str) -> float | None:
    """What `cases.ssa_work` predicts for a branch at full rates; the score as an exp pass of its own. None for an unknown chip."""
    if gpu not in CHIPS:
        return None
    work = ssa_work(pass_, pairs, num_tokens=case.num_tokens, head_dim=case.head_dim, topk=BLOCKS[2], exp_passes=2)
    return limit_seconds(work if name == "all" else {name: work[name]}, CHIPS[gpu])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.branches", description=__doc__)
    parser.add_argument("--T", nargs="+", type=int, default=TOKENS, help="the largest is the end of the range")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of repetitions a row")
    parser.add_argument("--out", type=Path, required=True, help="CSV file of benchmarks.run that this growth belongs to")
    parser.add_argument("--resume", action="store_true", help="add what is missing to the file")
    parser.add_argument("--commit", help="name of the code version where git is not at hand")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    options.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    run(options.out, environment(device, options.commit), device, options)
    if options.out.exists():
        report.write(options.out)
    else:
        print(f"No Markdown or plot: they come with {options.out}, which benchmarks.run writes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
