"""What the op files share."""

from __future__ import annotations

from torch.library import CustomOpDef

from ..kernels.common import interpreted

__all__ = ["first_order_only", "interpreted"]


def first_order_only(op: CustomOpDef) -> None:
    """Gives a backward op a gradient that says there is none, instead of a silent zero."""

    def backward(ctx, *grads):
        raise RuntimeError(f'second-order gradients are not supported by {op._qualname}; use impl="naive"')

    op.register_autograd(backward)
