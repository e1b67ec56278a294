"""The block compressors against their definitions, written out sample by sample in fp64."""

import pytest
import torch
from torch.nn.functional import group_norm, silu
from utils import DEVICE, IMPL

import ssa
from ssa import naive
from ssa.compression import COMPRESSORS

IMPLS = ["naive", "torch", "triton"] if IMPL == "triton" else ["naive", "torch"]
CHANNELS = 64


def cloud(counts=(70, 0, 1, 33), seed: int = 0, m_cmp: int = 4) -> ssa.VoxelPartition:
    """Voxels of unequal samples, one of them empty, one of a single voxel; negative coordinates."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.cartesian_prod(*[torch.arange(-5, 5)] * 3)
    chosen = [cells[torch.randperm(len(cells), generator=generator)[:n]] for n in counts]
    parts = [torch.nn.functional.pad(c, (1, 0), value=b) for b, c in enumerate(chosen)] or [torch.zeros(0, 4, dtype=torch.int64)]
    return ssa.partition_voxels(torch.cat(parts).to(DEVICE), compression_block_size=m_cmp, selection_block_size=8, batch_size=len(counts))


def randomised(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(1)
    module = COMPRESSORS[name](CHANNELS, device=DEVICE, dtype=torch.float32)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.to(dtype)


def pool(x, partition, extra):
    offsets = partition.compression.offsets.tolist()
    return torch.stack([x[a:b].sum(0) / (b - a + extra) for a, b in zip(offsets[:-1], offsets[1:], strict=True)])


def norm(x, sample, parameters):
    """GroupNorm(32) over the rows of each sample."""
    y = torch.empty_like(x)
    for b in sample.unique().tolist():
        rows = sample == b
        y[rows] = group_norm(x[rows].T[None], 32, parameters.weight, parameters.bias, eps=1e-5)[0].T
    return y


def conv(x, neighbors, wrapped):
    return naive.submanifold_conv3d(x, wrapped.conv.kernel, wrapped.conv.bias, neighbors)


def definition(name, module, x, partition, table):
    if table is not None:
        m = partition.compression.size
        place = partition.coords[:, 1:].long() - m * torch.div(partition.coords[:, 1:].long(), m, rounding_mode="floor")
        x = x + table[place[:, 0], place[:, 1], place[:, 2]]
    if name == "conv_mean":
        return pool(naive.submanifold_conv3d(x, module.conv.kernel, module.conv.bias, partition.neighbors), partition, 0)
    if name == "direct3d_s2_v1":
        linear = module.act_layers[0].conv
        return pool(silu(x @ linear.kernel + linear.bias), partition, 1)
    sample, sample_cmp = partition.coords[:, 0], partition.compression.coords[:, 0]
    h = pool(silu(norm(x, sample, module.act_layers[0])), partition, 1)
    h = conv(h, partition.block_neighbors, module.out_layers[0])
    h = conv(silu(norm(h, sample_cmp, module.out_layers[1])), partition.block_neighbors, module.out_layers[3])
    return h + pool(x, partition, 1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("m_cmp", "with_table"), [(4, True), (8, True), (4, False)])
@pytest.mark.parametrize("name", list(COMPRESSORS))
def test_forward_and_gradients(name, m_cmp, with_table, impl):
    partition = cloud(m_cmp=m_cmp)
    torch.manual_seed(2)
    x = torch.randn(partition.num_tokens, CHANNELS, device=DEVICE)
    table = torch.randn(m_cmp, m_cmp, m_cmp, CHANNELS, device=DEVICE) if with_table else None
    dy = torch.randn(len(partition.compression), CHANNELS, device=DEVICE)

    def grads(module, dtype, compress):
        leaves = [t.to(dtype).requires_grad_() for t in (x, table) if t is not None]
        y = compress(module, leaves[0], leaves[1] if with_table else None)
        return y.detach(), torch.autograd.grad(y, [*leaves, *module.parameters()], dy.to(dtype))

    module = randomised(name)
    got = grads(module, torch.float32, lambda f, x, t: f(x, partition, None if t is None else t.flatten(0, 2), impl))
    want = grads(randomised(name, torch.float64), torch.float64, lambda f, x, t: definition(name, f, x, partition, t))
    # a sample of one voxel is ill-conditioned (its variance is 0): the tolerance is the definition's own error in fp32
    low = grads(randomised(name), torch.float32, lambda f, x, t: definition(name, f, x, partition, t))
    names = ["y", "x", "table"][: 2 + with_table] + [n for n, _ in module.named_parameters()]
    for label, a, b, c in zip(names, *((r[0], *r[1]) for r in (got, want, low)), strict=True):
        assert (a - b).abs().max() <= 2 * (c - b).abs().max() + 2e-6 * (1 + b.abs().max()), label


@pytest.mark.parametrize("impl", IMPLS)
def test_a_fresh_compressor_is_the_mean(impl):
    partition = cloud()
    x = torch.randn(partition.num_tokens, CHANNELS, device=DEVICE)
    got = COMPRESSORS["conv_mean"](CHANNELS, device=DEVICE)(x, partition, torch.zeros(64, CHANNELS, device=DEVICE), impl)
    assert (got - pool(x, partition, 0)).abs().max() <= 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", list(COMPRESSORS))
def test_samples_do_not_meet(name, impl):
    """Compressing two samples together equals compressing each alone."""
    together, module = cloud((90, 60)), randomised(name)
    x = torch.randn(150, CHANNELS, device=DEVICE)
    table = torch.randn(64, CHANNELS, device=DEVICE)
    parts = []
    for b in (0, 1):
        rows = together.coords[:, 0] == b
        alone = ssa.partition_voxels(together.coords[rows], batch_size=2)
        parts.append(module(x[rows], alone, table, impl))
    want = torch.cat(parts)
    assert (module(x, together, table, impl) - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "naive"])
@pytest.mark.parametrize("name", list(COMPRESSORS))
@pytest.mark.parametrize("counts", [(), (0, 0), (1,), (0, 1)])
def test_empty_and_single(name, counts, impl):
    partition, module = cloud(counts), randomised(name)
    x = torch.randn(partition.num_tokens, CHANNELS, device=DEVICE, requires_grad=True)
    y = module(x, partition, torch.zeros(64, CHANNELS, device=DEVICE), impl)
    assert y.shape == (partition.num_tokens, CHANNELS)
    y.sum().backward()
    assert x.grad.shape == x.shape and all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("impl", [IMPL])
@pytest.mark.parametrize("name", list(COMPRESSORS))
def test_two_runs_are_bitwise_equal(name, impl):
    partition, module = cloud((150, 130)), randomised(name)
    x = torch.randn(280, CHANNELS, device=DEVICE, requires_grad=True)
    table = torch.randn(64, CHANNELS, device=DEVICE, requires_grad=True)
    runs = [torch.autograd.grad(module(x, partition, table, impl).sin().sum(), [x, table, *module.parameters()]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "naive"])
@pytest.mark.parametrize("name", list(COMPRESSORS))
def test_half_rows_with_fp32_statistics(name, impl):
    """fp16 rows far from zero: statistics in half precision would lose them."""
    partition = cloud()
    x = (torch.randn(partition.num_tokens, CHANNELS, device=DEVICE) + 20).half()
    want = definition(name, randomised(name, torch.float64), x.double(), partition, None)
    got = randomised(name).half()(x, partition, None, impl)
    assert got.dtype == torch.float16
    low = definition(name, randomised(name).half().float(), x.float(), partition, None)  # what rounding the parameters alone costs
    tolerance = 2 * (low - want).abs().max() + 4 * torch.finfo(torch.float16).eps * want.abs().max()
    assert (got - want).abs().max() <= tolerance


RELEASED = {
    "direct3d_s2_v1": {
        "act_layers.0.conv.kernel": (64, 64),
        "act_layers.0.conv.bias": (64,),
    },
    "direct3d_s2_v2": {
        "act_layers.0.weight": (64,),
        "act_layers.0.bias": (64,),
        "out_layers.0.conv.kernel": (27, 64, 64),
        "out_layers.0.conv.bias": (64,),
        "out_layers.1.weight": (64,),
        "out_layers.1.bias": (64,),
        "out_layers.3.conv.kernel": (27, 64, 64),
        "out_layers.3.conv.bias": (64,),
    },
}


@pytest.mark.parametrize(("name", "m_cmp"), [("direct3d_s2_v1", 8), ("direct3d_s2_v2", 4)])
def test_loads_a_state_dict_with_the_released_names(name, m_cmp):
    state = {
        "proj_q.weight": torch.randn(1024, 1024),
        "proj_k.weight": torch.randn(64, 1024),
        "proj_v.weight": torch.randn(64, 1024),
        "proj_o.weight": torch.randn(1024, 1024),
        "gate.0.weight": torch.randn(3, 1024),
        "intra_block_pe": torch.randn(m_cmp, m_cmp, m_cmp, 64),
    }
    for part in ("key", "value"):
        state.update({f"compression_{part}.{k}": torch.randn(shape) for k, shape in RELEASED[name].items()})
    layer = ssa.SpatialSparseAttention(1024, 32, compression_block_size=m_cmp, compression=name)
    assert layer.head_dim == 32
    layer.load_state_dict(state, strict=True)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())


def test_default_parameters():
    layer = ssa.SpatialSparseAttention(64, 4)
    names = {n: tuple(p.shape) for n, p in layer.named_parameters() if "compression" in n or "pe" in n}
    conv_shapes = {f"compression_{part}.conv.{p}": s for part in ("key", "value") for p, s in (("kernel", (27, 32, 32)), ("bias", (32,)))}
    assert names == {"intra_block_pe": (4, 4, 4, 32), **conv_shapes}
    assert torch.equal(layer.compression_key.conv.kernel[13], torch.eye(32))
    assert layer.compression_key.conv.kernel.abs().sum() == 32 and not layer.intra_block_pe.any()


@pytest.mark.skipif("triton" not in IMPLS, reason="needs a GPU or Triton's interpreter")
def test_the_default_saves_one_row_a_token_beyond_k_and_v():
    partition = cloud((400, 200))
    saved: dict[int, int] = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    layer = ssa.SpatialSparseAttention(64, 2, 2, 32, impl="triton", device=DEVICE)
    x = torch.randn(600, 64, device=DEVICE)
    shared = [partition.neighbors, partition.compression.offsets, x, *layer.parameters()]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer.project(x, partition)
    for t in shared:
        saved.pop(t.untyped_storage().data_ptr(), None)
    row = 600 * 64 * 4
    assert 0 < sum(saved.values()) <= 2 * row + 600 * 8  # v, k + table, the slots
