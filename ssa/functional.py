"""The public operations: docstring, checks at the door, choice of implementation.

T tokens in packed order, C compression blocks, S selection blocks, Hq query heads, Hkv key/value heads, D head size; head h of q reads
key/value head h // (Hq // Hkv). D is a multiple of 8 from 16 to 128, Hq // Hkv is 1 … 32. q, k, v, k_cmp, v_cmp share one dtype
(float32, bfloat16, float16; float64 with impl "torch" or "naive"); sums are at least float32.
`softmax_scale` None means D ** −0.5. `impl`: "triton", "torch" (chunked), "naive" (dense); None means triton for CUDA tensors and torch
for others. A choice that cannot run raises. lse is [T,Hq], natural log, differentiable; a row without keys gives o = 0, lse = −inf.
Every function raises ValueError or TypeError with the rule and the value got. Source: arXiv 2505.17412, section 4.1.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from . import chunked, naive
from .partition import Blocks, VoxelPartition

_PLAIN: dict[str, ModuleType] = {"torch": chunked, "naive": naive}
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def spatial_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    partition: VoxelPartition,
    *,
    topk: int,
    topk_indices: Tensor | None = None,
    softmax_scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """o = g0 · compression + g1 · selection + g2 · window branch (Eq. 4), rows in packed order.

    Args:
        q: [T,Hq,D]; k, v: [T,Hkv,D]; k_cmp, v_cmp: [C,Hkv,D], one token a compression block.
        gates: [T,3] or [T,Hq,3], already activated, order (compression, selection, window); q's dtype or float32.
        topk: selection blocks each (query, key/value head) attends to.
        topk_indices: [T,Hkv,topk] int32 as from `block_topk`; given, the choice is frozen.

    Returns: [T,Hq,D]. Gradients for q, k, v, k_cmp, v_cmp, gates.
    """
    q, k, v, k_cmp, v_cmp = _autocast(q=q, k=k, v=v, k_cmp=k_cmp, v_cmp=v_cmp)
    _check_partition(q, partition)
    _check_attention(q, k, v, q.shape[0])
    _check_attention(q, k_cmp, v_cmp, partition.parents.shape[0], "k_cmp", "v_cmp")
    if k.shape[1] != k_cmp.shape[1]:
        raise ValueError(f"k and k_cmp must have the same heads, got {k.shape=}, {k_cmp.shape=}")
    _check_gates(gates, q)
    _check_topk(topk)
    if topk_indices is not None:
        _check_topk_indices(topk_indices, q, k, topk)
    scale, impl = _scale(q, softmax_scale), _choose(impl, q)
    if impl != "triton":
        plain = _PLAIN[impl]
        o_cmp, lse = plain.compression_attention(q, k_cmp, v_cmp, partition, softmax_scale=scale)
        if topk_indices is None:
            topk_indices = plain.block_topk(q, k_cmp, lse, partition, topk, softmax_scale=scale)
        o_slc, _ = plain.selected_attention(q, k, v, topk_indices, partition, softmax_scale=scale)
        o_win, _ = plain.window_attention(q, k, v, partition, softmax_scale=scale)
        return naive.gated_sum(o_cmp, o_slc, o_win, gates)
    from .autograd.spatial_sparse_attention import spatial_sparse_attention as op

    p = partition
    return op(
        q, k, v, k_cmp, v_cmp, gates, topk_indices, p.cu_seqlens, p.compression.cu_blocks, p.selection.cu_blocks, p.child_offsets,
        p.fill_order, p.selection.offsets, p.window.offsets, p.window.index, topk, scale,
    )[0]  # fmt: skip


def compression_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, partition: VoxelPartition, *, softmax_scale: float | None = None, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Every query [T,Hq,D] attends to the compressed tokens [C,Hkv,D] of its sample (Eq. 6) → o [T,Hq,D], lse [T,Hq]."""
    q, k_cmp, v_cmp = _autocast(q=q, k_cmp=k_cmp, v_cmp=v_cmp)
    _check_partition(q, partition)
    _check_attention(q, k_cmp, v_cmp, partition.parents.shape[0], "k_cmp", "v_cmp")
    scale, impl = _scale(q, softmax_scale), _choose(impl, q)
    if impl != "triton":
        return _PLAIN[impl].compression_attention(q, k_cmp, v_cmp, partition, softmax_scale=scale)
    return _varlen(q, k_cmp, v_cmp, partition.cu_seqlens, partition.compression.cu_blocks, None, scale)


def block_topk(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    partition: VoxelPartition,
    topk: int,
    *,
    softmax_scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """The selection blocks each (query, key/value head) attends to (Eq. 8).

    q [T,Hq,D], k_cmp [C,Hkv,D], lse [T,Hq] of the compression attention → [T,Hkv,topk] int32: global ids, valid ones first and
    ascending, −1 after where a sample has fewer blocks. Block J scores Σ_{j in J} Σ_h exp(q_h·k_cmp[j] scale − lse_h). No gradient.
    """
    q, k_cmp = (x.detach() for x in _autocast(q=q, k_cmp=k_cmp))
    _check_partition(q, partition)
    _check_attention(q, k_cmp, k_cmp, partition.parents.shape[0], "k_cmp", "k_cmp")
    _check_tensors(lse=lse)
    if lse.shape != q.shape[:2] or lse.dtype not in (torch.float32, torch.float64) or lse.device != q.device:
        raise ValueError(f"lse must be float32 [T,Hq] on q's device, got {lse.shape=}, {lse.dtype=}, {lse.device=}, {q.shape=}")
    _check_topk(topk)
    scale, impl = _scale(q, softmax_scale), _choose(impl, q)
    if impl != "triton":
        return _PLAIN[impl].block_topk(q, k_cmp, lse.detach(), partition, topk, softmax_scale=scale)
    from .autograd.block_topk import block_topk as op

    p = partition
    cu_blocks = p.selection.cu_blocks
    return op(q, k_cmp, lse.detach(), p.cu_seqlens, cu_blocks, p.child_offsets, p.fill_order, topk, scale)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_indices: Tensor,
    partition: VoxelPartition,
    *,
    softmax_scale: float | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Every query attends to all tokens of the blocks it chose (Algorithm 1).

    q [T,Hq,D], k, v [T,Hkv,D], topk_indices [T,Hkv,topk] int32 as from `block_topk` → o [T,Hq,D], lse [T,Hq].
    """
    q, k, v = _autocast(q=q, k=k, v=v)
    _check_partition(q, partition)
    _check_attention(q, k, v, q.shape[0])
    _check_topk_indices(topk_indices, q, k)
    scale, impl = _scale(q, softmax_scale), _choose(impl, q)
    if impl != "triton":
        return _PLAIN[impl].selected_attention(q, k, v, topk_indices, partition, softmax_scale=scale)
    from .autograd.selected_attention import selected_attention as op

    o, lse, *_ = op(q, k, v, topk_indices, partition.selection.offsets, scale)
    return o, lse.float()


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, partition: VoxelPartition, *, softmax_scale: float | None = None, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Attention among the tokens of each window of the partition: q [T,Hq,D], k, v [T,Hkv,D] → o [T,Hq,D], lse [T,Hq]."""
    q, k, v = _autocast(q=q, k=k, v=v)
    _check_partition(q, partition)
    _check_attention(q, k, v, q.shape[0])
    scale, impl = _scale(q, softmax_scale), _choose(impl, q)
    if impl != "triton":
        return _PLAIN[impl].window_attention(q, k, v, partition, softmax_scale=scale)
    window = partition.window
    return _varlen(q, k, v, window.offsets, window.offsets, window.index, scale)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    softmax_scale: float | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention inside segments of packed rows.

    q [Tq,Hq,D], k, v [Tk,Hkv,D]; cu_seqlens_q, cu_seqlens_k [n+1] int32, non-decreasing from 0 to Tq and Tk: rows of segment i of q
    attend to the rows of segment i of k. No longest length is needed. → o [Tq,Hq,D], lse [Tq,Hq].
    """
    q, k, v = _autocast(q=q, k=k, v=v)
    _check_attention(q, k, v, k.shape[0] if isinstance(k, Tensor) and k.ndim else 0)
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_tensors(**{name: cu})
        if cu.ndim != 1 or cu.shape[0] < 1 or cu.dtype != torch.int32 or cu.device != q.device:
            raise ValueError(f"{name} must be int32 [n+1] on q's device, got {cu.shape=}, {cu.dtype=}, {cu.device=}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(f"both sides must have the same number of segments, got {cu_seqlens_q.shape=}, {cu_seqlens_k.shape=}")
    scale, impl = _scale(q, softmax_scale), _choose(impl, q)
    if impl != "triton":
        return _PLAIN[impl].varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=scale)
    return _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, None, scale)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, index: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    from .autograd.varlen_attention import varlen_attention as op

    o, lse = op(q, k, v, cu_q, cu_k, index, scale)
    return o, lse.float()  # float64 behind the door for float32 inputs


def _autocast(**tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast float tensors take its dtype here; the ops themselves never cast, so lse stays float32."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    xs = tuple(tensors.values())
    device_type = xs[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return xs
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in xs)


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if not 0 < scale < float("inf"):
        raise ValueError(f"softmax_scale must be positive and finite, got {softmax_scale}")
    return scale


def _choose(impl: str | None, x: Tensor) -> str:
    """The implementation that runs on x, or an error that names one that can."""
    if impl is None:
        impl = "triton" if x.is_cuda else "torch"
    if impl not in ("triton", "torch", "naive"):
        raise ValueError(f'impl must be "triton", "torch" or "naive", got {impl!r}')
    if impl == "triton":
        if x.dtype not in _TRITON_DTYPES:
            raise ValueError(f'impl "triton" takes float32, bfloat16 or float16, got {x.dtype}; impl "torch" takes it')
        if not _installed():
            raise ValueError('impl "triton" needs the triton package, which is not installed; impl "torch" runs')
        if not x.is_cuda and not _interpreted():
            raise ValueError(f'impl "triton" needs CUDA tensors (or Triton\'s interpreter), got {x.device}; impl "torch" runs')
    return impl


@torch.compiler.assume_constant_result
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    """Whether the kernels were defined under Triton's interpreter, which takes CPU tensors."""
    from .autograd.common import interpreted

    return interpreted()


def _check_attention(q: Tensor, k: Tensor, v: Tensor, rows: int, name_k: str = "k", name_v: str = "v") -> None:
    device, dtype = q.device, q.dtype
    for name, x in (("q", q), (name_k, k), (name_v, v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
        if x.ndim != 3:
            raise ValueError(f"{name} must be [rows, heads, head_dim], got {tuple(x.shape)}")
        if x.device != device:
            raise ValueError(f"{name} must be on q's device {device}, got {x.device}")
        if x.dtype != dtype:
            raise ValueError(f"{name} must have q's dtype {dtype}, got {x.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"{name_k} and {name_v} must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape[0] != rows:
        raise ValueError(f"{name_k} must have {rows} rows, got {tuple(k.shape)}")
    hq, hkv, d = q.shape[1], k.shape[1], q.shape[2]
    if k.shape[2] != d:
        raise ValueError(f"{name_k} must have q's head_dim {d}, got {tuple(k.shape)}")
    if d % 8 or not 16 <= d <= 128:
        raise ValueError(f"head_dim must be a multiple of 8 from 16 to 128, got {d}")
    if hkv < 1 or hq % hkv or not 1 <= hq // hkv <= 32:
        raise ValueError(f"query heads must be 1 … 32 times the key/value heads, got {hq} and {hkv}")


def _check_partition(q: Tensor, partition: VoxelPartition) -> None:
    if not isinstance(partition, VoxelPartition):
        raise TypeError(f"partition must be a VoxelPartition (see ssa.partition_voxels), got {type(partition).__name__}")
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a torch.Tensor, got {type(q).__name__}")
    if q.ndim != 3:
        raise ValueError(f"q must be [T, Hq, D], got {tuple(q.shape)}")
    if q.shape[0] != partition.num_tokens:
        raise ValueError(f"q must have one row per voxel: {tuple(q.shape)} but the partition has {partition.num_tokens} voxels")
    if q.device != partition.device:
        raise ValueError(f"q and the partition must be on one device, got {q.device} and {partition.device}")


def _check_gates(gates: Tensor, q: Tensor) -> None:
    if not isinstance(gates, Tensor) or not gates.is_floating_point():
        raise TypeError(f"gates must be a floating point tensor, got {getattr(gates, 'dtype', type(gates).__name__)}")
    t, hq = q.shape[:2]
    if gates.shape != (t, 3) and gates.shape != (t, hq, 3):
        raise ValueError(f"gates must be [T,3] or [T,Hq,3] = ({t}, 3) or ({t}, {hq}, 3), got {tuple(gates.shape)}")
    if gates.dtype not in (q.dtype, torch.float32):
        raise ValueError(f"gates must be {q.dtype} as q or torch.float32, got {gates.dtype}")
    if gates.device != q.device:
        raise ValueError(f"gates must be on q's device {q.device}, got {gates.device}")


def _check_topk(topk: int) -> None:
    if isinstance(topk, bool) or not isinstance(topk, int):
        raise TypeError(f"topk must be an int, got {topk!r}")
    if topk < 1:
        raise ValueError(f"topk must be at least 1, got {topk}")


def _check_topk_indices(topk_indices: Tensor, q: Tensor, k: Tensor, topk: int | None = None) -> None:
    if not isinstance(topk_indices, Tensor) or topk_indices.dtype != torch.int32:
        raise TypeError(f"topk_indices must be an int32 tensor, got {getattr(topk_indices, 'dtype', type(topk_indices).__name__)}")
    shape = tuple(topk_indices.shape)
    if len(shape) != 3 or shape[:2] != (q.shape[0], k.shape[1]) or shape[2] < 1 or (topk is not None and shape[2] != topk):
        want = f"({q.shape[0]}, {k.shape[1]}, {'topk' if topk is None else topk})"
        raise ValueError(f"topk_indices must be [T,Hkv,topk] = {want}, got {shape}")
    if topk_indices.device != q.device:
        raise ValueError(f"topk_indices must be on q's device {q.device}, got {topk_indices.device}")


def block_mean(x: Tensor, blocks: Blocks, *, impl: str | None = None) -> Tensor:
    """Mean over the rows of each block (Eq. 7): x [T, …] in packed order → [n, …] in x's dtype, summed in float32.

    blocks: `partition.compression`, `partition.selection` or `partition.window`.
    """
    _check_floating(x=x)
    if not isinstance(blocks, Blocks):
        raise TypeError(f"blocks must be Blocks such as partition.compression, got {type(blocks).__name__}")
    if x.ndim < 1 or x.device != blocks.offsets.device:
        raise ValueError(f"x must be [T, …] on the device of the blocks {blocks.offsets.device}, got {x.shape=}, {x.device=}")
    if blocks.index is not None and blocks.index.shape[0] != x.shape[0]:
        raise ValueError(f"x must have one row per voxel, got {x.shape=} for {blocks.index.shape[0]} voxels")
    features = x.shape[1:]
    return segment_mean(x.reshape(x.shape[0], features.numel()), blocks.offsets, blocks.index, impl=impl).reshape(-1, *features)


def segment_mean(
    x: Tensor,
    offsets: Tensor,
    index: Tensor | None = None,
    *,
    extra: int = 0,
    table: Tensor | None = None,
    slots: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Σ (x + table[slots]) / (n_b + extra) over the rows of each segment, 0 for one without rows.

    x [T, F]; offsets [n+1] int32; index [T] int32: rows in the order of the segments; table [P, F], slots [T] int32 in 0 … P − 1 → [n, F].
    """
    impl = _choose(impl, x)
    if impl == "triton":
        from .autograd.block_mean import block_mean as op

        return op(x, offsets, index, table, slots, extra)
    if table is not None and slots is not None:
        x = add_position(x, table, slots, impl=impl)
    return _PLAIN[impl].segment_mean(x, offsets, index, extra)


def add_position(x: Tensor, table: Tensor, slots: Tensor, *, impl: str | None = None) -> Tensor:
    """x [T, F], table [P, F], slots [T] int32 in 0 … P − 1 → x + table[slots] in x's dtype."""
    if _choose(impl, x) != "triton":
        return chunked.add_position(x, table, slots)
    from .autograd.position_table import add_position as op

    return op(x, table, slots)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, num_groups: int, eps: float = 1e-5, *, impl: str | None = None
) -> Tensor:
    """SiLU(GroupNorm(x)) in x's dtype, moments over the rows of a sample and the channels of a group.

    x [N, F]; weight, bias [F]; cu_seqlens [B+1] int32, from 0 to N: the rows of each sample; num_groups divides F.
    """
    _check_floating(x=x, weight=weight, bias=bias)
    _check_tensors(cu_seqlens=cu_seqlens)
    if x.ndim != 2 or weight.shape != x.shape[1:] or bias.shape != x.shape[1:]:
        raise ValueError(f"x must be [N, F], weight and bias [F], got {x.shape=}, {weight.shape=}, {bias.shape=}")
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"num_groups must divide the {x.shape[1]} channels, got {num_groups}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be [B+1] int32, got {cu_seqlens.shape=}, {cu_seqlens.dtype=}")
    for name, t in (("weight", weight), ("bias", bias), ("cu_seqlens", cu_seqlens)):
        if t.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {t.device}")
    if _choose(impl, x) != "triton":
        return naive.group_norm_silu(x, weight, bias, cu_seqlens, num_groups, eps)
    from .autograd.group_norm_silu import group_norm_silu as op

    return op(x, weight, bias, cu_seqlens, num_groups, eps)[0]


def submanifold_conv3d(x: Tensor, kernel: Tensor, bias: Tensor | None, neighbors: Tensor, *, impl: str | None = None) -> Tensor:
    """Submanifold 3^3 convolution: y[i] = Σ_δ x[i+δ] W[δ] + b over the active neighbours.

    Args:
        x: [T, in].
        kernel: [27, in, out], tap = (dx+1) + 3(dy+1) + 9(dz+1); used in x's dtype, sums and its gradient are float32. bias: [out] or None.
        neighbors: [T,27] int32, −1 = none, as `partition.neighbors`: symmetric, that is neighbors[i, δ] = j ⟺ neighbors[j, 26 − δ] = i.

    Returns: [T, out] in x's dtype.
    """
    _check_floating(x=x, kernel=kernel, **({} if bias is None else {"bias": bias}))
    if x.ndim != 2 or kernel.ndim != 3 or kernel.shape[:2] != (27, x.shape[1]):
        raise ValueError(f"kernel must be [27, in, out] for x [T, in], got {kernel.shape=}, {x.shape=}")
    if bias is not None and bias.shape != kernel.shape[2:]:
        raise ValueError(f"bias must be [out], got {bias.shape=} for {kernel.shape=}")
    _check_tensors(neighbors=neighbors)
    if neighbors.shape != (x.shape[0], 27) or neighbors.dtype != torch.int32:
        raise ValueError(f"neighbors must be [T, 27] int32, got {neighbors.shape=}, {neighbors.dtype=} for {x.shape=}")
    for name, t in (("kernel", kernel), ("bias", bias), ("neighbors", neighbors)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {t.device}")
    impl = _choose(impl, x)
    if impl == "naive":
        return naive.submanifold_conv3d(x, kernel.to(x.dtype), None if bias is None else bias.to(x.dtype), neighbors)
    if impl == "torch":
        return chunked.submanifold_conv3d(x, kernel, bias, neighbors)
    from .autograd.submanifold_conv3d import submanifold_conv3d as op

    return op(x, kernel, bias, neighbors)


def _check_tensors(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def _check_floating(**tensors: Tensor) -> None:
    _check_tensors(**tensors)
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
