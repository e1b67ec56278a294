"""What is timed (cases, inputs) and what it costs at least (pairs, FLOPs, exps, bytes).

Letters: T tokens, C compression blocks, S selection blocks, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head size.
A pair is one (query, head, key): compression has Hq T C of them (in one sample), selection G times the tokens of the chosen
blocks, the window Hq times the squared window fills. Useful work of attention over P pairs, whatever a kernel repeats:

    forward   P exps   4 D P FLOPs (q k^T, p v)
    backward  P exps  10 D P FLOPs (q k^T, do v^T, p^T do, ds k, ds^T q)

The limit of an operation adds up its branches, each at 100 % of the resource that binds it (exp, matrix or bytes).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

import ssa

from . import voxels

NUM_HEADS, NUM_KV_HEADS, WINDOW_SIZE = 32, 2, 8
TOKENS = (131_072, 8_192, 32_768, 65_536, 16_384, 4_096, 262_144, 1_048_576)  # in order of interest: time may run out
MAX_DENSE_TOKENS = 262_144  # dense attention at 1M takes over 20 s a call
HEAD_DIMS = (32, 64)
BLOCKS = ((4, 8, 8), (8, 8, 8), (4, 8, 32))  # (m_cmp, m_slc, topk)
MESH_RESOLUTIONS = (128, 256)
DENSE = ("fa2", "cudnn", "flex")
PASSES = ("fwd", "bwd", "both")
GYROID_COUNTS = {131_072: {4: 7_488, 8: 1_836}}  # T → block edge → non-empty blocks


@dataclass(frozen=True)
class Case:
    """One implementation on one input. `blocks` = (m_cmp, m_slc, topk), `voxels` and `resolution` are None for dense peers."""

    impl: str
    num_tokens: int
    head_dim: int
    blocks: tuple[int, int, int] | None = None
    voxels: str | None = None
    resolution: int | None = None
    num_heads: int = NUM_HEADS
    num_kv_heads: int = NUM_KV_HEADS

    def __str__(self) -> str:
        blocks = "" if self.blocks is None else f" {'/'.join(map(str, self.blocks))} {self.voxels}"
        return f"{self.impl} T={self.num_tokens:,} D={self.head_dim}{blocks}"


@dataclass(frozen=True)
class Chip:
    """Rates of one GPU, each measured alone."""

    exp: float  # exp2 in fp32, per second
    matrix: float  # bf16 FLOP/s
    hbm: float  # bytes/s, read plus written
    l2: float  # bytes/s


# exp2: an ex2 loop; matrix: an 8192^3 bf16 GEMM; HBM: a device copy; L2: repeated reads. One H200, torch 2.11, CUDA 13, 2026-11-22.
CHIPS = {"NVIDIA H200": Chip(exp=3.76e12, matrix=785e12, hbm=4.25e12, l2=5.5e12)}


@dataclass(frozen=True)
class Inputs:
    """Tensors of one ssa case, rows in packed order: shapes as `ssa.spatial_sparse_attention` takes them; do like q."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    gates: Tensor
    do: Tensor
    partition: ssa.VoxelPartition
    topk: int

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.k_cmp, self.v_cmp, self.gates

    def attend(self, topk_indices: Tensor | None = None, impl: str | None = None) -> Tensor:
        """The operator, o [T, Hq, D]; with the choice given or its own."""
        q, k, v, k_cmp, v_cmp, gates = self.leaves
        return ssa.spatial_sparse_attention(
            q, k, v, k_cmp, v_cmp, gates, self.partition, topk=self.topk, topk_indices=topk_indices, impl=impl
        )

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values as new leaves of another dtype."""
        q, k, v, k_cmp, v_cmp, gates = (x.detach().to(dtype).requires_grad_() for x in self.leaves)
        return Inputs(q, k, v, k_cmp, v_cmp, gates, self.do.to(dtype), self.partition, self.topk)

    def choose(self) -> Tensor:
        """The chosen blocks, topk_indices [T, Hkv, topk], by the public branches."""
        with torch.no_grad():
            _, lse = ssa.compression_attention(self.q, self.k_cmp, self.v_cmp, self.partition)
            return ssa.block_topk(self.q, self.k_cmp, lse, self.partition, self.topk)


@dataclass(frozen=True)
class Pairs:
    """(query, head, key) pairs of each branch."""

    cmp: int
    slc: int
    win: int

    @property
    def total(self) -> int:
        return self.cmp + self.slc + self.win


def gyroid_cases(tokens: tuple[int, ...] = TOKENS) -> list[Case]:
    """The synthetic cases by T, in the order given; the peers that share a T follow each other."""
    cases = []
    for T in tokens:
        for D in HEAD_DIMS:
            cases += [Case("ssa", T, D, blocks, "gyroid", voxels.gyroid_resolution(T)) for blocks in BLOCKS]
            cases += [Case(impl, T, D, num_kv_heads=NUM_HEADS) for impl in DENSE if T <= MAX_DENSE_TOKENS]
    return cases


def mesh_cases(mesh: str | None = None) -> list[Case]:
    """The surface voxels of a mesh (see `mesh_voxels`) at two resolutions, D = 32, and FlashAttention-2 at the same T."""
    cases = []
    for resolution in MESH_RESOLUTIONS:
        T = mesh_voxels(mesh, resolution).shape[0]
        name = Path(mesh).stem if mesh else "linked-rings"
        cases += [Case("ssa", T, 32, blocks, name, resolution) for blocks in BLOCKS[:2]]
        cases += [Case("fa2", T, 32, num_kv_heads=NUM_HEADS)] if T <= MAX_DENSE_TOKENS else []
    return cases


@lru_cache(maxsize=4)
def mesh_voxels(mesh: str | None, resolution: int) -> Tensor:
    """Surface voxels [T, 4] of a mesh file, or of `voxels.linked_rings` for None."""
    return voxels.surface_voxels(voxels.linked_rings() if mesh is None else voxels.load_mesh(mesh), resolution)


def make_inputs(
    coords: Tensor,
    head_dim: int,
    blocks: tuple[int, int, int],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    num_heads: int = NUM_HEADS,
    num_kv_heads: int = NUM_KV_HEADS,
    seed: int = 0,
) -> Inputs:
    """Random inputs over voxels [T, 4]: q, k, v, k_cmp, v_cmp, do ~ N(0, 1) independent, gates = sigmoid(N(0, 1)), all leaves.

    Block means of k as k_cmp would flatten the scores and make the selection almost free: k_cmp is drawn by itself.
    """
    m_cmp, m_slc, topk = blocks
    partition = ssa.partition_voxels(
        coords.to(device), compression_block_size=m_cmp, selection_block_size=m_slc, window_size=WINDOW_SIZE
    )
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    T, C = partition.num_tokens, len(partition.compression)
    q, do = normal(T, num_heads, head_dim), normal(T, num_heads, head_dim)
    k, v = normal(T, num_kv_heads, head_dim), normal(T, num_kv_heads, head_dim)
    k_cmp, v_cmp = normal(C, num_kv_heads, head_dim), normal(C, num_kv_heads, head_dim)
    return Inputs(q, k, v, k_cmp, v_cmp, normal(T, 3).sigmoid(), do, partition, topk).to(dtype)


def count_pairs(partition: ssa.VoxelPartition, topk_indices: Tensor, num_heads: int) -> Pairs:
    """Pairs of the three branches; topk_indices [T, Hkv, topk] as the operator chose them (−1 = none)."""
    group = num_heads // topk_indices.shape[1]
    tokens = partition.cu_seqlens.diff().long()
    blocks = partition.compression.cu_blocks.diff().long()
    fill = partition.selection.offsets.diff().long()
    chosen = int(torch.where(topk_indices >= 0, fill[topk_indices.clamp(min=0).long()], 0).sum()) if len(fill) else 0
    window = partition.window.offsets.diff().long()
    return Pairs(num_heads * int((tokens * blocks).sum()), group * chosen, num_heads * int((window * window).sum()))


def useful_flops(pass_: str, head_dim: int, pairs: int) -> int:
    """FLOPs of attention over `pairs` pairs: 4 D forward, 10 D backward, 14 D both."""
    return {"fwd": 4, "bwd": 10, "both": 14}[pass_] * head_dim * pairs


@dataclass(frozen=True)
class Work:
    """What one branch needs: exps, FLOPs and, as alternatives of which the quicker counts, (HBM bytes, L2 bytes)."""

    exps: float
    flops: float
    traffic: tuple[tuple[float, float], ...]

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Time of each resource at its full rate."""
        moved = min(max(hbm / chip.hbm, l2 / chip.l2) for hbm, l2 in self.traffic)
        return {"exp": self.exps / chip.exp, "matrix": self.flops / chip.matrix, "bytes": moved}


def ssa_work(
    pass_: str,
    pairs: Pairs,
    *,
    num_tokens: int,
    head_dim: int,
    topk: int,
    num_heads: int = NUM_HEADS,
    num_kv_heads: int = NUM_KV_HEADS,
    element_size: int = 2,
    exp_passes: int = 1,
) -> dict[str, Work]:
    """Work of each branch in one pass ("fwd" or "bwd"); a branch reads its inputs and writes its outputs once.

    The block score is the sum of the compression attention's own p: with exp_passes=1 it costs nothing beyond that, with 2
    it is a branch that computes q k^T and exp again. Selection moves the least of two schedules: query-major, k and v of
    every chosen block read by every query (L2), or block-major, one partial row of o or dq a chosen block (HBM, dq in fp32).
    Tiles over neighbouring queries that agree can move less than both, so its bytes are the model's, not a strict bound.
    """
    rows = num_tokens * num_heads * head_dim * element_size  # bytes of q, o, do or dq
    keys = num_tokens * num_kv_heads * head_dim * element_size  # bytes of k, v, dk or dv
    stats = num_tokens * num_heads * 4  # bytes of lse or delta
    gates = num_tokens * 3 * element_size
    chosen = num_tokens * num_kv_heads * topk * 4
    reread = pairs.slc // (num_heads // num_kv_heads) * 2 * head_dim * element_size
    flops = {"fwd": 4, "bwd": 10}[pass_] * head_dim
    if pass_ == "fwd":
        stream, combine = 2 * rows + 2 * keys + stats, 4 * rows + gates
        query_major, block_major = float(reread), 3.0 * rows * topk
    else:
        stream, combine = 3 * rows + 4 * keys + 2 * stats, 4 * rows + 2 * gates + 3 * stats
        query_major, block_major = reread + 2.0 * rows * topk, (2 + 8 / element_size) * rows * topk
    work = {
        "cmp": Work(pairs.cmp, flops * pairs.cmp, ((stream, 0),)),
        "slc": Work(pairs.slc, flops * pairs.slc, ((stream, query_major), (block_major, 0))),
        "win": Work(pairs.win, flops * pairs.win, ((stream, 0),)),
        "gates": Work(0, 0, ((combine, 0),)),
    }
    if exp_passes == 2 and pass_ == "fwd":
        work["score"] = Work(pairs.cmp, 2 * head_dim * pairs.cmp, ((rows + stats + chosen, 0),))
    return work


def dense_work(pass_: str, *, num_tokens: int, head_dim: int, num_heads: int = NUM_HEADS, element_size: int = 2) -> dict[str, Work]:
    """Work of dense attention in one pass ("fwd" or "bwd"), num_heads key/value heads."""
    pairs = num_heads * num_tokens**2
    rows = num_tokens * num_heads * head_dim * element_size
    traffic = {"fwd": 4, "bwd": 8}[pass_] * rows
    return {"dense": Work(pairs, {"fwd": 4, "bwd": 10}[pass_] * head_dim * pairs, ((traffic, 0),))}


def limit_seconds(work: dict[str, Work], chip: Chip) -> float:
    """Every branch at 100 % of what binds it, one after the other."""
    return sum((max(branch.seconds(chip).values()) for branch in work.values()), 0.0)


def binding(work: Work, chip: Chip) -> str:
    """The resource that binds a branch: "exp", "matrix" or "bytes"."""
    seconds = work.seconds(chip)
    return max(seconds, key=seconds.__getitem__)
