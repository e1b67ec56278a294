"""Time `ssa` beside dense attention: `python -m benchmarks.run` → a table on the screen, CSV, Markdown and plots.

Every case passes the correctness gate before a time of it is shown. bf16 on a GPU. Forward is timed with autograd on, backward by
`torch.autograd.grad` on a kept graph. `--resume` adds what is missing to a file of an earlier call; `--minutes` stops in time.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from . import branches, peers, report
from .cases import (
    BLOCKS,
    CHIPS,
    DENSE,
    HEAD_DIMS,
    PASSES,
    TOKENS,
    Case,
    Pairs,
    count_pairs,
    dense_work,
    gyroid_cases,
    limit_seconds,
    make_inputs,
    mesh_cases,
    mesh_voxels,
    ssa_work,
    useful_flops,
)
from .gate import check_backward, check_counts, check_dense, check_forward, check_gradients
from .rows import ResultFile, Row
from .timing import Calls, Timing, environment, measure, reason_of, short_name, synchronize, three_calls
from .voxels import gyroid

RESULTS = Path(__file__).parent / "results"
SLOWEST_SECONDS = 5.0  # dense peers are left out where one call would take longer
DENSE_RATE = 3e14  # FLOP/s assumed of a dense peer before it has been measured


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 if ssa failed anywhere."""
    options = parse(arguments)
    device = torch.device(options.device)
    env = environment(device, options.commit)
    path = options.out or RESULTS / f"{short_name(env['gpu'])}-{env['date']}.csv"
    results = ResultFile(path, env, peers.describe(), resume=options.resume)
    print(" ".join(f"{name}={value!r}" for name, value in (env | results.peers).items()))

    cases = gyroid_cases(options.T)
    if "mesh" in options.voxels:
        no_mesh = Case("ssa", 0, 32, BLOCKS[0], "mesh", 0)
        results.forget(no_mesh, "all")
        try:
            cases += mesh_cases(options.mesh)
        except ImportError as error:
            results.fail(no_mesh, "all", f"voxels of a mesh need trimesh: {error}")
    cases = [case for case in cases if wanted(case, options)]
    deadline = time.monotonic() + 60 * options.minutes
    left = []
    for case in cases:
        passes = [p for p in options.passes if (case, p) not in results]
        if passes and time.monotonic() + seconds_needed(case, passes, results.rows) > deadline:
            left.append(case)
        elif passes:
            run_case(case, passes, results, device, options)
    if options.branches and "ssa" in options.impl and not left:
        branches.run(path, env, device, options, deadline)
    report.write(path)
    if left:
        print(f"No time for {len(left)} of {len(cases)} cases (call again with --resume): " + "; ".join(map(str, left)))
    return int(any(failure["impl"] == "ssa" for failure in results.failures))


def run_case(case: Case, passes: list[str], results: ResultFile, device: torch.device, options: argparse.Namespace) -> None:
    """Gate and time one case; what goes wrong is recorded and printed, and the run goes on unless the device is lost."""
    todo = []
    for pass_ in passes:
        expected = expected_seconds(case, pass_, results.rows)
        if expected > SLOWEST_SECONDS:
            results.fail(case, pass_, f"left out: about {expected:.0f} s a call")
        else:
            todo.append(pass_)
    try:
        if todo:
            columns, calls, pairs = (prepare_ssa if case.impl == "ssa" else prepare_dense)(case, device, options)
        while todo:
            timing = measure(calls[todo[0]], device, options.budget)
            row = results.add(case, todo[0], columns | figures(case, todo[0], timing, pairs, results.environment["gpu"]))
            print(report.line(row, results.rows), flush=True)
            todo.pop(0)
    except Exception as error:
        reason = reason_of(error)
        for pass_ in todo:
            results.fail(case, pass_, reason)
        print(f"{case} FAILED {'/'.join(todo)}: {reason}", flush=True)
        synchronize(device)  # raises where the error has left the device unusable: every later time would be wrong
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def prepare_ssa(case: Case, device: torch.device, options: argparse.Namespace) -> tuple[dict[str, object], Calls, Pairs]:
    """Inputs, gate and the three calls of an ssa case."""
    assert case.blocks and case.resolution
    coords = gyroid(case.num_tokens, case.resolution) if case.voxels == "gyroid" else mesh_voxels(options.mesh, case.resolution)
    inputs = make_inputs(coords, case.head_dim, case.blocks, device=device, dtype=options.dtype)
    check_counts(case, inputs.partition)
    check_gradients(case.head_dim, case.blocks, device, options.dtype)
    topk_indices = inputs.choose()
    check_forward(inputs, topk_indices)
    check_backward(inputs, topk_indices)
    pairs = count_pairs(inputs.partition, topk_indices, case.num_heads)
    columns: dict[str, object] = {
        "C": len(inputs.partition.compression),
        "S": len(inputs.partition.selection),
        "pairs_cmp": pairs.cmp,
        "pairs_slc": pairs.slc,
        "pairs_win": pairs.win,
    }
    return columns, three_calls(inputs.attend, inputs.leaves, inputs.do), pairs


def prepare_dense(case: Case, device: torch.device, options: argparse.Namespace) -> tuple[dict[str, object], Calls, None]:
    """Inputs, gate and the three calls of a dense peer."""
    attention = peers.dense_attention(case.impl)
    H, T, D = case.num_heads, case.num_tokens, case.head_dim
    tokens_first = peers.layout(case.impl) == "bthd"
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, T, H, D) if tokens_first else (1, H, T, D)
    q, k, v, do = (torch.randn(shape, generator=generator, device=device, dtype=options.dtype) for _ in range(4))
    leaves = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
    heads_first = [x.detach()[0].transpose(0, 1) if tokens_first else x.detach()[0] for x in (*leaves, attention(*leaves))]
    check_dense(heads_first[:3], heads_first[3])
    return {}, three_calls(lambda: attention(*leaves), leaves, do), None


def figures(case: Case, pass_: str, timing: Timing, pairs: Pairs | None, gpu: str) -> dict[str, object]:
    """The measured columns of a row; limit_share only for a chip whose rates are known, peak_gb in 1e9 bytes."""
    total = case.num_heads * case.num_tokens**2 if pairs is None else pairs.total
    chip = CHIPS.get(gpu)
    limit = None
    if chip is not None:
        halves = ("fwd", "bwd") if pass_ == "both" else (pass_,)
        limit = sum(limit_seconds(case_work(case, half, pairs), chip) for half in halves)
    return {
        "ms": timing.ms,
        "ms_p20": timing.ms_p20,
        "ms_p80": timing.ms_p80,
        "tflops": useful_flops(pass_, case.head_dim, total) / timing.ms / 1e9,
        "limit_share": None if limit is None else limit * 1e3 / timing.ms,
        "peak_gb": None if timing.peak is None else timing.peak / 1e9,
    }


def case_work(case: Case, half: str, pairs: Pairs | None) -> dict:
    """`ssa_work` or `dense_work` of a case in "fwd" or "bwd"."""
    if pairs is None or case.blocks is None:
        return dense_work(half, num_tokens=case.num_tokens, head_dim=case.head_dim, num_heads=case.num_heads)
    return ssa_work(
        half,
        pairs,
        num_tokens=case.num_tokens,
        head_dim=case.head_dim,
        topk=case.blocks[2],
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
    )


def expected_seconds(case: Case, pass_: str, rows: list[Row]) -> float:
    """One call of a dense peer, at the rate of its own largest measured T; 0 for ssa."""
    if case.impl not in DENSE:
        return 0.0
    same = [row for row in rows if (row["impl"], row["pass"], row["head_dim"]) == (case.impl, pass_, str(case.head_dim))]
    rate = 1e12 * float(max(same, key=lambda row: int(row["T"]))["tflops"]) if same else DENSE_RATE
    return useful_flops(pass_, case.head_dim, case.num_heads * case.num_tokens**2) / rate


def seconds_needed(case: Case, passes: list[str], rows: list[Row]) -> float:
    """A cautious guess of what gating and timing a case takes."""
    if case.impl == "ssa":
        return 10 + case.num_tokens / 20_000
    calls = (expected_seconds(case, pass_, rows) for pass_ in passes)
    return (25 if case.impl == "flex" else 5) + sum(6 * s for s in calls if s <= SLOWEST_SECONDS)


def wanted(case: Case, options: argparse.Namespace) -> bool:
    kind = "gyroid" if case.voxels == "gyroid" else "mesh"
    return (
        case.impl in options.impl
        and case.head_dim in options.head_dim
        and (case.blocks is None or (case.blocks in options.cases and kind in options.voxels))
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def blocks(text: str) -> tuple[int, int, int]:
        m_cmp, m_slc, topk = map(int, text.split("/"))
        return m_cmp, m_slc, topk

    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--impl", nargs="+", choices=("ssa", *DENSE), default=("ssa", *DENSE))
    parser.add_argument("--cases", nargs="+", type=blocks, default=BLOCKS, choices=BLOCKS, metavar="M_CMP/M_SLC/TOPK", help="of ssa")
    parser.add_argument("--T", nargs="+", type=int, help="gyroid sizes; at most 2^20 fit the default grids")
    parser.add_argument("--head-dim", nargs="+", type=int, default=HEAD_DIMS, choices=HEAD_DIMS)
    parser.add_argument("--pass", nargs="+", dest="passes", default=PASSES, choices=PASSES)
    parser.add_argument("--voxels", nargs="+", default=("gyroid", "mesh"), choices=("gyroid", "mesh"), help="inputs of ssa")
    parser.add_argument("--mesh", help="a mesh file for the mesh rows (default: two linked rings made by code)")
    parser.add_argument("--no-branches", dest="branches", action="store_false", help="leave out the growth of each branch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of repetitions a row")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case that would end later than this")
    parser.add_argument("--out", type=Path, help="CSV file (default: benchmarks/results/GPU-DATE.csv)")
    parser.add_argument("--resume", action="store_true", help="add what is missing to the file")
    parser.add_argument("--commit", help="name of the code version where git is not at hand")
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or (torch.bfloat16 if options.device.startswith("cuda") else torch.float32)
    if options.T is None and not options.device.startswith("cuda"):
        parser.error("the full run needs a GPU; on a CPU give small sizes with --T")
    options.T = tuple(options.T or TOKENS)
    return options


if __name__ == "__main__":
    sys.exit(main())
