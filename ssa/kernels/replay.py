"""Replays what an operator started, without its Python.

A call on few rows costs the host more than the GPU: allocations, launch settings and keys took 0.5 to 1 ms of a forward at T = 4,096, where
the kernels take 0.3. What a call starts follows from the shapes, types and numbers of its arguments, since no launcher looks at values.
So the fifth call with these writes it down, and later ones start the same kernels with the same numbers in the same order:

    input     at the address of the new argument          temporary   in one allocation, side by side where both are in use
    output    allocated anew                               number      as it was

Results are bitwise the same. A call that does anything but allocate, take views of that and launch is not written down, nor is a large one.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

LARGE = 2**24  # elements of the first argument, 16,384 rows of 32 heads of 32: beyond, the GPU takes longer than the host
ENOUGH = 5  # calls before a tape: writing one down costs as much as four replays save
KEPT = 1024  # tapes
_aten = torch.ops.aten
_ALLOCATIONS = (_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty)


class _Recording(threading.local):
    recorder: Recorder | None = None


recording = _Recording()


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class Recorder(TorchDispatchMode):
    """Notes allocations and launches while it is entered. A cell is what a launch passes: ("input", i), (slot, offset), ("is", number)."""

    def __init__(self, inputs: list[Tensor]):
        super().__init__()
        self.inputs = {id(x): i for i, x in enumerate(inputs)}
        self.slots: dict[int, int] = {}  # address of a storage → its number; an address may be given out again
        self.sizes: list[int] = []
        self.launches: list[tuple[Any, tuple[int, ...], list[tuple]]] = []
        self.fit = True

    def __enter__(self) -> Recorder:
        recording.recorder = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        recording.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in _ALLOCATIONS:
            self.slots[_storage(out)] = len(self.sizes)
            self.sizes.append(out.untyped_storage().nbytes())
        elif func.is_view:  # `to` and `contiguous` are so in name, and may copy
            outs = out if isinstance(out, (tuple, list)) else [out]
            self.fit &= all(isinstance(x, Tensor) and _storage(x) == _storage(args[0]) for x in outs)
        else:  # its first argument may be a list of tensors
            self.fit = False
        return out

    def launched(self, kernel: Any, grid: tuple[int, ...], args: tuple) -> None:
        self.launches.append((kernel, grid, [self.cell(x) if isinstance(x, Tensor) else ("is", x) for x in args]))

    def cell(self, x: Tensor) -> tuple:
        if id(x) in self.inputs:
            return "input", self.inputs[id(x)]
        base = _storage(x)
        self.fit &= base in self.slots
        return self.slots.get(base, 0), x.data_ptr() - base


def place(spans: list[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Spans (bytes, first use, last use) → where each begins so that none in use at one time overlap, and the bytes of all."""
    placed: list[tuple[int, int, int, int]] = []
    begins = [0] * len(spans)
    for i in sorted(range(len(spans)), key=lambda i: -spans[i][0]):
        size, first, last = spans[i]
        at = 0
        for lo, hi, _, _ in sorted(p for p in placed if p[2] <= last and first <= p[3]):
            if at + size <= lo:
                break
            at = max(at, hi)
        begins[i] = at
        placed.append((at, at + (size + 511) // 512 * 512, first, last))
    return begins, max((p[1] for p in placed), default=0)


class Tape:
    """The launches of a call, to be started again at other addresses.

    A launch picks its arguments from one list: addresses of the inputs, of the outputs, of the arena, addresses behind these, numbers.
    """

    @staticmethod
    def of(recorder: Recorder, out: Tensor | tuple[Tensor, ...]) -> Tape | None:
        """None if the call did more than a tape holds, or if an output is an input or a part of something else."""
        outputs = [out] if isinstance(out, Tensor) else [*out]
        slots = [recorder.cell(x)[0] for x in outputs]
        whole = all(x.is_contiguous() and x.nbytes == x.untyped_storage().nbytes() for x in outputs)
        known = [slot for slot, x in zip(slots, outputs, strict=True) if x.nbytes]  # empty ones have no address
        fit = recorder.fit and whole and "input" not in slots and len({*known}) == len(known)
        return Tape(recorder, outputs, slots, isinstance(out, Tensor)) if fit else None

    def __init__(self, recorder: Recorder, outputs: list[Tensor], slots: list[int], single: bool):
        self.single = single
        self.outputs = [functools.partial(torch.empty, x.shape, dtype=x.dtype, device=x.device) for x in outputs]
        uses: dict[int, list[int]] = {}
        for i, (_, _, cells) in enumerate(recorder.launches):
            for slot, _ in cells:
                if isinstance(slot, int) and slot not in slots:
                    uses.setdefault(slot, []).append(i)
        begins, size = place([(recorder.sizes[slot], used[0], used[-1]) for slot, used in uses.items()])
        self.arena = functools.partial(torch.empty, size, dtype=torch.uint8, device=outputs[0].device)
        first, arena = len(recorder.inputs), len(recorder.inputs) + len(outputs)
        bases = {slot: (first + i, 0) for i, slot in enumerate(slots)} | {s: (arena, b) for s, b in zip(uses, begins, strict=True)}
        derived: dict[tuple[int, int], int] = {}  # (place of an address, bytes behind it) → its place
        numbers: list[Any] = []

        def index(kind: str | int, x: Any) -> int:
            if kind == "input":
                return x
            if kind == "is":
                numbers.append(x)
                return -len(numbers)
            base, begin = bases[kind]  # type: ignore[index]
            return derived.setdefault((base, begin + x), arena + 1 + len(derived)) if base == arena or x else base

        picks = [operator.itemgetter(*[index(*cell) for cell in cells]) for _, _, cells in recorder.launches]
        self.derived, self.numbers = [*derived], numbers[::-1]
        self.launches = [
            (kernel.run, *(*grid, 1, 1)[:3], kernel.function, kernel.packed_metadata, pick)
            for (kernel, grid, _), pick in zip(recorder.launches, picks, strict=True)
        ]

    def replay(self, cells: list[Any], device: int) -> Tensor | tuple[Tensor, ...]:
        """cells: addresses of the inputs."""
        outputs, arena = tuple([new() for new in self.outputs]), self.arena()
        cells += [x.data_ptr() for x in outputs]
        cells.append(arena.data_ptr())
        cells += [cells[i] + behind for i, behind in self.derived]
        cells += self.numbers
        stream = driver.active.get_current_stream(device)
        for run, x, y, z, function, metadata, pick in self.launches:
            run(x, y, z, stream, function, metadata, None, None, None, *pick(cells))
        return outputs[0] if self.single else outputs


class Kind:
    """Of a call: how many there were, and their tape."""

    calls = 0
    tape: Tape | None = None


@functools.lru_cache(KEPT)
def kind(*key: Any) -> Kind:
    return Kind()


def _device(x: Tensor) -> int | None:
    """Of a small tensor on the current device, where launches go; None for others."""
    if not x.is_cuda or x.numel() > LARGE:
        return None
    device = driver.active.get_current_device()
    return device if x.get_device() == device else None


def forget() -> None:
    """For who changes what a tape does not know of, as tests do with the constants of a launcher."""
    kind.cache_clear()


def replayed(function: Callable) -> Callable:
    """The same function of tensors and numbers, which gets the tensors contiguous and returns one or a tuple that it made."""

    def call(*args: Any) -> Any:
        args = tuple([x.contiguous() if isinstance(x, Tensor) else x for x in args])
        device = _device(args[0])
        if device is None:
            return function(*args)
        addresses = [x.data_ptr() for x in args if isinstance(x, Tensor)]
        key = [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in args]
        this = kind(function, device, torch.get_float32_matmul_precision(), *key, *[x % 16 for x in addresses])
        if this.tape is not None:
            return this.tape.replay(addresses, device)
        this.calls += 1
        if this.calls != ENOUGH:
            return function(*args)
        fresh = [x.detach() if isinstance(x, Tensor) else x for x in args]  # an object each, so that a launch tells them apart
        with Recorder([x for x in fresh if isinstance(x, Tensor)]) as recorder:
            out = function(*fresh)
        this.tape = Tape.of(recorder, out)
        return out

    return call
