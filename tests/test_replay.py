"""A replayed call starts what the call written down started, at the addresses of its own arguments, where that is all there is to do.

The kernels here are Python that reads and writes memory by address, behind the real `Launcher`: no GPU, no interpreter.
"""

import ctypes
import random
from types import SimpleNamespace

import pytest
import torch
from utils import CUDA, draw, draw_qkv, random_choice, random_partition

import ssa
from ssa.kernels import launch, replay, selected_attention
from ssa.kernels.launch import Launcher

DRIVER = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7))


class Function:
    """out[i] = x[i] + scale · y[i] for i < n, as `triton.jit` would offer it; y may be None."""

    params = [
        SimpleNamespace(name=s, is_constexpr=s == "BLOCK", do_not_specialize=s == "n")
        for s in ("x_ptr", "y_ptr", "out_ptr", "n", "scale", "BLOCK")
    ]

    def __getitem__(self, grid):
        def compile_and_run(x, y, out, n, scale, **constants):
            addresses = [None if t is None else t.data_ptr() for t in (x, y, out)]
            self.run(*grid, 1, 1, 7, None, None, None, None, None, *addresses, n, scale, None)
            return SimpleNamespace(run=self.run, function=None, packed_metadata=None)

        return compile_and_run

    @staticmethod
    def run(gx, gy, gz, stream, function, metadata, a, b, c, x, y, out, n, scale, block):
        assert (gy, gz, stream, block) == (1, 1, 7, None)
        x, out = ((ctypes.c_float * n).from_address(p) for p in (x, out))
        y = [0.0] * n if y is None else (ctypes.c_float * n).from_address(y)
        for i in range(n):
            out[i] = x[i] + scale * y[i]


@pytest.fixture
def axpy(monkeypatch):
    monkeypatch.setattr(launch, "driver", DRIVER)
    monkeypatch.setattr(replay, "driver", DRIVER)
    monkeypatch.setattr(replay, "ENOUGH", 2)
    monkeypatch.setattr(replay, "_device", lambda x: 0 if x.numel() <= replay.LARGE else None)
    replay.forget()
    kernel = Launcher(Function())
    yield lambda x, y, out, n, scale: kernel[(1,)](x, y, out, n, scale, BLOCK=8)
    replay.forget()


def counted(function):
    """replayed(function) and how often the function itself ran."""
    runs = []

    def body(*args):
        runs.append(1)
        return function(*args)

    return replay.replayed(body), runs


def floats(*shape, seed=0):
    return draw(*shape, seed=seed).cpu()


def test_new_arguments_and_their_aliases(axpy):
    """The call written down gets one tensor twice; temporaries, views of them, a missing pointer and numbers are as they were."""

    def body(x, y, missing, n, scale):
        pair, o, rest = torch.empty(2, n), torch.empty_like(x), torch.empty_like(x)
        low, _ = pair.unbind()
        axpy(x, y, pair[1], n, scale)
        axpy(pair[1], missing, low, n, scale)
        axpy(pair[0], x, o, n, 1.0)
        axpy(y, pair[1], rest, n, 2.0)
        return o, rest

    call, runs = counted(body)
    held = []
    for seed in range(5):
        x = floats(40, seed=seed)
        y = x if seed < 2 else floats(40, seed=seed + 10)
        o, rest = call(x, y, None, 40, 0.5)
        torch.testing.assert_close(o, 2 * x + 0.5 * y)
        torch.testing.assert_close(rest, y + 2 * (x + 0.5 * y))
        held.append((o, o.clone()))
    assert len(runs) == 2 and all(torch.equal(o, copy) for o, copy in held), "outputs are new memory"


def test_empty_outputs_are_new_each_time(axpy):
    """They have no address to be told apart by; an empty input that is returned is still no output."""

    def body(x, n, own):
        o, none, nothing = torch.empty_like(x), x.new_empty(0), torch.empty(0, 3, dtype=torch.int32)
        axpy(x, x, o, n, 1.0)
        return o, none, nothing if own else x[:0]

    for own in (True, False):
        call, runs = counted(lambda *args, own=own: body(*args, own))
        for seed in range(4):
            x = floats(16, seed=seed)
            o, none, nothing = call(x, 16)
            assert torch.equal(o, 2 * x) and none.shape == (0,) and nothing.shape == ((0, 3) if own else (0,))
        assert len(runs) == (2 if own else 4)


def test_what_differs_is_written_down_anew(axpy):
    def body(x, y, other, n, scale):
        o = torch.empty_like(x)
        axpy(x, y, o, n, scale)
        return o

    call, runs = counted(body)
    x, half = floats(64), torch.zeros(4, dtype=torch.float16)
    y = x[:32]
    anew = [(y, y, half, 32, 0.5), (x[:16], x[:16], half, 16, 0.5), (y, y, half, 32, 0.25), (x[1:33], x[1:33], half, 32, 0.5)]
    anew += [(y, None, half, 32, 0.5), (y, y, half.bfloat16(), 32, 0.5), (y, y, None, 32, 0.5)]
    alike = [(x[::2], x[::2], half, 32, 0.5), (x[4:36], x[4:36], half, 32, 0.5)]  # made contiguous; aligned as x[0]
    for y, z, other, n, scale in anew + alike:
        for _ in range(3):
            torch.testing.assert_close(call(y, z, other, n, scale), y if z is None else y + scale * z)
    assert len(runs) == 2 * len(anew)
    try:
        torch.set_float32_matmul_precision("high")
        call(*anew[0])
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(runs) == 2 * len(anew) + 1


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "kind", ["operation", "copy", "fill", "join", "input returned", "output twice", "part returned", "part of an input"]
)
def test_a_call_that_does_more_runs_itself(axpy, kind, inference):
    """`to` and `contiguous` say they are views; in inference mode the recorder sees them as they are."""

    def body(x, n):
        o = torch.empty(2, n)
        if kind == "part of an input":
            axpy(x[4:], None, o[0], n - 4, 1.0)
        elif kind == "fill":
            o[0].copy_(x)
        else:
            if kind == "join":  # its first argument is a list
                torch.stack([o[0], o[1]])
            torch.empty(n, dtype=torch.float64)  # its address is free for the copy
            axpy({"operation": x.clone, "copy": x.double().float}.get(kind, lambda: x)(), None, o[0], n, 1.0)
        axpy(o[0], None, o[1], n, 1.0)
        return {"input returned": (x, o), "output twice": (o, o), "part returned": o[1]}.get(kind, o)

    call, runs = counted(body)
    for seed in range(3):
        with torch.inference_mode(inference):
            x = floats(8, seed=seed)
            out = call(x, 8)
        want = x[4:] if kind == "part of an input" else x
        assert torch.equal((out if isinstance(out, torch.Tensor) else out[1]).reshape(-1, 8)[-1][: len(want)], want)
    assert len(runs) == 3


def test_large_calls_run_themselves(axpy, monkeypatch):
    def body(x):
        o = torch.empty_like(x)
        axpy(x, None, o, x.numel(), 1.0)
        return o

    monkeypatch.setattr(replay, "LARGE", 7)
    call, runs = counted(body)
    for n in (7, 7, 7, 8, 8, 8):
        call(floats(n))
    assert len(runs) == 2 + 3


def test_temporaries_share_memory_only_when_not_in_use_together():
    rng = random.Random(0)
    for _ in range(200):
        spans = [(rng.randint(0, 3000), *sorted(rng.choices(range(6), k=2))) for _ in range(rng.randint(0, 9))]
        begins, size = replay.place(spans)
        for i, (a, first, last) in enumerate(spans):
            assert begins[i] % 512 == 0 and begins[i] + a <= size
            for j, (b, start, end) in enumerate(spans[:i]):
                apart = begins[i] + a <= begins[j] or begins[j] + b <= begins[i]
                assert apart or last < start or end < first
    assert replay.place([(512, 0, 1), (512, 2, 3)])[1] == 512


if CUDA:
    OPERATIONS = {
        "spatial_sparse_attention": lambda p, q, k, v, k_cmp, v_cmp, g: ssa.spatial_sparse_attention(q, k, v, k_cmp, v_cmp, g, p, topk=4),
        "compression_attention": lambda p, q, k, v, k_cmp, v_cmp, g: ssa.compression_attention(q, k_cmp, v_cmp, p)[0],
        "selected_attention": lambda p, q, k, v, *_: ssa.selected_attention(q, k, v, random_choice(p, 2, 4), p)[0],
        "window_attention": lambda p, q, k, v, *_: ssa.window_attention(q, k, v, p)[0],
        "block_mean": lambda p, q, *_: ssa.block_mean(q, p.compression),
    }

    @pytest.mark.parametrize(("dtype", "query_major"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)])
    @pytest.mark.parametrize("name", OPERATIONS)
    def test_replayed_operations_are_bitwise_equal(name, dtype, query_major, monkeypatch):
        """Outputs and gradients of new inputs, by tapes of other inputs and without."""
        monkeypatch.setattr(selected_attention, "by_query", lambda *_: query_major)
        partition = random_partition([700, 0, 55], m_cmp=1, shift=2, edge=12)  # long enough for the bounded forward
        replays = []

        def step(seed):
            leaves = [*draw_qkv(partition, 8, 2, 32, dtype, seed), draw(755, 8, 3, dtype=dtype, seed=seed)]
            leaves = [x.requires_grad_() for x in leaves]
            o = OPERATIONS[name](partition, *leaves)
            return o, *(g for g in torch.autograd.grad(o, leaves, o.detach(), allow_unused=True) if g is not None)

        want = step(2)
        replay.forget()
        monkeypatch.setattr(replay, "ENOUGH", 2)
        play = replay.Tape.replay
        monkeypatch.setattr(replay.Tape, "replay", lambda *args: replays.append(1) or play(*args))
        step(1)
        step(3)
        assert not replays
        step(4)
        for got, expected in zip(step(2), want, strict=True):
            assert torch.equal(got, expected)
        assert len(replays) == 4, "forward and backward of two steps"

    def test_several_chunks_are_not_written_down(monkeypatch):
        """Their shares of the inverse map are joined by torch: every call is itself, and all give the same."""
        monkeypatch.setattr(selected_attention, "SCRATCH", 2**17)
        monkeypatch.setattr(replay, "ENOUGH", 2)
        replay.forget()
        partition = random_partition([700, 0, 55], edge=12)
        q, k, v, *_ = (x.requires_grad_() for x in draw_qkv(partition, 8, 2, 32, torch.bfloat16, 0))
        ids = random_choice(partition, 2, 4)
        assert selected_attention.chunk_queries(q, ids) < 755
        outputs = [ssa.selected_attention(q, k, v, ids, partition)[0] for _ in range(4)]
        first, *others = ([o, *torch.autograd.grad(o, (q, k, v), o)] for o in outputs)
        assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))
