"""The largest norms of the keys, of shares of the rows."""

import pytest
import torch
from utils import IMPL, draw

if IMPL == "triton":
    from ssa.kernels.common import NORM_PARTS, NORM_ROWS, cdiv, key_norms

    @pytest.mark.parametrize("rows, heads, head_dim", [(1, 1, 16), (63, 3, 24), (4097, 2, 32), (9000, 1, 128)])
    def test_norms(rows, heads, head_dim):
        k = draw(rows, heads, head_dim).bfloat16()
        want = torch.linalg.vector_norm(k.float(), dim=-1)
        norms = key_norms(k)
        assert norms.shape == (NORM_PARTS.value, heads) and norms.dtype == torch.float32
        share = cdiv(cdiv(rows, NORM_PARTS.value), NORM_ROWS) * NORM_ROWS
        for part, x in zip(norms, want.split(share), strict=False):
            torch.testing.assert_close(part, x.amax(0))
        torch.testing.assert_close(norms.amax(0), want.amax(0))

    def test_only_bf16_is_bounded():
        k = draw(9, 2, 32)
        assert key_norms(k) is None and key_norms(k.half()) is None
