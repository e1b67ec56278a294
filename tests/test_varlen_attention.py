"""Variable-length attention and the two branches made of it, against naive in fp64: outputs, lse and every gradient."""

import pytest
import torch
from utils import (
    DEVICE,
    DTYPES,
    GROUPS,
    HEAD_DIMS,
    IMPL,
    assert_repeats,
    compare,
    draw,
    draw_qkv,
    nan_in_fresh_memory,
    opcheck,
    random_partition,
    run,
)

import ssa
from ssa import naive


def cu(*counts: int) -> torch.Tensor:
    return torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()


def problem(counts_q, counts_k, hq=4, hkv=2, d=32, dtype=torch.float32):
    """Inputs, the operation and its reference for segments of these lengths."""
    q, k, v = (draw(sum(n), h, d, dtype=dtype, seed=i) for i, (n, h) in enumerate([(counts_q, hq), (counts_k, hkv), (counts_k, hkv)]))
    offsets = cu(*counts_q), cu(*counts_k)
    return (
        lambda q, k, v: ssa.varlen_attention(q, k, v, *offsets, impl=IMPL),
        lambda q, k, v: naive.varlen_attention(q, k, v, *offsets),
        [q, k, v],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "counts_q, counts_k",
    [([1], [1]), ([63], [111]), ([111], [63]), ([40, 0, 1, 30], [1, 7, 0, 33]), ([0, 32], [32, 32]), ([], []), ([0], [5]), ([5], [0])],
)
def test_odd_and_empty_segments(counts_q, counts_k, dtype):
    compare(*problem(counts_q, counts_k, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim, dtype):
    compare(*problem([17, 30], [45, 9], d=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_groups(group, dtype):
    compare(*problem([9, 2], [35, 3], hq=2 * group, hkv=2, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_segment_over_many_query_tiles(dtype):
    """More than 512 keys a segment take the launch settings of compression; many queries split the key gradients."""
    hq, hkv, queries, keys = (8, 1, 1100, 1100) if DEVICE.type == "cuda" else (2, 1, 33, 530)
    compare(*problem([queries], [keys], hq=hq, hkv=hkv, dtype=dtype))


if DEVICE.type == "cuda":
    from ssa.kernels import varlen_attention as kernels
    from ssa.kernels import varlen_attention_hopper as hopper

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_queries_split_for_the_key_gradients(dtype):
        """Few keys over many rows: dk and dv are sums of partial sums over the queries."""
        compare(*problem([3000, 70], [40, 3], hq=16, hkv=1, dtype=dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        "head_dim, group, shares", [(16, 4, 1), (32, 16, 1), (32, 16, 4), (32, 1, 2), (32, 3, 2), (48, 8, 1), (64, 8, 4)]
    )
    def test_long_segments_of_all_forms(head_dim, group, shares, dtype, monkeypatch):
        """More than 512 keys a segment on average, some of few, some of none, over queries that fill no tile; in 16 bit on sm_90 the kernel
        of varlen_attention_hopper, but for head sizes and groups that do not fill its tiles. The shares that hold no query add nothing."""
        monkeypatch.setattr(kernels, "_splits", lambda *_: shares)
        fn, reference, inputs = problem([301, 0, 3, 500], [900, 40, 0, 1301], hq=2 * group, d=head_dim, dtype=dtype)
        if torch.cuda.get_device_capability() == (9, 0):
            taken = hopper.takes(inputs[0], inputs[1], inputs[0], None, True)
            assert taken == (dtype != torch.float32 and head_dim != 48 and group != 3)
        compare(fn, reference, inputs)
        assert_repeats(fn, inputs)

    def test_rows_at_odd_addresses():
        """No kernel may copy 16 bytes at a time from there."""
        q, k, v, do = (draw(n, h, 32, dtype=torch.bfloat16, seed=n + h) for n, h in ((90, 4), (600, 2), (600, 2), (90, 4)))
        offsets = cu(90), cu(600)
        o, lse = kernels.varlen_attention_forward(q, k, v, *offsets, None, 0.2)
        stats = kernels.attention_stats(o, do, lse, torch.zeros_like(lse))
        want = kernels.varlen_attention_backward(q, k, v, do, stats, *offsets, None, 0.2)
        odd = [torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x) for x in (q, k, v, do)]
        got = kernels.varlen_attention_backward(*odd, stats, *offsets, None, 0.2)
        for a, b in zip(got, want, strict=True):
            assert (a - b).abs().max() <= 2 * torch.finfo(a.dtype).eps * b.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_beyond_the_range_of_exp(dtype):
    """Scores up to 200: exp overflows without the running maximum."""
    fn, reference, (q, k, v) = problem([33], [50], dtype=dtype)
    q, k = 6 * q, 6 * k
    outputs, grads = run(fn, [q, k, v])
    assert outputs[1].max() > 100 and all(x.isfinite().all() for x in [*outputs, *grads])
    compare(fn, reference, [q, k, v])


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_keys_give_the_mean_of_v(dtype):
    q, v = draw(21, 4, 32, dtype=dtype), draw(50, 2, 32, dtype=dtype, seed=1)
    k = draw(1, 2, 32, dtype=dtype, seed=2).expand(50, 2, 32)
    o, lse = ssa.varlen_attention(q, k, v, cu(21), cu(50), impl=IMPL)
    mean = v.double().mean(0).repeat_interleave(2, 0).expand(21, 4, 32)
    assert (o.double() - mean).abs().max() <= 2 * torch.finfo(dtype).eps
    s = (q.double() * k[0].repeat_interleave(2, 0).double()).sum(-1) * 32**-0.5
    assert (lse - (s + torch.tensor(50.0).log().item())).abs().max() <= 4 * torch.finfo(torch.float32).eps * lse.abs().max() + (
        0 if IMPL == "triton" else 4 * torch.finfo(dtype).eps * s.abs().max()
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_gives_v(dtype):
    q, k, v = draw(5, 2, 16, dtype=dtype), draw(5, 1, 16, dtype=dtype, seed=1), draw(5, 1, 16, dtype=dtype, seed=2)
    offsets = cu(1, 1, 1, 1, 1)
    o, _ = ssa.varlen_attention(q, k, v, offsets, offsets, impl=IMPL)
    assert torch.equal(o, v.expand(5, 2, 16))


def test_row_without_keys():
    """o = 0, lse = −inf, zero gradients, whatever the cotangent of lse."""
    fn, _, inputs = problem([3, 4], [0, 5])
    with nan_in_fresh_memory():
        (o, lse), (dq, dk, dv) = run(fn, inputs)
    assert (o[:3] == 0).all() and (lse[:3] == -torch.inf).all() and (dq[:3] == 0).all()
    assert o[3:].isfinite().all() and lse[3:].isfinite().all() and dk.isfinite().all() and dv.isfinite().all()


def test_gradient_of_o_alone_and_of_lse_alone():
    fn, reference, inputs = problem([20, 13], [7, 30])
    for i in (0, 1):
        compare(lambda *xs, i=i: fn(*xs)[i], lambda *xs, i=i: reference(*xs)[i], inputs)


def test_softmax_scale():
    _, _, inputs = problem([20], [30])
    offsets = cu(20), cu(30)
    compare(
        lambda q, k, v: ssa.varlen_attention(q, k, v, *offsets, softmax_scale=0.71, impl=IMPL),
        lambda q, k, v: naive.varlen_attention(q, k, v, *offsets, softmax_scale=0.71),
        inputs,
    )


def test_rows_that_are_not_contiguous():
    """Views with strides, as projections give them."""
    offsets = cu(20)
    qkv = draw(20, 8, 32)

    def split(op, **kwargs):
        return lambda x: op(x[:, :4], x[:, 4:6], x[:, 6:], offsets, offsets, **kwargs)

    compare(split(ssa.varlen_attention, impl=IMPL), split(naive.varlen_attention), [qkv])


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_repeat_bitwise(dtype):
    fn, _, inputs = problem([70, 33], [64, 41], dtype=dtype)
    assert_repeats(fn, inputs)


LAYOUTS = {
    "unequal samples, one of them empty": dict(counts=[90, 0, 1, 20]),
    "shifted windows": dict(counts=[60, 21], shift=2),
    "odd windows, shift 1": dict(counts=[40, 5], window=3, shift=1),
    "windows of the compression blocks": dict(counts=[63], window=2),
    "one token": dict(counts=[1]),
    "a full block": dict(counts=[64], edge=4),
    "no token": dict(counts=[0]),
    "no sample": dict(counts=[]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("branch", ["compression_attention", "window_attention"])
def test_branches(branch, layout, dtype):
    partition = random_partition(**LAYOUTS[layout])
    q, k, v, k_cmp, v_cmp = draw_qkv(partition, 4, 2, 32, dtype)
    inputs = [q, k_cmp, v_cmp] if branch == "compression_attention" else [q, k, v]
    compare(
        lambda *xs: getattr(ssa, branch)(*xs, partition, impl=IMPL), lambda *xs: getattr(naive, branch)(*xs, partition), inputs
    )


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("branch", ["compression_attention", "window_attention"])
def test_nan_and_inf_stay_in_their_row_or_sample(branch, value, name):
    """In q: its own row alone. In k or v: every row that sees it, never another sample. Gradients likewise."""
    partition = random_partition([24, 20, 27], window=6, shift=1)
    q, k, v, k_cmp, v_cmp = draw_qkv(partition, 2, 1, 32, torch.float32)
    inputs = dict(zip("qkv", [q, k_cmp, v_cmp] if branch == "compression_attention" else [q, k, v], strict=True))
    blocks_k = partition.compression.coords[:, 0] if branch == "compression_attention" else partition.coords[:, 0]
    samples = dict(q=partition.coords[:, 0], k=blocks_k, v=blocks_k)
    row = int((samples[name] == 1).nonzero()[3])
    fn = lambda q, k, v: getattr(ssa, branch)(q, k, v, partition, impl=IMPL)  # noqa: E731
    clean, clean_grads = run(fn, list(inputs.values()))
    inputs[name] = inputs[name].clone()
    inputs[name][row] = value
    outputs, grads = run(fn, list(inputs.values()))
    for got, want in zip(outputs, clean, strict=True):
        other = torch.arange(len(got), device=DEVICE) != row if name == "q" else partition.coords[:, 0] != 1
        assert torch.equal(got[other], want[other])
    for got, want, s in zip(grads, clean_grads, samples.values(), strict=True):
        assert torch.equal(got[s != 1], want[s != 1])
    o = outputs[0]
    if name == "q":
        assert o[row].isnan().any()
        assert torch.equal(grads[0][other], clean_grads[0][other])
    else:
        visible = partition.coords[:, 0] == 1
        if branch == "window_attention":
            cell = torch.div(partition.coords[:, 1:] + 1, 6, rounding_mode="floor")
            visible &= (cell == cell[row]).all(-1)
        reached = ~(o[visible] == clean[0][visible]).all(-1)
        assert reached.all(), "a row that sees it must not hide it"


if IMPL == "triton":
    from ssa.kernels import varlen_attention as kernels
    from ssa.kernels.common import NORM_PARTS

    @pytest.mark.parametrize("large", ["no row", "every row", "every other row", "one row"])
    def test_with_and_without_a_running_maximum(large, monkeypatch):
        """Tiles whose scores are bounded need none; the bound, which only bf16 asks for elsewhere, of fp32 here. 30 q is beyond it."""

        def norms(k):  # the largest in the last share
            return torch.nn.functional.pad(torch.linalg.vector_norm(k, dim=-1).amax(0, keepdim=True), (0, 0, NORM_PARTS.value - 1, 0))

        monkeypatch.setattr(kernels, "key_norms", norms)
        fn, reference, (q, k, v) = problem([40, 9], [600, 530])
        rows = {"no row": [], "every row": slice(None), "every other row": slice(0, None, 2), "one row": [5]}[large]
        q[rows] *= 30
        assert ((5.0 * q.norm(dim=-1).amax(1) * 32**-0.5 > 50).sum() > 0) == (large != "no row")
        compare(fn, reference, [q, k, v])

    @pytest.mark.parametrize("shares", [2, 64])
    @pytest.mark.parametrize("branch", ["compression_attention", "window_attention"])
    def test_shares_of_the_queries(branch, shares, monkeypatch):
        """dk and dv are sums over programs that take a share of the queries each, most of them none."""
        monkeypatch.setattr(kernels, "_splits", lambda *_: shares)
        partition = random_partition([30, 7], window=5, shift=1)
        q, k, v, k_cmp, v_cmp = draw_qkv(partition, 6, 2, 32, torch.float32)
        inputs = [q, k_cmp, v_cmp] if branch == "compression_attention" else [q, k, v]
        compare(
            lambda *xs: getattr(ssa, branch)(*xs, partition, impl=IMPL), lambda *xs: getattr(naive, branch)(*xs, partition), inputs
        )

    def test_shares_keep_to_the_scratch():
        sizes = [(n, d) for n in (500, 7_500, 130_000) for d in (32, 64, 128)]
        shares = {(n, d): kernels._splits(n // 64 * 2, 2**21, 16 * n * d, True) for n, d in sizes}
        assert all(s == 1 or s * 16 * n * d <= kernels.SCRATCH for (n, d), s in shares.items())
        assert shares[7_500, 64] == 64 and shares[7_500, 128] == 32 and shares[130_000, 32] == 4

    def test_opcheck():
        from ssa.autograd import varlen_attention as boundary

        fn, _, inputs = problem([20, 3], [5, 30])
        opcheck(boundary, "varlen_attention", lambda: fn(*[x.requires_grad_() for x in inputs]))
        partition = random_partition([20], shift=1)
        q, k, v, _, _ = (x.requires_grad_() for x in draw_qkv(partition, 2, 1, 16, torch.float32))
        opcheck(boundary, "varlen_attention", lambda: ssa.window_attention(q, k, v, partition, impl=IMPL))

    def test_second_order_gradient_raises():
        fn, _, inputs = problem([5], [7])
        leaves = [x.requires_grad_() for x in inputs]
        (dq,) = torch.autograd.grad(fn(*leaves)[0].sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="second-order gradients are not supported"):
            torch.autograd.grad(dq.sum(), leaves)
