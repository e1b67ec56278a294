"""Every kernel compiles for sm_80, 89, 90 and 100 without a GPU, with the launch settings its launcher chooses, and its shared memory fits.

The operations themselves run on CPU tensors with every launch replaced by a recorder: signatures, constants, warps and stages are the real
ones. Limits: CUDA C++ programming guide, "Technical specifications per compute capability", shared memory of a thread block.
"""

import concurrent.futures
import math
import multiprocessing

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction
from utils import draw_qkv, random_coords

import ssa
from ssa import functional
from ssa.kernels import (
    block_mean,
    block_topk,
    common,
    gated_sum,
    group_norm_silu,
    position_table,
    selected_attention,
    selected_attention_by_query,
    submanifold_conv3d,
    varlen_attention,
)
from ssa.kernels import varlen_attention_hopper as hopper
from ssa.kernels.launch import Launcher

SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227}
FILES = [
    block_mean, block_topk, common, gated_sum, group_norm_silu, position_table, selected_attention,
    selected_attention_by_query, submanifold_conv3d, varlen_attention,
]  # fmt: skip
TYPES = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


def launches(head_dim: int, dtype: torch.dtype, group: int, narrow: bool) -> list[tuple[JITFunction, dict]]:
    """(kernel, arguments by name) of everything a forward and backward of all operations starts for this head size and group of heads."""
    recorded = []

    def record(self, grid, *args, **kwargs):
        recorded.append((self.function, {**dict(zip(self.function.arg_names, args, strict=False)), **kwargs}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launcher, "_launch", record)
        patch.setattr(functional, "_choose", lambda impl, x: "triton")
        for module in (gated_sum, selected_attention, varlen_attention) if narrow else ():
            patch.setattr(module, "lse_dtype", lambda x: torch.float32)
        for shift, m_cmp in ((0, 4), (4, 1)):  # windows of the blocks; windows of their own and many compression blocks a sample
            coords = random_coords([1000], edge=16, low=0).cpu()
            partition = ssa.partition_voxels(coords, compression_block_size=m_cmp, window_shift=shift)
            q, k, v, k_cmp, v_cmp = (x.cpu().requires_grad_() for x in draw_qkv(partition, 2 * group, 2, head_dim, dtype))
            gates = torch.rand(1000, 2 * group, 3).to(dtype).requires_grad_()
            ssa.spatial_sparse_attention(q, k, v, k_cmp, v_cmp, gates, partition, topk=8).sum().backward()
            outputs = ssa.window_attention(q, k, v, partition) + ssa.compression_attention(q, k_cmp, v_cmp, partition)
            ids = torch.zeros(1000, 2, 8, dtype=torch.int32)
            for query_major in (False, True):
                patch.setattr(selected_attention, "by_query", lambda q, *_, ways=query_major: ways and q.dtype != torch.float32)
                outputs += ssa.selected_attention(q, k, v, ids, partition)
            torch.cat([x.flatten() for x in outputs]).sum().backward()
        x, table, slots = k.detach().flatten(1).requires_grad_(), torch.zeros(64, 2 * head_dim), torch.zeros(1000, dtype=torch.int32)
        functional.add_position(x, table.requires_grad_(), slots).sum().backward()
        blocks = partition.compression
        functional.segment_mean(x, blocks.offsets, blocks.index, table=table, slots=slots).sum().backward()
        width = x.shape[1]
        functional.group_norm_silu(x, torch.ones(width), torch.zeros(width), partition.cu_seqlens, math.gcd(32, width)).sum().backward()
        kernel = torch.zeros(27, x.shape[1], x.shape[1], requires_grad=True)
        ssa.submanifold_conv3d(x, kernel, torch.zeros(x.shape[1]), partition.neighbors).sum().backward()
    return recorded


def source(kernel: JITFunction, arguments: dict) -> tuple[tuple, dict]:
    """What tells one compilation from another, as hashable parts, and its options."""
    signature, constants, aligned = [], [], []
    for i, param in enumerate(kernel.params):
        value = arguments[param.name]
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not param.do_not_specialize):
            signature.append((param.name, "constexpr"))
            constants.append((i, value))
        elif isinstance(value, torch.Tensor):
            signature.append((param.name, TYPES[value.dtype]))
            aligned.append(i)
        else:
            signature.append((param.name, "fp32" if isinstance(value, float) else "i32"))
            if isinstance(value, int) and value % 16 == 0 and not param.do_not_specialize:
                aligned.append(i)
    options = {name: arguments[name] for name in OPTIONS if name in arguments}
    return (tuple(signature), tuple(constants), tuple(aligned)), options


def compile_for(module: str, name: str, parts: tuple, options: dict, capability: int) -> int:
    """Compiles one kernel → bytes of shared memory."""
    signature, constants, aligned = parts
    kernel = getattr(__import__(f"ssa.kernels.{module}", fromlist=[name]), name).function
    compiled = triton.compile(
        ASTSource(kernel, dict(signature), {(i,): c for i, c in constants}, {(i,): [["tt.divisibility", 16]] for i in aligned}),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    return compiled.metadata.shared


def jobs(head_dim: int, dtype: torch.dtype, group: int = 8, narrow: bool = False) -> set[tuple]:
    """narrow: lse and delta in fp32 beside fp32, as on chips that multiply fp64 slowly."""
    found = set()
    for kernel, arguments in launches(head_dim, dtype, group, narrow):
        parts, options = source(kernel, arguments)
        found.add((kernel.__module__.rsplit(".", 1)[1], kernel.__name__, parts, tuple(options.items())))
    return found


def kernels_of(file) -> set[str]:
    return {name for name, x in vars(file).items() if isinstance(x, Launcher)}


def test_the_recorder_sees_every_kernel():
    seen = {(module, name) for module, name, *_ in jobs(64, torch.bfloat16)}
    assert {(f.__name__.rsplit(".", 1)[1], name) for f in FILES for name in kernels_of(f)} <= seen


def family(job: tuple) -> tuple:
    """Kernel and dtypes of a job: what decides which units of a chip it uses."""
    module, name, (signature, *_), _ = job
    return module, name, tuple(sorted({kind for _, kind in signature}))


def test_all_kernels_fit_every_chip():
    """Every variant of every kernel for sm_90, but for fp32 at a head size of 128 one of each; for the others the variant of each kernel
    and dtypes that takes most shared memory there. The groups are for sm_89, whose 99 KiB they could fill."""
    settings = [(d, torch.bfloat16) for d in (32, 64, 128)] + [(48, torch.float32)]  # these and `wide`: every branch of every _config
    work = set().union(*(jobs(*setting) for setting in settings))
    wide = {family(job): job for job in sorted(jobs(128, torch.float32), key=str)}
    groups = [(64, 16), (64, 3), (40, 32), (72, 14)]  # the top-k keeps or does not keep the queries of a whole group
    grouped = {job for d, group in groups for job in jobs(d, torch.bfloat16, group) if job[0] == "block_topk"}
    work |= grouped | {*wide.values()}
    narrow = {family(job): job for job in sorted(jobs(48, torch.float32, narrow=True) - work, key=str)}
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:

        def compile_all(tasks: list[tuple[tuple, int]]) -> dict[tuple[tuple, int], int]:
            futures = {(job, c): pool.submit(compile_for, *job[:3], dict(job[3]), c) for job, c in tasks}
            return {task: future.result() for task, future in futures.items()}

        done = compile_all([(job, 90) for job in sorted(work, key=str)])
        largest = {family(job): job for job in sorted(work, key=lambda job: (done[job, 90], str(job)))}
        done |= compile_all([(job, c) for job in largest.values() for c in SHARED_KIB if c != 90])
        done |= compile_all([(job, 89) for job in (*grouped, *narrow.values())])
    too_much = [f"{job[0]}.{job[1]} sm_{c}: {size / 1024}" for (job, c), size in done.items() if size > SHARED_KIB[c] * 1024]
    assert len(work) >= 150 and not too_much, f"shared memory in KiB beyond the chip's: {too_much}"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [16, 32, 64])
def test_the_hopper_kernel_compiles(head_dim: int, dtype: str):
    """And its shared memory leaves room for four programs a multiprocessor, three at a head size of 64."""
    names = [p.name for p in hopper._dkv_kernel.function.params]
    constants = dict(SPLITS=4, HQ=32, HKV=2, D=head_dim)
    types = {name: "*" + dtype for name in ("q_ptr", "k_ptr", "v_ptr", "do_ptr")} | dict(
        stats_ptr="*fp32", dk_ptr="*fp32", dv_ptr="*fp32", cu_q_ptr="*i32", tiles_ptr="*i32", num_tiles="i32", num_keys="i32", scale="fp32"
    )
    compiled = triton.compile(
        GluonASTSource(
            hopper._dkv_kernel.function,
            {name: types.get(name, "constexpr") for name in names},
            {(names.index(name),): value for name, value in constants.items()},
            {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "").startswith("*")},
        ),
        target=GPUTarget("cuda", 90, 32),
        options=hopper.config(head_dim),
    )
    assert compiled.metadata.shared * (4 if head_dim <= 32 else 3) <= 227 * 1024
