"""The reference itself: numerical gradients, answers known by hand, and the paper's Algorithm 1 transcribed."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from utils import draw, draw_qkv, random_choice, random_partition

from ssa import naive


@pytest.fixture(scope="module")
def tiny():
    """7 voxels in two of three samples, and fp64 inputs with 2 query heads a key/value head, D = 2."""
    partition = random_partition([5, 0, 2], window=3, shift=1, edge=4)
    inputs = [x.requires_grad_() for x in draw_qkv(partition, 2, 1, 2, torch.float64)]
    return partition, inputs


@pytest.mark.parametrize("op", ["compression_attention", "window_attention", "selected_attention", "varlen_attention"])
def test_gradients_of_the_branches(op, tiny):
    partition, (q, k, v, k_cmp, v_cmp) = tiny
    if op == "compression_attention":
        assert gradcheck(lambda *xs: naive.compression_attention(*xs, partition), (q, k_cmp, v_cmp))
    elif op == "window_attention":
        assert gradcheck(lambda *xs: naive.window_attention(*xs, partition), (q, k, v))
    elif op == "selected_attention":
        ids = random_choice(partition, 1, 2, seed=3)
        ids[..., 0] = torch.where(ids[..., 0] < 0, 0, ids[..., 0])  # an lse of −inf has no numerical derivative
        assert gradcheck(lambda *xs: naive.selected_attention(*xs, ids, partition), (q, k, v))
    else:
        cu = partition.cu_seqlens
        assert gradcheck(lambda *xs: naive.varlen_attention(*xs, cu, cu, softmax_scale=0.3), (q, k, v))


def test_gradients_of_the_whole(tiny):
    partition, inputs = tiny
    gates = draw(7, 2, 3, dtype=torch.float64, seed=50).sigmoid().requires_grad_()
    ids = random_choice(partition, 1, 2)
    assert gradcheck(lambda *xs: naive.spatial_sparse_attention(*xs, partition, topk=2, topk_indices=ids), (*inputs, gates))


def test_gradients_of_the_gated_sum():
    branches = [draw(5, 2, 3, dtype=torch.float64, seed=i).requires_grad_() for i in range(3)]
    for shape in ((5, 3), (5, 2, 3)):
        assert gradcheck(naive.gated_sum, (*branches, draw(*shape, dtype=torch.float64, seed=4).requires_grad_()))


def algorithm_1(q, k, v, topk_indices, offsets, key_tile):
    """Algorithm 1 of arXiv 2505.17412 as printed but for its two slips: the log-sum-exp starts at −inf, scores carry the scale.

    For every token t and key/value head: q^t of the group's heads; for every chosen block, its tokens C[I] … C[I+1] by tiles, the last
    tile masked; running maximum m, log-sum-exp, output.
    """
    (num_tokens, hq, d), hkv = q.shape, k.shape[1]
    group = hq // hkv
    o, lse_out = torch.zeros_like(q), q.new_zeros(num_tokens, hq)
    for t in range(num_tokens):
        for h in range(hkv):
            q_t = q[t, h * group : (h + 1) * group]
            o_t = q.new_zeros(group, d)
            lse = q.new_full((group,), -math.inf)
            m = q.new_full((group,), -math.inf)
            for j in range(topk_indices.shape[2]):
                block = int(topk_indices[t, h, j])
                if block < 0:
                    continue
                begin, end = int(offsets[block]), int(offsets[block + 1])
                for i in range(begin, end, key_tile):
                    rows = torch.arange(i, i + key_tile)
                    inside = rows < end
                    rows = rows.clamp(max=len(k) - 1)
                    k_i, v_i = k[rows, h], v[rows, h]
                    s = (q_t @ k_i.T) * d**-0.5
                    s = torch.where(inside.to(s.device), s, -math.inf)
                    m_new = torch.maximum(m, s.amax(1))
                    p = torch.exp(s - m_new[:, None])
                    o_t = o_t * torch.exp(m - m_new)[:, None] + p @ v_i
                    lse = m_new + torch.log(torch.exp(lse - m_new) + p.sum(1))
                    m = m_new
            heads = slice(h * group, (h + 1) * group)
            if (m > -math.inf).all():
                o[t, heads] = torch.exp(m - lse)[:, None] * o_t
            lse_out[t, heads] = lse
    return o, lse_out


@pytest.mark.parametrize("key_tile", [1, 4, 16])
def test_algorithm_1_of_the_paper(key_tile):
    partition = random_partition([25, 9], edge=5)
    q, k, v, _, _ = draw_qkv(partition, 6, 2, 8, torch.float64)
    ids = random_choice(partition, 2, 3)
    o, lse = naive.selected_attention(q, k, v, ids, partition)
    want_o, want_lse = algorithm_1(q, k, v, ids, partition.selection.offsets, key_tile)
    empty = lse == -math.inf
    assert empty.any() and torch.equal(empty, want_lse == -math.inf)
    assert (o - want_o).abs().max() < 1e-13 and (lse - want_lse)[~empty].abs().max() < 1e-13


def test_equal_keys_give_the_mean_of_v():
    partition = random_partition([20, 5])
    q, k, v, k_cmp, v_cmp = draw_qkv(partition, 2, 1, 8, torch.float64)
    k, k_cmp = torch.ones_like(k), torch.ones_like(k_cmp)
    o, lse = naive.compression_attention(q, k_cmp, v_cmp, partition)
    cu = partition.compression.cu_blocks.tolist()
    for b in range(2):
        mine = partition.coords[:, 0] == b
        mean = v_cmp[cu[b] : cu[b + 1]].mean(0)
        assert (o[mine] - mean).abs().max() < 1e-14
        s = q[mine].sum(-1) * 8**-0.5
        assert (lse[mine] - s - math.log(cu[b + 1] - cu[b])).abs().max() < 1e-13
    o, _ = naive.window_attention(q, k, v, partition)
    window = [(s, x // 4, y // 4, z // 4) for s, x, y, z in partition.coords.tolist()]
    for t in range(25):
        mates = [i for i in range(25) if window[i] == window[t]]
        assert (o[t] - v[mates].mean(0)).abs().max() < 1e-14


def test_scores_sum_to_the_group_size():
    """Per head the softmax over compression blocks sums to 1, so a query's scores over its sample sum to G."""
    partition = random_partition([30, 7])
    q, _, _, k_cmp, _ = draw_qkv(partition, 6, 2, 8, torch.float64)
    _, lse = naive.compression_attention(q, k_cmp, k_cmp, partition)
    scores = naive.block_scores(q, k_cmp, lse, partition)
    other = partition.coords[:, None, :1] != partition.selection.coords[:, 0][None, None]
    assert (scores[other.expand_as(scores)] == -math.inf).all()
    assert (scores.masked_fill(other, 0).sum(-1) - 3).abs().max() < 1e-13


def test_block_scores_by_hand():
    """Loops over heads and compression blocks, from the coordinates."""
    partition = random_partition([14], edge=5)
    q, _, _, k_cmp, _ = draw_qkv(partition, 4, 2, 8, torch.float64)
    _, lse = naive.compression_attention(q, k_cmp, k_cmp, partition)
    scores = naive.block_scores(q, k_cmp, lse, partition)
    weights = torch.softmax(torch.einsum("thd,chd->thc", q, k_cmp.repeat_interleave(2, 1)) * 8**-0.5, -1)
    want = torch.zeros_like(scores)
    parent = torch.div(partition.compression.coords[:, 1:], 2, rounding_mode="floor").tolist()
    slc = partition.selection.coords[:, 1:].tolist()
    for c, p in enumerate(parent):
        want[:, :, slc.index(p)] += weights[:, :, c].view(14, 2, 2).sum(-1)
    assert (scores - want).abs().max() < 1e-14


def test_no_tokens_and_one_token():
    for counts in ([], [0], [1]):
        partition = random_partition(counts)
        inputs = draw_qkv(partition, 2, 1, 8, torch.float64)
        gates = draw(partition.num_tokens, 3, dtype=torch.float64)
        o = naive.spatial_sparse_attention(*inputs, gates, partition, topk=2)
        assert o.shape == inputs[0].shape
        if counts == [1]:
            want = gates[:, None, 0:1] * inputs[4] + gates[:, None, 1:2] * inputs[2] + gates[:, None, 2:3] * inputs[2]
            assert (o - want).abs().max() < 1e-14
