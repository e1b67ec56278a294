"""dk and dv of compression attention on Hopper: what `_dkv_kernel` of varlen_attention.py computes, in Gluon.

Triton waits for each product where it is asked for and reads k and v from shared memory for each. Here they are operands in registers, the
products into dv and dk run on beside what follows, and warps meet for copies of 128 rows, of which 32 are worked on at a time, at three
barriers. 64 keys a program and 125 registers let four programs share a multiprocessor (head size 64: up to 168, three). Rows beyond the
last query are zeros with lse = delta = 0, which add nothing; keys beyond the last have sums that nobody reads.
Shapes and types as there, 16 bit, segments contiguous on both sides.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from .launch import launcher

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of Triton before 3.7
BLOCK_N = gl.constexpr(64)  # keys a program
ROUND = gl.constexpr(128)  # rows copied at a time
STEP = gl.constexpr(32)  # rows worked on at a time


def takes(q: Tensor, k: Tensor, do: Tensor, index: Tensor | None, long: bool) -> bool:
    """Whether this kernel is for these: long contiguous segments, 16 bit, head sizes and groups that fill its tiles, sm_90.

    It copies 16 bytes at a time, to addresses of which q and do must be.
    """
    if not (long and index is None and q.is_cuda and torch.version.hip is None and q.dtype in (torch.bfloat16, torch.float16)):
        return False
    whole = q.shape[2] in (16, 32, 64) and ROUND.value % (q.shape[1] // k.shape[1]) == 0
    aligned = q.data_ptr() % 16 == 0 and do.data_ptr() % 16 == 0
    return whole and aligned and torch.cuda.get_device_capability(q.device) == (9, 0)


def config(head_dim: int) -> dict[str, int]:
    """Launch settings, H200."""
    return dict(num_warps=4, maxnreg=128 if head_dim <= 32 else 168)


@gluon.jit
def _copy_round(q_smem, do_smem, stats_smem, q_ptr, do_ptr, stats_ptr, start, end, HQ: gl.constexpr, G: gl.constexpr, D: gl.constexpr):
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    r = gl.arange(0, ROUND, layout=gl.SliceLayout(1, rows))
    near = (r // G * HQ + r % G)[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, rows))[None, :]
    there = (r // G < end - start)[:, None]
    base = start.to(gl.int64) * HQ
    async_copy.async_copy_global_to_shared(q_smem, q_ptr + base * D + near, there)
    async_copy.async_copy_global_to_shared(do_smem, do_ptr + base * D + near, there)
    i = gl.arange(0, 2 * ROUND, layout=gl.BlockedLayout([1], [32], [4], [0]))  # lse of the rows, then delta
    r = i % ROUND
    near = (r // G * HQ + r % G) * 2 + i // ROUND
    async_copy.async_copy_global_to_shared(stats_smem, stats_ptr + base * 2 + near, r // G < end - start)
    async_copy.commit_group()


@launcher
@gluon.jit(do_not_specialize=["num_keys", "num_tiles"])
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, dk_ptr, dv_ptr, cu_q_ptr, tiles_ptr, num_tiles, num_keys, scale, SPLITS: gl.constexpr,
    HQ: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    G: gl.constexpr = HQ // HKV
    BLOCK_Q: gl.constexpr = ROUND // G
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, of_sums, 2)
    left_of_scores: gl.constexpr = gl.DotOperandLayout(0, of_scores, 2)
    columns: gl.constexpr = gl.SliceLayout(0, of_scores)
    split, pid = gl.program_id(0) // (HKV * num_tiles), gl.program_id(0) % (HKV * num_tiles)
    tile, kv = pid // HKV, pid % HKV
    segment = gl.load(tiles_ptr + tile)
    first = gl.load(tiles_ptr + num_tiles + tile)
    count = gl.load(tiles_ptr + 2 * num_tiles + tile)
    if count > 0:
        start, end = gl.load(cu_q_ptr + segment), gl.load(cu_q_ptr + segment + 1)
        share = gl.cdiv(gl.cdiv(end - start, BLOCK_Q), SPLITS) * BLOCK_Q
        lo = gl.minimum(start + split * share, end)
        hi = gl.minimum(lo + share, end)
        q_ptr += kv * G * D
        do_ptr += kv * G * D
        stats_ptr += kv * G * 2
        rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROUND, D], dtype)
        q_smem = gl.allocate_shared_memory(dtype, [2, ROUND, D], rows)
        do_smem = gl.allocate_shared_memory(dtype, [2, ROUND, D], rows)
        stats_smem = gl.allocate_shared_memory(gl.float32, [2, 2 * ROUND], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        _copy_round(q_smem.index(0), do_smem.index(0), stats_smem.index(0), q_ptr, do_ptr, stats_ptr, lo, hi, HQ, G, D)
        blocked: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
        n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, blocked))
        at = ((first + n).to(gl.int64) * HKV + kv)[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, blocked))[None, :]
        there = (n < count)[:, None]
        k = gl.convert_layout(gl.load(k_ptr + at, mask=there, other=0.0), left_of_scores)
        v = gl.convert_layout(gl.load(v_ptr + at, mask=there, other=0.0), left_of_scores)
        unit = scale * 1.4426950408889634
        s = gl.zeros([BLOCK_N, STEP], gl.float32, of_scores)
        dk = warpgroup_mma_init(gl.zeros([BLOCK_N, D], gl.float32, of_sums))
        dv = warpgroup_mma_init(gl.zeros([BLOCK_N, D], gl.float32, of_sums))
        now = 0
        for at_query in range(lo, hi, BLOCK_Q):
            async_copy.wait_group(0)  # with a barrier
            fence_async_shared()
            q_now, do_now, stats = q_smem.index(now), do_smem.index(now), stats_smem.index(now)
            now = 1 - now
            for i in gl.static_range(ROUND // STEP):
                q, do = q_now.slice(i * STEP, STEP, 0), do_now.slice(i * STEP, STEP, 0)
                # into registers whose content is over: ptxas serialises products whose sums are zeroed or read in flight
                s = warpgroup_mma(k, q.permute((1, 0)), s, use_acc=False, is_async=True)
                lse = stats.slice(i * STEP, STEP, 0).load(columns)
                s = warpgroup_mma_wait(0, [s])
                if i == 1:  # all products of the round before are over, after a barrier those of all warps: its place is free
                    barrier()
                    q_next, do_next, stats_next = q_smem.index(now), do_smem.index(now), stats_smem.index(now)
                    _copy_round(q_next, do_next, stats_next, q_ptr, do_ptr, stats_ptr, at_query + BLOCK_Q, hi, HQ, G, D)
                p = gl.exp2(s * unit - lse[None, :])
                s = warpgroup_mma(v, do.permute((1, 0)), s, use_acc=False, is_async=True)
                dv = warpgroup_mma(gl.convert_layout(p.to(dtype), left), do, dv, is_async=True)
                delta = stats.slice(ROUND + i * STEP, STEP, 0).load(columns)
                s = warpgroup_mma_wait(1, [s])
                ds = p * (s - delta[None, :])
                dk = warpgroup_mma(gl.convert_layout(ds.to(dtype), left), q, dk, is_async=True)
        dk, dv = warpgroup_mma_wait(0, [dk, dv])
        async_copy.wait_group(0)
        n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, of_sums))
        at = ((first + n).to(gl.int64) * HKV + kv)[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, of_sums))[None, :]
        at += split.to(gl.int64) * num_keys * (HKV * D)
        there = (n < count)[:, None]
        gl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=there)
        gl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=there)
