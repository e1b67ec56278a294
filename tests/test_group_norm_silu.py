"""GroupNorm over the rows of each sample with SiLU, against its definition in fp64.

Tolerance: twice the definition's own error in the same precision, plus one rounding of what is summed: a gradient that cancels to
nothing is judged by what it cancelled from.
"""

import itertools
import math

import pytest
import torch
from torch.nn.functional import group_norm, silu
from utils import CUDA, DEVICE, IMPL, assert_close, assert_repeats, draw, largest, nan_in_fresh_memory, run

from ssa import naive
from ssa.functional import group_norm_silu

EPS = 1e-5


def cu_of(*counts: int) -> torch.Tensor:
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(DEVICE)


def draw_inputs(num_rows: int, features: int, dtype: torch.dtype = torch.float32, offset: float = 0.0) -> list[torch.Tensor]:
    """x with rows around `offset`, weight, bias."""
    x = (draw(num_rows, features) + offset).to(dtype)
    return [x, 1 + draw(features, dtype=dtype, seed=1) / 4, draw(features, dtype=dtype, seed=2)]


def forms(cu: torch.Tensor, groups: int):
    """What runs here, and the definition."""
    return (
        lambda x, w, b: group_norm_silu(x, w, b, cu, groups, EPS, impl=IMPL),
        lambda x, w, b: naive.group_norm_silu(x, w, b, cu, groups, EPS),
    )


def summands(inputs: list[torch.Tensor], dy: torch.Tensor, cu: torch.Tensor, groups: int) -> tuple[float, float, float]:
    """Largest in size, in fp64: the terms of dx; what dweight sums; what dbias sums."""
    x, weight, bias, dy = (t.double() for t in (*inputs, dy))
    normal, scale = torch.empty_like(x), torch.empty_like(x)
    for a, b in itertools.pairwise(cu.unique().tolist()):
        rows = x[a:b].unflatten(1, (groups, -1))
        rstd = (rows.var((0, 2), correction=0, keepdim=True) + EPS).rsqrt().expand_as(rows)
        normal[a:b], scale[a:b] = ((rows - rows.mean((0, 2), keepdim=True)) * rstd).flatten(1), rstd.flatten(1)
    z = normal * weight + bias
    dz = dy * torch.sigmoid(z) * (1 + z - z * torch.sigmoid(z))
    return largest(dz * weight * scale), largest((dz * normal).abs().sum(0)), largest(dz.abs().sum(0))


def compare(inputs: list[torch.Tensor], cu: torch.Tensor, groups: int) -> None:
    """The output and every gradient against the definition in fp64; fresh memory is NaN."""
    fn, definition = forms(cu, groups)
    with nan_in_fresh_memory():
        (y,), grads = run(fn, inputs)
    (want_y,), want = run(definition, inputs, torch.float64)
    (low_y,), low = run(definition, inputs)
    eps = torch.finfo(y.dtype).eps
    assert [g.dtype for g in (y, *grads)] == [inputs[0].dtype, *(t.dtype for t in inputs)]
    assert_close(y, want_y, low_y, eps * largest(want_y), "y")
    dy = draw(*y.shape, dtype=y.dtype, seed=99)  # as `run` draws it
    roundings = summands(inputs, dy, cu, groups)
    for name, *tensors, size in zip(("dx", "dweight", "dbias"), grads, want, low, roundings, strict=True):
        assert_close(*tensors, eps * size, name)


@pytest.mark.parametrize("counts", [(1,), (63,), (64, 111), (0, 0, 5, 0, 130, 1, 0)])
@pytest.mark.parametrize("features", [32, 24, 64, 272])
def test_forward_and_gradients(counts, features):
    compare(draw_inputs(sum(counts), features), cu_of(*counts), math.gcd(32, features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if CUDA or IMPL == "torch" else [torch.float16])
def test_half_precision_far_from_zero(dtype):
    compare(draw_inputs(160, 64, dtype, offset=20), cu_of(70, 90), 32)


def test_rows_far_from_zero():
    """The variance is 1e-6 of the mean's square: sums of x² in fp32 would lose it."""
    compare(draw_inputs(240, 64, offset=1000), cu_of(200, 40), 32)


def test_half_rows_with_parameters_in_fp32():
    cu, (x, weight, bias) = cu_of(50, 30), draw_inputs(80, 64)
    leaves = [x.half().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    y = group_norm_silu(*leaves, cu, 32, EPS, impl=IMPL)
    grads = torch.autograd.grad(y.float().sum(), leaves)
    want = naive.group_norm_silu(x.half().double(), weight.double(), bias.double(), cu, 32, EPS)
    assert (y - want).abs().max() <= torch.finfo(torch.float16).eps * want.abs().max()
    assert [g.dtype for g in (y, *grads)] == [torch.float16, torch.float16, torch.float32, torch.float32]


def test_no_rows_and_no_samples():
    for cu in (cu_of(0, 0), cu_of()):
        compare(draw_inputs(0, 64), cu, 32)


def test_the_definition_is_that_of_torch():
    x, weight, bias = (t.double() for t in draw_inputs(90, 48))
    want = [silu(group_norm(x[a:b].T[None], 16, weight, bias, EPS))[0].T for a, b in ((0, 30), (30, 90))]
    assert (naive.group_norm_silu(x, weight, bias, cu_of(30, 0, 60), 16, EPS) - torch.cat(want)).abs().max() <= 1e-12


def test_definition_gradcheck():
    inputs = [t.double().requires_grad_() for t in draw_inputs(7, 6)]
    assert torch.autograd.gradcheck(lambda x, w, b: naive.group_norm_silu(x, w, b, cu_of(3, 0, 4), 2, EPS), inputs)


def test_mistakes_are_named():
    x, weight, cu = torch.zeros(3, 8, device=DEVICE), torch.ones(8, device=DEVICE), cu_of(3)
    for arguments, rule in (
        ((x[0], weight, weight, cu, 2), "x must be"),
        ((x, weight[1:], weight, cu, 2), "weight and bias"),
        ((x, weight, weight, cu, 3), "num_groups must divide the 8 channels, got 3"),
        ((x, weight, weight, cu, 0), "num_groups must divide"),
        ((x, weight, weight, cu.long(), 2), "cu_seqlens must be"),
    ):
        with pytest.raises(ValueError, match=rule):
            group_norm_silu(*arguments)
    with pytest.raises(TypeError, match="x must be floating point"):
        group_norm_silu(x.int(), weight, weight, cu, 2)


def test_nan_stays_in_its_sample():
    cu, (x, weight, bias) = cu_of(70, 90, 3), draw_inputs(163, 64)
    clean = group_norm_silu(x, weight, bias, cu, 32, EPS, impl=IMPL)
    x = x.clone().index_fill_(0, torch.tensor([80], device=DEVICE), torch.nan).requires_grad_()
    y = group_norm_silu(x, weight, bias, cu, 32, EPS, impl=IMPL)
    (dx,) = torch.autograd.grad(y.sum(), x)
    others = torch.ones(163, dtype=torch.bool, device=DEVICE).index_fill_(0, torch.arange(70, 160, device=DEVICE), False)
    assert torch.equal(y[others], clean[others]) and dx[others].isfinite().all() and y[~others].isnan().all()


def test_runs_repeat_bitwise():
    fn, _ = forms(cu_of(300, 0, 77), 32)
    with nan_in_fresh_memory():
        assert_repeats(fn, draw_inputs(377, 64))


if IMPL == "triton":

    def test_tiles_of_several_steps(monkeypatch):
        """Tiles of three steps, as many rows have; with other tiles the sums differ by rounding alone."""
        from ssa.kernels import group_norm_silu as kernels

        tiling = kernels._tiling
        monkeypatch.setattr(kernels, "_tiling", lambda n, samples, block: tiling(n, samples, 3 * block))
        assert kernels._tiling(10, 2, 64)[0] == 192
        compare(draw_inputs(884, 64, offset=10), cu_of(500, 0, 191, 193), 32)

    def test_number_of_launches(monkeypatch):
        """Three a pass, whatever the samples."""
        from ssa.kernels import group_norm_silu as kernels

        count = []
        for name in [n for n in vars(kernels) if n.endswith("_kernel")]:
            kernel = getattr(kernels, name)
            counting = type("Counting", (), {"__getitem__": lambda self, grid, k=kernel: count.append(1) or k[grid]})()
            monkeypatch.setattr(kernels, name, counting)
        cu, (x, weight, bias) = cu_of(70, 0, 30), draw_inputs(100, 64)
        y, stats = kernels.group_norm_silu_forward(x, weight, bias, cu, 32, EPS)
        assert len(count) == 3
        kernels.group_norm_silu_backward(y, x, weight, bias, stats, cu)
        assert len(count) == 6

    def test_opcheck_and_second_order():
        from ssa.autograd.group_norm_silu import group_norm_silu as op
        from ssa.autograd.group_norm_silu import group_norm_silu_backward

        cu, inputs = cu_of(20, 0, 13), [t.requires_grad_() for t in draw_inputs(33, 64)]
        torch.library.opcheck(op.overload, (*inputs, cu, 32, EPS))
        y, stats = op(*inputs, cu, 32, EPS)
        torch.library.opcheck(group_norm_silu_backward.overload, (*(t.detach() for t in (y, *inputs, stats)), cu))
        (dx,) = torch.autograd.grad(y.sum(), inputs[0], create_graph=True)
        with pytest.raises(RuntimeError, match="second-order gradients are not supported"):
            torch.autograd.grad(dx.sum(), inputs[0])
