"""The gated sum of three branches: forward, its gradients, and the stats its backward hands to the branches."""

import math

import pytest
import torch
from utils import DTYPES, IMPL, assert_close, compare, draw, largest, nan_in_fresh_memory, run

from ssa import naive

if IMPL == "triton":
    from ssa.kernels.common import lse_dtype
    from ssa.kernels.gated_sum import gated_sum_backward, gated_sum_forward

    def problem(tokens, heads, head_dim, dtype, per_head, gate_dtype=None):
        branches = [draw(tokens, heads, head_dim, dtype=dtype, seed=i) for i in range(3)]
        shape = (tokens, heads, 3) if per_head else (tokens, 3)
        return branches, draw(*shape, dtype=gate_dtype or dtype, seed=3)

    class GatedSum(torch.autograd.Function):
        """What the operator's own boundary does with the two launchers."""

        @staticmethod
        def forward(ctx, *args):
            ctx.save_for_backward(*args)
            return gated_sum_forward(*args)

        @staticmethod
        def backward(ctx, do):
            *branches, gates = ctx.saved_tensors
            lses = [o.new_zeros(o.shape[:2], dtype=lse_dtype(o)) for o in branches]
            dos, _, dgates = gated_sum_backward(do.contiguous(), branches, lses, gates)
            return *dos, dgates

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("per_head", [False, True])
    @pytest.mark.parametrize("tokens, heads, head_dim", [(0, 2, 32), (1, 1, 16), (63, 3, 24), (20, 8, 48), (5, 32, 128)])
    def test_forward_and_gradients(tokens, heads, head_dim, per_head, dtype):
        branches, gates = problem(tokens, heads, head_dim, dtype, per_head)
        compare(GatedSum.apply, naive.gated_sum, [*branches, gates])

    @pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32])
    @pytest.mark.parametrize("per_head", [False, True])
    def test_fp32_gates_of_half_branches(per_head, dtype):
        """The sum and the gates' gradients are fp32, so each result is off by its own rounding alone."""
        branches, gates = problem(31, 3, 32, dtype, per_head, torch.float32)
        (o,), grads = run(GatedSum.apply, [*branches, gates])
        exact, exact_grads = run(naive.gated_sum, [*branches, gates], torch.float64)
        assert grads[3].dtype == torch.float32
        for got, want in zip([o, *grads], [*exact, *exact_grads], strict=True):
            assert largest(got.double() - want) <= torch.finfo(got.dtype).eps * 4 * largest(want)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("per_head", [False, True])
    def test_stats_of_each_branch(per_head, dtype):
        """lse_b in the unit of the exponent, and delta_b = Σ_d o_b do_b with do_b = g_b do as rounded, in fp32 at least."""
        branches, gates = problem(41, 6, 24, dtype, per_head)
        do = draw(41, 6, 24, dtype=dtype, seed=9)
        lses = [draw(41, 6, dtype=lse_dtype(do), seed=10 + i) for i in range(3)]
        with nan_in_fresh_memory():
            dos, stats, _ = gated_sum_backward(do, branches, lses, gates)
        for i, (o, do_b, lse, both) in enumerate(zip(branches, dos, lses, stats, strict=True)):
            g = gates[..., i, None] if per_head else gates[:, None, i, None]
            assert torch.equal(do_b, (g.float() * do.float()).to(dtype))
            want, low = ((o.to(t) * do_b.to(t)).sum(-1) for t in (torch.float64, torch.float32))
            assert both.dtype == lse_dtype(do)
            assert torch.equal(both[..., 0], lse if dtype == torch.float32 else lse * math.log2(math.e))
            assert_close(both[..., 1], want, low, torch.finfo(torch.float32).eps * largest(want), f"delta {i}")
