"""`SpatialSparseAttention`, the layer, and `explain`, which shows what one query attends to.

Source: arXiv 2505.17412, section 4.1 (Eqs. 4-10). Parameter names are those of the released Direct3D-S2 weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .compression import COMPRESSORS
from .partition import VoxelPartition, partition_voxels


class SpatialSparseAttention(nn.Module):
    """Self-attention over sparse voxels: compressed blocks, selected blocks and windows, mixed by learned gates.

    Args:
        hidden_size: width of x and y.
        num_heads, num_kv_heads: Hq, Hkv; query head h reads key/value head h // (Hq / Hkv).
        head_dim: D; default hidden_size // num_heads. A multiple of 8 from 16 to 128.
        compression_block_size, selection_block_size, window_size, window_shift: in voxels, as `partition_voxels`.
        topk: selection blocks a query reads.
        compression: "conv_mean" (the paper), "direct3d_s2_v1" or "direct3d_s2_v2" (the released variants).
        bias: of the projections of q, k, v, o and of the gate.
        impl: "triton", "torch" or "naive"; None: triton on CUDA, torch on the CPU.

    `layer(x, coords)` takes rows in any order and returns them as given; `layer(x, partition)` takes and returns packed rows
    (`partition.sort`, `partition.unsort`) and neither sorts nor synchronises; `layer(sparse)` takes an object with `.feats`
    [T, hidden_size] and `.coords` [T, 4] and returns its `.replace(feats)`, keeping the partition in its spatial cache if it has one.

    Raises ValueError or TypeError, with the rule and the value got, for sizes, shapes, dtypes or partitions that do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int = 2,
        head_dim: int | None = None,
        *,
        compression_block_size: int = 4,
        selection_block_size: int = 8,
        topk: int = 8,
        window_size: int = 8,
        window_shift: int = 0,
        compression: str = "conv_mean",
        bias: bool = False,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = dict(hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads, topk=topk, window_size=window_size)
        sizes.update(compression_block_size=compression_block_size, selection_block_size=selection_block_size)
        for name, value in [*sizes.items(), ("window_shift", window_shift), ("head_dim", 1 if head_dim is None else head_dim)]:
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1 and name in sizes:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if num_heads % num_kv_heads or num_heads // num_kv_heads > 32:
            raise ValueError(f"num_kv_heads must divide num_heads, at most 32 times, got {num_heads=}, {num_kv_heads=}")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"num_heads must divide hidden_size unless head_dim is given, got {hidden_size=}, {num_heads=}")
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        if head_dim % 8 or not 16 <= head_dim <= 128:
            raise ValueError(f"head_dim must be a multiple of 8 from 16 to 128, got {head_dim}")
        if selection_block_size % compression_block_size:
            got = f"{compression_block_size=}, {selection_block_size=}"
            raise ValueError(f"compression_block_size must divide selection_block_size, got {got}")
        if not 0 <= window_shift < window_size:
            raise ValueError(f"0 <= window_shift < window_size, got {window_shift=}, {window_size=}")
        if compression not in tuple(COMPRESSORS):
            raise ValueError(f"compression must be one of {sorted(COMPRESSORS)}, got {compression!r}")
        if impl not in (None, "triton", "torch", "naive"):
            raise ValueError(f'impl must be "triton", "torch", "naive" or None, got {impl!r}')
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_dim = head_dim
        self.compression_block_size, self.selection_block_size = compression_block_size, selection_block_size
        self.topk, self.window_size, self.window_shift = topk, window_size, window_shift
        self.compression, self.impl = compression, impl

        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        channels, m = num_kv_heads * self.head_dim, compression_block_size
        self.proj_q = nn.Linear(hidden_size, num_heads * self.head_dim, bias, **factory)
        self.proj_k = nn.Linear(hidden_size, channels, bias, **factory)
        self.proj_v = nn.Linear(hidden_size, channels, bias, **factory)
        self.proj_o = nn.Linear(num_heads * self.head_dim, hidden_size, bias, **factory)
        self.gate = nn.Sequential(nn.Linear(hidden_size, 3, bias, **factory), nn.Sigmoid())
        self.intra_block_pe = nn.Parameter(torch.zeros(m, m, m, channels, **factory))
        self.compression_key = COMPRESSORS[compression](channels, **factory)
        self.compression_value = COMPRESSORS[compression](channels, **factory)

    def forward(self, x: Any, coords: Tensor | VoxelPartition | None = None) -> Any:
        """x [T, hidden_size] with coords [T, 4] or a VoxelPartition, or a sparse tensor alone → the same kind, same rows."""
        if coords is None:
            return self._forward_sparse(x)
        if isinstance(coords, VoxelPartition):
            return self._forward_packed(x, coords)
        if not isinstance(coords, Tensor):
            raise TypeError(f"coords must be a torch.Tensor [T, 4] or a VoxelPartition, got {type(coords).__name__}")
        self._check_input(x, coords.shape[0], coords.device)
        partition = self.partition(coords)
        return partition.unsort(self._forward_packed(partition.sort(x), partition))

    def partition(self, coords: Tensor, batch_size: int | None = None) -> VoxelPartition:
        """The partition this layer needs, with its neighbour table: the only sort and host synchronisation, to be shared by a stack."""
        partition = partition_voxels(
            coords,
            compression_block_size=self.compression_block_size,
            selection_block_size=self.selection_block_size,
            window_size=self.window_size,
            window_shift=self.window_shift,
            batch_size=batch_size,
        )
        COMPRESSORS[self.compression].neighbors(partition)
        return partition

    def project(self, x: Tensor, partition: VoxelPartition) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Packed x [T, hidden_size] → q [T,Hq,D], k, v [T,Hkv,D], k_cmp, v_cmp [C,Hkv,D]."""
        q, k, v = self.proj_q(x), self.proj_k(x), self.proj_v(x)
        k_cmp = self.compression_key(k, partition, self.intra_block_pe.flatten(0, 2), self.impl)
        v_cmp = self.compression_value(v, partition, None, self.impl)
        shape_q, shape_k = (self.num_heads, self.head_dim), (self.num_kv_heads, self.head_dim)
        return q.unflatten(-1, shape_q), *(t.unflatten(-1, shape_k) for t in (k, v, k_cmp, v_cmp))

    def extra_repr(self) -> str:
        names = ["hidden_size", "num_heads", "num_kv_heads", "head_dim", "compression_block_size", "selection_block_size", "topk"]
        names += ["window_size", "window_shift", "compression", "impl"]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _forward_packed(self, x: Tensor, partition: VoxelPartition) -> Tensor:
        self._check_partition(partition)
        self._check_input(x, partition.num_tokens, partition.device)
        q, k, v, k_cmp, v_cmp = self.project(x, partition)
        o = functional.spatial_sparse_attention(q, k, v, k_cmp, v_cmp, self.gate(x), partition, topk=self.topk, impl=self.impl)
        return self.proj_o(o.flatten(1))

    def _forward_sparse(self, x: Any) -> Any:
        if not all(hasattr(x, name) for name in ("feats", "coords", "replace")):
            raise TypeError(f"without coords or a partition, x must have .feats and .coords and .replace, got {type(x).__name__}")
        if not isinstance(x.coords, Tensor):
            raise TypeError(f"coords must be a torch.Tensor [T, 4], got {type(x.coords).__name__}")
        self._check_input(x.feats, x.coords.shape[0], x.coords.device)
        partition = self._cached_partition(x)
        y = self._forward_packed(partition.sort(x.feats), partition)
        return x.replace(partition.unsort(y))

    def _cached_partition(self, x: Any) -> VoxelPartition:
        """The partition kept with x. Layers that differ only in their windows share one sort of the voxels."""
        if not (hasattr(x, "get_spatial_cache") and hasattr(x, "register_spatial_cache")):
            return self.partition(x.coords)
        key = f"ssa_partition_{self.compression_block_size}_{self.selection_block_size}"
        coords, plans = x.get_spatial_cache(key) or (None, {})
        if coords is not x.coords and not _same_voxels(plans, x.coords):
            plans = {}
        window = (self.window_size, self.window_shift)
        if window not in plans:
            shared = next(iter(plans.values()), None)
            plan = self.partition(x.coords) if shared is None else shared.with_window(*window)
            plans = {**plans, window: plan}
            x.register_spatial_cache(key, (x.coords, plans))
        return plans[window]

    def _check_input(self, x: Tensor, num_tokens: int, device: torch.device) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if x.ndim != 2 or x.shape[1] != self.hidden_size:
            raise ValueError(f"x must be [T, hidden_size={self.hidden_size}], got {x.shape=}")
        if not x.is_floating_point():
            raise TypeError(f"x must be of a floating point type, got {x.dtype=}")
        if x.shape[0] != num_tokens:
            raise ValueError(f"x must have one row per voxel, got {x.shape=} for {num_tokens} voxels")
        if x.device != device:
            raise ValueError(f"x and the voxels must be on one device, got {x.device=} and {device}")
        weight = self.proj_q.weight
        if x.device != weight.device:
            raise ValueError(f"x and the layer must be on one device, got {x.device=} and {weight.device=}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"x and the layer must have one dtype outside autocast, got {x.dtype=} and {weight.dtype=}")

    def _check_partition(self, partition: VoxelPartition) -> None:
        got = (partition.compression.size, partition.selection.size, partition.window.size, partition.window_shift)
        want = (self.compression_block_size, self.selection_block_size, self.window_size, self.window_shift)
        if got != want:
            raise ValueError(
                "the partition's (compression_block_size, selection_block_size, window_size, window_shift) must be the layer's: "
                f"got {got}, expected {want}; other windows alone: partition.with_window({want[2]}, {want[3]})"
            )


def explain(layer: SpatialSparseAttention, x: Tensor, partition: VoxelPartition, query: int) -> tuple[Tensor, Tensor, Tensor]:
    """What one query attends to.

    Args:
        layer, x, partition: as `layer(x, partition)`, x [T, hidden_size] in packed order.
        query: packed row, 0 … T − 1.

    Returns:
        window rows [n] int64, the packed rows of the query's window; chosen blocks [Hkv, topk] int32, ids of selection blocks,
        valid ones first and ascending, −1 after; compression weights [Hq, C] fp32 (or wider), the softmax over the compression
        blocks of the query's sample, 0 in other samples.
    """
    for name, value, kind in (("layer", layer, SpatialSparseAttention), ("partition", partition, VoxelPartition), ("query", query, int)):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")
    layer._check_partition(partition)
    layer._check_input(x, partition.num_tokens, partition.device)
    if not 0 <= query < partition.num_tokens:
        raise ValueError(f"query must be a row 0 … {partition.num_tokens - 1}, got {query}")
    with torch.no_grad():
        q, _, _, k_cmp, v_cmp = layer.project(x, partition)
        _, lse = functional.compression_attention(q, k_cmp, v_cmp, partition, impl=layer.impl)
        chosen = functional.block_topk(q, k_cmp, lse, partition, layer.topk, impl=layer.impl)[query]
        k_heads = k_cmp.to(lse.dtype).repeat_interleave(layer.num_heads // layer.num_kv_heads, dim=1)  # [C, Hq, D]
        scores = torch.einsum("hd,chd->hc", q[query].to(lse.dtype), k_heads) * layer.head_dim**-0.5
        same = partition.compression.coords[:, 0] == partition.coords[query, 0]
        weights = torch.where(same, torch.exp(scores - lse[query, :, None]), 0.0)
        return _window_rows(partition, query), chosen, weights


def _window_rows(partition: VoxelPartition, query: int) -> Tensor:
    window = partition.window
    rows = torch.arange(partition.num_tokens, device=partition.device) if window.index is None else window.index.long()
    position = (rows == query).nonzero()[0]
    last = torch.searchsorted(window.offsets.long(), position, right=True)
    begin, end = int(window.offsets[last - 1]), int(window.offsets[last])
    return rows[begin:end]


def _same_voxels(plans: dict[Any, VoxelPartition], coords: Tensor) -> bool:
    """Whether cached partitions still describe these coordinates: `replace` of some libraries keeps the cache of other voxels."""
    plan = next(iter(plans.values()), None)
    if plan is None or plan.num_tokens != coords.shape[0] or plan.device != coords.device:
        return False
    return torch.equal(plan.sort(coords).int(), plan.coords)
