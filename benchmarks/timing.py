"""Time and memory of a call, and the environment they were measured in."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Call = Callable[[], Tensor | tuple[Tensor, ...]]
Calls = dict[str, Call]

MIN_REPEATS, MAX_REPEATS, BUDGET_SECONDS = 3, 20, 2.0


@dataclass(frozen=True)
class Timing:
    """One call: median, 20 % and 80 % quantile in milliseconds, and its extra peak memory in bytes (None on a CPU).

    Extra peak: the most allocated during the call, less what was before, less what the call returns.
    """

    ms: float
    ms_p20: float
    ms_p80: float
    peak: int | None


def measure(function: Call, device: torch.device, budget: float = BUDGET_SECONDS) -> Timing:
    """Warm up, take the peak memory of one call, then time 3 to 20 more within `budget` seconds, by CUDA events on a GPU.

    Repetitions are enqueued back to back, so a call whose launches outlast its kernels shows its launch time. Caches are not flushed.
    """
    function()
    synchronize(device)
    start = time.perf_counter()
    peak = peak_bytes(function, device)
    once = time.perf_counter() - start
    repeats = max(MIN_REPEATS, min(MAX_REPEATS, int(budget / max(once, 1e-6))))
    times = event_times(function, repeats) if device.type == "cuda" else wall_times(function, repeats)
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, middle, high = torch.tensor(times, dtype=torch.float64).quantile(quantiles).tolist()
    return Timing(middle, low, high, peak)


def three_calls(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...], do: Tensor) -> Calls:
    """Forward with autograd on; backward alone, on a graph built at its first call; both."""
    kept: list[Tensor] = []

    def backward() -> tuple[Tensor, ...]:
        if not kept:
            kept.append(forward())
        return torch.autograd.grad(kept[0], leaves, do, retain_graph=True)

    def both() -> tuple[Tensor, ...]:
        kept.clear()
        o = forward()
        return o, *torch.autograd.grad(o, leaves, do)

    return {"fwd": forward, "bwd": backward, "both": both}


def event_times(function: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds between CUDA events around each call."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def wall_times(function: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each call on the host; nothing is waited for."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def peak_bytes(function: Call, device: torch.device) -> int | None:
    """Extra peak memory of a call, as `Timing` defines it; waits for the call."""
    if device.type != "cuda":
        function()
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = function()
    torch.cuda.synchronize(device)
    returned = (result,) if isinstance(result, Tensor) else result
    return torch.cuda.max_memory_allocated(device) - before - sum(x.nbytes for x in returned)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reason_of(error: Exception) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def short_name(gpu: str) -> str:
    """"NVIDIA H200" → "h200"."""
    return gpu.lower().removeprefix("nvidia ").replace(" ", "-")


def environment(device: torch.device, commit: str | None = None) -> dict[str, str]:
    """gpu, torch, triton, commit, date of a run; a commit with a "+" had changes in ssa or benchmarks; "unknown" outside git."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
    return {
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton,
        "commit": commit or _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "--", "ssa", "benchmarks/*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
