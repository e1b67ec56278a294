"""The largest norm of the keys, of parts of the rows and then of these."""

import pytest
import torch
from utils import IMPL, draw

if IMPL == "triton":
    from ssa.kernels.common import _norms, largest_norm

    @pytest.mark.parametrize("rows, heads, head_dim", [(1, 1, 16), (63, 3, 24), (2049, 2, 32), (5000, 1, 128)])
    def test_norms(rows, heads, head_dim):
        k = draw(rows, heads, head_dim)
        want = torch.linalg.vector_norm(k, dim=-1)
        parts = _norms(k)
        assert parts.shape == (-(-rows // 2048), heads, 1) and parts.dtype == torch.float32
        for part, x in zip(parts, want.split(2048), strict=True):
            torch.testing.assert_close(part[:, 0], x.amax(0))
        torch.testing.assert_close(_norms(parts)[0, :, 0], want.amax(0))

    def test_only_bf16_is_bounded():
        k = draw(9, 2, 32)
        assert largest_norm(k) is None and largest_norm(k.half()) is None
