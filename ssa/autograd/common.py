"""What the op files share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..kernels.common import interpreted
from ..kernels.replay import replayed

__all__ = ["Operator", "first_order_only", "interpreted", "operator"]

_LIBRARY = torch.library.Library("ssa", "FRAGMENT")  # registrations live as long as it does


class Operator:
    """`torch.library.custom_op` without what small inputs feel: it looks for aliases among the outputs of every call.

    Its gradient reads the whole schema, argument by argument, in every call: 0.1 ms for 17 of them. So that is our own too.
    The function gets its tensors contiguous; on few rows its launches are replayed.
    """

    def __init__(self, name: str, function: Callable):
        self.name = f"ssa::{name}"
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, replayed(function), "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.ssa, name).default

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    def register_fake(self, function: Callable) -> Callable:
        torch.library.register_fake(self.name, function, lib=_LIBRARY)
        return function

    def register_autograd(self, backward: Callable, setup_context: Callable | None = None) -> None:
        """As `torch.library.register_autograd`."""
        overload = self.overload

        def forward(ctx, *args):
            with torch._C._AutoDispatchBelowAutograd():
                output = overload(*args)
            if setup_context is not None:
                setup_context(ctx, args, output)
            return output

        function: Any = type(self.name, (torch.autograd.Function,), dict(forward=staticmethod(forward), backward=staticmethod(backward)))

        def autograd(*args):
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
                return function.apply(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*args)

        _LIBRARY.impl(self.name, autograd, "Autograd")


def operator(name: str) -> Callable[[Callable], Operator]:
    """Decorator: registers a function of tensors and numbers, none of which it writes or returns, as `torch.ops.ssa.<name>`."""
    return lambda function: Operator(name, function)


def first_order_only(op: Operator) -> None:
    """Gives a backward op a gradient that says there is none, instead of a silent zero."""

    def backward(ctx, *grads):
        raise RuntimeError(f'second-order gradients are not supported by {op.name}; use impl="naive"')

    op.register_autograd(backward)
