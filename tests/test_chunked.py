"""The PyTorch implementation for any device: the same comparisons, no [T,T] memory, and a bound on time and memory at T = 20,000."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from utils import DEVICE, assert_choice, assert_repeats, compare, draw, draw_qkv, largest, random_choice, random_partition, run

import ssa
from ssa import chunked, naive

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {
    "unequal samples, one of them empty": dict(counts=[90, 0, 1, 20]),
    "63 tokens, shifted windows": dict(counts=[63], shift=2),
    "111 tokens, odd windows": dict(counts=[111], m_cmp=4, window=5, shift=1),
    "one token": dict(counts=[1]),
    "full blocks": dict(counts=[64], edge=4),
    "no token": dict(counts=[0]),
    "no sample": dict(counts=[]),
}


def problem(partition, topk=3, hq=6, hkv=2, d=24, dtype=torch.float32, per_head=True):
    """The operator with its own choice, the reference with the same, inputs."""
    t = partition.num_tokens
    inputs = [*draw_qkv(partition, hq, hkv, d, dtype), draw(*((t, hq, 3) if per_head else (t, 3)), seed=77).sigmoid().to(dtype)]
    _, lse = ssa.compression_attention(inputs[0], inputs[3], inputs[4], partition, impl="torch")
    ids = ssa.block_topk(inputs[0], inputs[3], lse, partition, topk, impl="torch")
    return (
        lambda *xs: ssa.spatial_sparse_attention(*xs, partition, topk=topk, impl="torch"),
        lambda *xs: naive.spatial_sparse_attention(*xs, partition, topk=topk, topk_indices=ids),
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_operator(layout, dtype):
    compare(*problem(random_partition(**LAYOUTS[layout]), dtype=dtype))


def test_fp64():
    """As exact as the reference up to the order of its sums."""
    fn, reference, inputs = problem(random_partition([90, 20], shift=1), dtype=torch.float64)
    got, want = run(fn, inputs), run(reference, inputs)
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert a.dtype == torch.float64 and largest(a - b) <= 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_key_leaves_no_gradient_of_q_and_k(dtype):
    """do · v and delta cancel, in whatever order a matrix library adds."""
    cu = torch.arange(65, dtype=torch.int32, device=DEVICE)
    inputs = [draw(64, heads, 128, dtype=dtype, seed=i) for i, heads in enumerate((6, 2, 2))]
    _, grads = run(lambda *xs: ssa.varlen_attention(*xs, cu, cu, impl="torch")[0], inputs)
    assert largest(grads[0], grads[1]) <= 1e-13 and largest(grads[2]) > 0.1


@pytest.mark.parametrize("piece", [1, 500, 20_000])
@pytest.mark.parametrize("op", ["compression_attention", "window_attention", "selected_attention", "varlen_attention"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_branches_in_pieces(layout, op, piece, monkeypatch):
    """Outputs, lse and gradients do not depend on where the pieces end."""
    monkeypatch.setattr(chunked, "PIECE", piece)
    partition = random_partition(**LAYOUTS[layout])
    q, k, v, k_cmp, v_cmp = draw_qkv(partition, 6, 2, 16, torch.float32)
    keys = (k_cmp, v_cmp) if op == "compression_attention" else (k, v)
    more = {
        "selected_attention": (random_choice(partition, 2, 4), partition),
        "varlen_attention": (partition.cu_seqlens, partition.cu_seqlens),
    }.get(op, (partition,))
    compare(lambda *xs: getattr(ssa, op)(*xs, *more, impl="torch"), lambda *xs: getattr(naive, op)(*xs, *more), [q, *keys])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("piece", [1, 700, 2**24])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_choice(layout, piece, dtype, monkeypatch):
    monkeypatch.setattr(chunked, "PIECE", piece)
    partition = random_partition(**LAYOUTS[layout])
    q, _, _, k_cmp, _ = draw_qkv(partition, 6, 2, 16, dtype)
    _, lse = ssa.compression_attention(q, k_cmp, k_cmp, partition, impl="torch")
    for topk in (1, 4, 40):
        assert_choice(ssa.block_topk(q, k_cmp, lse, partition, topk, impl="torch"), q, k_cmp, partition, topk)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_choice_of_half_inputs(dtype):
    """Scores are fp32 whatever the inputs' dtype."""
    partition = random_partition([111, 40])
    q, _, _, k_cmp, _ = draw_qkv(partition, 6, 2, 32, dtype)
    _, lse = ssa.compression_attention(q, k_cmp, k_cmp, partition, impl="torch")
    assert_choice(ssa.block_topk(q, k_cmp, lse, partition, 3, impl="torch"), q, k_cmp, partition, 3)


def test_scores_beyond_the_range_of_exp():
    fn, reference, inputs = problem(random_partition([50]))
    inputs[0], inputs[1], inputs[3] = 6 * inputs[0], 6 * inputs[1], 6 * inputs[3]
    _, lse = ssa.compression_attention(inputs[0], inputs[3], inputs[4], random_partition([50]), impl="torch")
    ids = ssa.block_topk(inputs[0], inputs[3], lse, random_partition([50]), 3, impl="torch")
    assert lse.max() > 88
    compare(fn, lambda *xs: naive.spatial_sparse_attention(*xs, random_partition([50]), topk=3, topk_indices=ids), inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 33])
@pytest.mark.parametrize("name", ["q", "k", "v", "k_cmp", "v_cmp"])
def test_nan_and_inf_stay_in_their_row_or_sample(name, row, value):
    """Row 0 is also what padding points at. Gradients likewise."""
    partition = random_partition([30, 25, 0, 21], window=3)
    fn, _, inputs = problem(partition)
    clean, clean_grads = run(fn, inputs)
    token, block = partition.coords[:, 0], partition.compression.coords[:, 0]
    samples = [token, token, token, block, block, token]
    i = ["q", "k", "v", "k_cmp", "v_cmp"].index(name)
    spoilt = [x.clone() for x in inputs]
    spoilt[i][row] = value
    (o,), grads = run(fn, spoilt)
    spoilt_sample = samples[i][row]
    assert not o[token == spoilt_sample].isfinite().all(), "it must not be hidden"
    other = torch.arange(len(o), device=DEVICE) != row if name == "q" else token != spoilt_sample

    def assert_same(got, want, what):
        assert got.isfinite().all() and largest(got - want) <= 8 * torch.finfo(got.dtype).eps * largest(want), what

    assert_same(o[other], clean[0][other], "o")
    if name == "q":
        assert_same(grads[0][other], clean_grads[0][other], "dq")
    for got, want, sample, what in zip(grads, clean_grads, samples, ["dq", "dk", "dv", "dk_cmp", "dv_cmp", "dgates"], strict=True):
        assert_same(got[sample != spoilt_sample], want[sample != spoilt_sample], what)


def test_runs_repeat_bitwise():
    fn, _, inputs = problem(random_partition([80, 21], shift=1))
    assert_repeats(fn, inputs)


class Largest(TorchDispatchMode):
    """The most elements any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_no_matrix_of_all_scores(monkeypatch):
    """No tensor of forward or backward is much larger than a piece or an input, though T² · Hq is 40 times that."""
    monkeypatch.setattr(chunked, "PIECE", 2**16)
    partition = random_partition([1200], edge=16)
    fn, _, inputs = problem(partition, topk=4, hq=4, hkv=2, d=16)
    with Largest() as mode:
        run(fn, inputs)
    assert mode.numel <= 2 * max(2**16, inputs[0].numel()) < 1200**2 * 4 / 20


AT_20_000 = """
import resource, time, torch, ssa
torch.manual_seed(0)
torch.set_num_threads(1)
# a sphere's surface, about 20,000 voxels
axis = torch.arange(-41, 42)
xyz = torch.cartesian_prod(axis, axis, axis)
r = xyz.double().norm(dim=1)
xyz = xyz[(r - 39.5).abs() < 0.52][:20_000]
assert len(xyz) == 20_000, len(xyz)
coords = torch.cat([torch.zeros(20_000, 1, dtype=torch.int64), xyz], 1)
before = resource.getrusage(resource.RUSAGE_SELF)
start = time.perf_counter()
p = ssa.partition_voxels(coords)
q = torch.randn(20_000, 8, 32, requires_grad=True)
k, v = (torch.randn(20_000, 2, 32, requires_grad=True) for _ in range(2))
gates = torch.rand(20_000, 3, requires_grad=True)
k_cmp, v_cmp = (ssa.block_mean(x, p.compression) for x in (k, v))
o = ssa.spatial_sparse_attention(q, k, v, k_cmp, v_cmp, gates, p, topk=8, impl="torch")
o.square().sum().backward()
usage = resource.getrusage(resource.RUSAGE_SELF)
cpu = usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime
print(time.perf_counter() - start, cpu, usage.ru_maxrss / 2**20)
"""


def test_time_and_memory_at_20_000_tokens():
    """8 heads of 32, forward and backward: at most 60 s of one core and 4 GB, the whole process included."""
    result = subprocess.run([sys.executable, "-c", AT_20_000], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    _, cpu_seconds, gigabytes = map(float, result.stdout.split())
    assert cpu_seconds <= 60 and gigabytes <= 4, result.stdout
