"""What a layer costs beyond the bare operator, its compressors, the partition, and its host side: `python -m benchmarks.layer`.

hidden 1024, 32 query and 2 key/value heads of 32, (m_cmp, m_slc, topk) = (4, 8, 8), bf16 on a GPU, the gyroid. The bare operator gets
the layer's own q, k, v, k_cmp, v_cmp and gates. Figures go to results/GPU-DATE-layer.csv and .md as they are measured; a part that fails
is recorded and the others go on. The bounds shown on a GPU are those for T = 131,072 on an H200.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import ssa

from .figures import Figures, default_path
from .timing import Call, environment, event_times, measure, reason_of, synchronize, three_calls, wall_times
from .voxels import gyroid

HIDDEN, NUM_HEADS, NUM_KV_HEADS, TOPK = 1024, 32, 2, 8
COMPRESSORS = ("conv_mean", "direct3d_s2_v1", "direct3d_s2_v2")
SMALL_TOKENS = 4_096  # where launches cost more than kernels
REPEATS = 20


class Bench:
    """A layer, its voxels and its input, rows in packed order."""

    def __init__(self, num_tokens: int, device: torch.device, dtype: torch.dtype, window_shift: int = 0, compression: str = "conv_mean"):
        torch.manual_seed(0)
        self.device = device
        self.layer = ssa.SpatialSparseAttention(
            HIDDEN, NUM_HEADS, NUM_KV_HEADS, topk=TOPK, window_shift=window_shift, compression=compression, device=device, dtype=dtype
        )
        self.coords = gyroid(num_tokens).to(device)
        self.partition = self.layer.partition(self.coords)
        self.x = torch.randn(num_tokens, HIDDEN, device=device, dtype=dtype, requires_grad=True)
        self.dy = torch.randn(num_tokens, HIDDEN, device=device, dtype=dtype)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, *self.layer.parameters()

    def forward(self) -> Tensor:
        return self.layer(self.x, self.partition)

    def whole(self) -> dict[str, Call]:
        """The layer: gradients of x and of every parameter."""
        return three_calls(self.forward, self.leaves, self.dy)

    def operator(self) -> dict[str, Call]:
        """The bare operator on what the layer feeds it."""
        with torch.no_grad():
            inputs = (*self.layer.project(self.x, self.partition), self.layer.gate(self.x))
        q, k, v, k_cmp, v_cmp, gates = leaves = tuple(x.contiguous().requires_grad_() for x in inputs)
        do = torch.randn_like(q)
        return three_calls(
            lambda: ssa.spatial_sparse_attention(q, k, v, k_cmp, v_cmp, gates, self.partition, topk=TOPK), leaves, do.detach()
        )

    def compression(self) -> tuple[Callable[[], Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Compressing k and v together → (forward, its leaves, what exists without it: the leaves and the partition's tables)."""
        layer, partition = self.layer, self.partition
        with torch.no_grad():
            k, v = layer.proj_k(self.x).requires_grad_(), layer.proj_v(self.x).requires_grad_()
        leaves = (k, v, layer.intra_block_pe, *layer.compression_key.parameters(), *layer.compression_value.parameters())

        def forward() -> Tensor:
            k_cmp = layer.compression_key(k, partition, layer.intra_block_pe.flatten(0, 2), layer.impl)
            return torch.cat([k_cmp, layer.compression_value(v, partition, None, layer.impl)])

        shared = [partition.slots, partition.coords, partition.cu_seqlens, partition.neighbors, partition.block_neighbors]
        shared += [partition.compression.offsets, partition.compression.cu_blocks]
        return forward, leaves, (*leaves, *shared)


def saved_bytes(forward: Callable[[], Tensor], existing: tuple[Tensor, ...]) -> int:
    """Bytes that a forward keeps for its backward, each storage once, without those of `existing`."""
    known = {x.untyped_storage().data_ptr() for x in existing}
    saved: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def pack(x: Tensor) -> Tensor:
        saved.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return sum(x.untyped_storage().nbytes() for pointer, x in saved.items() if pointer not in known)


def partition_times(bench: Bench) -> dict[str, float]:
    """Median host milliseconds, waited for: the partition, other windows for it, the neighbour table on first use."""

    def median(prepare: Callable[[], ssa.VoxelPartition], function: Callable[[ssa.VoxelPartition], object]) -> float:
        times = []
        for _ in range(REPEATS):
            partition = prepare()
            synchronize(bench.device)
            start = time.perf_counter()
            function(partition)
            synchronize(bench.device)
            times.append((time.perf_counter() - start) * 1e3)
        return float(torch.tensor(times[2:]).median())

    def fresh() -> ssa.VoxelPartition:
        return ssa.partition_voxels(bench.coords)  # without a neighbour table

    return {
        "partition": median(lambda: bench.partition, lambda _: fresh()),
        "windows shifted by 4": median(fresh, lambda partition: partition.with_window(8, 4)),
        "neighbour table": median(fresh, lambda partition: partition.neighbors),
    }


def synchronizations(bench: Bench) -> str:
    """"none", or the first host synchronisation of a forward and backward."""
    call = bench.whole()["both"]
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def capture(bench: Bench) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A CUDA graph of the layer's forward and backward, and its static outputs (y, gradients)."""
    call = bench.whole()["both"]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, tuple(outputs)


def launches(bench: Bench) -> dict[str, float]:
    """Median ms of forward + backward: enqueued on the host alone, run eagerly, replayed as a CUDA graph (on a new x, outputs compared)."""
    call = bench.whole()["both"]
    call()
    enqueued = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()  # an empty queue: a full one would make the host wait for the GPU
        enqueued += wall_times(call, 1)
    host = torch.tensor(enqueued).median()
    eager = torch.tensor(event_times(call, REPEATS)).median()
    graph, outputs = capture(bench)
    with torch.no_grad():
        bench.x.normal_()
    graph.replay()
    for got, expected in zip(outputs, call(), strict=True):
        error, size = float((got - expected).detach().abs().max()), float(expected.detach().abs().max())
        if not error <= 1e-2 * size:  # cuBLAS may choose another algorithm in a capture
            raise RuntimeError(f"the replayed graph must give the layer's outputs: {error=} of {size=}")
    replay = torch.tensor(event_times(graph.replay, REPEATS)).median()
    return {"host enqueue": float(host), "eager": float(eager), "CUDA graph": float(replay)}


def figures_of_partition(figures: Figures, T: int, device: torch.device, dtype: torch.dtype, budget: float) -> None:
    bounds = {"partition": 2.0, "neighbour table": 3.0}
    for name, ms in partition_times(Bench(T, device, dtype)).items():
        figures.add(name, T, ms, "ms", bounds.get(name))


def figures_of_layer(figures: Figures, T: int, device: torch.device, dtype: torch.dtype, budget: float) -> None:
    for shift in (0, 4):
        bench = Bench(T, device, dtype, window_shift=shift)
        whole, bare = bench.whole(), bench.operator()
        for pass_, bound in (("fwd", 4.5), ("bwd", 12.0)):
            layer_ms, bare_ms = (measure(calls[pass_], device, budget).ms for calls in (whole, bare))
            figures.add(f"layer {pass_}, window shift {shift}", T, layer_ms, "ms")
            figures.add(f"operator {pass_}, window shift {shift}", T, bare_ms, "ms")
            figures.add(f"layer over operator {pass_}, window shift {shift}", T, layer_ms - bare_ms, "ms", bound)


def figures_of_compression(figures: Figures, T: int, device: torch.device, dtype: torch.dtype, budget: float) -> None:
    for name in COMPRESSORS:
        forward, leaves, existing = Bench(T, device, dtype, compression=name).compression()
        calls = three_calls(forward, leaves, torch.randn_like(forward()))
        for pass_, bound in (("fwd", 3.0), ("bwd", 8.0)):
            figures.add(f"compression of k and v, {name}, {pass_}", T, measure(calls[pass_], device, budget).ms, "ms", bound)
        figures.add(f"compression of k and v, {name}, saved beyond them", T, saved_bytes(forward, existing) / 1e6, "MB", 100.0)


def figures_of_host(figures: Figures, T: int, device: torch.device, dtype: torch.dtype, budget: float) -> None:
    bench = Bench(T, device, dtype)
    found = synchronizations(bench)
    if found == "none":
        figures.add("host synchronisations, layer fwd + bwd", T, 0, "", 0)
    else:
        figures.fail("host synchronisations, layer fwd + bwd", T, found)
    times = launches(bench)
    for name, ms in times.items():
        # launches do not limit a layer whose kernels take longer than the host needs to enqueue them
        figures.add(f"layer fwd + bwd, {name}", T, ms, "ms", times["CUDA graph"] if name == "host enqueue" else None)


def main(arguments: list[str] | None = None) -> int:
    """Measure; the exit status is 1 if a bound is exceeded, a host synchronisation found or a part failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__)
    parser.add_argument("--T", type=int, default=131_072)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of repetitions a figure")
    parser.add_argument("--out", type=Path, help="CSV file (default: benchmarks/results/GPU-DATE-layer.csv)")
    parser.add_argument("--commit", help="name of the code version where git is not at hand")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    env = environment(device, options.commit)
    print(" ".join(f"{name}={value!r}" for name, value in env.items()))

    figures = Figures(options.out or default_path(env, "layer"), env, bounded=device.type == "cuda")
    parts = [(part, options.T) for part in (figures_of_partition, figures_of_layer, figures_of_compression)]
    if device.type == "cuda":
        parts += [(figures_of_host, T) for T in sorted({min(SMALL_TOKENS, options.T), options.T})]
    for part, T in parts:
        try:
            part(figures, T, device, dtype, options.budget)
        except Exception as error:
            figures.fail(part.__name__.removeprefix("figures_of_"), T, reason_of(error))
            synchronize(device)  # raises where the error has left the device unusable
    figures.write_markdown(
        "The layer",
        "python -m benchmarks.layer",
        f"hidden {HIDDEN}, {NUM_HEADS} query and {NUM_KV_HEADS} key/value heads of {HIDDEN // NUM_HEADS}, m_cmp/m_slc/topk = 4/8/{TOPK}, "
        "the gyroid, bf16 on a GPU. Medians; fwd with autograd on, bwd on a kept graph with the gradients of x and of every parameter. "
        "MB are 1e6 bytes.",
    )
    return int(not figures.good)


if __name__ == "__main__":
    sys.exit(main())
