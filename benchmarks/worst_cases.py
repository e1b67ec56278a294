"""Time per useful pair where the input is against the kernels: `python -m benchmarks.worst_cases`.

The cost of a case is its time over its pairs (`cases.Pairs`), forward and backward; beside it, that cost over the random case's. Every
case passes the forward gate first. D = 32, (m_cmp, m_slc, topk) = (4, 8, 8), bf16 on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch
from torch import Tensor

from .cases import Inputs, count_pairs, make_inputs
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


def main(arguments: list[str] | None = None) -> int:
    """Print a line a case and pass; the exit status is 1 if one fails or, but for lone voxels, costs over 1.5 times the random case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worst_cases", description=__doc__)
    parser.add_argument("--T", type=int, default=131_072)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of repetitions a line")
    parser.add_argument("--commit", help="name of the code version where git is not at hand")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(" ".join(f"{name}={value!r}" for name, value in environment(device, options.commit).items()))
    print(f"{'case':16} {'pass':4} {'T':>8} {'C':>7} {'S':>6} {'pairs':>9} {'ms':>9} {'fs/pair':>8} {'/ random':>9}")

    random_cost: dict[str, float] = {}
    good = True
    for name in NAMES:
        try:
            inputs = make_case(name, options.T, device, dtype)
            topk_indices = inputs.choose()
            check_forward(inputs, topk_indices)
            pairs = count_pairs(inputs.partition, topk_indices, inputs.q.shape[1]).total
            calls = three_calls(inputs.attend, inputs.leaves, inputs.do)
            for pass_ in ("fwd", "bwd"):
                ms = measure(calls[pass_], device, options.budget).ms
                cost = ms / pairs
                ratio = cost / random_cost.setdefault(pass_, cost)
                sizes = f"{inputs.q.shape[0]:8} {len(inputs.partition.compression):7} {len(inputs.partition.selection):6}"
                print(f"{name:16} {pass_:4} {sizes} {pairs:9.3g} {ms:9.3f} {cost * 1e12:8.3g} {ratio:9.2f}", flush=True)
                good &= ratio <= ALLOWED or name == "lone voxels"
        except Exception as error:
            print(f"{name:16} FAILED {reason_of(error)}", flush=True)
            synchronize(device)
            good = False
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
