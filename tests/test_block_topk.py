"""The choice of blocks, judged by fp64 scores: no chosen block lies more than 1e-5 · G below one left out."""

import pytest
import torch
from utils import DEVICE, DTYPES, GROUPS, HEAD_DIMS, IMPL, assert_choice, draw_qkv, nan_in_fresh_memory, opcheck, random_partition

import ssa
from ssa import naive

# what keeps scores in the inputs' precision cannot be judged so finely
EXACT = DTYPES if IMPL == "triton" else [torch.float32, torch.float64]


def choose(q, k_cmp, partition, topk, impl=IMPL):
    with nan_in_fresh_memory():
        _, lse = ssa.compression_attention(q, k_cmp, k_cmp, partition, impl=impl)
        return ssa.block_topk(q, k_cmp, lse, partition, topk, impl=impl)


def check(partition, topk, hq=4, hkv=2, d=32, dtype=torch.float32, factor=1.0):
    q, _, _, k_cmp, _ = draw_qkv(partition, hq, hkv, d, dtype)
    q = q * factor
    ids = choose(q, k_cmp, partition, topk)
    assert_choice(ids, q, k_cmp, partition, topk)
    return ids


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim, dtype):
    check(random_partition([50, 23]), 3, d=head_dim, dtype=dtype)


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("group", GROUPS)
def test_groups(group, dtype):
    check(random_partition([40, 6]), 3, hq=2 * group, dtype=dtype)


LAYOUTS = {
    "unequal samples, one of them empty": dict(counts=[90, 0, 1, 20]),
    "63 tokens": dict(counts=[63]),
    "111 tokens, equal block sizes": dict(counts=[111], m_cmp=4),
    "27 children a block": dict(counts=[111], m_cmp=1, m_slc=3),
    "many small blocks": dict(counts=[111], m_cmp=1, m_slc=2),
    "one token": dict(counts=[1]),
    "full blocks": dict(counts=[64], edge=4),
    "no token": dict(counts=[0]),
    "no sample": dict(counts=[]),
}


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("topk", [1, 4, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, topk, dtype):
    check(random_partition(**LAYOUTS[layout]), topk, dtype=dtype)


def test_same_choice_as_the_reference():
    partition = random_partition([100, 37])
    q, _, _, k_cmp, _ = draw_qkv(partition, 4, 2, 32, torch.float32)
    _, lse = naive.compression_attention(q.double(), k_cmp.double(), k_cmp.double(), partition)
    assert torch.equal(choose(q, k_cmp, partition, 3), naive.block_topk(q.double(), k_cmp.double(), lse, partition, 3))


def test_softmax_comes_before_the_sum_over_heads():
    """A head of small scores counts as much as a head of large ones: raw logits would choose block 0."""
    coords = torch.tensor([[0, 0, 0, 0], [0, 4, 0, 0], [0, 8, 0, 0]], device=DEVICE)
    partition = ssa.partition_voxels(coords, compression_block_size=4, selection_block_size=4, window_size=4)
    q, k_cmp = torch.zeros(3, 3, 16, device=DEVICE), torch.zeros(3, 1, 16, device=DEVICE)
    k_cmp[0, 0, 0] = k_cmp[1, 0, 1] = 1.0
    q[:, 0, 0] = 80.0  # head 0: all its weight on block 0
    q[:, 1:, 1] = 40.0  # heads 1 and 2: on block 1
    assert choose(q, k_cmp, partition, 1).flatten().tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", EXACT)
def test_scores_beyond_the_range_of_exp(dtype):
    check(random_partition([63]), 3, dtype=dtype, factor=60.0)


@pytest.mark.parametrize("topk", [1, 3, 8, 50])
def test_ties(topk):
    """Equal scores everywhere: any choice is right, none comes twice."""
    partition = random_partition([90], m_cmp=4)
    q, k_cmp = (torch.ones(n, h, 32, device=DEVICE) for n, h in ((90, 4), (len(partition.compression), 2)))
    assert_choice(choose(q, k_cmp, partition, topk), q, k_cmp, partition, topk)


def test_block_that_every_query_chooses():
    partition = random_partition([90], m_cmp=4)
    q, k_cmp = torch.ones(90, 4, 32, device=DEVICE), draw_qkv(partition, 4, 2, 32, torch.float32)[3]
    k_cmp[5] = 3.0
    assert (choose(q, k_cmp, partition, 1) == 5).all()


def test_no_gradient_and_repeats_bitwise():
    partition = random_partition([111])
    q, _, _, k_cmp, _ = draw_qkv(partition, 4, 2, 32, torch.float32)
    ids = choose(q.requires_grad_(), k_cmp.requires_grad_(), partition, 4)
    assert not ids.requires_grad and torch.equal(ids, choose(q, k_cmp, partition, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["q", "k_cmp"])
def test_nan_and_inf_stay_in_their_row_or_sample(name, value):
    """Other rows (q) or other samples (k_cmp) choose as before; every id stays in its sample, and lists keep their form."""
    partition = random_partition([40, 30, 21])
    q, _, _, k_cmp, _ = draw_qkv(partition, 4, 2, 32, torch.float32)
    before = choose(q, k_cmp, partition, 3)
    sample = partition.coords[:, 0]
    row = 45
    if name == "q":
        q[row] = value
        other = torch.arange(len(q), device=DEVICE) != row
    else:
        row = int((partition.compression.coords[:, 0] == sample[row]).nonzero()[2])
        k_cmp[row] = value
        other = sample != partition.compression.coords[row, 0]
    ids = choose(q, k_cmp, partition, 3)
    assert torch.equal(ids[other], before[other])
    low, high = (partition.selection.cu_blocks[sample.long() + i][:, None, None] for i in (0, 1))
    assert ((ids == -1) | ((ids >= low) & (ids < high))).all()
    assert ((ids[..., 1:] > ids[..., :-1]) | (ids[..., 1:] == -1)).all()


if IMPL == "triton":

    def test_small_scratch_gives_the_same_choice(monkeypatch):
        """Many launches over chunks of query tiles."""
        from ssa.kernels import block_topk as kernels

        partition = random_partition([111, 30])
        q, _, _, k_cmp, _ = draw_qkv(partition, 4, 2, 32, torch.float32)
        before = choose(q, k_cmp, partition, 4)
        monkeypatch.setattr(kernels, "SCRATCH", 1)
        assert torch.equal(choose(q, k_cmp, partition, 4), before)

    @pytest.mark.parametrize("group", [1, 6])
    @pytest.mark.parametrize(("parts", "resident"), [(8, 1 << 16), (3, 1 << 16), (1, 0)])
    def test_how_programs_share_the_work_does_not_show(parts, resident, group, monkeypatch):
        """Four and two columns of blocks: a program for each, three for four, one for all; and queries that are read again for each."""
        from ssa.kernels import block_topk as kernels

        partition = random_partition([111, 30], m_cmp=1, m_slc=2)
        q, _, _, k_cmp, _ = draw_qkv(partition, 2 * group, 2, 32, torch.float16)
        before = choose(q, k_cmp, partition, 4)
        config = kernels._config(32, torch.float16, group) | dict(BLOCK_J=16)
        monkeypatch.setattr(kernels, "_config", lambda *_: config)
        monkeypatch.setattr(kernels, "PARTS", parts)
        monkeypatch.setattr(kernels, "RESIDENT", resident)
        ids = choose(q, k_cmp, partition, 4)
        assert_choice(ids, q, k_cmp, partition, 4)
        assert torch.equal(ids, before)

    def test_what_stays_in_registers_does_not_show(monkeypatch):
        """34 groups of maxima where 32 are kept, and the candidates of 5 groups where those of 2 are."""
        from ssa.kernels import block_topk as kernels

        x = torch.arange(530, device=DEVICE)
        coords = torch.stack([0 * x, x, 0 * x, 0 * x], 1)
        partition = ssa.partition_voxels(coords, compression_block_size=1, selection_block_size=1, window_size=8)
        q, _, _, k_cmp, _ = draw_qkv(partition, 1, 1, 16, torch.float32)
        before = choose(q, k_cmp, partition, 5)
        monkeypatch.setattr(kernels, "MAX_GROUPS", 32)
        monkeypatch.setattr(kernels, "MAX_SLOTS", 2)
        ids = choose(q, k_cmp, partition, 5)
        assert_choice(ids, q, k_cmp, partition, 5)
        assert torch.equal(ids, before)

    def test_opcheck():
        from ssa.autograd import block_topk as boundary

        partition = random_partition([30, 4])
        q, _, _, k_cmp, _ = draw_qkv(partition, 4, 2, 32, torch.float32)
        opcheck(boundary, "block_topk", lambda: choose(q, k_cmp, partition, 3))
