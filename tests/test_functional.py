"""The door of the public operations: what they refuse, which implementation they choose, autocast, torch.compile."""

import pytest
import torch
from utils import CUDA, DEVICE, IMPL, draw, draw_qkv, random_choice, random_partition

import ssa

OPS = ["compression_attention", "window_attention", "selected_attention", "block_topk", "varlen_attention", "spatial_sparse_attention"]


def arguments(op, hq=4, hkv=2, d=16, dtype=torch.float32, **changes):
    """(function, its arguments by name), the named ones replaced."""
    partition = random_partition([20, 7])
    q, k, v, k_cmp, v_cmp = draw_qkv(partition, hq, hkv, d, dtype)
    every = dict(
        q=q, k=k, v=v, k_cmp=k_cmp, v_cmp=v_cmp, gates=draw(partition.num_tokens, 3, dtype=dtype), partition=partition, topk=2,
        topk_indices=random_choice(partition, hkv, 2), lse=torch.zeros(q.shape[:2], device=DEVICE),
        cu_seqlens_q=partition.cu_seqlens, cu_seqlens_k=partition.cu_seqlens, impl=IMPL,
    )  # fmt: skip
    names = {
        "compression_attention": "q k_cmp v_cmp partition",
        "window_attention": "q k v partition",
        "selected_attention": "q k v topk_indices partition",
        "block_topk": "q k_cmp lse partition topk",
        "varlen_attention": "q k v cu_seqlens_q cu_seqlens_k",
        "spatial_sparse_attention": "q k v k_cmp v_cmp gates partition topk",
    }[op].split()
    return getattr(ssa, op), {name: every[name] for name in (*names, "impl")} | changes


def refuses(error, match, op, **changes):
    fn, kwargs = arguments(op, **changes)
    with pytest.raises(error, match=match):
        fn(**kwargs)


@pytest.mark.parametrize("op", OPS)
def test_every_operation_refuses(op):
    k, rows = ("k_cmp", len(random_partition([20, 7]).compression)) if op in OPS[:1] + OPS[3:4] else ("k", 27)
    refuses(TypeError, "q must be a torch.Tensor, got list", op, q=[1.0])
    refuses(TypeError, f"{k} must be a torch.Tensor, got NoneType", op, **{k: None})
    refuses(TypeError, "q must be floating point, got torch.int64", op, q=torch.zeros(27, 4, 16, dtype=torch.int64, device=DEVICE))
    refuses(ValueError, r"q must be .*\(27, 64\)", op, q=draw(27, 64))
    refuses(ValueError, rf"{k} must have q's dtype torch.float32, got torch.float16", op, **{k: draw(rows, 2, 16, dtype=torch.float16)})
    refuses(ValueError, rf"{k} must be on q's device {DEVICE}.*, got meta", op, **{k: torch.zeros(rows, 2, 16, device="meta")})
    refuses(ValueError, f"{k} must have q's head_dim 16, got .*24", op, **{k: draw(rows, 2, 24)} | ({} if op == "block_topk" else {"v" + k[1:]: draw(rows, 2, 24)}))  # noqa: E501
    refuses(ValueError, "head_dim must be a multiple of 8 from 16 to 128, got 20", op, d=20)
    refuses(ValueError, "head_dim must be a multiple of 8 from 16 to 128, got 8", op, d=8)
    refuses(ValueError, "head_dim must be a multiple of 8 from 16 to 128, got 136", op, d=136)
    refuses(ValueError, "1 … 32 times.*got 3 and 2", op, hq=3)
    refuses(ValueError, "1 … 32 times.*got 33 and 1", op, hq=33, hkv=1)
    refuses(ValueError, "1 … 32 times.*got 1 and 2", op, hq=1)
    refuses(ValueError, 'impl must be "triton", "torch" or "naive", got \'cuda\'', op, impl="cuda")
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        refuses(ValueError, f"softmax_scale must be positive and finite, got {scale}", op, softmax_scale=scale)


@pytest.mark.parametrize("op", [op for op in OPS if op != "varlen_attention"])
def test_rows_and_partition_must_match(op):
    refuses(TypeError, "VoxelPartition.*got Tensor", op, partition=random_partition([20, 7]).coords)
    k, rows = ("k_cmp", len(random_partition([20, 7]).compression)) if op in OPS[:1] + OPS[3:4] else ("k", 27)
    fn, kwargs = arguments(op)
    kwargs["q"] = draw(26, 4, 16)
    with pytest.raises(ValueError, match=r"\(26, 4, 16\).*27 voxels"):
        fn(**kwargs)
    fn, kwargs = arguments(op)
    for name in (k, "v" + k[1:]):
        if name in kwargs:
            kwargs[name] = kwargs[name][:-1]
    with pytest.raises(ValueError, match=f"{k} must have {rows} rows, got"):
        fn(**kwargs)
    if CUDA:
        fn, kwargs = arguments(op)
        kwargs["partition"] = kwargs["partition"].to("cpu")
        with pytest.raises(ValueError, match="one device.*cuda.*cpu"):
            fn(**kwargs)


def test_values_of_another_shape_than_keys():
    refuses(ValueError, r"k and v must have one shape, got \(27, 2, 16\) and \(27, 1, 16\)", "window_attention", v=draw(27, 1, 16))
    refuses(ValueError, "k and k_cmp must have the same heads", "spatial_sparse_attention", k=draw(27, 1, 16), v=draw(27, 1, 16))


@pytest.mark.parametrize("op", ["block_topk", "spatial_sparse_attention"])
def test_topk(op):
    refuses(ValueError, "topk must be at least 1, got 0", op, topk=0)
    refuses(ValueError, "topk must be at least 1, got -3", op, topk=-3)
    refuses(TypeError, "topk must be an int, got 2.0", op, topk=2.0)
    refuses(TypeError, "topk must be an int, got True", op, topk=True)


@pytest.mark.parametrize("op", ["selected_attention", "spatial_sparse_attention"])
def test_topk_indices(op):
    ids = random_choice(random_partition([20, 7]), 2, 2)
    refuses((TypeError, ValueError), "topk_indices.*int64", op, topk_indices=ids.long())
    refuses(ValueError, r"topk_indices.*\[?\(?26, 2, 2", op, topk_indices=ids[1:])
    refuses(ValueError, r"topk_indices.*27, 1, 2", op, topk_indices=ids[:, :1])
    refuses(ValueError, r"topk_indices.*27, 2\b", op, topk_indices=ids[..., 0])
    if op == "spatial_sparse_attention":
        refuses(ValueError, r"topk_indices.*27, 2, 1", op, topk_indices=ids[..., :1])


def test_gates():
    op = "spatial_sparse_attention"
    refuses(ValueError, r"gates must be .*got \(27, 2\)", op, gates=draw(27, 2))
    refuses(ValueError, r"gates must be .*got \(27, 2, 3\)", op, gates=draw(27, 2, 3))
    refuses(ValueError, "gates must be torch.float32 .*got torch.float16", op, gates=draw(27, 3, dtype=torch.float16))
    refuses(TypeError, "gates must be a floating point tensor, got torch.int64", op, gates=draw(27, 3).long())
    refuses(TypeError, "gates must be a floating point tensor, got NoneType", op, gates=None)
    refuses(ValueError, "gates must be on q's device", op, gates=torch.zeros(27, 3, device="meta"))


def test_lse_of_block_topk():
    refuses(ValueError, r"lse must be float32.*27, 2", "block_topk", lse=torch.zeros(27, 2, device=DEVICE))
    refuses(TypeError, "lse must be a torch.Tensor, got NoneType", "block_topk", lse=None)
    refuses(ValueError, "lse must be float32.*float16", "block_topk", lse=torch.zeros(27, 4, device=DEVICE, dtype=torch.float16))


def test_cu_seqlens():
    op = "varlen_attention"
    cu = random_partition([20, 7]).cu_seqlens
    refuses(TypeError, "cu_seqlens_k must be a torch.Tensor, got list", op, cu_seqlens_k=[0, 20, 27])
    refuses(ValueError, "cu_seqlens_q must be int32.*int64", op, cu_seqlens_q=cu.long())
    refuses(ValueError, r"cu_seqlens_k must be int32.*\[1, 3\]", op, cu_seqlens_k=cu[None])
    refuses(ValueError, r"same number of segments.*\[3\].*\[2\]", op, cu_seqlens_k=cu[:2])
    refuses(ValueError, "cu_seqlens_q must be int32.*meta", op, cu_seqlens_q=cu.to("meta"))


def test_implementations():
    """None is triton on CUDA and torch elsewhere; what cannot run says what can."""
    fn, kwargs = arguments("window_attention")
    outputs = {impl: fn(**kwargs | dict(impl=impl))[0] for impl in (None, "torch", "naive", IMPL)}
    default = "triton" if CUDA else "torch"
    if default in outputs:
        assert torch.equal(outputs[None], outputs[default])
    for o in outputs.values():
        assert (o - outputs["naive"]).abs().max() < 1e-6
    fn, kwargs = arguments("window_attention", dtype=torch.float64)
    assert fn(**kwargs | dict(impl="torch"))[0].dtype == torch.float64
    with pytest.raises(ValueError, match='float64; impl "torch" takes it'):
        fn(**kwargs | dict(impl="triton"))
    if IMPL == "torch" or CUDA:
        fn, kwargs = arguments("window_attention")
        kwargs = {k: v.to("cpu") if hasattr(v, "to") else v for k, v in kwargs.items()} | dict(impl="triton")
        with pytest.raises(ValueError, match='impl "torch" runs'):
            fn(**kwargs)


def test_autocast():
    """q, k, v, k_cmp, v_cmp are cast at the door; lse and fp32 gates stay, gradients come back in the leaves' dtype."""
    half = torch.bfloat16 if CUDA else torch.float16  # Triton's interpreter has no bf16
    partition = random_partition([20, 7])
    q, k, v, k_cmp, v_cmp = (x.requires_grad_() for x in draw_qkv(partition, 4, 2, 16, torch.float32))
    gates = draw(27, 3).requires_grad_()
    with torch.autocast(DEVICE.type, dtype=half):
        for o, lse in (
            ssa.compression_attention(q, k_cmp, v_cmp, partition, impl=IMPL),
            ssa.window_attention(q, k, v, partition, impl=IMPL),
            ssa.selected_attention(q, k, v, random_choice(partition, 2, 2), partition, impl=IMPL),
        ):
            assert o.dtype == half and lse.dtype == torch.float32
        o = ssa.spatial_sparse_attention(q, k.to(half), v, k_cmp, v_cmp, gates, partition, topk=2, impl=IMPL)
        assert o.dtype == half
        ids = ssa.block_topk(q, k_cmp, lse, partition, 2, impl=IMPL)
    assert ids.dtype == torch.int32
    want = ssa.spatial_sparse_attention(*(x.to(half) for x in (q, k, v, k_cmp, v_cmp)), gates, partition, topk=2, impl=IMPL)
    assert torch.equal(o, want)
    leaves = [q, k, v, k_cmp, v_cmp, gates]
    for a, b in zip(torch.autograd.grad(o.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


if IMPL == "triton":

    @pytest.mark.parametrize(("dtype", "heads", "frames"), [(torch.float32, 2, 2), (torch.float16, 8, 3)])
    def test_compiles_whole_for_changing_sizes(dtype, heads, frames):
        """fullgraph, forward and backward: eight batches of other T, C, S, B (every other one under the interpreter) cost two compilations
        at most, and one where small blocks are taken another way."""
        from torch._dynamo.testing import CompileCounterWithBackend

        def f(q, k, v, k_cmp, v_cmp, gates, partition):
            return ssa.spatial_sparse_attention(2 * q, k, v, k_cmp, v_cmp, gates.sigmoid(), partition, topk=2, impl=IMPL) + 1

        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(f, fullgraph=True, backend=counter)
        batches = [[10, 7], [11, 9], [13, 2], [9, 12], [44, 45], [5, 8], [5, 20], [17, 6]]
        for i, counts in enumerate(batches[:: 1 if CUDA else 2]):
            partition = random_partition(counts, window=5, shift=1, edge=4, seed=i)
            leaves = *draw_qkv(partition, heads, 1, 16, dtype, seed=i), draw(partition.num_tokens, 3, dtype=dtype)
            leaves = [x.requires_grad_() for x in leaves]
            got, want = compiled(*leaves, partition), f(*leaves, partition)
            assert torch.equal(got, want)
            for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
                assert (a - b).abs().max() <= 1e-6 * max(1.0, b.abs().max().item())
        assert counter.frame_count <= frames
