"""The processes of one training run: one alone, or those that torchrun started."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Ranks:
    """rank and size; numbers are exchanged on the CPU (gloo), gradients on the device (NCCL on GPUs)."""

    def __init__(self) -> None:
        self.rank, self.size, self.local = 0, 1, 0
        self._control: Any = None

    @classmethod
    def launched(cls) -> "Ranks":
        """Join the group of torchrun, or stay alone outside it."""
        ranks = cls()
        if dist.is_torchelastic_launched():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            ranks.rank, ranks.size, ranks.local = dist.get_rank(), dist.get_world_size(), dist.get_node_local_rank()
            ranks._control = dist.new_group(backend="gloo")
        return ranks

    def device(self, name: str | None) -> torch.device:
        """The device of this process: `name`, or the GPU of its rank, or the CPU."""
        if name is None:
            name = f"cuda:{self.local}" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    def wrap(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module with gradients averaged over the ranks."""
        if self.size == 1:
            return module
        devices = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks."""
        if self.size == 1 or not values:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._control)
        return total.tolist()

    def from_first(self, value: float) -> float:
        """The first rank's value."""
        return value if self.size == 1 else self.sum([value if self.rank == 0 else 0.0])[0]

    def names(self, values: Any) -> list[str]:
        """All keys of the ranks' mappings, sorted."""
        found: list[list[str]] = [list(values)]
        if self.size > 1:
            found = [[] for _ in range(self.size)]
            dist.all_gather_object(found, list(values), group=self._control)
        return sorted({name for names in found for name in names})

    def bar(self, total: int, initial: int = 0, unit: str = "step") -> Any:
        """A progress bar, on the first rank; none where nothing is to be done."""
        from reference_model.cli import optional_import

        return optional_import("tqdm").tqdm(total=total, initial=initial, unit=unit, disable=self.rank > 0 or not total)

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()
