"""Each block against the same computation written out plainly."""

import math

import pytest
import torch
from torch.nn import functional as F
from vae_inputs import random_latents, random_level, small_batch, stirred

import ssa
from reference_model import vae_blocks
from reference_model.vae_blocks import (
    AttentionBlock,
    Lift,
    Pool,
    ReleasedUpBlock,
    SubpixelUpBlock,
    UpBlock,
    down_block,
    position_code,
)
from reference_model.vae_encoder import EncoderPlan
from reference_model.vae_grid import Level
from reference_model.vae_layers import GroupNormSiLU


def close(a, b, bound=2e-5):
    assert a.shape == b.shape and (a - b).abs().max() <= bound * max(b.abs().max().item(), 1e-3), (a - b).abs().max()


@pytest.mark.parametrize("channels", [32, 64, 12])
def test_group_norm_is_per_sample(channels):
    sizes = [5, 0, 300, 2]
    x = torch.randn(sum(sizes), channels) * 3 + torch.arange(channels)
    norm = stirred(GroupNormSiLU(channels))
    groups = math.gcd(32, channels)
    weight, bias = norm.weight.double(), norm.bias.double()
    parts = [part.T[None] for part in x.double().split(sizes) if len(part)]
    expected = [F.silu(F.group_norm(part, groups, weight, bias, 1e-5)[0].T) for part in parts]
    cu_seqlens = torch.tensor([0, *sizes]).cumsum(0).int()
    close(norm(x, cu_seqlens), torch.cat(expected))
    assert norm(x.bfloat16(), cu_seqlens).dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "more"), [("mean", 0), ("released", 1)])
def test_pool(kind, more):
    x, counts = torch.randn(14, 3), [1, 8, 5]
    offsets = torch.tensor([0, 1, 9, 14], dtype=torch.int32)
    blocks = ssa.Blocks(2, offsets, torch.tensor([0, 3], dtype=torch.int32), torch.zeros(3, 4, dtype=torch.int32))
    expected = torch.stack([part.sum(0) / (n + more) for part, n in zip(x.split(counts), counts, strict=True)])
    close(Pool(kind)(x, blocks), expected)


def plain_parents(batch, edge):
    """Cells of `edge` an axis in a latent: place of each voxel's cell and the voxels of each, in the order of the plan's rows."""
    level = EncoderPlan.build(batch).levels[(4, 2, 1).index(edge)]
    rows = {tuple(c): i for i, c in enumerate(level.coords.tolist())}
    size = 8 // edge
    return level, [rows[(b, x // size, y // size, z // size)] for b, x, y, z in batch.coords.tolist()]


POOLINGS = ["mean", "released", "subpixel"]


def plain_pool(pooling, x, rows, slots, count):
    """Rows x [n,C] → [count,C] (mean, released) or [count,8C] (subpixel), one by one."""
    if pooling != "subpixel":
        number = torch.bincount(rows, minlength=count)[:, None] + (pooling == "released")
        return torch.zeros(count, x.shape[1]).index_add(0, rows, x) / number
    out = torch.zeros(count, 8, x.shape[1])
    return out.index_put((rows, slots), x).flatten(1)


def plain_norm(module, x, cu_seqlens):
    """GroupNorm of each sample, then SiLU."""
    samples = x.split(cu_seqlens.diff().tolist())
    parts = [F.group_norm(p.T[None], math.gcd(32, x.shape[1]), module.weight, module.bias)[0].T for p in samples]
    return F.silu(torch.cat(parts))


def slots_below(coords):
    """0 … 7 of each cell in its parent, x slowest."""
    return (coords[:, 1:].long() % 2) @ torch.tensor([4, 2, 1])


@pytest.mark.parametrize("rows", [50, 1 << 18])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_lift_and_first_block(pooling, rows, monkeypatch):
    """Linear 1→C, then the pooling of the block: with all rows of all channels, as the paper has it.

    Several pieces a sample, then all samples in one piece.
    """
    batch = small_batch()
    monkeypatch.setattr(vae_blocks, "_ROWS", rows)
    lift, block = stirred(Lift(6)), stirred(down_block(6, 10, pooling), seed=1)
    plan = EncoderPlan.build(batch)
    assert len(plan.cells) > 1 and min(plan.cells) > 50 and sum(plan.cells) < 1 << 18
    got = lift(plan, block)
    level, parent = plain_parents(batch, 4)
    x = lift.linear(batch.values[:, None])
    pooled = [plain_pool(pooling, v, torch.tensor(parent), slots_below(batch.coords), len(level))
              for v in (plain_norm(block.norm1, x, batch.cu_seqlens), x)]  # fmt: skip
    plain = (block.gather(pooled[0]) if pooling == "subpixel" else pooled[0], block.skip(pooled[1]))
    for a, b in zip(got, plain, strict=True):
        close(a, b)
    weights = [lift.linear.weight, block.norm1.weight, block.skip.weight]
    grads = [torch.autograd.grad(sum(p.square().sum() for p in outputs), weights) for outputs in (got, plain)]
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-4)


def test_small_samples_come_together(monkeypatch):
    monkeypatch.setattr(vae_blocks, "_ROWS", 10)
    assert vae_blocks._together([3, 7, 1, 0, 25, 9, 2, 8]) == [(0, 2), (2, 4), (4, 5), (5, 6), (6, 8)]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_down_block(pooling):
    plan = EncoderPlan.build(small_batch())
    block = stirred(down_block(6, 10, pooling))
    x = torch.randn(len(plan.levels[0]), 6)
    got = block(x, plan.cu_seqlens[0], plan.children[0], plan.levels[1], plan.cu_seqlens[1])
    fine, level = plan.levels[:2]
    rows = {tuple(c): i for i, c in enumerate(level.coords.tolist())}
    index = torch.tensor([rows[(b, i // 2, j // 2, k // 2)] for b, i, j, k in fine.coords.tolist()])

    def pool(v):
        return plain_pool(pooling, v, index, slots_below(fine.coords), len(level))

    def conv(module, v):
        return ssa.submanifold_conv3d(v, module.kernel, module.bias, level.neighbors, impl="naive")

    active = pool(plain_norm(block.norm1, x, plan.cu_seqlens[0]))
    h = conv(block.conv1, block.gather(active) if pooling == "subpixel" else active)
    h = conv(block.conv2, plain_norm(block.norm2, h, plan.cu_seqlens[1]))
    close(got, h + block.skip(pool(x)))


def test_learned_pooling_tells_the_sides_of_a_surface_apart():
    """Two layers of voxels in one layer of cells, seen from either side: means are equal, learned poolings are not."""
    children = torch.tensor([0.1, -0.9]).repeat_interleave(4)[None, :, None] * torch.randn(6)
    mask = torch.ones(1, 8, dtype=torch.bool)
    for pooling in POOLINGS:
        block = stirred(down_block(6, 10, pooling), seed=1)
        sides = [torch.cat(block.reduce(side, side, mask), 1) for side in (children, children.flip(1))]
        assert ((sides[0] - sides[1]).abs().max() > 0.1) == (pooling == "subpixel")


@pytest.mark.parametrize("kind", [UpBlock, SubpixelUpBlock, ReleasedUpBlock])
def test_up_block(kind):
    coarse = random_level(2, 0.5, count=6)
    fine = Level.of(coarse.latents, coarse.latent_neighbors, 4, active_children(coarse))
    block = stirred(kind(6, 10, None))
    x = torch.randn(len(coarse), 6)
    rows = {tuple(c): i for i, c in enumerate(coarse.coords.tolist())}
    parent = torch.tensor([rows[(b, i // 2, j // 2, k // 2)] for b, i, j, k in fine.coords.tolist()])
    assert len(fine) == 8 * len(coarse)

    def conv(module, v, level):
        return ssa.submanifold_conv3d(v, module.kernel, module.bias, level.neighbors, impl="naive")

    if kind is UpBlock:
        h = conv(block.conv1, F.silu(F.layer_norm(x, (6,), block.norm1.weight, block.norm1.bias))[parent], fine)
        h = conv(block.conv2, F.silu(F.layer_norm(h, (10,), block.norm2.weight, block.norm2.bias)), fine)
        expected = h + F.linear(x[parent], block.skip.weight, block.skip.bias)
    elif kind is SubpixelUpBlock:
        child = torch.tensor([4 * (i % 2) + 2 * (j % 2) + k % 2 for _, i, j, k in fine.coords.tolist()])

        def spread(module, v):
            weight, bias = module.weight.view(8, 10, -1)[child], module.bias.view(8, 10)[child]
            return torch.einsum("noi,ni->no", weight, v[parent]) + bias

        h = conv(block.conv1, spread(block.spread, F.silu(F.layer_norm(x, (6,), block.norm1.weight, block.norm1.bias))), fine)
        h = conv(block.conv2, F.silu(F.layer_norm(h, (10,), block.norm2.weight, block.norm2.bias)), fine)
        expected = h + spread(block.skip, x)
    else:
        expected = F.silu(conv(block.conv2, F.silu(conv(block.conv1, x, coarse))[parent], fine))
    close(block(x, coarse, fine), expected)


def active_children(level):
    active = torch.zeros(len(level.latents) * level.edge**3, dtype=torch.bool)
    active[level.places] = True
    return active.view(len(level.latents), -1).repeat_interleave(8, 1)


@pytest.mark.parametrize("shift", [0, 2])
def test_attention_block_sees_its_window_only(shift):
    latents = random_latents(60, samples=3)
    partition = ssa.partition_voxels(latents, compression_block_size=2, selection_block_size=2, window_size=4, window_shift=shift)
    block = stirred(AttentionBlock(32, 2, 2))
    x = torch.randn(len(latents), 32)
    window = torch.cat((latents[:, :1], torch.div(latents[:, 1:] + shift, 4, rounding_mode="floor")), 1)
    together = (window[:, None] == window[None]).all(2)
    assert 1 < len(window.unique(dim=0)) < len(latents)
    q, k, v = (t.view(-1, 2, 16).transpose(0, 1) for t in block.qkv(block.norm1(x)).chunk(3, 1))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=together).transpose(0, 1).flatten(1)
    h = x + block.out(o)
    up, _, down = block.mlp
    expected = h + down(F.gelu(up(block.norm2(h)), approximate="tanh"))
    close(partition.unsort(block(partition.sort(x), partition)), expected)


def test_position_code():
    code = position_code(torch.tensor([[3, 0, 7]]), 20, 0.5)
    frequencies = [10000 ** (-j / 3) for j in range(3)]
    expected = [f(0.5 * c * w) for c in (3, 0, 7) for f in (math.sin, math.cos) for w in frequencies] + [0, 0]
    close(code, torch.tensor([expected]))
    coords = torch.randint(0, 32, (9, 3))
    close(position_code(coords, 48, 2.0), position_code(2 * coords, 48, 1.0))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_zero_start(pooling):
    """A fresh residual block is its skip."""
    block = down_block(4, 8, pooling)
    level = random_level(2, 0.5)
    h, skip = torch.randn(len(level), 8 if pooling == "subpixel" else 4), torch.randn(len(level), 8)
    assert torch.equal(block.convolve(h, skip, level, torch.tensor([0, len(level)], dtype=torch.int32)), skip)
