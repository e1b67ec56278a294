"""Hypothesis draws layouts; forward and all gradients against naive in fp64: 300 layouts on CUDA, 24 elsewhere (see conftest.py)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from utils import CUDA, DTYPES, IMPL, assert_choice, compare, draw, draw_qkv, random_coords

import ssa
from ssa import naive

MOST = 400 if CUDA else 14  # voxels a sample
HALF = DTYPES[-1]
# few combinations of what a kernel is compiled for, many layouts of each; conftest.py divides the number of examples by their number
HEADS = [
    (4, 2, 32, torch.float32),
    (6, 2, 24, torch.float16),
    (16, 1, 64, HALF),
    (2, 2, 16, torch.float32),
    (32, 1, 32, HALF),
    (3, 1, 48, torch.float32),
]


@st.composite
def layouts(draw_from):
    """coords and the options of partition_voxels."""
    m_cmp = draw_from(st.integers(1, 4))
    window = draw_from(st.integers(1, 9))
    counts = draw_from(st.lists(st.integers(0, MOST), max_size=4))
    smallest = next(edge for edge in range(1, 10) if edge**3 >= max([0, *counts]))
    edge = draw_from(st.integers(smallest, max(smallest, 20 if CUDA else 8)))
    coords = random_coords(counts, edge, low=draw_from(st.integers(-9, 9)), seed=draw_from(st.integers(0, 99)))
    return coords, dict(
        compression_block_size=m_cmp,
        selection_block_size=m_cmp * draw_from(st.integers(1, 3)),
        window_size=window,
        window_shift=draw_from(st.integers(0, window - 1)),
        batch_size=len(counts) + draw_from(st.integers(0, 1)),
    )


@pytest.mark.parametrize("heads", HEADS, ids=lambda h: "-".join(map(str, h)))
@given(layout=layouts(), topk=st.integers(1, 9), per_head=st.booleans(), seed=st.integers(0, 99))
def test_forward_and_gradients(heads, layout, topk, per_head, seed):
    hq, hkv, d, dtype = heads
    coords, options = layout
    partition = ssa.partition_voxels(coords, **options)
    inputs = draw_qkv(partition, hq, hkv, d, dtype, seed)
    gates = draw(*((len(coords), hq, 3) if per_head else (len(coords), 3)), seed=seed).sigmoid().to(dtype)
    q, _, _, k_cmp, v_cmp = inputs
    _, lse = ssa.compression_attention(q, k_cmp, v_cmp, partition, impl=IMPL)
    ids = ssa.block_topk(q, k_cmp, lse, partition, topk, impl=IMPL)
    if IMPL == "triton" or dtype == torch.float32:
        assert_choice(ids, q, k_cmp, partition, topk)
    compare(
        lambda *xs: ssa.spatial_sparse_attention(*xs, partition, topk=topk, impl=IMPL),
        lambda *xs: naive.spatial_sparse_attention(*xs, partition, topk=topk, topk_indices=ids),
        [*inputs, gates],
        seed,
    )
