"""Every backend against a dense convolution over the whole grid in float64, and against each other's weights."""

import importlib.util
import sys
from importlib import metadata

import pytest
import torch
from torch.nn import functional as F
from utils import DEVICE, IMPL
from vae_inputs import GRID, random_level

from reference_model import sparse_conv_spconv
from reference_model.sparse_conv import SparseConv3d
from reference_model.vae_grid import Level

SPCONV = ["spconv"] if importlib.util.find_spec("spconv") else []
BACKENDS = ["torch", *SPCONV, *(["triton"] if IMPL == "triton" else [])]
CASES = [(1, None, 5, 7), (2, 0.6, 8, 16), (4, 0.3, 16, 8), (4, None, 4, 4)]


def on_grid(x, kernel, bias, level):
    """The definition: scatter to a dense grid, convolve, gather."""
    size = GRID * level.edge
    where = tuple(level.coords.long().T)
    grid = x.new_zeros(2, size, size, size, x.shape[1])
    grid = grid.index_put(where, x)
    weight = torch.stack([kernel[(dx + 1) + 3 * (dy + 1) + 9 * (dz + 1)] for dx in (-1, 0, 1) for dy in (-1, 0, 1) for dz in (-1, 0, 1)])
    weight = weight.view(3, 3, 3, *kernel.shape[1:]).permute(4, 3, 0, 1, 2)
    return F.conv3d(grid.permute(0, 4, 1, 2, 3), weight, bias, padding=1).permute(0, 2, 3, 4, 1)[where]


def conv_and_input(backend, level, channels_in, channels_out, seed=0):
    torch.manual_seed(seed)
    conv = SparseConv3d(channels_in, channels_out, backend)
    torch.nn.init.normal_(conv.bias)
    return conv.to(DEVICE), torch.randn(len(level), channels_in)


def on_device(level):
    places = None if level.places is None else level.places.to(DEVICE)
    return Level(level.edge, level.latents.to(DEVICE), level.latent_neighbors.to(DEVICE), places)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("edge", "share", "channels_in", "channels_out"), CASES)
def test_value_and_gradients(backend, edge, share, channels_in, channels_out):
    level = random_level(edge, share, count=6)
    conv, x = conv_and_input(backend, level, channels_in, channels_out)
    dy = torch.randn(len(level), channels_out)
    outcome = []
    for double in (True, False):
        given = (x.double() if double else x.to(DEVICE)).requires_grad_()
        kernel, bias = (p.detach().to(given) for p in (conv.kernel, conv.bias)) if double else (conv.kernel, conv.bias)
        kernel.requires_grad_(), bias.requires_grad_()
        y = on_grid(given, kernel, bias, level) if double else conv(given, on_device(level))
        y.backward(dy.to(y))
        outcome.append((y, given.grad, kernel.grad, bias.grad))
    for name, expected, got in zip(("y", "dx", "dkernel", "dbias"), *outcome, strict=True):
        assert (got.cpu().double() - expected.cpu()).abs().max() < 1e-5 * expected.abs().max(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_shared(backend):
    level = random_level(2, 0.5, count=6)
    first, x = conv_and_input("torch", level, 8, 8)
    second, _ = conv_and_input(backend, level, 8, 8, seed=1)
    before = second(x.to(DEVICE), on_device(level))
    second.load_state_dict(first.state_dict())
    expected, got = first(x.to(DEVICE), on_device(level)), second(x.to(DEVICE), on_device(level))
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max() and (before - expected).abs().max() > 0.1
    assert {name: tuple(p.shape) for name, p in second.state_dict().items()} == {"kernel": (27, 8, 8), "bias": (8,)}


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton" or DEVICE.type == "cuda"])
def test_under_autocast(backend):
    """bf16 in and out, and the tiny gradients of a mean over many voxels arrive."""
    level = random_level(4, 0.5, count=6)
    conv, x = conv_and_input(backend, level, 8, 8)
    given = x.to(DEVICE).requires_grad_()
    exact = on_grid(x.double(), conv.kernel.double().cpu(), conv.bias.double().cpu(), level)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = conv(given, on_device(level))
    assert y.dtype == torch.bfloat16 and (y.cpu().double() - exact).abs().max() < 0.02 * exact.abs().max()
    y.backward(torch.full_like(y, 1e-9))
    expected = 1e-9 * torch.autograd.grad(on_grid(g := x.double().requires_grad_(), conv.kernel.double().cpu(), None, level).sum(), g)[0]
    assert (given.grad.cpu().double() - expected).abs().max() < 0.02 * expected.abs().max()
    assert conv.kernel.grad.dtype == torch.float32 and conv.kernel.grad.abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    level = random_level(2, 0.0, count=6)
    conv, x = conv_and_input(backend, level, 8, 4)
    assert conv(x.to(DEVICE), on_device(level)).shape == (0, 4)


def test_unknown_backend():
    with pytest.raises(ValueError, match="torchsparse"):
        SparseConv3d(4, 4, "torchsparse")


def test_the_cpu_wheel_of_spconv_is_refused(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "2.3.8")
    with pytest.raises(ImportError, match="wrong rows"):
        sparse_conv_spconv.load()


def test_missing_spconv_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "spconv", None)
    monkeypatch.setitem(sys.modules, "spconv.pytorch", None)
    with pytest.raises(ImportError, match=r"spatial-sparse-attention\[spconv\]"):
        sparse_conv_spconv.load()
