"""The convolution of `sparse_conv` through spconv (wheels spconv-cuNNN; on the CPU with its Native algorithm).

spconv has no bfloat16: it runs in float32 whatever the dtype of x. float16 would need its own loss scale, because the gradient of a mean
over millions of voxels lies below its smallest number.
"""

from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from reference_model.vae_grid import Level


def load() -> ModuleType:
    """spconv.pytorch; ImportError where it is missing or is the plain CPU wheel, whose threaded results are wrong (spconv issue 679)."""
    hint = 'pip install "spatial-sparse-attention[spconv]"'
    try:
        metadata.version("spconv")
    except metadata.PackageNotFoundError:
        pass
    else:
        raise ImportError(f"the CPU wheel of spconv gives wrong rows with several threads: pip uninstall spconv; {hint}")
    try:
        import spconv.pytorch as library
    except ImportError as error:
        raise ImportError(f"the backend spconv is not installed: {hint}") from error
    return library


def submanifold_conv3d(x: Tensor, kernel: Tensor, bias: Tensor, level: Level) -> Tensor:
    """x [n,in], kernel [27,in,out], bias [out] → [n,out] in x's dtype; gradients of x, kernel and bias. The level keeps spconv's pairs."""
    library = load()
    channels_in, channels_out = kernel.shape[1:]
    with torch.autocast(x.device.type, enabled=False):
        conv = _convolution(library, channels_in, channels_out, x.is_cuda)
        coords = level.coords
        pairs: Any = level.cache.setdefault("spconv", {})
        if "shape" not in pairs:
            pairs["shape"] = (coords.amax(0) + 1).tolist()
            pairs["indices"] = {}
        batch, *shape = pairs["shape"]
        tensor = library.SparseConvTensor(x.float(), coords, shape, batch, indice_dict=pairs["indices"])
        weight = kernel.float().view(3, 3, 3, channels_in, channels_out).permute(4, 2, 1, 0, 3).contiguous()  # [out, x, y, z, in]
        out = torch.func.functional_call(conv, {"weight": weight, "bias": bias.float()}, (tensor,))
        return out.features.to(x.dtype)


def _convolution(library: ModuleType, channels_in: int, channels_out: int, cuda: bool) -> torch.nn.Module:
    algo = library.ConvAlgo.MaskImplicitGemm if cuda else library.ConvAlgo.Native
    with torch.device("meta"):
        return library.SubMConv3d(channels_in, channels_out, 3, bias=True, indice_key="level", algo=algo)
