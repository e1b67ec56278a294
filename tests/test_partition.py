"""The partition against brute force over the coordinates, its limits, and what it refuses."""

import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from utils import CUDA, DEVICE, draw, random_coords

import ssa


def cell(row, size, shift=0):
    sample, *xyz = row
    return (sample, *[(a + shift) // size for a in xyz])  # Python floors


def groups(rows, size, shift=0):
    """{cell: rows of it, ascending}."""
    found = {}
    for i, row in enumerate(rows):
        found.setdefault(cell(row, size, shift), []).append(i)
    return found


def check_blocks(blocks, rows, size, shift, batch_size):
    want = groups(rows, size, shift)
    offsets, coords = blocks.offsets.tolist(), [tuple(c) for c in blocks.coords.tolist()]
    index = list(range(len(rows))) if blocks.index is None else blocks.index.tolist()
    assert blocks.size == size and len(blocks) == len(want) == len(coords) and offsets[0] == 0 and offsets[-1] == len(rows)
    for i, c in enumerate(coords):
        assert index[offsets[i] : offsets[i + 1]] == want[c], "each cell lists exactly its voxels, in packed order"
    samples = [c[0] for c in coords]
    assert samples == sorted(samples)
    assert blocks.cu_blocks.tolist() == [sum(s < b for s in samples) for b in range(batch_size + 1)]
    for t in (blocks.offsets, blocks.cu_blocks, blocks.coords):
        assert t.dtype == torch.int32 and t.device.type == DEVICE.type


LAYOUTS = {
    "one sample": dict(counts=[100]),
    "unequal, empty in the middle": dict(counts=[3, 0, 120, 1]),
    "one token": dict(counts=[1]),
    "equal block sizes": dict(counts=[50, 20], m_cmp=4, m_slc=4),
    "windows of compression blocks": dict(counts=[50], window=2),
    "shifted windows": dict(counts=[60, 31], window=4, shift=2),
    "odd windows": dict(counts=[60, 31], window=5, shift=4),
    "blocks of one voxel": dict(counts=[40], m_cmp=1, m_slc=1, window=1),
    "sizes that are no powers of two": dict(counts=[80], m_cmp=3, m_slc=6, window=7, shift=3),
    "full blocks": dict(counts=[512], edge=8),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_brute_force(layout):
    """Contiguity sample ⊃ selection block ⊃ compression block, offsets, parents, children, windows, neighbours."""
    m_cmp, m_slc, window, shift, edge = 2, 4, 4, 0, 9
    spec = dict(m_cmp=m_cmp, m_slc=m_slc, window=window, shift=shift, edge=edge) | LAYOUTS[layout]
    coords = random_coords(spec["counts"], spec["edge"], low=-5)
    before = coords.clone()
    b = len(spec["counts"])
    p = ssa.partition_voxels(
        coords, compression_block_size=spec["m_cmp"], selection_block_size=spec["m_slc"], window_size=spec["window"],
        window_shift=spec["shift"], batch_size=b,
    )  # fmt: skip
    assert torch.equal(coords, before)
    rows = [tuple(r) for r in p.coords.tolist()]
    assert p.num_tokens == len(rows) and p.batch_size == b and p.device == coords.device
    assert p.coords.dtype == torch.int32 and p.order.dtype == p.inverse_order.dtype == torch.int64
    assert torch.equal(coords[p.order].int(), p.coords) and torch.equal(p.order[p.inverse_order], torch.arange(len(rows), device=DEVICE))
    assert p.cu_seqlens.dtype == torch.int32 and p.cu_seqlens.tolist() == [sum(r[0] < i for r in rows) for i in range(b + 1)]
    check_blocks(p.compression, rows, spec["m_cmp"], 0, b)
    check_blocks(p.selection, rows, spec["m_slc"], 0, b)
    assert p.compression.index is None and p.selection.index is None
    check_blocks(p.window, rows, spec["window"], spec["shift"], b)
    assert p.window_shift == spec["shift"]
    slc = [tuple(c) for c in p.selection.coords.tolist()]
    parents = [slc.index(cell(c, spec["m_slc"] // spec["m_cmp"])) for c in p.compression.coords.tolist()]
    assert p.parents.dtype == torch.int32 and p.parents.tolist() == parents == sorted(parents)
    assert p.child_offsets.tolist() == [sum(a < i for a in parents) for i in range(len(slc) + 1)]
    at = {row: i for i, row in enumerate(rows)}
    taps = [(dx, dy, dz) for dz in (-1, 0, 1) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    want = [[at.get((s, x + dx, y + dy, z + dz), -1) for dx, dy, dz in taps] for s, x, y, z in rows]
    assert p.neighbors.dtype == torch.int32 and p.neighbors.tolist() == want
    assert p.neighbors is p.neighbors, "built once"


def test_windows_that_are_contiguous_have_no_index():
    coords = random_coords([50])
    for window in (2, 4):
        p = ssa.partition_voxels(coords, compression_block_size=2, selection_block_size=4, window_size=window)
        assert p.window.index is None and len(p.window) == len(p.compression if window == 2 else p.selection)
    p = ssa.partition_voxels(coords, compression_block_size=2, selection_block_size=4, window_size=4, window_shift=1)
    assert p.window.index.dtype == torch.int32


def test_order_depends_on_coords_and_blocks_alone():
    coords = random_coords([80, 30])
    orders = [ssa.partition_voxels(coords, window_size=w, window_shift=s).order for w, s in ((8, 0), (8, 4), (3, 1))]
    assert torch.equal(orders[0], orders[1]) and torch.equal(orders[0], orders[2])
    shuffled = coords[torch.randperm(110).to(DEVICE)]
    assert torch.equal(ssa.partition_voxels(shuffled).coords, ssa.partition_voxels(coords).coords)


@pytest.mark.parametrize("batch_size", [None, 0, 3])
def test_no_voxel(batch_size):
    p = ssa.partition_voxels(torch.zeros(0, 4, dtype=torch.int64, device=DEVICE), batch_size=batch_size, window_shift=4)
    assert p.num_tokens == len(p.compression) == len(p.selection) == len(p.window) == 0
    assert p.batch_size == (batch_size or 0) and p.cu_seqlens.tolist() == [0] * ((batch_size or 0) + 1)
    assert p.neighbors.shape == (0, 27) and p.sort(draw(0, 5)).shape == (0, 5) and p.child_offsets.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integer_dtypes(dtype):
    coords = random_coords([60, 20], low=0)
    assert torch.equal(ssa.partition_voxels(coords.to(dtype)).coords, ssa.partition_voxels(coords).coords)


def extreme(samples=2**15, width=2**16, at=-(2**15)):
    corners = [(0, 0, 0), (1, 0, 1), (1, 1, 1), (0, 1, 0)]
    corners = [[s, *(at + (width - 1) * bit for bit in bits)] for s in (0, samples - 1) for bits in corners]
    return torch.tensor(corners, device=DEVICE)


@pytest.mark.parametrize("at", [-(2**15), 0, 5, -(2**31), 2**31 - 2**16])
@pytest.mark.parametrize("m_cmp, m_slc, window", [(4, 8, 8), (1, 1, 1), (3, 6, 5)])
def test_samples_and_axes_as_wide_as_promised(m_cmp, m_slc, window, at):
    coords = extreme(at=at)
    p = ssa.partition_voxels(
        coords, compression_block_size=m_cmp, selection_block_size=m_slc, window_size=window, window_shift=window // 2
    )
    rows = p.coords.tolist()
    assert sorted(rows) == sorted(coords.tolist()) and p.batch_size == 2**15 and len(p.selection) == len(p.window) == 8
    assert [r[0] for r in rows] == [0] * 4 + [2**15 - 1] * 4
    assert (p.neighbors[:, 13].tolist() == list(range(8))) and (p.neighbors >= 0).sum() == 8


def test_too_wide_raises():
    with pytest.raises(ValueError, match=r"too wide.*32768 samples.*131071"):
        ssa.partition_voxels(extreme(width=2**17, at=0))
    with pytest.raises(ValueError, match="32 bits.*2147483648"):
        ssa.partition_voxels(torch.tensor([[0, 2**31, 0, 0]], device=DEVICE))


def assert_equal_partitions(a, b):
    for name in ("coords", "order", "inverse_order", "cu_seqlens", "parents", "child_offsets", "neighbors"):
        assert torch.equal(getattr(a, name).cpu(), getattr(b, name).cpu()), name
    for name in ("compression", "selection", "window"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.size == y.size and (x.index is None) == (y.index is None)
        for field in ("offsets", "cu_blocks", "coords") + (() if x.index is None else ("index",)):
            assert torch.equal(getattr(x, field).cpu(), getattr(y, field).cpu()), (name, field)
    assert a.window_shift == b.window_shift


@pytest.mark.parametrize("shift", [0, 3])
def test_with_window(shift):
    coords = random_coords([70, 12])
    p = ssa.partition_voxels(coords, window_size=8)
    q = p.with_window(6, shift)
    assert_equal_partitions(q, ssa.partition_voxels(coords, window_size=6, window_shift=shift))
    assert q.order is p.order and q.neighbors is p.neighbors and p.with_window(8, 0) is p
    assert_equal_partitions(q.with_window(8), p)


def test_moves_and_pickles():
    p = ssa.partition_voxels(random_coords([40, 9]).cpu(), window_shift=2)
    assert_equal_partitions(pickle.loads(pickle.dumps(p)), p)
    neighbors = p.neighbors
    moved = p.to(DEVICE, non_blocking=True)
    assert moved.device.type == DEVICE.type and torch.equal(moved.neighbors.cpu(), neighbors)
    assert_equal_partitions(moved, p)
    assert_equal_partitions(moved.to("cpu"), p)
    if CUDA:
        pinned = p.pin_memory()
        assert pinned.coords.is_pinned() and pinned.window.index.is_pinned()
        assert_equal_partitions(pinned.to("cuda", non_blocking=True), p)


class Sorts(TorchDispatchMode):
    """Counts every operation that sorts."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("sort", "argsort", "msort", "_unique", "_unique2", "unique_dim", "topk")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("window, shift, sorts", [(8, 0, 1), (4, 0, 1), (8, 4, 2), (5, 0, 2)])
def test_number_of_sorts(window, shift, sorts):
    coords = random_coords([90, 30])
    with Sorts() as mode:
        p = ssa.partition_voxels(coords, window_size=window, window_shift=shift)
        assert mode.count == sorts
        p.sort(draw(120, 2)), p.neighbors, p.block_neighbors
        assert mode.count == sorts, "moving rows and the neighbour table need none"


def test_sort_and_unsort():
    p = ssa.partition_voxels(random_coords([30, 20]))
    x = draw(50, 3, 2)
    assert torch.equal(p.sort(x), x[p.order]) and torch.equal(p.unsort(p.sort(x)), x) and torch.equal(p.sort(p.unsort(x)), x)
    for there, back in ((p.sort, p.unsort), (p.unsort, p.sort)):
        leaf, dy = x.clone().requires_grad_(), draw(50, 3, 2, seed=1)
        (dx,) = torch.autograd.grad(there(leaf), leaf, dy)
        assert torch.equal(dx, back(dy))
    y = x[:, 0].double().requires_grad_()
    assert torch.autograd.gradcheck(p.sort, y) and torch.autograd.gradgradcheck(p.unsort, y)


GOOD = [[0, 0, 0, 0], [0, 1, 2, 3], [1, 4, 4, 4]]


def bad(rows, dtype=torch.int64):
    return torch.tensor(rows, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    "error, match, coords, options",
    [
        (TypeError, "torch.Tensor, got list", GOOD, {}),
        (TypeError, "integers.*float32", bad(GOOD, torch.float32), {}),
        (TypeError, "integers.*bool", bad(GOOD, torch.bool), {}),
        (ValueError, r"\[T, 4\].*\[3, 3\]", bad([r[:3] for r in GOOD]), {}),
        (ValueError, r"\[T, 4\].*\[4\]", bad(GOOD[0]), {}),
        (ValueError, r"unique.*1 of 4.*\[0, 1, 2, 3\]", bad([*GOOD, GOOD[1]]), {}),
        (ValueError, "negative, got -2", bad([[-2, 0, 0, 0], *GOOD]), {}),
        (ValueError, "batch_size=1, got 1", bad(GOOD), dict(batch_size=1)),
        (ValueError, "batch_size", bad(GOOD), dict(batch_size=0)),
        (ValueError, "batch_size.*-1", bad(GOOD), dict(batch_size=-1)),
        (TypeError, "batch_size.*2.0", bad(GOOD), dict(batch_size=2.0)),
        (ValueError, "divide.*3 and 8", bad(GOOD), dict(compression_block_size=3)),
        (ValueError, "divide.*8 and 4", bad(GOOD), dict(compression_block_size=8, selection_block_size=4)),
        (ValueError, "compression_block_size.*0", bad(GOOD), dict(compression_block_size=0)),
        (TypeError, "selection_block_size.*8.0", bad(GOOD), dict(selection_block_size=8.0)),
        (TypeError, "compression_block_size.*True", bad(GOOD), dict(compression_block_size=True)),
        (ValueError, "window_size.*0", bad(GOOD), dict(window_size=0)),
        (ValueError, "window_shift.*-1", bad(GOOD), dict(window_shift=-1)),
        (ValueError, "window_shift=8, window_size=8", bad(GOOD), dict(window_shift=8)),
        (TypeError, r"window_size.*\(4, 4, 4\)", bad(GOOD), dict(window_size=(4, 4, 4))),
    ],
)
def test_bad_input(error, match, coords, options):
    with pytest.raises(error, match=match):
        ssa.partition_voxels(coords, **options)


def test_bad_rows_and_windows():
    p = ssa.partition_voxels(bad(GOOD))
    with pytest.raises(ValueError, match=r"\[4, 2\].*3 voxels"):
        p.sort(draw(4, 2))
    with pytest.raises(ValueError, match=r"3 voxels"):
        p.unsort(draw(2, 2))
    with pytest.raises(TypeError, match="x must be a torch.Tensor, got list"):
        p.sort([1, 2, 3])
    with pytest.raises(ValueError, match="window_shift=3, window_size=3"):
        p.with_window(3, 3)
    with pytest.raises(TypeError, match="'4'"):
        p.with_window("4")
    with pytest.raises(ValueError, match="device"):
        p.sort(torch.zeros(3, 2, device="meta"))
    with pytest.raises(AttributeError):
        p.order = None
