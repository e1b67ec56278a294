"""A speed suite that runs anywhere in seconds: `python -m pytest benchmarks/test_speed.py` (or `make bench`).

Small sizes on the default device: it catches a slowdown between two commits on one machine; the table comes from `benchmarks.run`.
"""

import pytest
import torch

import ssa

from .branches import PASSES, branch_calls
from .cases import Inputs, make_inputs
from .timing import synchronize
from .voxels import gyroid

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
NUM_TOKENS, HEAD_DIM, NUM_HEADS, BLOCKS = 2048, 32, 4, (4, 8, 8)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return make_inputs(gyroid(NUM_TOKENS), HEAD_DIM, BLOCKS, device=DEVICE, dtype=DTYPE, num_heads=NUM_HEADS)


@pytest.mark.parametrize(("branch", "pass_"), [(branch, pass_) for branch, passes in PASSES.items() for pass_ in passes])
def test_branch(benchmark, inputs, branch, pass_):
    call = branch_calls(branch, inputs, inputs.choose())[pass_]

    def timed():
        result = call()
        synchronize(DEVICE)
        return result

    result = benchmark.pedantic(timed, rounds=5, warmup_rounds=1)
    assert all(x.isfinite().all() for x in (result if isinstance(result, tuple) else (result,)))


def test_partition(benchmark):
    coords = gyroid(NUM_TOKENS).to(DEVICE)
    partition = benchmark.pedantic(ssa.partition_voxels, args=(coords,), rounds=5, warmup_rounds=1)
    assert partition.num_tokens == NUM_TOKENS


def test_layer(benchmark):
    layer = ssa.SpatialSparseAttention(128, NUM_HEADS, device=DEVICE, dtype=DTYPE)
    partition = layer.partition(gyroid(NUM_TOKENS).to(DEVICE))
    x = torch.randn(NUM_TOKENS, 128, device=DEVICE, dtype=DTYPE, requires_grad=True)

    def step():
        layer(x, partition).sum().backward()
        synchronize(DEVICE)

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    assert x.grad is not None and x.grad.isfinite().all()
