"""Selected attention against naive in fp64: outputs, lse and every gradient, for lists of any kind."""

import pytest
import torch
from utils import (
    CUDA,
    DEVICE,
    DTYPES,
    GROUPS,
    HEAD_DIMS,
    IMPL,
    assert_repeats,
    compare,
    draw_qkv,
    nan_in_fresh_memory,
    opcheck,
    random_choice,
    random_partition,
    run,
)

import ssa
from ssa import naive

WAYS = [(d, way) for d in DTYPES for way in ("block", "query") if way == "block" or (IMPL == "triton" and d != torch.float32)]


@pytest.fixture
def dtype(request, monkeypatch):
    """Both ways to o and dq, whatever the sizes; fp32 goes by block."""
    dtype, way = request.param
    if IMPL == "triton":
        from ssa.kernels import selected_attention

        monkeypatch.setattr(selected_attention, "by_query", lambda *_: way == "query")
    return dtype


both_ways = pytest.mark.parametrize("dtype", WAYS, indirect=True, ids=str)


def problem(partition, ids, hq=4, d=32, dtype=torch.float32, seed=0):
    q, k, v, _, _ = draw_qkv(partition, hq, ids.shape[1], d, dtype, seed)
    return (
        lambda q, k, v: ssa.selected_attention(q, k, v, ids, partition, impl=IMPL),
        lambda q, k, v: naive.selected_attention(q, k, v, ids, partition),
        [q, k, v],
    )


@both_ways
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim, dtype):
    partition = random_partition([40, 23])
    compare(*problem(partition, random_choice(partition, 2, 3), d=head_dim, dtype=dtype))


@both_ways
@pytest.mark.parametrize("group", GROUPS)
def test_groups(group, dtype):
    partition = random_partition([11, 6], edge=5)
    compare(*problem(partition, random_choice(partition, 2, 2), hq=2 * group, dtype=dtype))


LAYOUTS = {
    "unequal samples, one of them empty": dict(counts=[90, 0, 1, 20]),
    "63 tokens": dict(counts=[63]),
    "111 tokens, equal block sizes": dict(counts=[111], m_cmp=4),
    "one token": dict(counts=[1]),
    "full blocks of 64 tokens": dict(counts=[125], edge=5),
    "blocks of one token": dict(counts=[30], m_cmp=1, m_slc=1, edge=4),
    "no token": dict(counts=[0]),
    "no sample": dict(counts=[]),
}


@both_ways
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    """Lists of 0 to 5 blocks; a sample may have fewer than 5."""
    partition = random_partition(**LAYOUTS[layout])
    compare(*problem(partition, random_choice(partition, 2, 5), dtype=dtype))


@both_ways
def test_block_that_every_query_chooses(dtype):
    partition = random_partition([140])
    ids = torch.full((140, 1, 2), -1, dtype=torch.int32, device=DEVICE)
    ids[..., 0] = 3
    compare(*problem(partition, ids, hq=2, dtype=dtype))


@both_ways
def test_every_block_gives_full_attention(dtype):
    """topk of all blocks is attention over the sample, whatever the blocks."""
    partition = random_partition([70])
    ids = torch.arange(len(partition.selection), device=DEVICE, dtype=torch.int32).expand(70, 2, -1).contiguous()
    fn, _, inputs = problem(partition, ids, dtype=dtype)
    compare(fn, lambda q, k, v: naive.attention(q, k, v, torch.ones(70, 70, dtype=torch.bool, device=DEVICE)), inputs)


@both_ways
def test_empty_list(dtype):
    """All −1: o = 0, lse = −inf, zero gradients."""
    partition = random_partition([30])
    ids = torch.full((30, 2, 3), -1, dtype=torch.int32, device=DEVICE)
    fn, _, inputs = problem(partition, ids, dtype=dtype)
    with nan_in_fresh_memory():
        (o, lse), grads = run(fn, inputs)
    assert (o == 0).all() and (lse == -torch.inf).all() and all((g == 0).all() for g in grads)


@both_ways
def test_equal_keys_give_the_mean_of_v(dtype):
    partition = random_partition([60])
    ids = random_choice(partition, 1, 2)
    fn, _, (q, k, v) = problem(partition, ids, hq=2, dtype=dtype)
    o, lse = fn(q, k[:1].expand_as(k).contiguous(), v)
    offsets = partition.selection.offsets.tolist()
    for t, blocks in enumerate(ids[:, 0].tolist()):
        rows = [r for b in blocks if b >= 0 for r in range(offsets[b], offsets[b + 1])]
        if rows:
            mean = v[rows, 0].double().mean(0)
            assert (o[t].double() - mean).abs().max() <= 2 * torch.finfo(dtype).eps * max(1.0, v[rows].abs().max().item())
        else:
            assert (o[t] == 0).all() and (lse[t] == -torch.inf).all()


@both_ways
def test_scores_beyond_the_range_of_exp(dtype):
    partition = random_partition([50])
    fn, reference, (q, k, v) = problem(partition, random_choice(partition, 2, 4), dtype=dtype)
    q, k = 6 * q, 6 * k
    outputs, grads = run(fn, [q, k, v])
    assert outputs[1].max() > 100 and all(x.isfinite().all() for x in [outputs[0], *grads])
    compare(fn, reference, [q, k, v])


@both_ways
def test_gradient_of_o_alone_and_of_lse_alone(dtype):
    partition = random_partition([40])
    fn, reference, inputs = problem(partition, random_choice(partition, 2, 3), dtype=dtype)
    for i in (0, 1):
        compare(lambda *xs, i=i: fn(*xs)[i], lambda *xs, i=i: reference(*xs)[i], inputs)


@both_ways
def test_runs_repeat_bitwise(dtype):
    partition = random_partition([100])
    fn, _, inputs = problem(partition, random_choice(partition, 2, 4), dtype=dtype)
    assert_repeats(fn, inputs)


if IMPL == "triton":

    @pytest.mark.parametrize("dtype", [(d, "block") for d in DTYPES], indirect=True, ids=str)
    @pytest.mark.parametrize("chunk", [1, 7, 64])
    def test_chunks_of_queries_do_not_show(chunk, dtype, monkeypatch):
        """Scratch for few queries at a time: chunk borders inside and at the end, and key gradients split over chunks."""
        from ssa.kernels import selected_attention as kernels

        tokens = 9 if chunk == 1 else 64
        partition = random_partition([tokens], edge=6)
        monkeypatch.setattr(kernels, "chunk_queries", lambda *_: chunk)
        compare(*problem(partition, random_choice(partition, 2, 2), dtype=dtype))

    def test_order_of_the_blocks_does_not_show(monkeypatch):
        """Block 3, which every query chooses, comes first among the programs of dk and dv."""
        from ssa.kernels import selected_attention as kernels

        partition = random_partition([90, 21])
        ids = random_choice(partition, 2, 3)
        ids[:90, :, 0], ids[:90, :, 1:] = 3, torch.where(ids[:90, :, 1:] == 3, -1, ids[:90, :, 1:])
        function, _, tensors = problem(partition, ids, dtype=torch.float16)
        before = run(function, tensors)[1]
        monkeypatch.setattr(kernels, "MANY", 0)
        assert all(torch.equal(a, b) for a, b in zip(run(function, tensors)[1], before, strict=True))
        compare(*problem(partition, ids, dtype=torch.float16))

    @pytest.mark.parametrize(("width", "group"), [(1, 3), (2, 2)])
    def test_resident_keys_of_blocks_of_any_length(width, group):
        """Blocks at both sides of every bound: streamed; two tiles of 64 and one of 64, 32 or 16; one and another; one alone; one token."""
        sizes = [193, 192, 161, 160, 145, 144, 129, 128, 97, 96, 65, 64, 33, 32, 17, 16, 1]
        cube = torch.cartesian_prod(*[torch.arange(6)] * 3)
        coords = torch.cat([torch.nn.functional.pad(cube[:n], (1, 0), value=i) for i, n in enumerate(sizes)])
        partition = ssa.partition_voxels(coords.to(DEVICE), selection_block_size=8)
        ids = torch.full((sum(sizes), 1, 2), -1, dtype=torch.int32, device=DEVICE)
        ids[:, 0, 0] = partition.coords[:, 0].int()
        ids[::2] = -1
        compare(*problem(partition, ids[..., :width], hq=group, d=16, dtype=torch.float16))

    @pytest.mark.parametrize(("edge", "norms"), [(6, 1), (5, 0)])
    def test_blocks_that_are_streamed_on_average_take_the_norms_of_their_keys(edge, norms, monkeypatch):
        """216 tokens a block, or 125, which stay in registers."""
        from ssa.kernels import selected_attention as kernels

        taken = []
        key_norms = kernels.key_norms
        monkeypatch.setattr(kernels, "key_norms", lambda k: taken.append(k) or key_norms(k))
        cube = torch.cartesian_prod(*[torch.arange(edge)] * 3)
        coords = torch.cat([torch.nn.functional.pad(cube, (1, 0), value=i) for i in range(2)])
        partition = ssa.partition_voxels(coords.to(DEVICE), selection_block_size=8)
        ids = partition.coords[:, :1, None].int().contiguous()
        compare(*problem(partition, ids, hq=2, d=16, dtype=torch.bfloat16 if DEVICE.type == "cuda" else torch.float16))
        assert (len(taken) > 0) == norms

    @pytest.mark.parametrize("part", [32, 512])
    @pytest.mark.parametrize("chunk", [20, 1000])
    def test_inverse_map(chunk, part, monkeypatch):
        """A bucket (kv head, block) lists its (query, slot) entries in order, and each chunk's share of it; −1 ones come last."""
        from ssa.kernels import selected_attention as kernels
        from ssa.kernels.selected_attention import invert

        monkeypatch.setattr(kernels, "PART", part)
        partition = random_partition([50, 13])
        ids = random_choice(partition, 2, 3)
        num_blocks = len(partition.selection)
        csr_offsets, csr_indices, chunks = invert(ids, num_blocks, chunk)
        num_chunks = -(-63 // chunk)
        assert csr_offsets.dtype == csr_indices.dtype == chunks.dtype == torch.int32
        assert torch.equal(csr_indices.sort().values, torch.arange(ids.numel(), device=DEVICE, dtype=torch.int32))
        want = [[[] for _ in range(2 * num_blocks)] for _ in range(num_chunks)]
        for t, of_heads in enumerate(ids.tolist()):
            for h, blocks in enumerate(of_heads):
                for slot, block in enumerate(blocks):
                    if block >= 0:
                        want[t // chunk][h * num_blocks + block].append((t * 2 + h) * 3 + slot)
        starts, entries = csr_offsets.tolist(), csr_indices.tolist()
        got = [entries[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
        assert got == [sum(of_bucket, []) for of_bucket in zip(*want, strict=True)]
        ends, begins = chunks.tolist()
        got = [entries[begins[i] : begins[i] + ends[i + 1] - ends[i]] for i in range(num_chunks * 2 * num_blocks)]
        assert got == sum(want, [])

    def test_inverse_map_of_many_blocks():
        """As a stable sort gives it; a bucket of its own for −1."""
        from ssa.kernels.selected_attention import invert

        ids = torch.randint(-1, 600, (300, 2, 3), dtype=torch.int32).to(DEVICE)
        ids[::3] = 7
        bucket = torch.where(ids >= 0, ids + 600 * torch.arange(2, device=DEVICE)[:, None], 1200).flatten()
        csr_offsets, csr_indices, chunks = invert(ids, 600, 300)
        assert torch.equal(csr_indices, bucket.sort(stable=True).indices.int())
        assert csr_offsets.tolist() == [0, *bucket.bincount(minlength=1201).cumsum(0).tolist()[:-1]]
        assert torch.equal(chunks, csr_offsets.expand(2, -1))

    @both_ways
    def test_opcheck(dtype):
        from ssa.autograd import selected_attention as boundary

        partition = random_partition([30])
        fn, _, inputs = problem(partition, random_choice(partition, 2, 2), dtype=dtype)
        opcheck(boundary, "selected_attention", lambda: fn(*[x.requires_grad_() for x in inputs]))

    def test_which_blocks_are_small():
        """16 bit, 8 to 32 heads a key/value head, up to 64 blocks a query, up to 32 tokens a block on average."""
        from ssa.kernels.selected_attention_by_query import by_query

        def small(t=320, group=8, topk=64, num_blocks=10, dtype=torch.bfloat16):
            return by_query(torch.empty(t, 2 * group, 16, dtype=dtype), torch.empty(t, 2, topk, dtype=torch.int32), num_blocks)

        assert small() and small(dtype=torch.float16) and small(group=32) and small(t=0, num_blocks=0)
        assert not any((small(t=321), small(group=7), small(group=33), small(topk=65), small(dtype=torch.float32)))

    def test_second_order_gradient_raises():
        partition = random_partition([5])
        fn, _, inputs = problem(partition, random_choice(partition, 2, 1))
        leaves = [x.requires_grad_() for x in inputs]
        (dq,) = torch.autograd.grad(fn(*leaves)[0].sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="second-order gradients are not supported"):
            torch.autograd.grad(dq.sum(), leaves)


@both_ways
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_row_or_sample(value, name, dtype):
    """In q: its own row alone. In k or v: every row that sees it, never another sample. Gradients likewise."""
    partition = random_partition([30, 25, 0, 21] if CUDA else [14, 11, 0, 9])
    ids = random_choice(partition, 1, 3)
    fn, _, inputs = problem(partition, ids, hq=2, dtype=dtype)
    sample = partition.coords[:, 0]
    for row in (0, int((sample == 1).nonzero()[3])):
        clean, clean_grads = run(fn, inputs)
        spoilt = [x.clone() for x in inputs]
        spoilt["qkv".index(name)][row] = value
        outputs, grads = run(fn, spoilt)
        other = torch.arange(len(sample), device=DEVICE) != row if name == "q" else sample != sample[row]
        for got, want in zip([*outputs, grads[0]], [*clean, clean_grads[0]], strict=True):
            assert torch.equal(got[other], want[other])
        for got, want in zip(grads, clean_grads, strict=True):
            assert torch.equal(got[sample != sample[row]], want[sample != sample[row]])
        if name != "q":
            block = int((partition.selection.offsets[1:] <= row).sum())
            sees = (ids[:, 0] == block).any(-1)
            assert sees.any() and not (outputs[0] == clean[0]).all(-1)[sees].any(), "a row that sees it must not hide it"
