"""The optimiser of `reference_model.trainer`: AdamW alone, or Muon for matrices beside AdamW for the rest."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reference_model.train_settings import TrainSettings

_LEAST = 16  # rows and columns of a matrix worth orthogonal steps


class StackedMuon(torch.optim.Muon):
    """`torch.optim.Muon` with adjust_lr_fn "match_rms_adamw", matrices of one shape (turned to be wide) in one product.

    A fifth of the operations, whose launches bind small models: 275 instead of 1,382 a step of the compact VAE.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float):
        super().__init__(params, lr, weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            buffers: list[Tensor] = []
            self._init_group(group, params, grads, buffers)
            if not params:
                continue
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, buffers, group["momentum"])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            shapes: dict[tuple[int, ...], list[int]] = defaultdict(list)
            for i, p in enumerate(params):
                shapes[tuple(sorted(p.shape))].append(i)
            for (_, longer), chosen in shapes.items():
                steps = orthogonalized(torch.stack([_wide(updates[i]) for i in chosen]), group["ns_coefficients"], group["ns_steps"])
                rate = 0.2 * longer**0.5 * group["lr"]
                targets = [_wide(params[i]) for i in chosen]
                torch._foreach_add_(targets, list(steps.to(params[0].dtype).unbind()), alpha=-rate)


def _wide(x: Tensor) -> Tensor:
    return x.T if x.shape[0] > x.shape[1] else x


def orthogonalized(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """x [n,a,b], a ≤ b → bf16, singular values of each matrix about 1: the iteration of `torch.optim.Muon` (Newton and Schulz)."""
    a, b, c = coefficients
    x = x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Optimizers:
    """Steps of AdamW; with settings.optimizer "muon" those of `torch.optim.Muon` for every weight that is a matrix.

    Muon replaces a matrix's momentum by the nearest orthogonal matrix, scaled to the size that AdamW's steps have, so one rate serves both
    (Jordan 2024; Liu et al., arXiv 2502.16982). Taps and inputs of a convolution's kernel [27,in,out] are the rows of one matrix.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], settings: TrainSettings):
        parameters = list(parameters)
        matrices = [p for p in parameters if settings.optimizer == "muon" and p.ndim > 1 and min(p.shape[-2:]) >= _LEAST]
        chosen = set(map(id, matrices))
        rest = [p for p in parameters if id(p) not in chosen]
        self.flat = [(p, p.detach().flatten(0, -2)) for p in matrices]
        self.parts: list[torch.optim.Optimizer] = []
        if rest:
            fused = rest[0].device.type == "cuda"
            self.parts.append(torch.optim.AdamW(rest, settings.lr, settings.betas, weight_decay=settings.weight_decay, fused=fused))
        if matrices:
            flat = [flat for _, flat in self.flat]
            self.parts.append(StackedMuon(flat, settings.lr, settings.weight_decay))

    def step(self, rate: float) -> None:
        """One step at this learning rate, from the gradients of the parameters."""
        for p, flat in self.flat:
            flat.grad = None if p.grad is None else p.grad.flatten(0, -2)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()

    def zero_grad(self) -> None:
        for p, _ in self.flat:
            p.grad = None
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: "PART/INDEX/KEY" → tensor."""
        return {
            f"{number}/{index}/{key}": torch.as_tensor(x)
            for number, part in enumerate(self.parts)
            for index, slots in part.state_dict()["state"].items()
            for key, x in slots.items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill in what `state` gave; ValueError where it is of other parts."""
        slots: list[dict[int, dict[str, Any]]] = [{} for _ in self.parts]
        for name, x in state.items():
            number, index, key = name.split("/")
            if int(number) >= len(self.parts):
                raise ValueError(f"the state of {len(self.parts)} optimisers is wanted, got {name}")
            slots[int(number)].setdefault(int(index), {})[key] = x
        for part, filled in zip(self.parts, slots, strict=True):
            part.load_state_dict({"state": filled, "param_groups": part.state_dict()["param_groups"]})
