"""Linears that are written out, against nn.Linear: outputs and gradients."""

import pytest
import torch
from torch import nn

from reference_model.vae_layers import Narrow, Widen


@pytest.mark.parametrize("rows", [0, 1, 37])
def test_written_out_linears(rows: int) -> None:
    """Widen adds Linear 1 → C to the row, Narrow is Linear C → 1; alike with and without gradients."""
    torch.manual_seed(0)
    widen, narrow, x, t = Widen(1, 12), Narrow(12, 1), torch.randn(rows, 12, requires_grad=True), torch.randn(rows, requires_grad=True)
    for layer, inputs, plain in (
        (widen, (x, t), lambda: x + nn.functional.linear(t[:, None], widen.weight, widen.bias)),
        (narrow, (x,), lambda: nn.functional.linear(x, narrow.weight, narrow.bias)[:, 0]),
    ):
        leaves = (*inputs, layer.weight, layer.bias)
        got, want = layer(*inputs), plain()
        torch.testing.assert_close(got, want)
        dy = torch.randn_like(want)
        torch.testing.assert_close(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy))
        with torch.no_grad():
            torch.testing.assert_close(layer(*inputs), want)
