"""A small training run, also as a program: `python toy_training.py OUT STEPS [seconds a step]`, alone or under torchrun."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reference_model.distributed import Ranks
from reference_model.train_settings import TrainSettings
from reference_model.trainer import Trainer

SETTINGS = TrainSettings(
    steps=20, lr=0.01, weight_decay=0.1, warmup=5, clip=0.5, ema=0.9, precision="fp32", seed=3, log_every=1, validate_every=1000,
    save_every=4,
)  # fmt: skip


@dataclass(frozen=True)
class ToyBatch:
    x: Tensor  # [n,4]

    @property
    def counts(self) -> dict[str, int]:
        return {"tokens": len(self.x), "dropped": 1}

    def to(self, device: Any, non_blocking: bool = False) -> "ToyBatch":
        return replace(self, x=self.x.to(device))


class Toy(nn.Module):
    """Two terms, both random numbers: the generator's and those of dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))

    def loss(self, batch: ToyBatch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        noise = torch.randn(batch.x.shape, generator=generator)
        y = self.net(batch.x + 0.01 * noise)[:, 0]
        fit, size = (y - batch.x.sum(1)).square().mean(), y.square().mean()
        return {"fit": fit, "size": size, "total": fit + 0.01 * size}


def toy_batch(number: int, rank: int = 0) -> ToyBatch:
    return ToyBatch(torch.randn(16, 4, generator=torch.Generator().manual_seed(1000 * rank + number)))


def toy_batches(start: int, rank: int = 0, pause: float = 0.0) -> Iterator[ToyBatch]:
    number = start
    while True:
        time.sleep(pause)
        yield toy_batch(number, rank)
        number += 1


def main(out: Path, steps: int, pause: float) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.launched()
    model, settings = Toy(), replace(SETTINGS, steps=steps)
    held_out = [toy_batch(-1 - i) for i in range(3)]
    batches = partial(toy_batches, rank=ranks.rank, pause=pause)
    Trainer(model, batches, settings, out, validation=held_out, card={"config": "toy", "data_hash": "0"}, ranks=ranks).run()
    torch.save(model.state_dict(), out / f"rank{ranks.rank}.pt")
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)
