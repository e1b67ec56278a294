"""Layouts, inputs and the comparison with the fp64 reference that the operator's tests share.

Tolerance: at most twice the error of `naive` in the same dtype, plus one rounding. A rounding is eps times the largest value of what
is compared; gradients of one call share theirs, so that a gradient that cancels to nothing is judged by what it cancelled from.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

import ssa
from ssa import naive

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def _kernels_run() -> bool:
    if CUDA or importlib.util.find_spec("triton") is None:
        return CUDA
    from ssa.kernels.common import interpreted

    return interpreted()


IMPL = "triton" if _kernels_run() else "torch"  # what the tests of the operations run
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if CUDA or IMPL == "torch" else [])  # Triton's interpreter has no bf16

HEAD_DIMS = [16, 24, 32, 48, 64, 96, 128]
GROUPS = [1, 2, 3, 8, 16, 32]


def random_coords(counts: Sequence[int], edge: int = 7, low: int = -4, seed: int = 0) -> Tensor:
    """[Σ counts, 4] int64: counts[b] different voxels of a cube for each sample, rows shuffled."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for sample, count in enumerate(counts):
        place = torch.randperm(edge**3, generator=generator)[:count]
        rows.append(torch.stack([torch.full_like(place, sample), place // edge**2, place // edge % edge, place % edge], 1))
    coords = torch.cat(rows) if rows else torch.zeros(0, 4, dtype=torch.int64)
    coords[:, 1:] += low
    return coords[torch.randperm(coords.shape[0], generator=generator)].to(DEVICE)


def random_partition(counts: Sequence[int], m_cmp: int = 2, m_slc: int = 4, window: int = 4, shift: int = 0, edge: int = 7, seed: int = 0):
    return ssa.partition_voxels(
        random_coords(counts, edge, seed=seed), compression_block_size=m_cmp, selection_block_size=m_slc, window_size=window,
        window_shift=shift, batch_size=len(counts),
    )  # fmt: skip


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers, rounded to dtype, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def draw_qkv(
    partition: ssa.VoxelPartition, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    """q [T,Hq,D], k, v [T,Hkv,D], k_cmp, v_cmp [C,Hkv,D]."""
    t, c = partition.num_tokens, len(partition.compression)
    shapes = [(t, num_heads), *[(t, num_kv_heads)] * 2, *[(c, num_kv_heads)] * 2]
    return [draw(*shape, head_dim, dtype=dtype, seed=10 * seed + i) for i, shape in enumerate(shapes)]


def random_choice(partition: ssa.VoxelPartition, num_kv_heads: int, topk: int, seed: int = 0) -> Tensor:
    """topk_indices [T,Hkv,topk] of random length in 0 … topk, blocks of the query's own sample."""
    generator = torch.Generator().manual_seed(seed)
    cu = partition.selection.cu_blocks.tolist()
    ids = torch.full((partition.num_tokens, num_kv_heads, topk), -1, dtype=torch.int32)
    for t, sample in enumerate(partition.coords[:, 0].tolist()):
        for h in range(num_kv_heads):
            blocks = torch.randperm(cu[sample + 1] - cu[sample], generator=generator)
            blocks = blocks[: int(torch.randint(0, topk + 1, (1,), generator=generator))] + cu[sample]
            ids[t, h, : blocks.shape[0]] = blocks.sort().values.int()
    return ids.to(DEVICE)


@contextlib.contextmanager
def nan_in_fresh_memory() -> Iterator[None]:
    """torch.empty gives NaN (the largest integer for integers), so that reading what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def run(fn: Callable, inputs: Sequence[Tensor], dtype: torch.dtype | None = None, seed: int = 99) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of fn(*inputs) and the gradients of all inputs for random cotangents; dtype: cast the inputs first."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    outputs = fn(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    # rounded to the inputs' dtype first, so that every precision gets the same numbers
    cotangents = [draw(*o.shape, dtype=inputs[0].dtype, seed=seed + i).to(o.dtype) for i, o in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return [o.detach() for o in outputs], grads


def _finite(x: Tensor) -> Tensor:
    """fp64, −inf (the lse of a row without keys) replaced by 0: where they stand is compared apart."""
    return torch.where(x == -torch.inf, 0.0, x.double())


def largest(*tensors: Tensor) -> float:
    return max((x.abs().max().item() for x in tensors if x.numel()), default=0.0)


def assert_close(got: Tensor, want: Tensor, low: Tensor, rounding: float, name: str) -> None:
    """`want` fp64, `low` the reference in got's precision, rounding: one rounding in absolute terms."""
    assert got.shape == want.shape, f"{name}: {got.shape=}, {want.shape=}"
    assert torch.equal(got == -torch.inf, want == -torch.inf), f"{name}: −inf at other places"
    assert got.isnan().sum() == 0, f"{name}: NaN"
    error, allowed = largest(_finite(got) - _finite(want)), 2 * largest(_finite(low) - _finite(want)) + rounding
    assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g} = 2 × naive's error + one rounding of {rounding:.3g}"


def compare(fn: Callable, reference: Callable, inputs: Sequence[Tensor], seed: int = 99) -> None:
    """Outputs and every gradient of fn against `reference` in fp64; fresh memory is NaN while fn runs."""
    dtype = inputs[0].dtype
    with nan_in_fresh_memory():
        outputs, grads = run(fn, inputs, seed=seed)
    want_outputs, want_grads = run(reference, inputs, torch.float64, seed)
    low_outputs, low_grads = run(reference, inputs, seed=seed)
    for i, (got, want, low) in enumerate(zip(outputs, want_outputs, low_outputs, strict=True)):
        assert got.dtype == low.dtype, f"output {i}: {got.dtype=}, {low.dtype=}"
        assert_close(got, want, low, torch.finfo(got.dtype).eps * largest(_finite(want)), f"output {i}")
    rounding = torch.finfo(dtype).eps * largest(*want_grads)
    for i, (got, want, low) in enumerate(zip(grads, want_grads, low_grads, strict=True)):
        assert got.dtype == inputs[i].dtype
        assert_close(got, want, low, rounding, f"gradient {i}")


def assert_repeats(fn: Callable, inputs: Sequence[Tensor]) -> None:
    """Two runs of forward and backward are bitwise equal."""
    first, second = run(fn, inputs), run(fn, inputs)
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


def assert_choice(ids: Tensor, q: Tensor, k_cmp: Tensor, partition: ssa.VoxelPartition, topk: int, scale: float | None = None) -> None:
    """Form of the lists, and by fp64 scores no chosen block lies more than 1e-5 · G below one left out."""
    q, k_cmp = q.detach().double(), k_cmp.detach().double()
    _, lse = naive.compression_attention(q, k_cmp, k_cmp, partition, softmax_scale=scale)
    scores = naive.block_scores(q, k_cmp, lse, partition, softmax_scale=scale)  # [T, Hkv, S], −inf in other samples
    assert ids.shape == (*scores.shape[:2], topk) and ids.dtype == torch.int32
    valid = ids >= 0
    available = (scores >= 0).sum(-1, keepdim=True)
    assert torch.equal(valid.sum(-1, keepdim=True), available.clamp(max=topk)), "min(topk, blocks of the sample) are chosen"
    follows = (ids[..., 1:] > ids[..., :-1]) | ~valid[..., 1:]
    assert follows.all() and (valid[..., :-1] | ~valid[..., 1:]).all(), "valid ones come first and ascend"
    assert (ids[~valid] == -1).all(), "−1 after them"
    if not scores.numel():
        return
    every = torch.arange(scores.shape[-1], device=ids.device)
    chosen = (ids[..., None] == every).any(2)  # [T, Hkv, S]
    assert torch.equal(chosen.sum(-1, keepdim=True), available.clamp(max=topk)), "ids lie in 0 … S − 1, no block twice"
    worst = torch.where(chosen, scores, torch.inf).amin(-1)
    best_left = torch.where(chosen, -torch.inf, scores).amax(-1)
    gap = (best_left - worst).max().item()
    group = q.shape[1] // k_cmp.shape[1]
    assert gap <= 1e-5 * group, f"a chosen block lies {gap:.3g} below one left out"


def opcheck(module: ModuleType, name: str, call: Callable[[], object]) -> None:
    """torch.library.opcheck of the custom op module.name with the arguments that `call` gives it."""
    op, seen = getattr(module, name), []

    def record(*args):
        seen.append(args)
        return op(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, record)
        call()
    assert seen, f"{name} was not called"
    for args in seen:
        torch.library.opcheck(op.overload, args)
