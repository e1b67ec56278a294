"""What a layer costs beyond the bare operator, and what its host side costs: `python -m benchmarks.layer`.

hidden 1024, 32 query and 2 key/value heads of 32, (m_cmp, m_slc, topk) = (4, 8, 8), bf16 on a GPU, the gyroid. The bare operator gets
the layer's own q, k, v, k_cmp, v_cmp and gates. The bounds shown on a GPU are those for T = 131,072 on an H200.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import ssa

from .timing import Call, environment, event_times, measure, synchronize, three_calls, wall_times
from .voxels import gyroid

HIDDEN, NUM_HEADS, NUM_KV_HEADS, TOPK = 1024, 32, 2, 8
REPEATS = 20


class Bench:
    """A layer, its voxels and its input, rows in packed order."""

    def __init__(self, num_tokens: int, device: torch.device, dtype: torch.dtype, window_shift: int = 0):
        torch.manual_seed(0)
        self.device = device
        self.layer = ssa.SpatialSparseAttention(
            HIDDEN, NUM_HEADS, NUM_KV_HEADS, topk=TOPK, window_shift=window_shift, device=device, dtype=dtype
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

        return forward, leaves, (*leaves, partition.neighbors, partition.coords, partition.compression.offsets)


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
        return bench.layer.partition(bench.coords)

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
        error, size = float((got - expected).abs().max()), float(expected.abs().max())
        if not error <= 1e-2 * size:  # cuBLAS may choose another algorithm in a capture
            raise RuntimeError(f"the replayed graph must give the layer's outputs: {error=} of {size=}")
    replay = torch.tensor(event_times(graph.replay, REPEATS)).median()
    return {"host enqueue": float(host), "eager": float(eager), "CUDA graph": float(replay)}


def report(name: str, value: float, unit: str, bound: float | None = None) -> bool:
    """Print a figure beside its bound; whether it keeps it."""
    kept = bound is None or value <= bound
    print(f"{name:52} {value:9.3f} {unit}" + ("" if bound is None else f"  (bound {bound:g}{'' if kept else ', EXCEEDED'})"), flush=True)
    return kept


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; the exit status is 1 if a bound is exceeded or a host synchronisation found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__)
    parser.add_argument("--T", type=int, default=131_072)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of repetitions a figure")
    parser.add_argument("--commit", help="name of the code version where git is not at hand")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(" ".join(f"{name}={value!r}" for name, value in environment(device, options.commit).items()))
    print(f"T = {options.T:,}, hidden {HIDDEN}, {NUM_HEADS}/{NUM_KV_HEADS} heads")

    kept: list[bool] = []

    def check(name: str, value: float, unit: str, bound: float | None) -> None:
        kept.append(report(name, value, unit, bound if device.type == "cuda" else None))

    bench = Bench(options.T, device, dtype)
    for name, ms in partition_times(bench).items():
        check(name, ms, "ms", {"partition": 2.0, "neighbour table": 3.0}.get(name))

    for shift in (0, 4):
        bench = Bench(options.T, device, dtype, window_shift=shift)
        whole, bare = bench.whole(), bench.operator()
        for pass_, bound in (("fwd", 4.5), ("bwd", 12.0)):
            layer_ms, bare_ms = (measure(calls[pass_], device, options.budget).ms for calls in (whole, bare))
            report(f"layer {pass_}, window shift {shift}", layer_ms, "ms")
            report(f"operator {pass_}, window shift {shift}", bare_ms, "ms")
            check(f"layer over operator {pass_}, window shift {shift}", layer_ms - bare_ms, "ms", bound)
        del whole, bare

    forward, leaves, existing = bench.compression()
    calls = three_calls(forward, leaves, torch.randn_like(forward()))
    check("compression of k and v fwd", measure(calls["fwd"], device, options.budget).ms, "ms", 3.0)
    check("compression of k and v bwd", measure(calls["bwd"], device, options.budget).ms, "ms", 8.0)
    check("compression of k and v, saved beyond them", saved_bytes(forward, existing) / 1e6, "MB", 100.0)

    if device.type == "cuda":
        for T in (4_096, options.T):
            small = Bench(T, device, dtype)
            found = synchronizations(small)
            print(f"{f'host synchronisations fwd + bwd, T = {T:,}':52} {found}")
            kept.append(found == "none")
            for name, ms in launches(small).items():
                report(f"layer fwd + bwd, {name}, T = {T:,}", ms, "ms")
    return int(not all(kept))


if __name__ == "__main__":
    sys.exit(main())
