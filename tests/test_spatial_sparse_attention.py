"""The whole operator against naive in fp64 with the same choice on both sides, its fused path against the public branches."""

import functools

import pytest
import torch
from utils import (
    DEVICE,
    DTYPES,
    IMPL,
    assert_choice,
    assert_repeats,
    compare,
    draw,
    draw_qkv,
    largest,
    opcheck,
    random_choice,
    random_coords,
    random_partition,
    run,
)

import ssa
from ssa import naive

NAMES = ["q", "k", "v", "k_cmp", "v_cmp", "gates"]


def problem(partition, topk, hq=4, hkv=2, d=32, dtype=torch.float32, per_head=True, gate_dtype=None, impl=IMPL, ids=None):
    """The operator choosing by itself, the reference with the choice the public op makes from the same inputs, inputs."""
    qkv = draw_qkv(partition, hq, hkv, d, dtype)
    t = partition.num_tokens
    gates = draw(*((t, hq, 3) if per_head else (t, 3)), seed=77).sigmoid().to(gate_dtype or dtype)
    if ids is None:
        _, lse = ssa.compression_attention(qkv[0], qkv[3], qkv[4], partition, impl=impl)
        ids = ssa.block_topk(qkv[0], qkv[3], lse, partition, topk, impl=impl)
    return (
        lambda *xs: ssa.spatial_sparse_attention(*xs, partition, topk=topk, impl=impl),
        lambda *xs: naive.spatial_sparse_attention(*xs, partition, topk=topk, topk_indices=ids),
        [*qkv, gates],
    )


LAYOUTS = {
    "unequal samples, one of them empty": dict(counts=[70, 0, 1, 20]),
    "63 tokens, shifted windows": dict(counts=[63], shift=2),
    "111 tokens, equal block sizes": dict(counts=[111], m_cmp=4),
    "one token": dict(counts=[1]),
    "full blocks": dict(counts=[64], edge=4),
    "no token": dict(counts=[0]),
    "no sample": dict(counts=[]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    compare(*problem(random_partition(**LAYOUTS[layout]), 3, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hq, hkv, d", [(1, 1, 16), (3, 1, 24), (8, 1, 48), (32, 2, 64), (32, 1, 128), (2, 2, 96)])
def test_heads(hq, hkv, d, dtype):
    compare(*problem(random_partition([23, 4]), 2, hq, hkv, d, dtype))


@pytest.mark.parametrize("gate_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_a_token(dtype, gate_dtype):
    compare(*problem(random_partition([31]), 2, dtype=dtype, per_head=False, gate_dtype=gate_dtype))


def test_topk_larger_than_the_number_of_blocks():
    compare(*problem(random_partition([40, 3]), 60))


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_choice(dtype):
    """topk_indices given: used as they are, in forward and backward, even lists that no score would choose."""
    partition = random_partition([40, 13])
    ids = random_choice(partition, 2, 3)
    _, reference, inputs = problem(partition, 3, dtype=dtype, ids=ids)
    compare(lambda *xs: ssa.spatial_sparse_attention(*xs, partition, topk=3, topk_indices=ids, impl=IMPL), reference, inputs)


def test_frozen_choice_can_be_overwritten_after_the_forward():
    partition = random_partition([30])
    ids = random_choice(partition, 2, 3)
    _, _, inputs = problem(partition, 3, ids=ids)

    def fn(*xs, clobber=False):
        given = ids.clone()
        o = ssa.spatial_sparse_attention(*xs, partition, topk=3, topk_indices=given, impl=IMPL)
        if clobber:
            given.fill_(-1)
        return o

    for a, b in zip(run(fn, inputs)[1], run(lambda *xs: fn(*xs, clobber=True), inputs)[1], strict=True):
        assert torch.equal(a, b)


def test_same_as_the_public_branches():
    """The fused op against compression, block_topk, selection, window and the gated sum, each public by itself."""
    partition = random_partition([50, 11], shift=1)
    fn, reference, inputs = problem(partition, 3)

    def branches(q, k, v, k_cmp, v_cmp, gates):
        o_cmp, lse = ssa.compression_attention(q, k_cmp, v_cmp, partition, impl=IMPL)
        ids = ssa.block_topk(q, k_cmp, lse, partition, 3, impl=IMPL)
        assert_choice(ids, q, k_cmp, partition, 3)
        o_slc, _ = ssa.selected_attention(q, k, v, ids, partition, impl=IMPL)
        o_win, _ = ssa.window_attention(q, k, v, partition, impl=IMPL)
        return naive.gated_sum(o_cmp, o_slc, o_win, gates)

    compare(branches, reference, inputs)
    compare(fn, reference, inputs)


def test_all_scores_equal():
    """Zero queries and one block of everything: every branch is a mean, so o is v's mean times the gates' sum."""
    partition = ssa.partition_voxels(random_coords([20], edge=4, low=0), compression_block_size=4, selection_block_size=4, window_size=4)
    _, _, (q, k, v, k_cmp, _, gates) = problem(partition, 2)
    o = ssa.spatial_sparse_attention(0 * q, k, v, k_cmp, v.mean(0, keepdim=True), gates, partition, topk=2, impl=IMPL)
    want = gates.sum(-1, keepdim=True) * v.mean(0).repeat_interleave(2, 0)
    assert (o - want).abs().max() <= 4e-7


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_repeat_bitwise(dtype):
    fn, _, inputs = problem(random_partition([60, 21], shift=2), 3, dtype=dtype)
    assert_repeats(fn, inputs)


def assert_same(got, want):
    """Up to rounding: a row that chooses other blocks moves the rows beside it to other places of their tiles."""
    assert largest(got - want) <= 8 * torch.finfo(got.dtype).eps * largest(want) and got.isfinite().all()


@functools.cache
def unspoilt():
    """A problem of three samples, and what it gives with finite inputs."""
    partition = random_partition([24, 20, 17], window=7)
    fn, _, inputs = problem(partition, 2, hq=2, hkv=1)
    return partition, fn, inputs, *run(fn, inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_inf_stay_in_their_row_or_sample(name, value):
    partition, fn, inputs, clean, clean_grads = unspoilt()
    token, block = partition.coords[:, 0], partition.compression.coords[:, 0]
    samples = [token, token, token, block, block, token]
    i = NAMES.index(name)
    row = int((samples[i] == 1).nonzero()[2])
    spoilt = [x.clone() for x in inputs]
    spoilt[i][row] = value
    (o,), grads = run(fn, spoilt)
    assert not o[token == 1].isfinite().all(), "it must not be hidden"
    own_row_only = name in ("q", "gates")
    other = torch.arange(len(o), device=DEVICE) != row if own_row_only else token != 1
    assert_same(o[other], clean[0][other])
    if own_row_only:
        assert_same(grads[0][other], clean_grads[0][other])
    for got, want, sample in zip(grads, clean_grads, samples, strict=True):
        assert_same(got[sample != 1], want[sample != 1])


@pytest.mark.parametrize("lost", NAMES)
def test_inputs_that_need_no_gradient(lost):
    """Any single input without a gradient leaves the others' unchanged."""
    partition = random_partition([20])
    fn, _, inputs = problem(partition, 2)
    _, all_grads = run(fn, inputs)
    i = NAMES.index(lost)
    kept = inputs[:i] + inputs[i + 1 :]
    _, grads = run(lambda *xs: fn(*xs[:i], inputs[i], *xs[i:]), kept)
    for got, want in zip(grads, all_grads[:i] + all_grads[i + 1 :], strict=True):
        assert torch.equal(got, want)


if IMPL == "triton":

    def test_opcheck():
        from ssa.autograd import spatial_sparse_attention as boundary

        for ids in (None, random_choice(random_partition([20, 3]), 2, 2)):
            partition = random_partition([20, 3], shift=1)
            _, _, inputs = problem(partition, 2)
            leaves = [x.requires_grad_() for x in inputs]
            call = lambda: ssa.spatial_sparse_attention(*leaves, partition, topk=2, topk_indices=ids, impl=IMPL)  # noqa: B023, E731
            opcheck(boundary, "spatial_sparse_attention", call)

    def test_second_order_gradient_raises():
        fn, _, inputs = problem(random_partition([5]), 2)
        leaves = [x.requires_grad_() for x in inputs]
        (dq,) = torch.autograd.grad(fn(*leaves).sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="second-order gradients are not supported"):
            torch.autograd.grad(dq.sum(), leaves)

    @pytest.mark.parametrize(("query_major", "forward", "both"), [(False, 12, 23), (True, 7, 20)])
    def test_number_of_launches(query_major, forward, both, monkeypatch):
        """Few enough for small inputs, whatever the samples and windows."""
        from ssa.kernels import block_topk, common, gated_sum, selected_attention, selected_attention_by_query, varlen_attention

        count = []
        monkeypatch.setattr(selected_attention, "by_query", lambda *_: query_major)
        for module in (block_topk, common, gated_sum, selected_attention, selected_attention_by_query, varlen_attention):
            for name in [n for n in vars(module) if n.endswith("_kernel")]:
                kernel = getattr(module, name)
                counting = type("Counting", (), {"__getitem__": lambda self, grid, k=kernel: count.append(1) or k[grid]})()
                monkeypatch.setattr(module, name, counting)
        _, _, inputs = problem(partition := random_partition([20, 0, 7], shift=1), 2)
        count.clear()
        leaves = [x.requires_grad_() for x in inputs]
        o = ssa.spatial_sparse_attention(*leaves, partition, topk=2, impl=IMPL)
        assert len(count) == forward
        o.sum().backward()
        assert len(count) == both
