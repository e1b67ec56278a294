"""The position table added to rows: forward and gradients against indexing in fp64."""

import pytest
import torch
from utils import CUDA, DEVICE, IMPL

from ssa import functional
from ssa.partition import partition_voxels

IMPLS = ["torch", "triton"] if IMPL == "triton" else ["torch"]


def problem(num_tokens: int, features: int, num_slots: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(num_tokens + num_slots)
    x, dy = (torch.randn(num_tokens, features, generator=generator).to(DEVICE, dtype) for _ in range(2))
    table = torch.randn(num_slots, features, generator=generator).to(DEVICE)
    slots = torch.randint(0, num_slots, (num_tokens,), generator=generator, dtype=torch.int32).to(DEVICE)
    return x, table, slots, dy


def gradients(x, table, slots, dy, impl):
    x, table = x.clone().requires_grad_(), table.clone().requires_grad_()
    y = functional.add_position(x, table, slots, impl=impl)
    return y.detach(), *torch.autograd.grad(y, (x, table), dy)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_slots", [1, 8, 64, 512])
@pytest.mark.parametrize(("num_tokens", "features"), [(0, 16), (1, 16), (63, 24), (111, 136), (700, 64)])
def test_matches_indexing(num_tokens, features, num_slots, impl):
    x, table, slots, dy = problem(num_tokens, features, num_slots)
    y, dx, dtable = gradients(x, table, slots, dy, impl)
    assert torch.equal(y, x + table[slots.long()])
    assert torch.equal(dx, dy)
    want, chain = (torch.zeros(num_slots, features, dtype=dtype) for dtype in (torch.float64, torch.float32))
    for row, slot in zip(dy.cpu(), slots.tolist(), strict=True):
        want[slot] += row.double()
        chain[slot] += row
    assert dtable.dtype == torch.float32
    one_rounding = torch.finfo(torch.float32).eps * want.abs().max()
    assert (dtable.cpu() - want).abs().max() <= 2 * (chain - want).abs().max() + one_rounding


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if CUDA else [torch.float16])
def test_half_rows_are_rounded_once_and_the_table_gradient_is_fp32(dtype, impl):
    x, table, slots, dy = problem(300, 40, 64, dtype)
    y, _, dtable = gradients(x, table, slots, dy, impl)
    assert torch.equal(y, (x.float() + table[slots.long()]).to(dtype))
    want = torch.zeros(64, 40, dtype=torch.float64, device=DEVICE).index_add(0, slots.long(), dy.double())
    assert (dtable - want).abs().max() <= 1e-6 * want.abs().max()


@pytest.mark.parametrize("impl", IMPLS[-1:] if CUDA else IMPLS)  # plain PyTorch adds in any order on CUDA
def test_two_runs_are_bitwise_equal(impl):
    tensors = problem(900, 32, 27)
    assert all(torch.equal(a, b) for a, b in zip(gradients(*tensors, impl), gradients(*tensors, impl), strict=True))


@pytest.mark.skipif("triton" not in IMPLS, reason="needs a GPU or Triton's interpreter")
def test_opcheck_and_second_order():
    from ssa.autograd.position_table import add_position, table_gradient

    x, table, slots, dy = problem(40, 16, 8)
    torch.library.opcheck(table_gradient.overload, (dy, slots, 8))
    torch.library.opcheck(add_position.overload, (x.requires_grad_(), table.requires_grad_(), slots))
    weight = dy.clone().requires_grad_()
    (dtable,) = torch.autograd.grad((add_position(x, table, slots) * weight).sum(), table, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order gradients are not supported"):
        torch.autograd.grad(dtable.sum(), weight)


def test_slots_are_the_coordinates_modulo_the_block_with_x_slowest():
    coords = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3], [0, -1, 0, 5], [0, -4, -3, -2]], device=DEVICE)
    partition = partition_voxels(coords, compression_block_size=4)
    assert partition.unsort(partition.slots).tolist() == [0, 16 + 8 + 3, 48 + 0 + 1, 0 + 4 + 2]
