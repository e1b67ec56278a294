"""Coordinates → `VoxelPartition`: the only sort of the voxels and the only host synchronisation.

Packed order is lexicographic in (sample, selection block, compression block, voxel), each as (x, y, z) with x slowest:

    row      0 1 2 3 4 5 6 7 8      offsets
    sample   0 0 0 0 0 0 1 1 1      cu_seqlens          0 6 9
    select.  0 0 0 0 1 1 2 2 2      selection.offsets   0 4 6 9       selection.cu_blocks   0 2 3
    compr.   0 0 1 1 2 2 3 4 4      compression.offsets 0 2 4 6 7 9   compression.cu_blocks 0 3 5   parents 0 0 1 2 2

so every grouping but a shifted or odd-sized window is "offsets into one order" (arXiv 2505.17412, section 4.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

_INTEGER = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Blocks:
    """One grouping of the packed rows into n cubic cells of edge `size` voxels.

    offsets [n+1] int32: where each cell begins in this grouping's order; cu_blocks [B+1] int32: first cell of each sample;
    coords [n,4] int32: (sample, floor((xyz + shift) / size)); index [T] int32: packed rows in this grouping's order, or None
    where they are contiguous already.
    """

    size: int
    offsets: Tensor
    cu_blocks: Tensor
    coords: Tensor
    index: Tensor | None = None

    def __post_init__(self) -> None:
        _mark_sizes(self.offsets, self.cu_blocks, self.coords, self.index)

    def __len__(self) -> int:
        return self.offsets.shape[0] - 1


@dataclass(frozen=True, eq=False)
class VoxelPartition:
    """The spatial order of a batch of voxels, built once by `partition_voxels` and passed to every layer.

    coords [T,4] int32 in packed order; order [T] int64: packed row i is input row order[i]; inverse_order [T] int64;
    cu_seqlens [B+1] int32; parents [C] int32: compression block → selection block, non-decreasing;
    child_offsets [S+1] int32: first compression block of each selection block.
    """

    coords: Tensor
    order: Tensor
    inverse_order: Tensor
    cu_seqlens: Tensor
    parents: Tensor
    child_offsets: Tensor
    compression: Blocks
    selection: Blocks
    window: Blocks
    window_shift: int = 0
    _cache: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _mark_sizes(*(getattr(self, f.name) for f in dataclasses.fields(self)), *self._cache.values())

    @property
    def device(self) -> torch.device:
        return self.coords.device

    @property
    def num_tokens(self) -> int:
        return self.coords.shape[0]

    @property
    def batch_size(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def neighbors(self) -> Tensor:
        """[T,27] int32: packed row of the voxel at + (dx, dy, dz), column (dx+1) + 3(dy+1) + 9(dz+1); −1 = none. Built on first use.

        `layer.partition` builds it. Built inside torch.compile it becomes part of the graph, and its being there a reason to compile again.
        """
        return self._kept("neighbors", lambda: neighbor_table(self.coords, self.compression.size, self.selection.size))

    @property
    def block_neighbors(self) -> Tensor:
        """[C,27] int32: as `neighbors`, between compression blocks."""
        ratio = self.selection.size // self.compression.size
        return self._kept("block_neighbors", lambda: neighbor_table(self.compression.coords, 1, ratio))

    @property
    def fill_order(self) -> Tensor:
        """[S] int32: selection blocks of each sample by falling number of compression blocks, so that a tile of them wastes no work."""
        return self._fill_order() if torch.compiler.is_compiling() else self._kept("fill_order", self._fill_order)

    @property
    def slots(self) -> Tensor:
        """[T] int32: place of every voxel in its compression block, (x m + y) m + z of the coordinates modulo m."""
        return self._slots() if torch.compiler.is_compiling() else self._kept("slots", self._slots)

    def _kept(self, name: str, build: Callable[[], Tensor]) -> Tensor:
        """Built once. A compiled graph would be compiled again for a partition that has it: what is cheap it builds each time."""
        if name not in self._cache:
            with torch.inference_mode(False):  # a table first needed in evaluation must serve training too
                self._cache[name] = build()
            _mark_sizes(self._cache[name])
        return self._cache[name]

    def _fill_order(self) -> Tensor:
        most = (self.selection.size // self.compression.size) ** 3
        count = torch.diff(self.child_offsets.long())
        key = self.selection.coords[:, 0].long() * (most + 1) + most - count
        return torch.argsort(key, stable=True).int()

    def _slots(self) -> Tensor:
        m = self.compression.size
        x, y, z = torch.remainder(self.coords[:, 1:], m).unbind(1)
        return (x * m + y) * m + z

    def sort(self, x: Tensor) -> Tensor:
        """Rows [T, …] as given to `partition_voxels` → rows in packed order. Its gradient is `unsort`: gathers only."""
        self._check_rows(x)
        return _Permute.apply(x, self.order, self.inverse_order)

    def unsort(self, x: Tensor) -> Tensor:
        """Rows [T, …] in packed order → rows as given to `partition_voxels`."""
        self._check_rows(x)
        return _Permute.apply(x, self.inverse_order, self.order)

    def with_window(self, window_size: int, window_shift: int = 0) -> VoxelPartition:
        """The same order with other windows; shares everything else. One host synchronisation for windows that are not contiguous."""
        _check_window(window_size, window_shift)
        if (window_size, window_shift) == (self.window.size, self.window_shift):
            return self
        window = _contiguous_window(window_size, window_shift, self.compression, self.selection)
        if window is None:
            if self.num_tokens == 0:
                return dataclasses.replace(self, window=_no_blocks(self.cu_seqlens, window_size, True), window_shift=window_shift)
            ids, index = _window_order(self.coords, window_size, window_shift)
            window = _blocks(self.coords, ids, int(ids[-1]) + 1, self.cu_seqlens, window_size, window_shift, index)
        return dataclasses.replace(self, window=window, window_shift=window_shift)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> VoxelPartition:
        """The same partition on `device`, what was built on first use included."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> VoxelPartition:
        """The same partition in page-locked memory, for `.to(device, non_blocking=True)`."""
        return self._map(lambda t: t.pin_memory())

    def _map(self, f) -> VoxelPartition:
        def move(value):
            if isinstance(value, Tensor):
                return f(value)
            if isinstance(value, Blocks):
                return Blocks(**{k.name: move(getattr(value, k.name)) for k in dataclasses.fields(value)})
            return {k: f(v) for k, v in value.items()} if isinstance(value, dict) else value

        return VoxelPartition(**{k.name: move(getattr(self, k.name)) for k in dataclasses.fields(self)})

    def _check_rows(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if x.shape[:1] != (self.num_tokens,):
            raise ValueError(f"x must have one row per voxel: {x.shape=} but the partition has {self.num_tokens} voxels")
        if x.device != self.device:
            raise ValueError(f"x and the partition must be on one device: {x.device=}, {self.device=}")


def partition_voxels(
    coords: Tensor,
    *,
    compression_block_size: int = 4,
    selection_block_size: int = 8,
    window_size: int = 8,
    window_shift: int = 0,
    batch_size: int | None = None,
) -> VoxelPartition:
    """Sort voxels by (sample, selection block, compression block) and say where each group begins.

    Args:
        coords: [T,4] integers (sample, x, y, z) in any order; x, y, z may be negative; no voxel twice. Stays on its device.
        compression_block_size, selection_block_size: cube edges in voxels; the first divides the second (equality allowed).
        window_size, window_shift: a voxel's window is floor((xyz + shift) / size), 0 <= shift < size.
        batch_size: B; default: largest sample index + 1. Indices that do not occur are empty samples.

    Raises:
        TypeError, ValueError: the rule broken and the value got. Values are checked with the one host synchronisation.

    Source: arXiv 2505.17412, section 4.1; blocks are floor(coords / size) per sample.
    """
    _check_arguments(coords, compression_block_size, selection_block_size, batch_size)
    _check_window(window_size, window_shift)
    m_cmp, m_slc = compression_block_size, selection_block_size
    device, num_tokens = coords.device, coords.shape[0]
    if num_tokens == 0:
        return _empty(device, m_cmp, m_slc, window_size, window_shift, batch_size or 0)

    c = coords.long()
    lo, hi = torch.aminmax(c, dim=0)
    grid = _Grid.of(lo, hi, m_cmp, m_slc)
    key, order = torch.sort(grid.key(c))
    inverse_order = torch.empty_like(order).scatter_(0, order, torch.arange(num_tokens, device=device))
    packed = coords.int()[order]
    ids_cmp, ids_slc = (_ids(_floor_div(key, m**3)) for m in (m_cmp, m_slc))
    contiguous = window_shift == 0 and window_size in (m_cmp, m_slc)
    if contiguous:
        ids_win, index = ids_slc, None
    else:
        ids_win, index = _window_order(packed, window_size, window_shift)

    twice = key[1:] == key[:-1]
    facts = torch.cat([lo, hi, torch.stack([ids_cmp[-1], ids_slc[-1], ids_win[-1], twice.sum()])]).tolist()  # the one synchronisation
    num_samples = _check_values(facts[:4], facts[4:8], m_slc, batch_size)
    if facts[11]:
        row = int(twice.nonzero()[0])
        raise ValueError(f"voxels must be unique: {facts[11]} of {num_tokens} repeat another, the first is {packed[row].tolist()}")
    num_cmp, num_slc, num_win = (n + 1 for n in facts[8:11])

    cu_seqlens = _starts(packed[:, 0].contiguous(), num_samples)
    compression = _blocks(packed, ids_cmp, num_cmp, cu_seqlens, m_cmp)
    selection = _blocks(packed, ids_slc, num_slc, cu_seqlens, m_slc)
    window = _contiguous_window(window_size, window_shift, compression, selection)
    if window is None:
        window = _blocks(packed, ids_win, num_win, cu_seqlens, window_size, window_shift, index)
    return VoxelPartition(
        coords=packed,
        order=order,
        inverse_order=inverse_order,
        cu_seqlens=cu_seqlens,
        parents=ids_slc[compression.offsets[:-1]].int(),
        child_offsets=torch.searchsorted(compression.offsets, selection.offsets, out_int32=True),
        compression=compression,
        selection=selection,
        window=window,
        window_shift=window_shift,
    )


def neighbor_table(coords: Tensor, compression_block_size: int, selection_block_size: int) -> Tensor:
    """The 3×3×3 neighbours of every voxel. coords [n,4] in packed order of these block sizes → [n,27] int32 rows, −1 = none.

    Column (dx+1) + 3(dy+1) + 9(dz+1). No sort and no host synchronisation: the packing key is a sum over the axes, so the key of a
    neighbour is three table look-ups and a binary search. The table is symmetric (j = i + δ ⟺ i = j − δ): 13 of 27 taps are searched.
    """
    n, device = coords.shape[0], coords.device
    table = torch.full((n + 1, 27), -1, dtype=torch.int32, device=device)  # row n takes what has no neighbour
    rows = torch.arange(n, device=device)
    table[:n, 13] = rows.int()
    if n == 0:
        return table[:0]
    c = coords.long()
    grid = _Grid.of(*torch.aminmax(c, dim=0), compression_block_size, selection_block_size)
    keys = grid.key(c)
    step = torch.arange(-1, 2, device=device)
    u = (c[:, 1:] - grid.origin)[:, :, None] + step  # [n, axis, step]
    part = grid.parts(u)
    inside = (u >= 0) & (u < (grid.count * grid.m_slc)[None, :, None])
    taps = torch.arange(13, device=device)
    ix, iy, iz = taps % 3, taps // 3 % 3, taps // 9
    target = grid.sample_part(c)[:, None] + part[:, 0, ix] + part[:, 1, iy] + part[:, 2, iz]  # [n, 13]
    found = torch.searchsorted(keys, target).clamp_(max=n - 1)
    valid = (keys[found] == target) & inside[:, 0, ix] & inside[:, 1, iy] & inside[:, 2, iz]
    table[:n, :13] = torch.where(valid, found, -1).int()
    mirror = torch.where(valid, found, n) * 27 + 26 - taps
    table.view(-1)[mirror] = rows.int()[:, None].expand(n, 13)
    return table[:n].contiguous()


@dataclass(frozen=True)
class _Grid:
    """Mixed-radix packing key: a bijection from the voxels of the bounding box to consecutive integers in packed order.

    There may be up to 2^64 of them, so they start at `lowest`, a multiple of both block volumes: key // m^3 is the block's number.
    """

    m_cmp: int
    m_slc: int
    origin: Tensor  # [3] int64, a multiple of m_slc
    count: Tensor  # [3] int64, selection blocks an axis

    @classmethod
    def of(cls, lo: Tensor, hi: Tensor, m_cmp: int, m_slc: int) -> _Grid:
        origin = _floor_div(lo[1:], m_slc) * m_slc
        return cls(m_cmp, m_slc, origin, (hi[1:] - origin) // m_slc + 1)

    @property
    def lowest(self) -> int:
        return -(2**63 // self.m_slc**3) * self.m_slc**3

    def key(self, c: Tensor) -> Tensor:
        """[n,4] (sample, x, y, z) → [n] int64."""
        ratio = self.m_slc // self.m_cmp
        u = c[:, 1:] - self.origin
        slc = _floor_div(u, self.m_slc)
        u = torch.sub(u, slc, alpha=self.m_slc)
        cmp = _floor_div(u, self.m_cmp)
        voxel = torch.sub(u, cmp, alpha=self.m_cmp)
        key = c[:, 0]
        for digit, radix in zip(slc.unbind(1), self.count.unbind(), strict=True):
            key = torch.addcmul(digit, key, radix)
        for digit in cmp.unbind(1):
            key = torch.add(digit, key, alpha=ratio)
        for digit in voxel.unbind(1):
            key = torch.add(digit, key, alpha=self.m_cmp)
        return key + self.lowest

    def parts(self, u: Tensor) -> Tensor:
        """The key is a sum over the axes. u [n,3,k] voxel coordinates from the origin → what each axis adds to it."""
        _, ny, nz = self.count.unbind()
        power = torch.arange(2, -1, -1, device=u.device)  # x is the slowest axis
        block = torch.stack([ny * nz, nz, torch.ones_like(nz)]) * self.m_slc**3
        child = (self.m_slc // self.m_cmp) ** power * self.m_cmp**3
        voxel = self.m_cmp**power
        slc = _floor_div(u, self.m_slc)
        rest = u - slc * self.m_slc
        cmp = rest // self.m_cmp
        rest = rest - cmp * self.m_cmp
        return slc * block[:, None] + cmp * child[:, None] + rest * voxel[:, None]

    def sample_part(self, c: Tensor) -> Tensor:
        """What the sample adds to the key, and where keys begin."""
        return c[:, 0] * (self.count.prod() * self.m_slc**3) + self.lowest


class _Permute(torch.autograd.Function):
    """Rows x[index]; the gradient gathers with the inverse permutation instead of scattering."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return x[index]

    @staticmethod
    def backward(ctx, grad: Tensor):
        index, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, index), None, None


def _mark_sizes(*values: object) -> None:
    """Every batch has its own sizes: torch.compile is not to specialise on one, nor to take two that happen to be equal for one."""
    for x in values:
        if isinstance(x, Tensor) and not torch.compiler.is_compiling():
            torch._dynamo.maybe_mark_dynamic(x, 0)


def _floor_div(x: Tensor, size: int) -> Tensor:
    return torch.div(x, size, rounding_mode="floor")


def _ids(key: Tensor) -> Tensor:
    """Grouped keys [n] → number of the group of each, int64."""
    ids = torch.zeros_like(key)
    torch.cumsum(key[1:] != key[:-1], 0, out=ids[1:])
    return ids


def _starts(ids: Tensor, n: int) -> Tensor:
    """Non-decreasing ids [T] → [n+1] int32: first row of each of n groups, absent ones empty."""
    return torch.searchsorted(ids, torch.arange(n + 1, device=ids.device, dtype=ids.dtype), out_int32=True)


def _window_order(packed: Tensor, size: int, shift: int) -> tuple[Tensor, Tensor]:
    """Packed rows in window order: the window number of each, int64, and the row, int32."""
    cell = _floor_div(packed[:, 1:] + shift, size).long()
    lo, hi = torch.aminmax(cell, dim=0)
    key = packed[:, 0].long()
    for digit, radix in zip((cell - lo).unbind(1), (hi - lo + 1).unbind(), strict=True):
        key = torch.addcmul(digit, key, radix)
    key, index = torch.sort(key - 2**63, stable=True)  # up to 2^64 windows
    return _ids(key), index.int()


def _contiguous_window(size: int, shift: int, compression: Blocks, selection: Blocks) -> Blocks | None:
    if shift == 0:
        for blocks in (selection, compression):
            if blocks.size == size:
                return blocks
    return None


def _blocks(
    packed: Tensor, ids: Tensor, n: int, cu_seqlens: Tensor, size: int, shift: int = 0, index: Tensor | None = None
) -> Blocks:
    offsets = _starts(ids, n)
    first = offsets[:-1] if index is None else index[offsets[:-1]]
    coords = packed[first]
    coords[:, 1:].add_(shift).floor_divide_(size)
    cu_blocks = torch.searchsorted(offsets, cu_seqlens, out_int32=True)  # samples begin where blocks begin
    return Blocks(size=size, offsets=offsets, cu_blocks=cu_blocks, coords=coords, index=index)


def _no_blocks(cu_seqlens: Tensor, size: int, gathered: bool = False) -> Blocks:
    zero = torch.zeros(1, dtype=torch.int32, device=cu_seqlens.device)
    return Blocks(size, zero, torch.zeros_like(cu_seqlens), zero.new_zeros(0, 4), zero.new_zeros(0) if gathered else None)


def _empty(device: torch.device, m_cmp: int, m_slc: int, window_size: int, window_shift: int, num_samples: int) -> VoxelPartition:
    cu_seqlens = torch.zeros(num_samples + 1, dtype=torch.int32, device=device)
    compression, selection = (_no_blocks(cu_seqlens, m) for m in (m_cmp, m_slc))
    window = _contiguous_window(window_size, window_shift, compression, selection) or _no_blocks(cu_seqlens, window_size, True)
    order, none = (torch.zeros(0, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32))
    coords = none.new_zeros(0, 4)
    return VoxelPartition(
        coords, order, order.clone(), cu_seqlens, none, cu_seqlens[:1].clone(), compression, selection, window, window_shift
    )


def _check_arguments(coords: Tensor, m_cmp: int, m_slc: int, batch_size: int | None) -> None:
    if not isinstance(coords, Tensor):
        raise TypeError(f"coords must be a torch.Tensor, got {type(coords).__name__}")
    if coords.dtype not in _INTEGER:
        raise TypeError(f"coords must be integers, got {coords.dtype=}")
    if coords.ndim != 2 or coords.shape[1] != 4:
        raise ValueError(f"coords must be [T, 4] = (sample, x, y, z), got {coords.shape=}")
    for name, value in (("compression_block_size", m_cmp), ("selection_block_size", m_slc)):
        _check_int(name, value, 1)
    if m_slc % m_cmp:
        raise ValueError(f"compression_block_size must divide selection_block_size, got {m_cmp} and {m_slc}")
    if batch_size is not None:
        _check_int("batch_size", batch_size, 0)
        if coords.shape[0] and batch_size == 0:
            raise ValueError(f"batch_size must exceed every sample index, got {batch_size=} for {coords.shape[0]} voxels")


def _check_window(window_size: int, window_shift: int) -> None:
    _check_int("window_size", window_size, 1)
    _check_int("window_shift", window_shift, 0)
    if window_shift >= window_size:
        raise ValueError(f"window_shift must be less than window_size, got {window_shift=}, {window_size=}")


def _check_int(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_values(lo: list[int], hi: list[int], m_slc: int, batch_size: int | None) -> int:
    if lo[0] < 0:
        raise ValueError(f"sample indices must not be negative, got {lo[0]}")
    if batch_size is not None and hi[0] >= batch_size:
        raise ValueError(f"sample indices must be less than batch_size={batch_size}, got {hi[0]}")
    num_samples = hi[0] + 1 if batch_size is None else batch_size
    cells = hi[0] + 1
    for axis, a, b in zip("xyz", lo[1:], hi[1:], strict=True):
        if a < -(2**31) or b >= 2**31:
            raise ValueError(f"{axis} must fit 32 bits, got {a} … {b}")
        cells *= (b // m_slc - a // m_slc + 1) * m_slc
    if cells + m_slc**3 > 2**64:
        raise ValueError(
            "the extent is too wide for a 64-bit key (2^15 samples of 2^16 voxels an axis fit): "
            f"{hi[0] + 1} samples, x {lo[1]} … {hi[1]}, y {lo[2]} … {hi[2]}, z {lo[3]} … {hi[3]}"
        )
    return num_samples
