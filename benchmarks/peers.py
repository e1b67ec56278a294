"""Dense attention to compare with: FlashAttention-2, cuDNN and flex_attention, each with as many key/value heads as query heads."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable

import torch
import torch._dynamo
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def describe() -> dict[str, str]:
    """What each peer's name in the tables stands for here."""
    fa2 = f"flash-attn {importlib.metadata.version('flash-attn')}" if _has_flash_attn() else "PyTorch SDPA, flash backend"
    return {"fa2": fa2, "cudnn": "PyTorch SDPA, cuDNN backend", "flex": "compiled flex_attention, dense (no mask, no score_mod)"}


def layout(impl: str) -> str:
    """Axes of a peer's q, k, v and o: "bthd" for the flash-attn package, else "bhtd"."""
    return "bthd" if impl == "fa2" and _has_flash_attn() else "bhtd"


def dense_attention(impl: str) -> Attention:
    """`impl` in fa2, cudnn, flex → a function of q, k, v in its `layout`. It raises where the peer cannot run."""
    if impl == "fa2" and _has_flash_attn():
        from flash_attn import flash_attn_func

        return flash_attn_func
    if impl in ("fa2", "cudnn"):
        return _sdpa(SDPBackend.FLASH_ATTENTION if impl == "fa2" else SDPBackend.CUDNN_ATTENTION)
    if impl == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        torch._functorch.config.donated_buffer = False  # a compiled backward may not reuse what retain_graph=True keeps
        torch._dynamo.reset()  # one compilation a shape, else the limit on recompilations falls back to eager [T, T] scores
        return torch.compile(flex_attention, dynamic=False, fullgraph=True)
    raise ValueError(f"the peer must be fa2, cudnn or flex: {impl=}")


def _sdpa(backend: SDPBackend) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attention


def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None
