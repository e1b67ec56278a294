"""Submanifold convolution: forward and gradients against the dense reference in fp64, at odd sizes and channel counts."""

import pytest
import torch
from utils import CUDA, DEVICE, IMPL

import ssa
from ssa import naive

IMPLS = ["torch", "triton"] if IMPL == "triton" else ["torch"]
HALF = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]  # the interpreter has no bf16


def sheet(num_tokens: int, seed: int = 0) -> ssa.VoxelPartition:
    """A dense-ish cloud of voxels in two samples, so that most taps are present somewhere and absent elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    edge = max(2, round((1.5 * num_tokens) ** (1 / 3)))
    cells = torch.cartesian_prod(torch.arange(2), *[torch.arange(-2, edge - 2)] * 3)
    coords = cells[torch.randperm(len(cells), generator=generator)[:num_tokens]]
    return ssa.partition_voxels(coords.to(DEVICE), batch_size=2)


def problem(num_tokens: int, channels_in: int, channels_out: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = (num_tokens, channels_in), (27, channels_in, channels_out), (channels_out,), (num_tokens, channels_out)
    x, kernel, bias, dy = (torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes)
    return x, kernel * channels_in**-0.5, bias, dy


def run(x, kernel, bias, dy, neighbors, impl=None, dtype=None):
    """(y, dx, dkernel, dbias) of impl, or of the reference in `dtype`."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, kernel, bias)]
    y = naive.submanifold_conv3d(*leaves, neighbors) if impl is None else ssa.submanifold_conv3d(*leaves, neighbors, impl=impl)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))


def error(got, want) -> float:
    return (got.double() - want).abs().max().item() if got.numel() else 0.0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("channels", [(16, 16), (24, 40), (64, 64), (1, 5), (80, 136)])
@pytest.mark.parametrize("num_tokens", [0, 1, 63, 111])
def test_fp32_matches_the_reference(num_tokens, channels, impl):
    neighbors = sheet(num_tokens).neighbors
    tensors = problem(num_tokens, *channels)
    want = run(*tensors, neighbors, dtype=torch.float64)
    for name, a, b in zip(("y", "dx", "dkernel", "dbias"), run(*tensors, neighbors, impl), want, strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32
        scale = b.abs().max().item() if b.numel() else 0.0
        assert error(a, b) <= 2e-6 * scale + 1e-12, name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_one_rounding_away(dtype, impl):
    """Sums are fp32: only the inputs and the results are rounded, so the error is one rounding of the result."""
    neighbors = sheet(300).neighbors
    tensors = problem(300, 48, 40, dtype)
    want = run(*tensors, neighbors, dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    for name, a, b in zip(("y", "dx", "dkernel", "dbias"), run(*tensors, neighbors, impl), want, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= (0.5 * eps * b.abs().max() + 1e-5 * b.abs().max()), name


@pytest.mark.parametrize("impl", IMPLS)
def test_fp32_parameters_with_half_rows_get_fp32_gradients(impl):
    neighbors = sheet(111).neighbors
    x, kernel, bias, dy = problem(111, 32, 32)
    x, dy = x.half(), dy.half()
    y, dx, dkernel, dbias = run(x, kernel, bias, dy, neighbors, impl)
    assert (y.dtype, dx.dtype, dkernel.dtype, dbias.dtype) == (torch.float16, torch.float16, torch.float32, torch.float32)
    want = run(x, kernel.half(), bias, dy, neighbors, dtype=torch.float64)
    assert error(dkernel, want[2]) <= 2e-6 * want[2].abs().max()


@pytest.mark.parametrize("impl", ["naive", *IMPLS])
def test_equals_a_dense_convolution(impl):
    """conv3d over the filled grid, read at the active voxels: an independent definition of taps and their order."""
    partition = sheet(97, seed=3)
    x, kernel, bias, _ = problem(97, 16, 24)
    sample, *xyz = (partition.coords.long() - partition.coords.amin(0).long()).unbind(1)
    grid = torch.zeros(2, 16, *[int(c.max()) + 1 for c in xyz], dtype=torch.float64, device=DEVICE)
    grid[sample, :, xyz[0], xyz[1], xyz[2]] = x.double()
    weight = kernel.double().reshape(3, 3, 3, 16, 24).permute(4, 3, 2, 1, 0)  # taps (z, y, x) → [out, in, x, y, z]
    want = torch.nn.functional.conv3d(grid, weight, bias.double(), padding=1)[sample, :, xyz[0], xyz[1], xyz[2]]
    got = ssa.submanifold_conv3d(x, kernel, bias, partition.neighbors, impl=impl)
    assert error(got, want) <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("impl", ["naive", *IMPLS])
def test_one_tap_reads_the_voxel_at_its_offset_and_never_another_sample(impl):
    coords = torch.tensor([[0, 4, 4, 4], [0, 5, 4, 4], [1, 6, 4, 4]], device=DEVICE)
    partition = ssa.partition_voxels(coords)
    kernel = torch.zeros(27, 1, 1, device=DEVICE)
    kernel[2 + 3 + 9] = 1  # dx = +1
    x = partition.sort(torch.tensor([[1.0], [10.0], [100.0]], device=DEVICE))
    y = partition.unsort(ssa.submanifold_conv3d(x, kernel, None, partition.neighbors, impl=impl))
    assert y.flatten().tolist() == [10.0, 0.0, 0.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_no_bias(impl):
    neighbors = sheet(63).neighbors
    x, kernel, bias, _ = problem(63, 16, 16)
    zero = torch.zeros_like(bias)
    with_zero = ssa.submanifold_conv3d(x, kernel, zero, neighbors, impl=impl)
    assert torch.equal(ssa.submanifold_conv3d(x, kernel, None, neighbors, impl=impl), with_zero)


@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_are_bitwise_equal(impl):
    neighbors = sheet(600).neighbors
    tensors = problem(600, 16, 16)
    for a, b in zip(run(*tensors, neighbors, impl), run(*tensors, neighbors, impl), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_is_read_from_fresh_memory(impl):
    """Empty tensors come filled with NaN here: every element of the results must have been written."""
    neighbors = sheet(70).neighbors
    tensors = problem(70, 24, 20)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        results = run(*tensors, neighbors, impl)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    assert all(t.isfinite().all() for t in results)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_reaches_the_neighbours_of_its_voxel_only(impl):
    partition = sheet(111)
    x, kernel, bias, _ = problem(111, 16, 16)
    x[40, 3] = torch.nan
    y = ssa.submanifold_conv3d(x, kernel, bias, partition.neighbors, impl=impl)
    assert torch.equal(y.isnan().any(1), (partition.neighbors == 40).any(1))


@pytest.mark.parametrize("impl", IMPLS)
def test_saves_the_rows_and_not_what_was_gathered(impl):
    partition = sheet(300)
    x, kernel, bias, _ = (t.requires_grad_() for t in problem(300, 32, 32))
    saved: dict[int, int] = {}

    def pack(t):
        saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ssa.submanifold_conv3d(x, kernel, bias, partition.neighbors, impl=impl)
    inputs = sum(t.numel() * t.element_size() for t in (x, kernel, partition.neighbors))
    assert y.requires_grad and sum(saved.values()) <= inputs


@pytest.mark.skipif("triton" not in IMPLS, reason="needs a GPU or Triton's interpreter")
def test_opcheck():
    from ssa.autograd.submanifold_conv3d import submanifold_conv3d, submanifold_conv3d_backward

    neighbors = sheet(30).neighbors
    x, kernel, bias, dy = problem(30, 16, 24)
    torch.library.opcheck(submanifold_conv3d_backward.overload, (dy, x, kernel, neighbors))
    x, kernel, bias = (t.requires_grad_() for t in (x, kernel, bias))
    torch.library.opcheck(submanifold_conv3d.overload, (x, kernel, bias, neighbors))
    torch.library.opcheck(submanifold_conv3d.overload, (x, kernel, None, neighbors))


@pytest.mark.parametrize("impl", IMPLS)
def test_second_order_gradients_are_refused(impl):
    neighbors = sheet(20).neighbors
    x, kernel, bias, _ = (t.requires_grad_() for t in problem(20, 16, 16))
    y = ssa.submanifold_conv3d(x, kernel, bias, neighbors, impl=impl)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order|once_differentiable"):
        dx.sum().backward()


def test_reference_gradients_by_finite_differences():
    neighbors = sheet(6).neighbors.cpu()
    x, kernel, bias, _ = (t.cpu().double().requires_grad_() for t in problem(6, 2, 1))
    assert torch.autograd.gradcheck(lambda *t: naive.submanifold_conv3d(*t, neighbors), (x, kernel, bias))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(kernel=torch.zeros(26, 16, 16)), r"kernel must be \[27, in, out\]"),
        (dict(kernel=torch.zeros(27, 8, 16)), r"kernel must be \[27, in, out\]"),
        (dict(bias=torch.zeros(15)), r"bias must be \[out\]"),
        (dict(neighbors=torch.zeros(19, 27, dtype=torch.int32)), r"neighbors must be \[T, 27\] int32"),
        (dict(neighbors=torch.zeros(20, 27, dtype=torch.int64)), r"neighbors must be \[T, 27\] int32"),
        (dict(impl="fast"), "impl must be"),
        (dict(x=torch.zeros(20, 16, dtype=torch.int32)), "x must be floating point"),
        (dict(bias=torch.zeros(16, device="meta")), "must be on x's device"),
    ],
)
def test_bad_input_is_named(change, match):
    arguments = dict(x=torch.zeros(20, 16), kernel=torch.zeros(27, 16, 16), bias=None, neighbors=torch.zeros(20, 27, dtype=torch.int32))
    with pytest.raises((ValueError, TypeError), match=match):
        ssa.submanifold_conv3d(**{**arguments, **change})
