"""The launcher asks for a kernel anew exactly where Triton would compile another, and passes on what Triton's own launch passes."""

from types import SimpleNamespace

import pytest
import torch
from utils import CUDA

from ssa.kernels import launch
from ssa.kernels.launch import Launcher, launcher

DRIVER = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7))


class Function:
    """A kernel (x_ptr, y_ptr, scale, n, m, SIZE, KIND), n not specialised, that notes compilations and launches."""

    def __init__(self):
        names = ["x_ptr", "y_ptr", "scale", "n", "m", "SIZE", "KIND"]
        self.params = [SimpleNamespace(name=s, is_constexpr=s.isupper(), do_not_specialize=s == "n") for s in names]
        self.compilations, self.launches = [], []

    def __getitem__(self, grid):
        def compile_and_run(*args, **constants):
            self.compilations.append((grid, args, constants))
            return SimpleNamespace(run=lambda *a: self.launches.append(a), function="function", packed_metadata="metadata")

        return compile_and_run


@pytest.fixture
def function(monkeypatch):
    monkeypatch.setattr(launch, "driver", DRIVER)
    return Function()


X, Y = torch.zeros(64), torch.zeros(64, dtype=torch.int32)
ARGS, CONSTANTS = (X, Y, 0.5, 100, 3), dict(SIZE=4, KIND="a", num_warps=2)


def test_a_known_kernel_is_launched_with_what_triton_passes(function):
    kernel = Launcher(function)
    kernel[(5,)](*ARGS, **CONSTANTS)
    assert function.compilations == [((5,), ARGS, CONSTANTS)] and not function.launches
    kernel[(6, 2)](X[4:], Y, 0.25, 101, 3, **CONSTANTS)
    assert len(function.compilations) == 1
    pointers = X.data_ptr() + 16, Y.data_ptr()
    assert function.launches == [(6, 2, 1, 7, "function", "metadata", None, None, None, *pointers, 0.25, 101, 3, None, None)]


@pytest.mark.parametrize(
    "args, constants",
    [
        ((X.double(), *ARGS[1:]), {}),
        ((X[1:], *ARGS[1:]), {}),
        ((X, None, *ARGS[2:]), {}),
        ((*ARGS[:3], 2**31, 3), {}),
        ((*ARGS[:4], 1), {}),
        ((*ARGS[:4], 16), {}),
        (ARGS, dict(SIZE=8)),
        (ARGS, dict(KIND="b")),
        (ARGS, dict(num_warps=4)),
        (ARGS, dict(num_stages=2)),
    ],
)
def test_what_triton_specialises_on_is_compiled_anew(function, args, constants):
    kernel = Launcher(function)
    kernel[(1,)](*ARGS, **CONSTANTS)
    kernel[(1,)](*args, **{**CONSTANTS, **constants})
    assert len(function.compilations) == 2 and not function.launches


def test_devices_have_kernels_of_their_own(function, monkeypatch):
    kernel = Launcher(function)
    for device in (0, 1):
        monkeypatch.setattr(DRIVER.active, "get_current_device", lambda device=device: device)
        kernel[(1,)](*ARGS, **CONSTANTS)
    assert len(function.compilations) == 2


def test_arguments_are_complete(function):
    with pytest.raises(ValueError, match="longer"):
        Launcher(function)[(1,)](X, Y, **CONSTANTS)


def test_functions_of_the_interpreter_stay_as_they_are():
    function = Function()
    assert launcher(function) is function


if CUDA:
    import triton
    import triton.language as tl

    @launcher
    @triton.jit(do_not_specialize=["n"])
    def _scaled_copy_kernel(x_ptr, y_ptr, scale, n, stride, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + i, tl.load(x_ptr + i * stride, mask=i < n) * scale, mask=i < n)

    def test_launches_on_the_gpu():
        """Every alignment and stride, first as Triton launches it and then as the launcher does, on a stream of its own too."""
        x = torch.randn(5000, device="cuda")
        for _ in range(2):
            for offset in (0, 1, 4):
                for stride in (1, 2, 16):
                    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
                        stream.wait_stream(torch.cuda.current_stream())
                        with torch.cuda.stream(stream):
                            y = torch.zeros(257, device="cuda")
                            _scaled_copy_kernel[(3,)](x[offset:], y, 2.0, 257, stride, BLOCK=128)
                            assert torch.equal(y, 2 * x[offset : offset + 257 * stride : stride])
