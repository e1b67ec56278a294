"""Time per useful pair where the input is against the kernels: `python -m benchmarks.worst_cases`.

The cost of a case is its time over its pairs (`cases.Pairs`), forward and backward; beside it, that cost over the random case's. Every
case passes the forward gate first. D = 32, (m_cmp, m_slc, topk) = (4, 8, 8), bf16 on a GPU. Figures go to
results/GPU-DATE-worst-cases.csv and .md as they are measured; bounds are looked at on a GPU only.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .cases import Inputs, count_pairs, make_inputs
from .figures import Figures, default_path
from .gate import check_forward
from .timing import environment, measure, reason_of, synchronize, three_calls
from .voxels import gyroid, scattered, solid_box, stack_samples

HEAD_DIM, BLOCKS = 32, (4, 8, 8)
ALLOWED = 1.5  # cost over the random case's
NAMES = ("random", "one hot block", "unequal samples", "dense blocks", "lone voxels")


def make_coords(name: str, num_tokens: int) -> Tensor:
    """Voxels of a case, at most `num_tokens`, [T, 4].

    random: the gyroid. one hot block: the same (see `heat_block`). unequal samples: 1,000 n voxels beside a hundred samples of n,
    n = num_tokens // 1,310 (100 at 131,072). dense blocks: a box without gaps, 512 voxels a selection block. lone voxels: one voxel a
    block, so C = T, at an eighth of num_tokens.
    """
    m = BLOCKS[1]
    if name in ("random", "one hot block"):
        return gyroid(num_tokens)
    if name == "unequal samples":
        small = num_tokens // 1310
        return stack_samples([gyroid(1000 * small), *[gyroid(small, 16)] * 100])
    if name == "dense blocks":
        edge = m
        while (edge + m) ** 3 <= 2 * num_tokens:
            edge += m
        return solid_box(edge, edge, num_tokens // edge**2 // m * m)
    if name == "lone voxels":
        return scattered(num_tokens // 8, m)
    raise ValueError(f"the case must be one of {NAMES}: {name=}")


def make_case(name: str, num_tokens: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Inputs of a case over `make_coords`."""
    inputs = make_inputs(make_coords(name, num_tokens), HEAD_DIM, BLOCKS, device=device, dtype=dtype)
    return heat_block(inputs) if name == "one hot block" else inputs


def heat_block(inputs: Inputs) -> Inputs:
    """The same inputs with one direction added to every query and to the compressed keys of one block, so that every query chooses it."""
    hot = inputs.partition.parents == int(inputs.partition.parents[len(inputs.partition.compression) // 2])
    direction = torch.ones(inputs.q.shape[2], device=inputs.q.device, dtype=inputs.q.dtype)
    with torch.no_grad():
        q = inputs.q + direction
        k_cmp = torch.where(hot[:, None, None], 2 * direction, inputs.k_cmp)
    return replace(inputs, q=q.requires_grad_(), k_cmp=k_cmp.requires_grad_())


def figures_of_case(
    name: str, figures: Figures, random_cost: dict[str, float], num_tokens: int, device: torch.device, dtype: torch.dtype, budget: float
) -> None:
    """Gate and time a case. random_cost: ms a pair of the random case for each pass, filled by that case itself."""
    inputs = make_case(name, num_tokens, device, dtype)
    topk_indices = inputs.choose()
    check_forward(inputs, topk_indices)
    partition = inputs.partition
    pairs = count_pairs(partition, topk_indices, inputs.q.shape[1]).total
    calls = three_calls(inputs.attend, inputs.leaves, inputs.do)
    for pass_ in ("fwd", "bwd"):
        figure = f"{name} (C = {len(partition.compression):,}, S = {len(partition.selection):,}, {pairs:.3g} pairs) {pass_}"
        ms = measure(calls[pass_], device, budget).ms
        cost = ms / pairs
        if name == "random":
            random_cost[pass_] = cost
        figures.add(f"{figure}, time", partition.num_tokens, ms, "ms")
        figures.add(f"{figure}, time a pair", partition.num_tokens, cost * 1e12, "fs")
        if pass_ in random_cost:
            bound = None if name == "lone voxels" else ALLOWED
            figures.add(f"{figure}, over the random case's", partition.num_tokens, cost / random_cost[pass_], "", bound)


def main(arguments: list[str] | None = None) -> int:
    """Measure; the exit status is 1 if a case fails or, but for lone voxels, costs over 1.5 times the random case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worst_cases", description=__doc__)
    parser.add_argument("--T", type=int, default=131_072)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of repetitions a line")
    parser.add_argument("--out", type=Path, help="CSV file (default: benchmarks/results/GPU-DATE-worst-cases.csv)")
    parser.add_argument("--commit", help="name of the code version where git is not at hand")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    env = environment(device, options.commit)
    print(" ".join(f"{name}={value!r}" for name, value in env.items()))

    figures = Figures(options.out or default_path(env, "worst-cases"), env, bounded=device.type == "cuda")
    random_cost: dict[str, float] = {}
    for name in NAMES:
        try:
            figures_of_case(name, figures, random_cost, options.T, device, dtype, options.budget)
        except Exception as error:
            figures.fail(name, options.T, reason_of(error))
            synchronize(device)  # raises where the error has left the device unusable
    figures.write_markdown(
        "Time per useful pair",
        "python -m benchmarks.worst_cases",
        f"D = {HEAD_DIM}, m_cmp/m_slc/topk = {'/'.join(map(str, BLOCKS))}, 32 query and 2 key/value heads, bf16 on a GPU. The cost of a "
        "case is its time over its (query, head, key) pairs; bounds are on that cost over the random case's.",
    )
    return int(not figures.good)


if __name__ == "__main__":
    sys.exit(main())
