"""Block mean and the released pooling, against loops over the blocks in fp64."""

import pytest
import torch
from utils import CUDA, DEVICE, IMPL

import ssa
from ssa import functional, naive

IMPLS = ["torch", "triton"] if IMPL == "triton" else ["torch"]


def cloud(num_tokens: int, edge: int = 12) -> ssa.VoxelPartition:
    generator = torch.Generator().manual_seed(num_tokens)
    cells = torch.cartesian_prod(torch.arange(3), *[torch.arange(-edge // 2, edge // 2)] * 3)
    coords = cells[torch.randperm(len(cells), generator=generator)[:num_tokens]]
    return ssa.partition_voxels(coords.to(DEVICE), window_size=5, window_shift=2)


def loop_mean(x: torch.Tensor, blocks: ssa.Blocks, extra: int = 0) -> torch.Tensor:
    x = x if blocks.index is None else x[blocks.index.long()]
    offsets = blocks.offsets.tolist()
    pieces = [x[a:b].sum(0) / (b - a + extra) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    return torch.stack(pieces) if pieces else x[:0]


@pytest.mark.parametrize("impl", ["naive", *IMPLS])
@pytest.mark.parametrize("grouping", ["compression", "selection", "window"])
@pytest.mark.parametrize(("num_tokens", "features"), [(0, 16), (1, 16), (63, 24), (400, 136)])
def test_mean_and_gradient(num_tokens, features, grouping, impl):
    partition = cloud(num_tokens)
    blocks = getattr(partition, grouping)
    assert (blocks.index is None) == (grouping != "window")
    x = torch.randn(num_tokens, features, device=DEVICE, requires_grad=True)
    y = ssa.block_mean(x, blocks, impl=impl)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    wide = x.detach().double().requires_grad_()
    want = loop_mean(wide, blocks)
    (dx_want,) = torch.autograd.grad(want, wide, dy.double())
    assert y.shape == want.shape == (len(blocks), features)
    if num_tokens:
        assert (y - want).abs().max() <= 1e-6
        assert (dx - dx_want).abs().max() <= 1e-6


@pytest.mark.parametrize("impl", ["naive", *IMPLS])
def test_pooling_counts_one_row_more_and_adds_the_table(impl):
    partition = cloud(300)
    blocks = partition.compression
    x, table = torch.randn(300, 24, device=DEVICE), torch.randn(64, 24, device=DEVICE)
    slots = torch.randint(0, 64, (300,), dtype=torch.int32).to(DEVICE)
    leaves = x.requires_grad_(), table.requires_grad_()
    y = functional.segment_mean(x, blocks.offsets, extra=1, table=table, slots=slots, impl=impl)
    dy = torch.randn_like(y)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = loop_mean(wide[0] + wide[1][slots.long()], blocks, extra=1)
    assert (y - want).abs().max() <= 1e-6
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, wide, dy.double()), strict=True):
        assert (a - b).abs().max() <= 1e-6 * (1 + b.abs().max())


@pytest.mark.parametrize("impl", ["naive", *IMPLS])
def test_shape_is_kept_and_equal_rows_are_their_mean(impl):
    partition = cloud(200)
    x = torch.arange(6.0, device=DEVICE).view(2, 3).expand(200, 2, 3)
    assert torch.allclose(ssa.block_mean(x, partition.selection, impl=impl), x[: len(partition.selection)], rtol=1e-6, atol=0)
    assert ssa.block_mean(x[:, 0, 0], partition.selection, impl=impl).shape == (len(partition.selection),)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_segment_without_rows_is_zero(impl):
    offsets = torch.tensor([0, 2, 2, 3], dtype=torch.int32, device=DEVICE)
    x = torch.tensor([[1.0], [3.0], [5.0]], device=DEVICE)
    assert functional.segment_mean(x, offsets, impl=impl).tolist() == [[2.0], [0.0], [5.0]]
    assert naive.segment_mean(x, offsets).tolist() == [[2.0], [0.0], [5.0]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if CUDA else [torch.float16])
def test_half_precision_rounds_once(dtype, impl):
    partition = cloud(500, edge=8)
    x = (torch.randn(500, 32, device=DEVICE) + 30).to(dtype)
    want = loop_mean(x.double(), partition.selection)
    got = ssa.block_mean(x, partition.selection, impl=impl)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= 0.51 * torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_is_read_from_fresh_memory_and_runs_repeat(impl):
    partition = cloud(333)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = []
        for _ in range(2):
            x = torch.ones(333, 20, device=DEVICE).div(3).requires_grad_()
            y = ssa.block_mean(x, partition.window, impl=impl)
            runs.append((y.detach(), *torch.autograd.grad(y.sin().sum(), x)))
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    assert all(a.isfinite().all() and torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif("triton" not in IMPLS, reason="needs a GPU or Triton's interpreter")
def test_opcheck_and_second_order():
    from ssa.autograd.block_mean import block_mean, block_mean_backward

    partition = cloud(60)
    offsets, window = partition.compression.offsets, partition.window
    x = torch.randn(60, 16, device=DEVICE, requires_grad=True)
    table = torch.randn(64, 16, device=DEVICE, requires_grad=True)
    slots = torch.randint(0, 64, (60,), dtype=torch.int32).to(DEVICE)
    torch.library.opcheck(block_mean.overload, (x, offsets, None, table, slots, 1))
    torch.library.opcheck(block_mean.overload, (x, window.offsets, window.index, None, None, 0))
    torch.library.opcheck(block_mean_backward.overload, (torch.randn(len(window), 16, device=DEVICE), window.offsets, window.index, 60, 0))
    (dx,) = torch.autograd.grad(ssa.block_mean(x, partition.compression, impl="triton").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order gradients are not supported"):
        torch.autograd.grad(dx.sum(), x)


def test_bad_input_is_named():
    partition = cloud(50)
    with pytest.raises(TypeError, match="x must be floating point"):
        ssa.block_mean(torch.zeros(50, 4, dtype=torch.int32, device=DEVICE), partition.compression)
    with pytest.raises(ValueError, match="one row per voxel"):
        ssa.block_mean(torch.zeros(49, 4, device=DEVICE), partition.window)
    with pytest.raises(ValueError, match="on the device of the blocks"):
        ssa.block_mean(torch.zeros(50, 4, device="meta"), partition.window)


def test_wrong_arguments():
    partition = cloud(63)
    with pytest.raises(TypeError, match="blocks must be Blocks such as partition.compression, got VoxelPartition"):
        ssa.block_mean(torch.ones(63, 16, device=DEVICE), partition)
    with pytest.raises(ValueError, match="one row per voxel.*62.*63 voxels"):
        ssa.block_mean(torch.ones(62, 16, device=DEVICE), partition.window)
    with pytest.raises(TypeError, match="neighbors must be a torch.Tensor, got NoneType"):
        ssa.submanifold_conv3d(torch.ones(63, 16, device=DEVICE), torch.ones(27, 16, 8, device=DEVICE), None, None)


if IMPL == "triton":

    def test_rows_that_do_not_exist_are_not_read():
        """Without an index the number of rows is known to the device only."""
        memory = torch.full((400, 16), torch.nan, device=DEVICE)
        x = memory[:350].fill_(1.0).requires_grad_()
        y = ssa.block_mean(x, cloud(400).compression, impl="triton")
        assert y.isfinite().all() and torch.autograd.grad(y.sum(), x)[0].isfinite().all()
