"""The layer: against the method written out in fp64, its three ways of being called, its checks, and `explain`."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from utils import CUDA, DEVICE, IMPL, random_coords

import ssa
from ssa import naive
from ssa.compression import COMPRESSORS

HIDDEN = 48


def make(impl=IMPL, seed=0, dtype=torch.float32, **kwargs) -> ssa.SpatialSparseAttention:
    """A layer with every parameter random, the position table and the convolutions included."""
    torch.manual_seed(seed)
    settings = dict(compression_block_size=2, selection_block_size=4, topk=3, window_size=4, impl=impl, device=DEVICE)
    layer = ssa.SpatialSparseAttention(HIDDEN, 4, 2, 16, **{**settings, **kwargs})
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return layer.to(dtype)


def voxels(counts=(13, 6), seed=0, edge=4):
    coords = random_coords(counts, edge, -edge // 2, seed)
    return torch.randn(len(coords), HIDDEN, generator=torch.Generator().manual_seed(seed)).to(DEVICE), coords


def definition(layer, x, coords):
    """Eqs. 4-10 in terms of the dense reference, rows as given."""
    p = ssa.partition_voxels(
        coords, compression_block_size=layer.compression_block_size, selection_block_size=layer.selection_block_size,
        window_size=layer.window_size, window_shift=layer.window_shift,
    )  # fmt: skip
    x = x[p.order]
    q, k, v = (x @ w.weight.T for w in (layer.proj_q, layer.proj_k, layer.proj_v))
    k_cmp = layer.compression_key(k, p, layer.intra_block_pe.flatten(0, 2), "naive")
    v_cmp = layer.compression_value(v, p, None, "naive")
    q, k, v, k_cmp, v_cmp = (t.unflatten(1, (-1, layer.head_dim)) for t in (q, k, v, k_cmp, v_cmp))
    gates = torch.sigmoid(x @ layer.gate[0].weight.T)
    o = naive.spatial_sparse_attention(q, k, v, k_cmp, v_cmp, gates, p, topk=layer.topk)
    return (o.flatten(1) @ layer.proj_o.weight.T)[p.inverse_order]


class Sparse:
    """The part of TRELLIS's SparseTensor that the layer uses."""

    def __init__(self, feats, coords, cache=None):
        self.feats, self.coords, self.cache = feats, coords, {} if cache is None else cache

    def replace(self, feats, coords=None):
        return Sparse(feats, self.coords if coords is None else coords, self.cache)

    def register_spatial_cache(self, key, value):
        self.cache[key] = value

    def get_spatial_cache(self, key=None):
        return self.cache if key is None else self.cache.get(key)


class CountSorts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.sorts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.sorts += func.overloadpacket in (torch.ops.aten.sort, torch.ops.aten.argsort)
        return func(*args, **(kwargs or {}))


FORMS = [("conv_mean", 0), ("conv_mean", 2), ("direct3d_s2_v1", 2), ("direct3d_s2_v2", 0)]


@pytest.mark.parametrize(("compression", "window_shift"), [(c, s) for c in COMPRESSORS for s in (0, 2)] if CUDA else FORMS)
def test_matches_the_definition_with_all_gradients(compression, window_shift):
    x, coords = voxels()
    layer = make(compression=compression, window_shift=window_shift, topk=100)  # every block: no near-tie can differ
    wide = copy.deepcopy(layer).double()
    dy = torch.randn_like(x)
    xs = x.clone().requires_grad_(), x.double().requires_grad_()
    outputs = layer(xs[0], coords), definition(wide, xs[1], coords)
    assert outputs[0].dtype == x.dtype and outputs[0].shape == x.shape
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-5 * outputs[1].abs().max()
    grads = [torch.autograd.grad(y, [x, *m.parameters()], dy.to(y.dtype)) for y, x, m in zip(outputs, xs, (layer, wide), strict=True)]
    largest = max(g.abs().max() for g in grads[1])
    for name, a, b in zip(["x", *(n for n, _ in layer.named_parameters())], *grads, strict=True):
        assert (a - b).abs().max() <= 1e-5 * largest, name


def test_selects_as_the_definition_does():
    x, coords = voxels((100,), edge=10)
    layer = make("naive", dtype=torch.float64, topk=2)
    y, want = layer(x.double(), coords), definition(layer, x.double(), coords)
    assert (y - want).abs().max() <= 1e-12


def test_rows_may_come_in_any_order():
    x, coords = voxels()
    layer = make()
    shuffle = torch.randperm(len(x)).to(DEVICE)
    assert torch.equal(layer(x[shuffle], coords[shuffle]), layer(x, coords)[shuffle])


def test_partition_in_packed_rows_in_packed_rows_out():
    x, coords = voxels()
    layer = make()
    partition = layer.partition(coords)
    assert torch.equal(partition.unsort(layer(partition.sort(x), partition)), layer(x, coords))


@pytest.mark.parametrize("counts", [(), (1,), (0, 3, 0, 1)])
def test_few_voxels(counts):
    x, coords = voxels(counts)
    layer = make()
    x.requires_grad_()
    y = layer(x, coords)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_sparse_tensor_returns_its_kind_and_sorts_once():
    x, coords = voxels()
    stack = [make(seed=i, window_shift=shift) for i, shift in enumerate((0, 2, 0))]
    want = x
    for layer in stack:
        want = layer(want, coords)
    with CountSorts() as one_layer:
        stack[0].partition(coords)
    with CountSorts() as with_windows:
        stack[0].partition(coords).with_window(4, 2)
    base = with_windows.sorts
    assert one_layer.sorts == 1 and base == 2
    sparse = Sparse(x, coords)
    with CountSorts() as partitions:
        plans = [layer._cached_partition(sparse) for layer in stack]
    assert partitions.sorts == base and plans[0] is plans[2]
    assert plans[0].order is plans[1].order
    y = sparse
    for layer in stack:
        y = layer(y)
    assert isinstance(y, Sparse) and y.coords is coords
    assert torch.equal(y.feats, want)


def test_sparse_tensor_without_a_cache():
    class Plain:
        def __init__(self, feats, coords):
            self.feats, self.coords = feats, coords

        def replace(self, feats):
            return Plain(feats, self.coords)

    x, coords = voxels()
    layer = make()
    assert torch.equal(layer(Plain(x, coords)).feats, layer(x, coords))


def test_a_cache_of_other_voxels_is_not_used():
    x, coords = voxels()
    layer, sparse = make(), Sparse(x, coords)
    layer(sparse)
    moved = coords.flip(0) + torch.tensor([0, 1, 0, 0], device=DEVICE)
    other = sparse.replace(x, moved)
    assert other.cache is sparse.cache
    assert torch.equal(layer(other).feats, layer(x, moved))
    same = sparse.replace(x, moved.clone())
    with CountSorts() as count:
        layer._cached_partition(same)
    assert count.sorts == 0  # equal coordinates in another tensor


def test_other_block_sizes_do_not_share_a_partition():
    x, coords = voxels()
    sparse, small, large = Sparse(x, coords), make(), make(compression_block_size=4, selection_block_size=8, window_size=8)
    for layer in (small, large, small):
        assert torch.equal(layer(sparse).feats, layer(x, coords))


def test_checkpointing_recomputes_the_same():
    x, coords = voxels((30, 12))
    layer = make()
    partition = layer.partition(coords)
    grads = []
    for run in (layer, lambda *a: checkpoint(layer, *a, use_reentrant=False), lambda *a: checkpoint(layer, *a, use_reentrant=True)):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        run(leaf, partition).sin().sum().backward()
        grads.append([leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_autocast():
    """fp32 parameters and rows in, half precision inside, finite fp32 gradients out, close to fp32."""
    x, coords = voxels((25, 9), edge=6)
    layer = make()
    dtype = torch.bfloat16 if CUDA or IMPL == "torch" else torch.float16  # Triton's interpreter has no bf16
    with torch.autocast(DEVICE.type, dtype=dtype):
        y = layer(x, coords)
    assert y.dtype == dtype
    want = layer(x, coords)
    assert (y - want).norm() <= 0.05 * want.norm()
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


def compilations(layer, batches) -> int:
    """Graphs that torch.compile(fullgraph=True) makes over the batches (x, coords); forward and backward equal the eager layer's."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("inductor" if CUDA else "aot_eager")(graph, inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for i, (x, coords) in enumerate(batches):
        partition = layer.partition(coords)
        leaf = x.clone().requires_grad_()
        if i == 0:
            compiled(leaf, partition)  # a second step on one partition is no new batch
        y = compiled(leaf, partition)
        (got,) = torch.autograd.grad(y.sin().sum(), leaf)
        eager = layer(leaf, partition)
        (want,) = torch.autograd.grad(eager.sin().sum(), leaf)
        assert (y - eager).abs().max() <= 1e-5 * eager.abs().max()
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    return len(graphs)


@pytest.mark.skipif(IMPL != "triton", reason="needs a GPU or Triton's interpreter")
def test_compiles_whole_and_twice_at_most():
    """Eight batches on a GPU, three under the interpreter: one graph each time, at most one more for sizes that change."""
    counts = (12, 16, 21, 150, 77, 100, 131, 64)[: 8 if CUDA else 3]
    batches = [voxels((count, count // 3), seed, 10 if CUDA else 5) for seed, count in enumerate(counts)]
    assert compilations(make(compression="direct3d_s2_v2" if not CUDA else "conv_mean"), batches) <= 2


@pytest.mark.skipif(IMPL != "triton", reason="needs a GPU or Triton's interpreter")
@pytest.mark.parametrize("compression", list(COMPRESSORS) if CUDA else ["direct3d_s2_v2"])
def test_compiles_twice_at_most_where_sizes_coincide(compression):
    """Two batches of one sample whose voxels, blocks and windows number the same, then all differ, the samples too."""

    def lone(count):
        coords = torch.tensor([[0, 4 * i, 0, 0] for i in range(count)], device=DEVICE)
        return torch.randn(count, HIDDEN, device=DEVICE), coords

    batches = [lone(3), lone(5), voxels((14, 6), 0, 5), *[voxels((c, c // 2, 3), c, 10) for c in (60, 31) if CUDA]]
    sizes = [(p.num_tokens, len(p.compression), len(p.selection), p.batch_size) for p in (make().partition(c) for _, c in batches)]
    assert sizes[:2] == [(3, 3, 3, 1), (5, 5, 5, 1)] and len(set(sizes[2])) == 4
    assert compilations(make(compression=compression), batches) <= 2


@pytest.mark.parametrize("compression", list(COMPRESSORS))
def test_the_partition_of_a_layer_has_its_tables(compression):
    """Else a compiled layer would build them in its graph, and be compiled again for the next step on that partition."""
    partition = make(compression=compression).partition(voxels()[1])
    tables = {"conv_mean": {"neighbors"}, "direct3d_s2_v1": set(), "direct3d_s2_v2": {"block_neighbors"}}
    assert set(partition._cache) == tables[compression]


if CUDA:

    def test_neither_synchronises_nor_depends_on_the_host():
        """No host sync in forward or backward, and a CUDA graph of both replays with new rows."""
        x, coords = voxels((2000, 700), edge=16)
        layer = make()
        partition = layer.partition(coords)
        static = x.clone().requires_grad_()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                torch.autograd.grad(layer(static, partition).sin().sum(), static)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.autograd.grad(layer(static, partition).sin().sum(), static)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(static, partition)
            (dx,) = torch.autograd.grad(y.sin().sum(), static)
        fresh = torch.randn_like(x)
        with torch.no_grad():
            static.copy_(fresh)
        graph.replay()
        leaf = fresh.clone().requires_grad_()
        want = layer(leaf, partition)
        assert torch.equal(y, want) and torch.equal(dx, torch.autograd.grad(want.sin().sum(), leaf)[0])


def test_a_partition_first_used_in_evaluation_serves_training():
    """The tables of its first use are no inference tensors, which autograd could not save."""
    x, coords = voxels()
    for compression in COMPRESSORS:
        layer = make(compression=compression)
        partition = ssa.partition_voxels(coords, compression_block_size=2, selection_block_size=4, window_size=4)
        with torch.inference_mode():
            want = layer(x, partition)
        y = layer(x, partition)
        y.sum().backward()
        assert torch.equal(y, want)


def test_copies_and_state():
    layer, other = make(seed=1), make(seed=2)
    other.load_state_dict(layer.state_dict())
    x, coords = voxels()
    assert torch.equal(layer(x, coords), other(x, coords)) and torch.equal(copy.deepcopy(layer)(x, coords), layer(x, coords))
    assert "topk=3" in repr(layer)


@pytest.mark.parametrize("window_shift", [0, 1])
def test_explain_shows_what_the_query_read(window_shift):
    x, coords = voxels((61, 30), edge=10)
    layer = make(topk=4, window_shift=window_shift)
    p = layer.partition(coords)
    rows = p.sort(x)
    for query in (0, 45, 80):
        window, chosen, weights = ssa.explain(layer, rows, p, query)
        cell = torch.cat([p.coords[:, :1], (p.coords[:, 1:] + window_shift).div(4, rounding_mode="floor")], 1)
        assert window.sort().values.tolist() == (cell == cell[query]).all(1).nonzero().flatten().tolist()
        assert chosen.shape == (2, 4) and chosen.dtype == torch.int32
        same = p.compression.coords[:, 0] == p.coords[query, 0]
        q, _, _, k_cmp, _ = layer.project(rows, p)
        for head in range(4):
            want = torch.zeros(len(p.compression), device=DEVICE)
            want[same] = torch.softmax(k_cmp[same, head // 2] @ q[query, head] / 4, 0)
            assert (weights[head] - want).abs().max() <= 1e-5
        for kv in range(2):
            score = torch.zeros(len(p.selection), device=DEVICE).index_add(0, p.parents.long(), weights[2 * kv : 2 * kv + 2].sum(0))
            ids = chosen[kv].tolist()
            assert ids == sorted(ids) and (p.selection.coords[ids, 0] == p.coords[query, 0]).all()
            left_out = torch.ones_like(score, dtype=torch.bool).index_fill(0, chosen[kv].long(), False)
            assert score[ids].min() >= score[left_out].max() - 2e-5


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(num_heads=5), ValueError, "num_kv_heads must divide num_heads"),
        (dict(num_kv_heads=0), ValueError, "num_kv_heads must be at least 1"),
        (dict(hidden_size=50), ValueError, "num_heads must divide hidden_size"),
        (dict(selection_block_size=6), ValueError, "compression_block_size must divide selection_block_size"),
        (dict(topk=0), ValueError, "topk must be at least 1"),
        (dict(topk=2.0), TypeError, "topk must be an int"),
        (dict(num_heads=64, num_kv_heads=1, head_dim=16), ValueError, "at most 32 times"),
        (dict(num_heads=8), ValueError, "head_dim must be a multiple of 8 from 16 to 128, got 8"),
        (dict(head_dim=20), ValueError, "head_dim must be a multiple of 8 from 16 to 128, got 20"),
        (dict(head_dim=0), ValueError, "head_dim must be a multiple of 8 from 16 to 128, got 0"),
        (dict(head_dim=136), ValueError, "head_dim must be a multiple of 8 from 16 to 128, got 136"),
        (dict(head_dim=16.0), TypeError, "head_dim must be an int"),
        (dict(window_shift=8), ValueError, "0 <= window_shift < window_size"),
        (dict(window_shift=-1), ValueError, "0 <= window_shift < window_size"),
        (dict(window_shift=1.5), TypeError, "window_shift must be an int"),
        (dict(compression=["conv_mean"]), ValueError, "compression must be one of"),
        (dict(compression="mean"), ValueError, "compression must be one of"),
        (dict(impl="cuda"), ValueError, "impl must be"),
    ],
)
def test_bad_settings_are_named(change, error, match):
    with pytest.raises(error, match=match):
        ssa.SpatialSparseAttention(**{**dict(hidden_size=64, num_heads=4), **change})


def test_bad_calls_are_named():
    x, coords = voxels()
    layer = make()
    fits = layer.partition(coords)
    settings = dict(compression_block_size=2, selection_block_size=4, window_size=4)
    cases = [
        (ValueError, "x must be", (x[:, :-1], coords)),
        (ValueError, "x must be", (x[None], coords)),
        (ValueError, "one row per voxel", (x[:-1], coords)),
        (ValueError, "one row per voxel", (x[:-1], fits)),
        (TypeError, "floating point", (x.long(), coords)),
        (ValueError, "one dtype", (x.double(), coords)),
        (ValueError, "one device", (x.to("meta"), coords)),
        (ValueError, "one device", (x, coords.to("meta"))),
        (TypeError, "integers", (x, coords.float())),
        (TypeError, "coords must be", (x, coords.tolist())),
        (TypeError, ".feats and .coords", (x,)),
        (ValueError, r"got \(2, 4, 4, 1\)", (x, fits.with_window(4, 1))),
        (ValueError, r"got \(2, 4, 8, 0\)", (x, fits.with_window(8))),
        (ValueError, r"got \(4, 4, 4, 0\)", (x, ssa.partition_voxels(coords, **{**settings, "compression_block_size": 4}))),
        (ValueError, r"got \(2, 8, 4, 0\)", (x, ssa.partition_voxels(coords, **{**settings, "selection_block_size": 8}))),
        (ValueError, "unique", (x, torch.cat([coords[1:2], coords[1:]]))),
    ]
    for error, match, arguments in cases:
        with pytest.raises(error, match=match):
            layer(*arguments)
    with pytest.raises(ValueError, match="query must be a row"):
        ssa.explain(layer, fits.sort(x), fits, len(x))
    for match, arguments in {
        "layer must be": (torch.nn.Linear(2, 2), x, fits, 0),
        "partition must be": (layer, x, coords, 0),
        "query must be of type int, got float": (layer, x, fits, 1.0),
        "query must be of type int, got bool": (layer, x, fits, True),
    }.items():
        with pytest.raises(TypeError, match=match):
            ssa.explain(*arguments)
    with pytest.raises(TypeError, match="coords must be a torch.Tensor"):
        layer(Sparse(x, coords.tolist()))
