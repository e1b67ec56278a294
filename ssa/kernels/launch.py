"""Launches what Triton has compiled without asking it again what to compile.

Triton's own launch binds the arguments by name, prints every option into a key and looks each pointer up in the driver: 31 µs of the host
on the machine of an H200, where a small kernel takes 5. Here the key holds what Triton specialises on and no more, and finds the kernel
Triton compiled:

    constants, launch options    by value
    pointers                     by dtype and by their address modulo 16
    integers                     by value; those in do_not_specialize by whether they fit 32 bits
    None, floats                 by type

Launch hooks are not called. A kernel of Triton's interpreter stays as it is. Where replay.py writes a call down, launches are noted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor
from triton.runtime import driver

from .replay import recording


class Launcher:
    """`kernel[grid](*arguments, **constants)` as of `triton.jit`: all arguments by position and before the constants."""

    def __init__(self, function: triton.JITFunction):
        self.function = function
        self.compiled: dict[tuple, Any] = {}
        self.unspecialised = [p.do_not_specialize for p in function.params if not p.is_constexpr]
        self.places = (None,) * (len(function.params) - len(self.unspecialised))  # of the constants: passed, never read

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        device = driver.active.get_current_device()
        key, values = [device, *constants, *constants.values()], []
        for x, unspecialised in zip(args, self.unspecialised, strict=True):
            if isinstance(x, Tensor):
                key.append(x.dtype)
                x = x.data_ptr()
                key.append(x % 16)
            elif type(x) is int:
                key.append(x.bit_length() < 32 if unspecialised else x)
            else:
                key.append(type(x))
            values.append(x)
        found = tuple(key)
        kernel = self.compiled.get(found)
        if kernel is None:
            kernel = self.compiled[found] = self.function[grid](*args, **constants)
        else:
            x, y, z = (*grid, 1, 1)[:3]
            stream = driver.active.get_current_stream(device)
            kernel.run(x, y, z, stream, kernel.function, kernel.packed_metadata, None, None, None, *values, *self.places)
        if recording.recorder is not None:
            recording.recorder.launched(kernel, grid, (*args, *self.places))


def launcher(function: Any) -> Any:
    """Decorator of a `triton.jit` kernel that a launcher starts."""
    return Launcher(function) if isinstance(function, triton.JITFunction) else function


def cdiv(a: int, b: int) -> int:
    """`triton.cdiv` in a tenth of its time."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
